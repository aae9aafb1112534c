"""What `Plume.encode` costs over the bare forward pass: checking, loading, packing, tokenising, batching."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from plume import Plume


def encode_overhead(
    plume: Plume, inputs: Sequence[Any], *, batch_size: int = 32, num_runs: int = 9, num_warm_up: int = 2
) -> dict[str, float]:
    """Time of `encode`, of the model's passes alone on tensors prepared before, and of preparing them alone.

    The passes are those that `encode` makes: by the engine, if the embedder has one.

    The three take turns, so that a noisy machine disturbs them alike.

    Args:
        plume: the embedder.
        inputs: a whole number of batches, media already decoded.
        batch_size: inputs per pass.
        num_runs: timed runs of each.
        num_warm_up: runs of each before.

    Returns:
        Medians in milliseconds per batch, `encode_ms`, `forward_ms` and `prepare_ms`; `overhead`, the part of `encode`
        beyond the forward passes, as a share of these.
    """
    model = plume.plume_model
    processor = model.processor
    assert processor is not None
    items = [processor.parse(raw) for raw in inputs]
    cuts = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    batches = [dict(processor.encode(cut).to(model.device)) for cut in cuts]
    engine = plume.engine

    def forward() -> None:
        with torch.inference_mode():
            for batch in batches:
                output = model(**batch) if engine is None else engine(batch)
                assert output.embedding is not None
                output.embedding.cpu()

    def encode() -> None:
        plume.encode(inputs, batch_size=batch_size, show_progress_bar=False)

    def prepare() -> None:
        for start in range(0, len(inputs), batch_size):
            processor.encode([processor.parse(raw) for raw in inputs[start : start + batch_size]])

    actions: dict[str, Callable[[], None]] = {"encode_ms": encode, "forward_ms": forward, "prepare_ms": prepare}
    times: dict[str, list[float]] = {name: [] for name in actions}
    for run in range(num_warm_up + num_runs):
        for name, action in actions.items():
            begin = time.perf_counter()
            action()
            if run >= num_warm_up:
                times[name].append(1000 * (time.perf_counter() - begin) / len(batches))
    result = {name: statistics.median(values) for name, values in times.items()}
    return {**result, "overhead": result["encode_ms"] / result["forward_ms"] - 1}

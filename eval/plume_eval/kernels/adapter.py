"""The most that fused kernels of the transition adapter could win in training: its share of a training step.

A step here is forward and backward of a batch of one side, without the optimiser; the adapter's part is K forwards and
backwards of it alone, on states of the same shape.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from plume.model.model import PlumeModel
from plume_eval.speed.cases import make_items
from plume_eval.speed.config import InputSize


def adapter_shares(
    model: PlumeModel, sizes: dict[str, InputSize], batch_sizes: Sequence[int], *, num_steps: int = 8, num_runs: int = 7
) -> list[dict[str, Any]]:
    """Milliseconds of a training step and of the adapter within it, medians.

    Args:
        model: on its device.
        sizes: of the inputs.
        batch_sizes: inputs per step.
        num_steps: K.
        num_runs: timed, in turns.
    """
    assert model.processor is not None
    rows = []
    for name, size in sizes.items():
        for count in batch_sizes:
            batch = model.processor.encode(make_items(model.processor, size, count)).to(model.device)
            state = torch.randn(count, model.config.hidden_size, device=model.device, dtype=model.dtype)

            def whole(batch: Any = batch) -> None:
                embedding = model(**batch, num_latent_steps=num_steps).embedding
                assert embedding is not None
                embedding[:, 0].sum().backward()

            def adapter(state: torch.Tensor = state) -> None:
                own = state.clone().requires_grad_()
                following = own
                for step in range(num_steps):
                    following, _ = model.transition(following, step, own)
                following[:, 0].sum().backward()

            times: dict[str, list[float]] = {"step": [], "adapter": []}
            for run in range(num_runs + 1):
                for part, work in (("step", whole), ("adapter", adapter)):
                    taken = _ms(work, model.device)
                    if run:
                        times[part].append(taken)
            step_ms, adapter_ms = (statistics.median(times[part]) for part in ("step", "adapter"))
            rows.append(
                {
                    "input": name,
                    "num_tokens": int(batch["attention_mask"][0].sum()),
                    "batch_size": count,
                    "step_ms": step_ms,
                    "adapter_ms": adapter_ms,
                    "share": adapter_ms / step_ms,
                }
            )
    return rows


def _ms(work: Callable[[], None], device: torch.device) -> float:
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - begin)

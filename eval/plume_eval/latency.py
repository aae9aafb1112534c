"""Wall time of embedding prepared tensors, one mode beside another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from plume.inputs.item import Item
from plume.model.model import PlumeModel
from plume_eval.baselines import Mode, embed_batch


def latency_ms(
    model: PlumeModel,
    items: Sequence[Item],
    mode: Mode,
    *,
    num_latent_steps: int | None = None,
    max_new_tokens: int = 512,
    num_runs: int = 15,
    num_warm_up: int = 3,
) -> float:
    """Median wall time of one query in milliseconds, in a batch of `len(items)`.

    From tensors to embeddings: the prefix pass with its vision tower, the reasoning, the read-out. Loading and
    preparing images is left out, since it is the same for every mode.

    Args:
        model: a checkpoint in eval mode.
        items: the batch.
        mode: how to reason.
        num_latent_steps: as in `embed_batch`.
        max_new_tokens: as in `embed_batch`.
        num_runs: timed runs.
        num_warm_up: runs before.
    """
    assert model.processor is not None
    batch = dict(model.processor.encode(items).to(model.device))
    times = []
    for run in range(num_warm_up + num_runs):
        _synchronise(model)
        begin = time.perf_counter()
        embed_batch(model, batch, mode, num_latent_steps=num_latent_steps, max_new_tokens=max_new_tokens)
        _synchronise(model)
        if run >= num_warm_up:
            times.append(1000 * (time.perf_counter() - begin) / len(items))
    return statistics.median(times)


def _synchronise(model: PlumeModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)

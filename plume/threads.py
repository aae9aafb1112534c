"""What a CPU is good for: how many threads, and how long an input will take."""

from __future__ import annotations

import os
import time
from typing import Any

import psutil
import torch


def num_physical_cores() -> int:
    """Physical cores that this process may use: two threads of one core only get in each other's way."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical, logical = psutil.cpu_count(logical=False), psutil.cpu_count()
    if not physical or not logical:
        return allowed
    return max(1, min(allowed, round(allowed * physical / logical)))


def use_physical_cores() -> None:
    """As many threads as physical cores, for a whole program; `OMP_NUM_THREADS` has its way where it is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_physical_cores())


#: An image of 300 visual tokens, the input that times are told for; the tower sees four patches for each of them.
_NUM_TOKENS = 300
_SLOW_S = 10.0
#: Models whose products are fewer are fast anywhere, and nothing is measured.
_FEW_PRODUCTS = 5e10


def slow_on_cpu(model: Any) -> str | None:
    """What to tell somebody who loads a model that this CPU is slow with; None where it is not.

    Args:
        model: a `PlumeModel`.
    """
    text = sum(weight.numel() for weight in model.backbone.language_model.layers.parameters())
    vision = sum(weight.numel() for weight in model.backbone.visual.blocks.parameters())
    num_products = 2 * _NUM_TOKENS * (text + 4 * vision)
    if num_products < _FEW_PRODUCTS:
        return None
    seconds = num_products / products_per_second(model.dtype)
    if seconds < _SLOW_S:
        return None
    remedy = "a GPU, int8=True or a smaller model is faster"
    if model.dtype != torch.float32 and seconds > 2 * (exact := num_products / products_per_second(torch.float32)):
        name = str(model.dtype).removeprefix("torch.")
        remedy = f"this CPU has no fast products of {name}, and float32 takes about {exact:.0f} s: leave dtype out"
    return (
        f"an image of {_NUM_TOKENS} tokens takes about {seconds:.0f} s on this CPU (estimated from a product); {remedy}"
    )


def products_per_second(dtype: torch.dtype) -> float:
    """Multiplications and additions per second of matrices `[64, 1024]` and `[1024, 1024]`, measured at once."""
    x, weight = torch.ones(64, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    torch.nn.functional.linear(x, weight)
    start = time.perf_counter()
    for _ in range(3):
        torch.nn.functional.linear(x, weight)
    return 3 * 2 * 64 * 1024 * 1024 / (time.perf_counter() - start)

"""Triton kernels of one latent step.

Five launches per layer and three per transition adapter:

    qkv        sum of the residual stream, RMSNorm, queries, keys and values, rotation, write to the cache
    attention  decode attention, split over the cache
    out        sum of the splits, output projection, residual
    gate_up    RMSNorm, gate and up projections, SwiGLU
    down       down projection in fixed segments, residual

    experts_first    final RMSNorm, LayerNorm, router, top T; in a second launch the first layers
    experts_second   second layers, gates and residual
    final_norm       final RMSNorm, where no latent step follows

What each computes is defined by the function of the same name in `plume/engine/fused/reference.py`, against which it is
tested; the launch plan and its figures are in `kernels/README.md`. Importing the package imports no Triton; its modules
do.

Letters: B batch, n new tokens of a row, M = B n rows (row b n + i is token i of batch row b), D hidden size, H query
heads, G key/value heads, C channels per head, I inner size, P terms of the residual stream, Z splits of the cache,
L slots of the cache.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

#: Where each kernel is.
MODULES = {
    "qkv": "qkv",
    "attention": "attention",
    "out": "out",
    "gate_up": "gate_up",
    "down": "down",
    "experts_first": "experts",
    "experts_second": "experts",
    "final_norm": "norm",
}


def kernel(name: str) -> Callable[..., Any]:
    """The kernel that computes an op.

    Raises:
        ModuleNotFoundError: there is no Triton.
    """
    return getattr(importlib.import_module(f"plume_kernels.{MODULES[name]}"), name)

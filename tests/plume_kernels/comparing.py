"""Kernels whose outputs are NaN before they run, held against their definitions in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import plume_kernels
from plume.engine.fused import reference
from plume_eval.kernels.cases import as_double
from plume_eval.kernels.comparing import clone, errors, outcome


def kernel(name: str) -> Callable[..., Any]:
    """A kernel whose outputs are NaN before it runs."""
    own = plume_kernels.kernel(name)

    def run(*args: Any) -> Any:
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills memory that is allocated with NaN
        try:
            return own(*args)
        finally:
            torch.use_deterministic_algorithms(False)

    return run


def compare(name: str, args: tuple, *, tolerance: float = 1e-5, kept_rows: Tensor | None = None) -> None:
    """Hold a kernel against its definition: what it returns, and what it writes.

    Args:
        name: of the kernel.
        args: as it is called.
        tolerance: of the norm.
        kept_rows: rows that are compared, of queries and of attention; None: all.
    """
    exact, own = as_double(clone(args)), clone(args)
    expected = outcome(name, getattr(reference, name)(*exact), exact)
    found = outcome(name, kernel(name)(*own), own)
    if kept_rows is not None:
        for part, along in (("queries", 0), ("outputs", 1), ("lse", 1)):
            for one in (found, expected):
                if part in one:
                    one[part] = one[part].index_select(along, kept_rows.nonzero()[:, 0])
    for part, error in errors(name, found, expected).items():
        assert error <= tolerance, (name, part)


def tensors(result: Any) -> list[Tensor]:
    """What an op returned."""
    return [result] if isinstance(result, Tensor) else list(result)

"""How results of kernels are compared with their definitions."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plume import definitions
from plume_kernels.cases import as_double

MODULES = {"final_norm": "norm", "experts_first": "experts", "experts_second": "experts"}
WRITTEN = {"qkv": [9], "experts_first": [3]}


def kernel(name: str) -> Callable[..., Any]:
    """A kernel whose outputs are NaN before it runs."""
    own = getattr(importlib.import_module(f"plume_kernels.{MODULES.get(name, name)}"), name)

    def run(*args: Any) -> Any:
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills memory that is allocated with NaN
        try:
            return own(*args)
        finally:
            torch.use_deterministic_algorithms(False)

    return run


def compare(name: str, args: tuple, *, tolerance: float = 1e-5, ignored_rows: Tensor | None = None) -> None:
    """Hold a kernel against its definition in float64: what it returns, and what it writes."""
    exact, own = as_double(clone(args)), clone(args)
    expected = tensors(getattr(definitions, name)(*exact))
    found = tensors(kernel(name)(*own))
    if name == "experts_first":  # undefined where an expert has no weight
        is_used = expected[1].T[..., None] > 0
        assert torch.equal(found[1] > 0, expected[1] > 0)
        found[2], expected[2] = found[2].where(is_used, 0), expected[2].where(is_used, 0)
    if name == "attention":
        is_empty = expected[1] == -torch.inf
        assert torch.equal(found[1] == -torch.inf, is_empty)
        found[0], expected[0] = (one[0].masked_fill(is_empty[..., None], 0) for one in (found, expected))
    for place in WRITTEN.get(name, []):
        found.append(own[place])
        expected.append(exact[place])
    if name == "qkv":  # the last slot is scratch
        found[-1], expected[-1] = found[-1][..., :-1, :], expected[-1][..., :-1, :]
    for one, other in zip(found, expected, strict=True):
        if ignored_rows is not None and one.ndim in (3, 4):
            along = 0 if name == "qkv" else 1
            one, other = (it.index_select(along, (~ignored_rows).nonzero()[:, 0]) for it in (one, other))
        assert error(one, other) <= tolerance, name


def clone(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of their own memory."""
    return tuple(one.clone() if isinstance(one, Tensor) else one for one in args)


def tensors(result: Any) -> list[Tensor]:
    """What an op returned."""
    return [result] if isinstance(result, Tensor) else list(result)


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; infinite where something is not a number.

    What is expected not to be one, unfilled slots of a cache, must not be one here either.
    """
    assert found.shape == expected.shape, f"expected {tuple(expected.shape)}, received {tuple(found.shape)}"
    found, expected = found.double(), expected.double()
    is_same = (found == expected) | (found.isnan() & expected.isnan())  # infinities too
    difference = (found - expected).masked_fill(is_same, 0)
    if not difference.isfinite().all():
        return torch.inf
    scale = expected.masked_fill(~expected.isfinite(), 0).norm()
    return (difference.norm() / scale.clamp(min=1e-30)).item()

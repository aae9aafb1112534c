"""How results of a kernel are compared with those of its definition: by the norm of what is defined.

Some of it is not: the last slot of a cache is scratch, a split without slots has no output, an expert that a row has
not chosen no inner activation. And where two experts are nearly equal, rounding decides which of them a row keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Least distance of kept and dropped gates at which which experts are kept is compared.
CLEAR_MARGIN = 0.02


def clone(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of their own memory."""
    return tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)


def outcome(name: str, result: Any, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """What a kernel returned, and what it wrote."""
    if name == "qkv":
        return {"queries": result, "kv": args[9][..., :-1, :]}
    if name == "attention":
        return {"outputs": result[0], "lse": result[1]}
    if name == "experts_first":
        return {"gates": result[0], "weights": result[1], "inner": result[2], "state": args[3]}
    return {"result": result}


def errors(name: str, found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Errors of all that is defined, as shares of the norm.

    Args:
        name: of the kernel.
        found: its outcome.
        exact: the outcome of its definition, in float64.
    """
    found, exact = dict(found), dict(exact)
    if name == "attention":
        is_empty = (exact["lse"] == -torch.inf)[..., None]
        found["outputs"], exact["outputs"] = (results["outputs"].masked_fill(is_empty, 0) for results in (found, exact))
    if name == "experts_first":
        weights = exact["weights"][:, -exact["gates"].shape[1] :]  # of routed experts
        dropped = exact["gates"].masked_fill(weights > 0, -1).amax(dim=1)
        is_clear = weights.masked_fill(weights == 0, 2).amin(dim=1) - dropped >= CLEAR_MARGIN  # [B]
        is_used = (exact["weights"].T > 0) & is_clear  # [X, B]
        for results in (found, exact):
            results["weights"] = results["weights"].where(is_clear[:, None], 0)
            results["inner"] = results["inner"].where(is_used[..., None], 0)
    return {part: error(found[part], exact[part]) for part in exact}


def error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; infinite where something is not a number.

    What is expected not to be one, unfilled slots of a cache, must not be one here either.
    """
    assert found.shape == exact.shape, f"expected {tuple(exact.shape)}, received {tuple(found.shape)}"
    found, exact = found.double(), exact.double()
    is_same = (found == exact) | (found.isnan() & exact.isnan())  # infinities too
    difference = torch.where(is_same, 0, found - exact)
    if not difference.isfinite().all():
        return torch.inf
    scale = torch.where(exact.isfinite(), exact, 0).norm()
    return (difference.norm() / scale.clamp(min=1e-30)).item()

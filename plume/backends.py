"""Which backend the engine runs on: what was asked for, or the next simpler one that is possible, and why."""

from __future__ import annotations

from typing import Literal

from plume import graphs
from plume.experts import ExpertsTogether
from plume.parts import TextParts, UnsupportedModelError
from plume.projection import Projection
from plume.stack import TextStack
from plume.transition import Adapter

Backend = Literal["auto", "eager", "graph", "triton"]


def choose(
    asked: Backend, parts: TextParts, projection: type[Projection], adapter: Adapter, *, dependent_launch: bool = False
) -> tuple[Backend, TextStack, str | None]:
    """Choose a backend.

    Args:
        asked: for; "auto" is "graph" where that is possible.
        parts: of the text model.
        projection: how products are computed where no kernels are.
        adapter: as the engine has it.
        dependent_launch: see `plume.fused.FusedStack`.

    Returns:
        "eager", "graph" or "triton"; the text stack for it; and a warning if something else was asked for.
    """
    reason = graphs.why_not(parts.norm.weight.device)
    simpler: Backend = "eager" if asked == "eager" or reason else "graph"
    if asked == "triton":
        from plume.fused import FusedStack, why_not_experts  # loads Triton

        try:
            stack = FusedStack(parts, dependent_launch=dependent_launch)
        except UnsupportedModelError as error:
            return simpler, TextStack(parts, projection), f'backend="triton" falls back to "{simpler}": {error}'
        left_out = why_not_experts(adapter) if isinstance(adapter, ExpertsTogether) else None
        return asked, stack, left_out and f"the transition adapter runs without kernels: {left_out}"
    warning = f'backend="graph" falls back to "eager": {reason}' if asked == "graph" and reason else None
    return simpler, TextStack(parts, projection), warning

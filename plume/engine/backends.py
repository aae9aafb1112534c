"""Which backend the engine runs on: the one that was requested, or the next simpler one that is possible, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from plume.engine import graphs
from plume.engine.layers.text import JoinedExperts, JoinedLinear, TextLayers, join_experts
from plume.engine.layers.weights import TextWeights, UnsupportedModelError
from plume.model.interface import Adapter
from plume.model.transition import TransitionAdapter

Backend = Literal["auto", "eager", "graph", "triton"]


@dataclass(frozen=True)
class Choice:
    """What runs the latent steps.

    name: "eager", "graph" or "triton". layers, adapter: as they run there.
    warning: where something else was requested; else None.
    """

    name: Backend
    layers: TextLayers
    adapter: Adapter
    warning: str | None = None


def choose_backend(
    requested: Backend,
    weights: TextWeights,
    adapter: TransitionAdapter,
    *,
    linear: type[JoinedLinear] = JoinedLinear,
    dependent_launch: bool = False,
) -> Choice:
    """Choose a backend for a model where it is.

    Args:
        requested: "auto" is "triton" where kernels have been measured: in bfloat16, on devices with a table of tiles.
            Elsewhere it is "graph" where that is possible, and else "eager".
        weights: of the text model.
        adapter: the model's.
        linear: how products are computed where no kernels are.
        dependent_launch: see `plume.engine.fused.decoder.FusedTextLayers`.
    """
    no_graphs = graphs.unsupported_reason(weights.norm.weight.device)
    warning = f'backend="graph" falls back to "eager": {no_graphs}' if requested == "graph" and no_graphs else None
    simpler: Backend = "eager" if requested == "eager" or no_graphs else "graph"
    plain = Choice(simpler, TextLayers(weights, linear), join_experts(adapter), warning)
    if requested == "auto" and simpler == "graph" and _is_measured(weights):
        return replace(_with_kernels(plain, weights), warning=None)
    return _with_kernels(plain, weights, dependent_launch=dependent_launch) if requested == "triton" else plain


def _is_measured(weights: TextWeights) -> bool:
    """Whether kernels have been measured where a model is, and in its dtype."""
    weight = weights.norm.weight
    if weight.dtype != torch.bfloat16:
        return False
    from plume.engine.fused.ops import is_tuned  # loads Triton

    return is_tuned(weight)


def _with_kernels(plain: Choice, weights: TextWeights, *, dependent_launch: bool = False) -> Choice:
    """The same with kernels, or with a warning that says why not."""
    from plume.engine.fused.decoder import FusedExperts, FusedTextLayers  # loads Triton
    from plume.engine.fused.support import unsupported_experts_reason

    try:
        layers = FusedTextLayers(weights, dependent_launch=dependent_launch)
    except UnsupportedModelError as error:
        return replace(plain, warning=f'backend="triton" falls back to "{plain.name}": {error}')
    experts = plain.adapter
    if not isinstance(experts, JoinedExperts):
        return Choice("triton", layers, experts)
    if reason := unsupported_experts_reason(experts):
        return Choice("triton", layers, experts, f"the transition adapter runs without kernels: {reason}")
    return Choice("triton", layers, FusedExperts(experts, layers))

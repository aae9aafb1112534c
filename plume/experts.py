"""The mixture of experts as the engine runs it: all experts in two products instead of two each.

`plume.transition.MixtureOfExperts` is the definition; routing and norm are its own. Every expert runs on every row
there too, so what changes is how often kernels are launched.

Letters: B batch, D hidden size, M experts, the shared one first, I their inner size.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from plume.projection import Projection
from plume.transition import MixtureOfExperts, TransitionAdapter, weigh


def weights_of_all(weights: Tensor, has_shared: bool) -> Tensor:
    """Weights `[B, M]` of all experts, from those of the routed ones."""
    return F.pad(weights, (1, 0), value=1.0) if has_shared else weights


def first_layers(normed: Tensor, weight: Tensor, bias: Tensor, num_experts: int) -> Tensor:
    """First layers and GELU of all experts over `normed [B, D]`: `[M, B, I]`; weight `[M I, D]`, bias `[M I]`."""
    return rearrange(F.gelu(F.linear(normed, weight, bias)), "b (m i) -> m b i", m=num_experts)


def second_layers(state: Tensor, inner: Tensor, weights: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The state and what the experts add, `[B, D]`: inner `[M, B, I]`, weights `[B, M]`, weight `[M D, I]`, bias."""
    num_experts = len(inner)
    second = rearrange(weight, "(m d) i -> m i d", m=num_experts)
    outputs = torch.baddbmm(rearrange(bias, "(m d) -> m 1 d", m=num_experts), inner, second)  # [M, B, D]
    weights = weights.to(state.dtype)[:, None]
    return torch.baddbmm(state[:, None], weights, rearrange(outputs, "m b d -> b m d"))[:, 0]


def bias_of(projection: Projection) -> Tensor:
    """The bias of layers that have one."""
    assert projection.bias is not None
    return projection.bias


class ExpertsTogether:
    """A mixture of experts with the weights of all experts below each other; they stay shared with it."""

    def __init__(self, own: MixtureOfExperts):
        self.own = own
        experts = self._experts()
        self.first, self.second = Projection([one.fc1 for one in experts]), Projection([one.fc2 for one in experts])

    def _experts(self) -> list:
        shared = self.own.shared_expert
        return [*self.own.experts] if shared is None else [shared, *self.own.experts]

    def __call__(self, state: Tensor, step: int, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `TransitionAdapter.forward`."""
        own = self.own
        gates = own.route(state, step, context)
        weights = weights_of_all(weigh(gates, own.top_k), own.shared_expert is not None)
        inner = first_layers(own.ln(state), self.first.weight, bias_of(self.first), weights.shape[1])
        return second_layers(state, inner, weights, self.second.weight, bias_of(self.second)), gates


def together(adapter: TransitionAdapter) -> TransitionAdapter | ExpertsTogether:
    """The adapter in the form that the engine runs."""
    return ExpertsTogether(adapter) if type(adapter) is MixtureOfExperts else adapter

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

from plume.projection import Projection, made_of
from plume.transition import MixtureOfExperts, TransitionAdapter


class ExpertsTogether:
    """A mixture of experts with the weights of all experts below each other; they stay shared with it."""

    def __init__(self, own: MixtureOfExperts):
        self.own = own
        experts = self._experts()
        self.first, self.second = Projection([one.fc1 for one in experts]), Projection([one.fc2 for one in experts])
        self._made_of = self._parts()

    def _experts(self) -> list:
        shared = self.own.shared_expert
        return [*self.own.experts] if shared is None else [shared, *self.own.experts]

    def _parts(self) -> tuple:
        linear = [layer for one in self._experts() for layer in (one.fc1, one.fc2)]
        return made_of([*linear, self.own.router, self.own.ln, self.own.step_embed])

    def is_current(self) -> bool:
        """Whether the adapter still consists of what this was made of."""
        return self._parts() == self._made_of

    def __call__(self, state: Tensor, step: int, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `TransitionAdapter.forward`."""
        own, num_experts = self.own, len(self._experts())
        gates = own.route(state, step, context)
        weights = own.weigh(gates).to(state.dtype)  # [B, E]
        if own.shared_expert is not None:
            weights = F.pad(weights, (1, 0), value=1.0)  # [B, M]
        inner = rearrange(F.gelu(self.first(own.ln(state))), "b (m i) -> m b i", m=num_experts)
        second = rearrange(self.second.weight, "(m d) i -> m i d", m=num_experts)
        bias = rearrange(self._bias, "(m d) -> m 1 d", m=num_experts)
        outputs = torch.baddbmm(bias, inner, second)  # [M, B, D]
        return torch.baddbmm(state[:, None], weights[:, None], rearrange(outputs, "m b d -> b m d"))[:, 0], gates

    @property
    def _bias(self) -> Tensor:
        assert self.second.bias is not None
        return self.second.bias


def together(adapter: TransitionAdapter) -> TransitionAdapter | ExpertsTogether:
    """The adapter in the form that the engine runs."""
    return ExpertsTogether(adapter) if type(adapter) is MixtureOfExperts else adapter

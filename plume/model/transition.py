"""Transition adapters: from the hidden state of one latent step to the input of the next.

A transition adapter is any module `(state, step, context) -> (next_input, gates)`. PLUME's (arXiv 2604.02073,
section 3, equations 3 to 5) is a mixture of experts that a semantic anchor steers:

    gates      = softmax(W [state + context ; step_embedding] + b)            eq. 4, all E experts, float32
    next_input = state + E_0(norm(state)) + sum of gates_m E_m(norm(state))   eq. 5, over the top T experts

The gates of the kept experts are not renormalised, and the context enters the router only. The others are the
identity of Coconut (arXiv 2412.06769), the projector of CODI, and the paper's ablation with one MLP.

Letters: B batch, D hidden size, E routed experts, T kept experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plume.config import PlumeConfig
from plume.model.interface import Adapter, at_least_float32, normalize


class TransitionAdapter(nn.Module):
    """Base of all adapters: maps a state to the next input embedding."""

    def forward(self, state: Tensor, step: int, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Compute the next input.

        Args:
            state: the hidden state after the final norm, `[B, D]`.
            step: the latent step, counted from 0.
            context: what steers the router, `[B, D]`, or None.

        Returns:
            The next input embedding `[B, D]`, and the gates `[B, E]` of a router or None.
        """
        raise NotImplementedError


class Identity(TransitionAdapter):
    """The state is the next input (Coconut)."""

    def forward(self, state: Tensor, step: int, context: Tensor | None) -> tuple[Tensor, None]:
        return state, None


class Projector(TransitionAdapter):
    """Dropout, two layers, LayerNorm, no residual (CODI)."""

    def __init__(self, config: PlumeConfig):
        super().__init__()
        width = config.hidden_size
        inner = config.expert_hidden_size or 2 * width
        self.net = nn.Sequential(
            nn.Dropout(config.expert_dropout),
            nn.Linear(width, inner),
            nn.GELU(),
            nn.Linear(inner, width),
            nn.LayerNorm(width),
        )

    def forward(self, state: Tensor, step: int, context: Tensor | None) -> tuple[Tensor, None]:
        return self.net(state), None


class Expert(nn.Module):
    """A two-layer MLP, `[B, D] -> [B, D]`."""

    def __init__(self, config: PlumeConfig):
        super().__init__()
        inner = config.expert_hidden_size or 2 * config.hidden_size
        self.fc1 = nn.Linear(config.hidden_size, inner)
        self.fc2 = nn.Linear(inner, config.hidden_size)
        self.dropout = nn.Dropout(config.expert_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(F.gelu(self.fc1(x))))


class ResidualMLP(TransitionAdapter):
    """The paper's ablation "single MLP": one expert, no router."""

    def __init__(self, config: PlumeConfig):
        super().__init__()
        self.ln = nn.LayerNorm(config.hidden_size)
        self.expert = Expert(config)

    def forward(self, state: Tensor, step: int, context: Tensor | None) -> tuple[Tensor, None]:
        return state + self.expert(self.ln(state)), None


def route(state: Tensor, context: Tensor | None, step_embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Gates of all experts `[B, E]`, summing to 1: equation 4, in float32 whatever the model's dtype."""
    return _router_logits(_router_features(state, context, step_embedding), weight, bias).softmax(dim=-1)


def _router_features(state: Tensor, context: Tensor | None, step_embedding: Tensor) -> Tensor:
    if context is not None:
        state = state + context
    return torch.cat([state, step_embedding.expand_as(state)], dim=-1)  # [B, 2D]


def _router_logits(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast(features.device.type, enabled=False):
        return F.linear(*map(at_least_float32, (features, weight, bias)))


class Router(nn.Linear):
    """Logits of the experts in float32; a module that is called, so that offloading and quantisation may replace it."""

    def forward(self, input: Tensor) -> Tensor:
        return _router_logits(input, self.weight, self.bias)


def weigh(gates: Tensor, top_k: int) -> Tensor:
    """Weights of the experts `[B, E]`: the gates of the top T as they are, zero elsewhere."""
    kept, chosen = gates.topk(top_k, dim=-1)  # [B, T]
    return torch.zeros_like(gates).scatter(-1, chosen, kept)


class MixtureOfExperts(TransitionAdapter):
    """PLUME's adapter. Parameter names and shapes are those of the published checkpoints."""

    def __init__(self, config: PlumeConfig):
        super().__init__()
        width = config.hidden_size
        self.top_k, self.sees_step = config.top_k, config.step_embedding
        self.ln = nn.LayerNorm(width)
        self.step_embed = nn.Embedding(config.num_step_embeddings, width)
        self.router = Router(2 * width, config.num_experts)
        self.experts = nn.ModuleList([Expert(config) for _ in range(config.num_experts)])
        self.shared_expert = Expert(config) if config.shared_expert else None

    def route(self, state: Tensor, step: int, context: Tensor | None) -> Tensor:
        """Gates of all experts, `[B, E]`."""
        step_embedding = self.step_embed(torch.full((), step, device=state.device))
        if not self.sees_step:  # its table is zero, and stays so
            step_embedding = 0 * step_embedding
        return at_least_float32(self.router(_router_features(state, context, step_embedding))).softmax(dim=-1)

    def forward(self, state: Tensor, step: int, context: Tensor | None) -> tuple[Tensor, Tensor]:
        gates = self.route(state, step, context)  # [B, E]
        weights = weigh(gates, self.top_k).to(state.dtype)
        normed = self.ln(state)
        next_input = state
        if self.shared_expert is not None:
            next_input = next_input + self.shared_expert(normed)
        # Every expert runs on every row, which costs less than asking the device which rows chose which expert.
        for expert, weight in zip(self.experts, weights.unbind(dim=-1), strict=True):
            next_input = next_input + weight[:, None] * expert(normed)
        return next_input, gates


class LatentNorm(nn.Module):
    """Gives latent inputs one length, which is learnt and begins as the mean length of a token's embedding."""

    def __init__(self, embeddings: Tensor):
        super().__init__()
        mean = at_least_float32(embeddings.detach()).norm(dim=-1).mean(dim=0, keepdim=True)
        self.weight = nn.Parameter(mean.to(embeddings.dtype))  # [1], since FSDP shards no scalars

    def forward(self, inputs: Tensor) -> Tensor:
        return F.normalize(inputs, dim=-1) * self.weight


class Gate(nn.Module):
    """Probability that latent steps help an input, by its anchor (TWN, arXiv 2605.14448); one half until it is trained.

    `[B, D] -> [B]`, logistic regression on the anchor embedding, in float32 whatever the weights' dtype.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, anchor: Tensor) -> Tensor:
        return torch.sigmoid(normalize(anchor) @ at_least_float32(self.weight) + at_least_float32(self.bias))


def scaled(adapter: Adapter, norm: nn.Module) -> Adapter:
    """The adapter with outputs of the length that a `LatentNorm` gives."""

    def scaled_adapter(state: Tensor, step: int, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        next_input, gates = adapter(state, step, context)
        return norm(next_input).to(next_input.dtype), gates

    return scaled_adapter


ADAPTERS = {"moe": MixtureOfExperts, "mlp": ResidualMLP, "projector": Projector}


def build_adapter(config: PlumeConfig) -> TransitionAdapter:
    """The adapter that `config.transition` names."""
    return Identity() if config.transition == "identity" else ADAPTERS[config.transition](config)


@torch.no_grad()
def step_preferences(adapter: TransitionAdapter, num_latent_steps: int) -> Tensor | None:
    """Gates of each step where state and context are zero, `[K, E]`; None without a router or without steps.

    It is what the step alone prefers; inputs move it.
    """
    if not isinstance(adapter, MixtureOfExperts) or num_latent_steps == 0:
        return None
    state = adapter.ln.weight.new_zeros(1, len(adapter.ln.weight))
    return torch.cat([adapter.route(state, step, None) for step in range(num_latent_steps)])

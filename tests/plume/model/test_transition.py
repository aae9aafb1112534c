"""The adapters against their equations, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Qwen2VLConfig

from plume import PlumeConfig
from plume.model.transition import build_adapter


def config(width: int = 12, **fields) -> PlumeConfig:
    return PlumeConfig(backbone_config=Qwen2VLConfig(text_config={"hidden_size": width}), **fields)


def adapter_of(**fields):
    return build_adapter(config(**fields)).double().eval()


def expert_by_hand(expert, x):
    hidden = x @ expert.fc1.weight.T + expert.fc1.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ expert.fc2.weight.T + expert.fc2.bias


def mixture_by_hand(adapter, state, step, context, top_k):
    """Equations 4 and 5 row by row, running only the chosen experts."""
    rows = []
    for z, c in zip(state, context, strict=True):
        features = torch.cat([z + c, adapter.step_embed.weight[step]])
        gates = torch.softmax(adapter.router.weight @ features + adapter.router.bias, dim=0)
        normed = (z - z.mean()) / torch.sqrt(z.var(unbiased=False) + 1e-5)
        normed = normed * adapter.ln.weight + adapter.ln.bias
        row = z + expert_by_hand(adapter.shared_expert, normed)
        for chosen in gates.argsort(descending=True)[:top_k]:
            row = row + gates[chosen] * expert_by_hand(adapter.experts[chosen], normed)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 7])
def test_the_mixture_equals_its_equations(batch, top_k):
    adapter = adapter_of(top_k=top_k)
    torch.nn.init.normal_(adapter.ln.weight)
    torch.nn.init.normal_(adapter.ln.bias)
    state, context = torch.randn(2, batch, 12, dtype=torch.double)
    for step in (0, 31):
        next_input, gates = adapter(state, step, context)
        assert torch.allclose(next_input, mixture_by_hand(adapter, state, step, context, top_k), atol=1e-12)
        assert torch.allclose(gates.sum(dim=-1), torch.ones(batch, dtype=torch.double))


def test_the_context_steers_the_router_and_never_enters_the_experts():
    adapter = adapter_of(top_k=4)
    state, context = torch.randn(2, 3, 12, dtype=torch.double)
    torch.nn.init.zeros_(adapter.router.weight)  # a router that is blind to its input
    assert torch.equal(adapter(state, 0, context)[0], adapter(state, 0, None)[0])


def test_kept_gates_are_not_renormalised():
    adapter = adapter_of(top_k=1, shared_expert=False)
    torch.nn.init.zeros_(adapter.router.weight)
    adapter.router.bias.data = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.double).log()
    state = torch.randn(2, 12, dtype=torch.double)
    expected = state + 0.4 * expert_by_hand(adapter.experts[1], adapter.ln(state))
    assert torch.allclose(adapter(state, 0, None)[0], expected)


def test_uniform_gates_over_all_experts_give_their_mean():
    adapter = adapter_of(top_k=4, shared_expert=False)
    torch.nn.init.zeros_(adapter.router.weight)
    torch.nn.init.zeros_(adapter.router.bias)
    state = torch.randn(2, 12, dtype=torch.double)
    mean = sum(expert_by_hand(expert, adapter.ln(state)) for expert in adapter.experts) / 4
    assert torch.allclose(adapter(state, 0, None)[0], state + mean)


def test_the_router_is_exact_under_autocast():
    adapter = build_adapter(config()).eval()
    state = torch.randn(3, 12)
    with torch.autocast("cpu", torch.bfloat16):
        gates = adapter(state, 0, state)[1]
    assert torch.equal(gates, adapter.route(state, 0, state))


def test_the_router_is_exact_in_bfloat16_models():
    adapter = build_adapter(config()).bfloat16().eval()
    state = torch.randn(3, 12, dtype=torch.bfloat16)
    next_input, gates = adapter(state, 0, state)
    assert gates.dtype == torch.float32
    assert next_input.dtype == torch.bfloat16
    assert torch.allclose(gates.sum(dim=-1), torch.ones(3), atol=1e-6)


@pytest.mark.parametrize(("width", "expected"), [(1536, 47_273_476), (3584, 257_105_412)])
def test_parameter_counts_are_those_of_the_published_adapters(width, expected):
    with torch.device("meta"):
        adapter = build_adapter(config(width))
    assert sum(parameter.numel() for parameter in adapter.parameters()) == expected
    assert len(list(adapter.parameters())) == 25


def test_parameter_names_are_those_of_the_published_checkpoints():
    names = {name for name, _ in build_adapter(config()).named_parameters()}
    assert {"ln.weight", "step_embed.weight", "router.bias", "experts.3.fc2.bias"} <= names
    assert {"shared_expert.fc1.weight", "shared_expert.fc2.bias"} <= names


def test_identity_projector_and_mlp_follow_their_definitions():
    state = torch.randn(2, 12, dtype=torch.double)
    assert torch.equal(adapter_of(transition="identity")(state, 3, None)[0], state)
    mlp = adapter_of(transition="mlp")
    assert torch.allclose(mlp(state, 0, None)[0], state + expert_by_hand(mlp.expert, mlp.ln(state)))
    projected, gates = adapter_of(transition="projector")(state, 0, None)
    assert gates is None
    assert torch.allclose(projected.mean(dim=-1), torch.zeros(2, dtype=torch.double), atol=1e-12)

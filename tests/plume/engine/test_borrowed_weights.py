"""Weights that change behind the engine's back: moved, replaced, merged, loaded, trained, written in place."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from plume import Plume, PlumeModel
from plume.engine.layers.weights import BorrowedWeights


@pytest.fixture
def plume(plume_folder) -> Plume:
    return Plume(plume_folder, device="cpu")


def layer(model):
    return model.backbone.language_model.layers[1]


def noise(tensor):
    return 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))


def load_other(model):
    model.load_state_dict({name: tensor + noise(tensor) for name, tensor in model.state_dict().items()})


def load_assigned(model):
    model.load_state_dict({name: tensor + noise(tensor) for name, tensor in model.state_dict().items()}, assign=True)


def write_in_place(model):
    with torch.no_grad():
        layer(model).mlp.down_proj.weight.add_(noise(layer(model).mlp.down_proj.weight))


def write_data(model):
    layer(model).mlp.down_proj.weight.data.mul_(3)


def copy_data(model):  # as averages of weights are put in
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data + noise(parameter))


def set_data(model):
    weight = layer(model).self_attn.q_proj.weight
    weight.data = weight.data + noise(weight)


def replace_parameter(model):
    layer(model).input_layernorm.weight = nn.Parameter(torch.full_like(layer(model).input_layernorm.weight, 3.0))


def replace_in_the_dict(model):  # as accelerate does it
    projection = layer(model).mlp.up_proj
    projection._parameters["weight"] = nn.Parameter(projection.weight.detach() + noise(projection.weight))


def replace_module(model):
    old = layer(model).mlp.down_proj
    layer(model).mlp.down_proj = nn.Linear(old.in_features, old.out_features, bias=False)


def replace_module_in_the_dict(model):  # as quantisation does it
    old = layer(model).mlp.down_proj
    layer(model).mlp._modules["down_proj"] = nn.Linear(old.in_features, old.out_features, bias=False)


def replace_layer(model):
    layers = model.backbone.language_model.layers
    layers[1] = copy.deepcopy(layers[0])


def replace_bias_of_the_tower(model):
    attention = model.backbone.visual.blocks[0].attn
    attention.proj.bias = nn.Parameter(attention.proj.bias.detach() + 5 * noise(attention.proj.bias))


def replace_adapter(model):
    model.transition = copy.deepcopy(model.transition)
    with torch.no_grad():
        model.transition.experts[0].fc2.weight.mul_(4)


def step_of_an_optimiser(model):
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.3)
    batch = model.processor.encode([model.processor.parse("red kite")])
    model(**batch).embedding[0, 0].backward()
    optimiser.step()


def merge_lora(model):
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|down_proj)"))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(noise(parameter))
    wrapped.merge_and_unload()


def there_and_back(model):
    model.to(torch.float64).to(torch.float32)


CHANGES = [
    load_other,
    load_assigned,
    write_in_place,
    write_data,
    copy_data,
    set_data,
    replace_parameter,
    replace_in_the_dict,
    replace_module,
    replace_module_in_the_dict,
    replace_layer,
    replace_bias_of_the_tower,
    replace_adapter,
    step_of_an_optimiser,
    merge_lora,
]


def asked(picture):
    image = {"image": picture(), "text": "what?"}
    return ["red kite", image, {"image": picture(), "text": "where is it?"}, {"video": [picture(), picture(seed=1)]}]


EVERY_CACHE = {"vector_cache_bytes": 1 << 20, "vision_cache_bytes": 1 << 24, "prefix_cache_bytes": 1 << 24}
MEDIA_CACHES = {"vision_cache_bytes": 1 << 24, "prefix_cache_bytes": 1 << 24}
CACHES = [{}, EVERY_CACHE, MEDIA_CACHES, {"int8": True, "vision_cache_bytes": 1 << 24}]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_vector_of_earlier_weights_comes_back(plume_folder, picture, change):
    """Whatever is remembered; the oracle is an embedder that was made after the change."""
    inputs = asked(picture)
    for settings in CACHES:
        plume = Plume(plume_folder, device="cpu", **settings)
        before = plume.encode(inputs)
        assert np.allclose(plume.encode(inputs), before, atol=1e-6)  # the caches are warm
        change(plume.plume_model)
        fresh = Plume(plume_folder, device="cpu", int8=settings.get("int8", False))
        fresh.plume_model.load_state_dict(plume.plume_model.state_dict())
        expected = fresh.encode(inputs)
        assert np.abs(expected - before).max() > 1e-3
        assert np.allclose(plume.encode(inputs), expected, atol=2e-5), settings


def test_moving_there_and_back_is_noticed_and_changes_nothing(plume, picture):
    before = plume.encode(asked(picture))
    stack = plume.engine.layers
    there_and_back(plume.plume_model)
    assert np.allclose(plume.encode(asked(picture)), before, atol=1e-6)
    assert plume.engine.layers is not stack


def test_nothing_is_made_anew_while_nothing_changes(plume, picture):
    stack = plume.engine.layers
    for _ in range(3):
        plume.encode(asked(picture))
    plume.plume_model.train()
    plume.plume_model.eval()
    PlumeModel(plume.plume_config)  # other models are no reason
    assert plume.engine.layers is stack


def test_a_look_at_the_weights_asks_modules_for_nothing(plume, monkeypatch):
    """What made it slow was nn.Module's search for attributes, thousands of times for 28 + 32 layers."""
    weights = BorrowedWeights(plume.plume_model)
    calls = []
    monkeypatch.setattr(nn.Module, "__getattr__", lambda module, name: calls.append(name))
    assert weights.are_same()
    assert not calls

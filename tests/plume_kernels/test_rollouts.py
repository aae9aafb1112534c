"""Whole rollouts through the kernels, in Triton's interpreter: the engine's vectors are the model's."""

from __future__ import annotations

import importlib

import pytest
import torch

from plume import Item, PlumeModel
from plume.engine.engine import Engine
from plume.engine.fused.decoder import FusedTextLayers
from plume.engine.layers.weights import text_weights
from plume.model.interface import Segment
from plume.random_models import SHORT_STRINGS, save_tiny_backbone
from plume_eval.speed.writing import Writer
from plume_kernels import tiles

pytestmark = pytest.mark.interpreted


def built(tmp_path_factory, **fields) -> PlumeModel:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_backbone(folder, ["red", "kite", "blue"], num_layers=2, vision_layers=1)
    return PlumeModel.from_backbone(str(folder), num_latent_steps=2, **{**SHORT_STRINGS, **fields}).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> PlumeModel:
    return built(tmp_path_factory)


def batch(model: PlumeModel) -> dict:
    return dict(model.processor.encode([Item.parse("red kite"), Item.parse("blue"), Item.parse("kite " * 30)]))


@pytest.mark.parametrize("steps", [0, 2, torch.tensor([1, 0, 3])], ids=["0", "2", "mixed"])
def test_the_kernels_give_what_the_model_gives(model, steps):
    with torch.no_grad():
        expected = model(**batch(model), num_latent_steps=steps)
    engine = Engine(model, backend="triton")
    assert engine.backend == "triton"
    found = engine(batch(model), steps)
    for name in ("embedding", "anchor_embedding", "states", "gates"):
        one, other = getattr(found, name), getattr(expected, name)
        if other is not None:
            assert (one - other).norm() <= 1e-5 * other.norm(), name


@pytest.mark.parametrize(
    "fields", [{"transition": "identity"}, {"transition": "projector"}, {"router_context": "prefix_last"}], ids=str
)
def test_other_adapters_run_behind_the_kernels(tmp_path_factory, fields):
    model = built(tmp_path_factory, **fields)
    with torch.no_grad():
        expected = model(**batch(model)).embedding
    assert (Engine(model, backend="triton")(batch(model)).embedding - expected).abs().max() < 1e-5


@pytest.mark.parametrize("num_new", [1, 2])
def test_a_row_alone_gives_the_bits_that_it_gives_among_others(model, num_new):
    layers = FusedTextLayers(text_weights(model.backbone))
    lengths, width = torch.tensor([70, 3, 9, 1, 40]), len(layers.norm)
    embeds, kept = torch.randn(5, num_new, width), torch.randn(2, 2, 5, 2, 128, layers.weights.channels)
    found = []
    for rows in ([0, 1, 2, 3, 4], [0], [4, 2, 0]):
        cache = layers.new_cache(len(rows), 128)
        cache.kv.copy_(kept[:, :, rows])
        cache.lengths.copy_(lengths[rows])
        positions = torch.arange(num_new).expand(3, len(rows), -1) + 80
        mask = torch.ones(len(rows), num_new, dtype=torch.bool)
        with torch.inference_mode():
            found.append(layers.read_next(Segment(embeds[rows], mask, positions), cache)[rows.index(0)])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_is_five_launches_per_layer_and_three_for_the_adapter(model, monkeypatch, steps):
    launched = []
    for name in ("qkv", "attention", "out", "gate_up", "down", "norm", "routing", "experts"):
        module = importlib.import_module(f"plume_kernels.{name}")

        def launch(kernel, *args, own=module.launch, **constants):
            launched.append(kernel.fn.__name__)
            own(kernel, *args, **constants)

        monkeypatch.setattr(module, "launch", launch)
    one = dict(model.processor.encode([Item.parse("red kite")]))
    Engine(model, backend="triton")(one, steps)
    num_layers = 2
    layer = ["_qkv_kernel", "_attention_kernel", "_out_kernel", "_gate_up_kernel", "_down_kernel"]
    step = ["_route_kernel", "_first_kernel", "_second_kernel", *layer * num_layers]
    assert launched == [*step * steps, "_norm_kernel"]  # the suffix is in the last pass, and its norm by itself


def test_explicit_writing_takes_the_same_kernels(model):
    engine = Engine(model, backend="triton")
    found, _ = Writer(engine)(batch(model), 3, stops=False)
    expected, _ = Writer(Engine(model, backend="eager"))(batch(model), 3, stops=False)
    assert (found - expected).abs().max() < 1e-5


@torch.inference_mode()
def test_a_whole_rollout_gives_the_bits_of_a_row_alone(model):
    # Tiles of one height: numpy's products depend on how many rows they have, a GPU's do not.
    one = tiles.Tile()
    engine = Engine(model, backend="triton")
    kept, before = torch.randn(2, 2, 5, 2, 300, engine.layers.weights.channels), torch.randn(5, 2, 64)
    lengths = torch.tensor([270, 7, 64, 1, 200])
    found = []
    with tiles.forced(qkv=one, out=one, gate_up=one, down=one):
        for rows in (list(range(5)), [0], [3, 0]):
            buffers = engine.rollout_buffers(len(rows), 299)
            buffers.cache.kv.copy_(kept[:, :, rows])
            buffers.prefix_states.copy_(before[rows])
            buffers.cache.lengths.copy_(lengths[rows])
            buffers.start.copy_(lengths[rows])
            buffers.num_latent_steps.fill_(2)
            result, place = engine.rollout_launcher(buffers, 2)(), rows.index(0)
            found.append((result.states[place], result.suffix[place], result.gates[place]))
    for other in found[1:]:
        for own, same in zip(found[0], other, strict=True):
            assert torch.equal(own, same)

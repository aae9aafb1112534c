"""The engine gives the vectors of the model, whatever the backend, the batch, the padding and what it did before."""

from __future__ import annotations

import copy
import gc
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from plume import Item, PlumeModel
from plume.embedder.digests import media_keys
from plume.engine import graphs
from plume.engine.engine import Engine, bucket
from plume.engine.layers.weights import UnsupportedModelError
from plume.random_models import SHORT_STRINGS, save_tiny_backbone

FAMILIES = ["qwen2_vl", "qwen2_5_vl"]


def built(tmp_path_factory, family: str = "qwen2_vl", **fields) -> PlumeModel:
    folder = tmp_path_factory.mktemp(family)
    save_tiny_backbone(folder, ["red", "kite", "blue"], family=family, num_layers=3, vision_layers=2)  # type: ignore[arg-type]
    return PlumeModel.from_backbone(str(folder), num_latent_steps=3, **{**SHORT_STRINGS, **fields}).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> PlumeModel:
    return built(tmp_path_factory)


def frames(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def items() -> list[Item]:
    raws = [
        "red kite",
        {"image": Image.fromarray(frames(0, 84, 140, 3)), "text": "which kite is red?"},
        {"video": frames(1, 6, 84, 56, 3), "text": "red"},
        {"image": [Image.fromarray(frames(2, 56, 56, 3))] * 2, "video": frames(3, 2, 56, 56, 3)},
        "blue " * 40,
    ]
    return [Item.parse(raw) for raw in raws]


def errors(found, expected) -> dict[str, float]:
    worst = {}
    for name in ("embedding", "anchor_embedding", "states", "gates", "num_latent_steps"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.shape == other.shape, name
            worst[name] = ((one - other).abs().max() / other.abs().max().clamp(min=1)).item()
    return worst


@pytest.mark.parametrize("backend", ["eager", "graph"])
@pytest.mark.parametrize("steps", [0, 1, 3, 8, torch.tensor([0, 3, 8, 1, 2])], ids=["0", "1", "3", "8", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_gives_what_the_model_gives(tmp_path_factory, captured, family, steps, backend):
    model = built(tmp_path_factory, family)
    batch = model.processor.encode(items())
    with torch.no_grad():
        expected = model(**batch, num_latent_steps=steps)
    engine = Engine(model, backend=backend)
    for _ in range(3):  # towers are captured the second time, and replayed the third
        assert max(errors(engine(dict(batch), steps), expected).values()) < 1e-5
    assert (engine.num_captures > 0) == (backend == "graph")


@pytest.mark.parametrize(
    "fields",
    [
        {"transition": "identity"},
        {"transition": "projector"},
        {"transition": "mlp"},
        {"router_context": "prefix_last"},
        {"latent_positions": "kv_length"},
        {"prompt_template": SHORT_STRINGS["prompt_template"] + "", "blank_image_size": 56},
        {"latents": "parallel"},
        {"latents": "parallel", "refinements": 1},
        {"latents": "parallel", "refinements": 4},
        {"latent_scale": "embedding"},
        {"step_embedding": False},
    ],
    ids=str,
)
def test_every_kind_of_model_runs(tmp_path_factory, captured, fields):
    model = built(tmp_path_factory, **fields)
    batch = model.processor.encode(items())
    for backend in ("eager", "graph"):
        engine = Engine(model, backend=backend)
        for steps in (None, torch.tensor([0, 3, 5, 1, 2]), 0):
            with torch.no_grad():
                expected = model(**batch, num_latent_steps=steps)
            assert max(errors(engine(dict(batch), steps), expected).values()) < 1e-5


def test_parallel_latents_are_one_launch_and_share_prefixes(tmp_path_factory, captured):
    model = built(tmp_path_factory, latents="parallel")
    batch = dict(model.processor.encode(items()))
    engine = Engine(model, backend="graph")
    engine(batch)
    before = engine.num_captures
    engine(dict(model.processor.encode(items()[:1])))
    assert engine.num_captures == before + 1  # the prefix with latents and suffix; there is no rollout behind it
    sharing = Engine(model, prefix_cache_bytes=1 << 24)
    expected = model(**batch).embedding
    for _ in range(2):
        assert (sharing(batch, media_keys=media_keys(items())).embedding - expected).abs().max() < 1e-5


def test_stopping_early_is_for_sequential_latents(tmp_path_factory):
    with pytest.raises(ValueError, match="exit_tolerance is for sequential latents"):
        Engine(built(tmp_path_factory, latents="parallel"), exit_tolerance=0.1)


def test_padding_on_either_side_and_rows_alone_give_the_same(model, captured):
    batch = dict(model.processor.encode(items()))
    mask = batch["attention_mask"].bool()
    order = torch.argsort(~mask, dim=1, stable=True)
    right = {
        **batch,
        "input_ids": batch["input_ids"].gather(1, order),
        "attention_mask": mask.gather(1, order).long(),
    }
    for backend in ("eager", "graph"):
        engine = Engine(model, backend=backend)
        together = engine(batch).embedding
        assert torch.equal(engine(right).embedding, together)
        for row, item in enumerate(items()):
            alone = engine(dict(model.processor.encode([item]))).embedding[0]
            assert (alone - together[row]).abs().max() < 1e-5


@torch.inference_mode()
def test_a_graph_used_again_keeps_no_trace_of_earlier_inputs(model, captured):
    engine = Engine(model, backend="graph")
    first = dict(model.processor.encode(items()[:2]))
    expected = {steps: engine(first, steps).embedding.clone() for steps in (0, 3)}
    engine(first)  # the tower's second time
    captures = engine.num_captures
    for item in items():
        engine(dict(model.processor.encode([item, item])))
        for buffers in engine._buffers:
            buffers.cache.kv.fill_(torch.nan)
            buffers.prefix_states.fill_(torch.nan)
            for prefix in buffers.prefixes:
                prefix.embeds.fill_(torch.nan)
        for steps, embedding in expected.items():
            assert torch.equal(engine(first, steps).embedding, embedding)
    assert engine.num_captures > captures  # others' towers; none of these shapes


def test_many_calls_of_random_lengths_keep_a_bounded_number_of_graphs_and_tensors(model, captured):
    engine = Engine(model, backend="graph", max_graphs=4)
    generator = torch.Generator().manual_seed(0)

    def call() -> None:
        count, length = (int(torch.randint(1, high, (), generator=generator)) for high in (6, 300))
        engine(dict(model.processor.encode([Item.parse("red " * length)] * count)), int(length) % 3)

    def living() -> int:
        gc.collect()
        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())

    for _ in range(60):
        call()
    before = living()
    for _ in range(60):
        call()
    assert living() <= before * 1.2
    assert len(engine._buffers) <= 4
    assert len(engine._single_passes) <= 4
    assert all(len(buffers.prefixes) <= 4 and len(buffers.graphs) <= 4 for buffers in engine._buffers)


def test_a_result_does_not_change_when_another_call_follows(model, captured):
    engine = Engine(model, backend="graph")
    batches = [dict(model.processor.encode([item])) for item in items()]
    found = []
    for steps in (0, 3, 1):
        for batch in batches * 3:
            output = engine(batch, steps)
            found.append((output, copy.deepcopy(output)))
    for output, at_once in found:
        assert max(errors(output, at_once).values()) == 0


def test_a_capture_that_fails_falls_back_with_one_warning(model, monkeypatch):
    def fails(work, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "unsupported_reason", lambda device: None)
    monkeypatch.setattr(graphs, "new_pool", lambda device: None)
    monkeypatch.setattr(graphs, "capture", fails)
    engine = Engine(model, backend="graph")
    batch = dict(model.processor.encode(items()))
    with pytest.warns(
        UserWarning, match='falls back to "eager": operation not permitted when stream is capturing$'
    ) as w:
        found = [engine(batch).embedding for _ in range(3)]
    assert len(w) == 1
    assert engine.backend == "eager"
    expected = Engine(model, backend="eager")(batch).embedding
    assert all((one - expected).abs().max() < 1e-6 for one in found)


@pytest.mark.parametrize(
    "name",
    ["k_proj.weight", "k_proj.bias", "up_proj.weight", "input_layernorm.weight", "attn.proj.weight", "1.fc1.weight"],
)
def test_weights_that_are_replaced_behind_the_models_back_are_noticed(model, captured, name):
    model = copy.deepcopy(model)
    batch = dict(model.processor.encode(items()))
    engine = Engine(model, backend="graph")
    before = engine(batch).embedding.clone()
    for own, parameter in model.named_parameters():
        if own.endswith(name):
            parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
    with torch.no_grad():
        expected = model(**batch).embedding
    assert (expected - before).abs().max() > 1e-3
    assert (engine(batch).embedding - expected).abs().max() < 1e-5


def test_a_model_can_be_trained_after_the_engine_took_its_weights_anew(model):
    model = copy.deepcopy(model)
    engine = Engine(model)
    model.double()
    batch = dict(model.processor.encode(items()[:1]))
    engine(batch)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model(**batch).embedding[0, 0].backward()


def test_prefixes_are_not_shared_where_the_anchor_stands_before_the_image(tmp_path_factory):
    template = SHORT_STRINGS["prompt_template"]
    anchor = template.removeprefix("{content}").split("><")[0] + ">"
    model = built(tmp_path_factory, prompt_template=anchor + template.replace(anchor, ""))
    batch = dict(model.processor.encode(items()))
    with torch.no_grad():
        expected = model(**batch).embedding
    engine = Engine(model, prefix_cache_bytes=1 << 20)
    for _ in range(2):
        found = engine(batch, media_keys=media_keys(items())).embedding
        assert (found - expected).abs().max() < 1e-5
    assert len(engine.prefix_cache.entries) == 0


@pytest.mark.parametrize("change", [lambda keys: keys[:-1], lambda keys: [keys[0], ([], []), *keys[2:]]])
def test_keys_that_are_missing_are_an_error(model, change):
    engine = Engine(model, prefix_cache_bytes=1 << 20)
    batch = dict(model.processor.encode(items()))
    with pytest.raises(ValueError, match=r"media_keys holds .* for 5 media in 5 rows; give one key for each"):
        engine(batch, media_keys=change(media_keys(items())))


def test_what_is_too_large_for_graphs_is_launched(model, captured):
    batch = dict(model.processor.encode(items()))
    expected = Engine(model, backend="eager")(batch).embedding
    for bounds, captures in (({"max_captured_tokens": 1}, 1), ({"max_cache_bytes": 1}, 0)):
        engine = Engine(model, backend="graph", **bounds)
        assert torch.allclose(engine(batch).embedding, expected, atol=1e-6)
        assert engine.num_captures == captures  # the rollout alone; nothing


def test_bfloat16_errs_at_most_twice_as_much_as_the_model_does(model):
    exact, half = copy.deepcopy(model).double(), copy.deepcopy(model).bfloat16()
    batch = model.processor.encode(items())
    with torch.no_grad():
        expected = exact(**batch).embedding
        own = (half(**batch).embedding - expected).norm()
    assert (Engine(half)(dict(batch)).embedding - expected).norm() <= 2 * own


def test_graphs_on_a_cpu_fall_back_with_one_warning(model):
    with pytest.warns(
        UserWarning, match="falls back.*CUDA graphs need a CUDA device, and the model is on cpu"
    ) as found:
        engine = Engine(model, backend="graph")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine(dict(model.processor.encode(items()[:1])))
    assert len(found) == 1
    assert engine.backend == "eager"


def test_arguments_that_cannot_be_honoured_are_errors(model):
    with pytest.raises(ValueError, match="backend must be one of auto, eager, graph, triton; received 'fast'"):
        Engine(model, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exit_tolerance must be at least 0; received -1"):
        Engine(model, exit_tolerance=-1)
    engine = Engine(copy.deepcopy(model))
    engine.model.train()
    with pytest.raises(ValueError, match="eval mode"):
        engine(dict(model.processor.encode(items()[:1])))


def test_a_model_with_adapters_is_not_run_without_them(model):
    peft = pytest.importorskip("peft")
    wrapped = copy.deepcopy(model)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), wrapped.backbone)
    with pytest.raises(UnsupportedModelError, match="merge adapters first"):
        Engine(wrapped)


@pytest.mark.parametrize("backend", ["eager", "graph"])
def test_weights_that_change_move_or_are_saved_stay_those_of_the_model(model, captured, tmp_path, backend):
    model = copy.deepcopy(model)
    batch = dict(model.processor.encode(items()))
    engine = Engine(model, backend=backend)
    before = engine(batch).embedding.clone()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "k_proj" in name or "down_proj" in name or "attn.qkv" in name:
                parameter.mul_(1.5)
        learnt = model(**batch).embedding
    assert (engine(batch).embedding - learnt).abs().max() < 1e-5 < (learnt - before).abs().max()

    model.double()
    with torch.no_grad():
        assert (
            engine(batch).embedding - model(**batch).embedding
        ).abs().max() < 1e-6  # transformers rotates in float32
    model.save_pretrained(tmp_path)
    reopened = PlumeModel.from_pretrained(tmp_path)
    for (name, saved), own in zip(reopened.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(saved, own), name


def test_engines_over_one_model_leave_each_other_in_peace(model):
    first, second = Engine(model), Engine(model, int8=True)
    layers = first.layers
    batch = dict(model.processor.encode(items()))
    expected = first(batch).embedding
    second(batch)
    assert torch.equal(first(batch).embedding, expected)
    assert first.layers is layers
    assert first.layers.layers[0].qkv.weight.data_ptr() == second.layers.layers[0].qkv.weight.data_ptr()


def test_a_row_stops_when_its_states_agree(model, captured):
    batch = dict(model.processor.encode(items()))
    with torch.no_grad():
        states = model(**batch, num_latent_steps=6).states
    change = (states[:, 1:] - states[:, :-1]).norm(dim=-1) / states[:, 1:].norm(dim=-1)  # of step 1 .. 6
    tolerance = change[:, :4].median().item() * 1.0001
    settled = change[:, :5] <= tolerance
    expected = torch.where(settled.any(dim=1), settled.int().argmax(dim=1) + 1, 6)
    assert len(set(expected.tolist())) > 1
    with torch.no_grad():
        stopped = model(**batch, num_latent_steps=expected).embedding
    for backend in ("eager", "graph"):
        found = Engine(model, backend=backend, exit_tolerance=tolerance)(batch, 6)
        assert found.num_latent_steps.tolist() == expected.tolist()
        assert found.states.shape[1] == 1 + (6 if backend == "graph" else expected.max())  # a graph runs all steps
        assert (found.embedding - stopped).abs().max() < 1e-5
    everywhere = Engine(model, backend="eager", exit_tolerance=1e9)(batch, 6)
    assert everywhere.num_latent_steps.tolist() == [1] * 5
    assert everywhere.states.shape[1] == 2
    never = Engine(model, backend="eager", exit_tolerance=0)(batch, 6)
    assert never.num_latent_steps.tolist() == [6] * 5


def test_a_gate_decides_who_takes_steps_where_nobody_else_does(model, captured):
    """As if each row had been given 0 or K: in model and engine, with and without graphs, alone and in a batch."""
    gated, new = model.reconfigured(num_latent_steps=4, gate_threshold=0.5)
    assert new == ["gate"]
    batch = dict(gated.processor.encode(items()))
    with torch.no_grad():
        anchors = gated(**batch, num_latent_steps=0).anchor_embedding
        assert gated(**batch).num_latent_steps.tolist() == [4] * 5  # an untrained gate lets all think
        gated.gate.weight.copy_(anchors[0] - anchors[1:].mean(dim=0))
        gated.gate.bias.copy_(-(anchors @ gated.gate.weight).median())
        expected = torch.where(torch.sigmoid(anchors @ gated.gate.weight + gated.gate.bias) >= 0.5, 4, 0)
        assert 0 < (expected > 0).sum() < 5
        told = gated(**batch, num_latent_steps=expected)
        found = gated(**batch)
    assert found.num_latent_steps.tolist() == expected.tolist()
    for name in ("embedding", "anchor_embedding", "states"):
        assert torch.allclose(found[name], told[name], atol=1e-6)
    for backend in ("eager", "graph"):
        engine = Engine(gated, backend=backend)
        output = engine(batch)
        assert output.num_latent_steps.tolist() == expected.tolist()
        assert (output.embedding - told.embedding).abs().max() < 1e-5
        assert engine(batch, 4).num_latent_steps.tolist() == [4] * 5  # a caller who says how many means it
        assert (engine(batch).embedding - told.embedding).abs().max() < 1e-5
        for row, item in enumerate(items()):
            alone = engine(dict(gated.processor.encode([item])))
            assert (alone.embedding[0] - told.embedding[row]).abs().max() < 1e-5
    gated.config.gate_threshold = 1.0
    with torch.no_grad():
        nobody = gated(**batch)
    assert nobody.num_latent_steps.tolist() == [0] * 5
    assert nobody.states.shape[1] == 1  # nor are they run
    assert (Engine(gated, backend="eager")(batch).embedding - nobody.embedding).abs().max() < 1e-5
    assert (nobody.embedding - gated(**batch, num_latent_steps=0).embedding).abs().max() < 1e-6


def test_a_gate_decides_about_refined_latents_and_not_about_those_of_one_pass(model):
    with pytest.raises(ValueError, match="gate_threshold: latents that are read in the pass of the prefix"):
        model.reconfigured(latents="parallel", gate_threshold=0.5)
    with pytest.raises(ValueError, match=r"gate_threshold must be None or lie in \[0, 1\]; received 2"):
        model.reconfigured(gate_threshold=2)
    refined, _ = model.reconfigured(latents="parallel", refinements=1, num_latent_steps=3, gate_threshold=1.0)
    batch = dict(refined.processor.encode(items()))
    with torch.no_grad():
        expected = refined(**batch, num_latent_steps=0).embedding
        assert (refined(**batch).embedding - expected).abs().max() < 1e-6
        assert (Engine(refined)(batch).embedding - expected).abs().max() < 1e-5


def test_int8_stays_close_and_no_row_depends_on_another(model):
    batch = dict(model.processor.encode(items()))
    exact, engine = Engine(model)(batch).embedding, Engine(model, int8=True)
    found = engine(batch).embedding
    assert 0.98 < torch.cosine_similarity(found, exact).min() < 0.999999
    for row, item in enumerate(items()):
        alone = engine(dict(model.processor.encode([item]))).embedding[0]
        assert torch.cosine_similarity(alone, found[row], dim=0) > 0.9999


def test_int8_notices_weights_that_change_in_place(model):
    model = copy.deepcopy(model)
    batch = dict(model.processor.encode(items()[:1]))
    engine = Engine(model, int8=True)
    before = engine(batch).embedding
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    assert (engine(batch).embedding - before).abs().max() > 1e-3


def test_buckets_waste_at_most_a_quarter_and_never_cut():
    for length in range(1, 5000):
        assert length <= bucket(length) < max(length + 32, length * 5 / 4)
        assert bucket(bucket(length)) == bucket(length)
    assert len({bucket(length) for length in range(1, 4097)}) <= 28

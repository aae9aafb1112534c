"""What only a CUDA device can show; `make gpu` runs it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cosine_similarity

from plume import Item, Plume, PlumeModel
from plume.checkpoints.fingerprint import fingerprint
from plume.engine import graphs
from plume.engine.engine import Engine
from plume.inputs.patches import from_bytes
from plume.random_models import SHORT_STRINGS, save_tiny_backbone
from plume_train.config import PlumeTrainingArguments
from plume_train.data.rows import Record, Side
from plume_train.run import train
from plume_train.throughput import pairs_per_second
from tests.plume_train.runs import settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("exact_products"),
]


def items(picture):
    return [
        Item.parse("a red kite"),
        Item.parse({"image": picture(84, 56), "text": "what?"}),
        Item.parse(picture()),
        Item.parse({"video": [picture(84, 56, seed) for seed in range(3)], "text": "what moves?"}),
    ]


def test_a_cuda_device_gives_the_embeddings_of_the_cpu(plume_folder, picture):
    cpu = PlumeModel.from_pretrained(plume_folder).eval()
    batch = cpu.processor.encode(items(picture))
    expected = cpu(**batch).embedding
    found = cpu.to("cuda")(**batch.to("cuda")).embedding.cpu()
    assert cosine_similarity(found, expected).min() > 0.9999


def test_embeddings_in_bfloat16_do_not_depend_on_neighbours(plume_folder, picture):
    model = PlumeModel.from_pretrained(plume_folder, dtype=torch.bfloat16).to("cuda").eval()
    together = model(**model.processor.encode(items(picture)).to("cuda")).embedding
    for row, item in enumerate(items(picture)):
        alone = model(**model.processor.encode([item]).to("cuda")).embedding[0]
        assert cosine_similarity(together[row], alone, dim=0) > 0.9999


def test_gradients_reach_the_adapter_on_a_cuda_device(plume_folder, picture):
    model = PlumeModel.from_pretrained(plume_folder).to("cuda")
    model(**model.processor.encode(items(picture)).to("cuda")).embedding[:, 0].sum().backward()
    assert model.transition.router.weight.grad.norm() > 0


def test_the_embedder_gives_on_a_cuda_device_what_it_gives_on_the_cpu(plume_folder, picture):
    inputs = [*items(picture), *("caption " * number for number in range(1, 9))]
    expected = Plume(plume_folder, device="cpu").encode(inputs, convert_to_tensor=True)
    found = Plume(plume_folder, device="cuda").encode(inputs, convert_to_tensor=True, batch_size=3)
    assert cosine_similarity(found.cpu(), expected).min() > 0.9999


def test_a_fingerprint_does_not_depend_on_the_device(plume_folder):
    model = PlumeModel.from_pretrained(plume_folder)
    assert fingerprint(model) == fingerprint(model.to("cuda"))


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 2}, {"lora_rank": 4}], ids=["whole", "GradCache", "LoRA"])
def test_a_run_in_bfloat16_with_checkpointing_trains_saves_and_opens(tmp_path, start, hops_folder, changes):
    changes = {"use_cpu": False, "bf16": True, "gradient_checkpointing": True, "save_strategy": "steps", **changes}
    trained = train(settings(tmp_path, start, hops_folder, save_steps=5, **changes)).cpu()
    reopened = PlumeModel.from_pretrained(tmp_path / "out").eval()
    batch = reopened.processor.encode([Item.parse("red"), Item.parse("blue")])
    assert torch.equal(trained(**batch).embedding, reopened(**batch).embedding)


def test_gradcache_and_checkpointing_need_less_memory(plume_folder):
    model = PlumeModel.from_pretrained(plume_folder).to("cuda")
    records = [Record(Side("red kite " * 40 + str(row)), Side(f"blue {row}"), "", str(row)) for row in range(32)]
    args = PlumeTrainingArguments(num_segments=4, output_dir="unused", report_to="none")
    found = pairs_per_second(model, records, args, num_runs=1)
    latent = {one["method"]: one["peak_memory_gib"] for one in found if one["num_latent_steps"] == 4}
    assert latent["batch, checkpointing"] < latent["batch"]
    assert latent["GradCache, passes of 4"] < latent["batch"]


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def family_model(request, tmp_path_factory) -> PlumeModel:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_backbone(folder, ["red", "kite"], family=request.param, hidden_size=128, num_layers=4, vision_layers=2)
    return PlumeModel.from_backbone(str(folder), num_latent_steps=4, **SHORT_STRINGS).to("cuda").eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 8])
def test_graphs_give_what_direct_launches_give_to_the_bit(family_model, picture, monkeypatch, steps, dtype):
    model = copy.deepcopy(family_model).to(dtype)
    batch = dict(model.processor.encode(items(picture)))
    replaying = Engine(model, backend="graph")
    found = [replaying(batch, steps) for _ in range(4)]  # towers are captured the second time
    with monkeypatch.context() as patched:
        patched.setattr(graphs, "capture", lambda work, pool: work)
        launching = Engine(model, backend="graph")
        expected = [launching(batch, steps) for _ in range(4)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.embedding, other.embedding)
        assert torch.equal(one.states, other.states)


@pytest.mark.parametrize("backend", ["eager", "graph"])
def test_the_engine_gives_what_the_model_gives_and_errs_little_in_bfloat16(family_model, picture, backend):
    batch = family_model.processor.encode(items(picture))
    with torch.no_grad():
        expected = family_model(**batch.to("cuda")).embedding
        exact = copy.deepcopy(family_model).double()(**batch.to("cuda")).embedding
        half = copy.deepcopy(family_model).bfloat16()
        own = (half(**batch.to("cuda")).embedding - exact).norm()
    engine, rounded = Engine(family_model, backend=backend), Engine(half, backend=backend)
    for _ in range(3):
        assert (engine(dict(batch)).embedding - expected).abs().max() < 1e-5
        assert (rounded(dict(batch)).embedding - exact).norm() <= 2 * own


@torch.inference_mode()
def test_graphs_keep_no_trace_of_earlier_inputs(family_model, picture):
    engine = Engine(family_model, backend="graph")
    first = dict(family_model.processor.encode(items(picture)[:2]))
    for _ in range(2):
        expected = engine(first).embedding.clone()
    for item in items(picture):
        engine(dict(family_model.processor.encode([item])))
        for buffers in engine._buffers:
            buffers.cache.kv.fill_(torch.nan)
            buffers.prefix_states.fill_(torch.nan)
        assert torch.equal(engine(first).embedding, expected)


def test_ten_thousand_calls_of_random_lengths_leak_no_memory(family_model):
    engine = Engine(family_model, backend="graph")
    generator = torch.Generator().manual_seed(0)
    prepared = [
        dict(family_model.processor.encode([Item.parse("red " * length)] * count))
        for length in range(1, 500, 7)
        for count in (1, 3)
    ]
    taken = []
    for call in range(10_000):
        engine(prepared[int(torch.randint(len(prepared), (), generator=generator))], call % 3)
        if call in (5_000, 9_999):
            torch.cuda.synchronize()
            taken.append(torch.cuda.memory_allocated())
    assert taken[1] <= taken[0] * 1.05


def test_towers_of_unlike_images_replay_whatever_was_allocated_since(family_model, picture):
    model = copy.deepcopy(family_model).bfloat16()
    batch = dict(model.processor.encode(items(picture)))
    engine = Engine(model, backend="graph")
    expected = [engine(batch).embedding.clone() for _ in range(2)][1]
    for size in (8, 16, 64, 1024):
        garbage = [torch.full((size,), 7, dtype=torch.int32, device="cuda") for _ in range(200)]
        assert torch.equal(engine(batch).embedding, expected)
        del garbage


def test_caches_and_loading_ahead_give_the_same_on_a_cuda_device(plume_folder, picture):
    inputs = [{"image": picture(56, 56, seed % 3), "text": f"kite {seed}"} for seed in range(40)] + ["red"] * 5
    plain = Plume(plume_folder, device="cuda").encode(inputs, batch_size=4)
    cached = Plume(
        plume_folder, device="cuda", vector_cache_bytes=1 << 20, vision_cache_bytes=1 << 22, prefix_cache_bytes=1 << 22
    )
    for _ in range(3):
        assert abs(cached.encode(inputs, batch_size=4) - plain).max() < 1e-4
    assert cached.encode(inputs[:2], convert_to_tensor=True).is_cuda


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_the_second_device_is_captured_there(family_model, picture):
    model = copy.deepcopy(family_model).to("cuda:1")
    batch = dict(model.processor.encode(items(picture)))
    expected = Engine(model, backend="eager")(batch).embedding
    engine = Engine(model, backend="graph")
    for _ in range(3):
        assert (engine(batch).embedding - expected).abs().max() < 1e-5


def test_patches_that_travel_as_bytes_become_the_floats_of_the_cpu(plume_folder, picture):
    processor = PlumeModel.from_pretrained(plume_folder).processor
    batch = [processor.encode(items(picture)[1:3], as_bytes=as_bytes)["pixel_values"] for as_bytes in (False, True)]
    assert torch.equal(from_bytes(batch[1].cuda(), processor.patch_format()).cpu(), batch[0])

"""What only a CUDA device can show of the kernels, at the shapes of Qwen2-VL; `make gpu` runs it.

`tests/plume_kernels` interprets and compiles the same kernels without one.
"""

from __future__ import annotations

import copy
import random

import pytest
import torch

from plume import Item, PlumeModel
from plume.engine import graphs
from plume.engine.engine import Engine
from plume.engine.fused.decoder import FusedExperts, FusedTextLayers
from plume.engine.layers.text import TextLayers, join_experts
from plume.engine.layers.weights import text_weights
from plume.model.interface import Segment
from plume.random_models import SHORT_STRINGS, random_model, save_tiny_backbone
from plume_eval.kernels.cases import BY_NAME, Shapes, arguments
from plume_eval.kernels.gate import check_all
from plume_eval.kernels.run import GATED
from tests.plume_kernels.comparing import compare, kernel, tensors

DEVICE = "cuda"
TRUE_SHAPES = "2b"
#: One text model of the shapes of 2B serves all; its vision tower is small, since no image is embedded.
LAYERS = 28

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("exact_products"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> PlumeModel:
    """Random weights in bfloat16, and a router that is sure of itself, since rounding decides near ties."""
    folder = tmp_path_factory.mktemp("small")
    save_tiny_backbone(folder, ["red", "kite", "blue"], num_layers=2, vision_layers=1)
    torch.manual_seed(0)
    small = PlumeModel.from_backbone(str(folder), num_latent_steps=8, **SHORT_STRINGS).eval()
    one = BY_NAME[TRUE_SHAPES]
    text = {
        "hidden_size": one.hidden_size,
        "intermediate_size": one.inner_size,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": one.num_heads,
        "num_key_value_heads": one.num_key_value_heads,
        "vocab_size": len(small.processor.tokenizer),
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [one.channels // 8, one.channels * 3 // 16, one.channels * 3 // 16],
            "rope_theta": 1e6,
        },
    }
    vision = {"depth": 1, "embed_dim": 64, "num_heads": 4, "hidden_size": one.hidden_size}
    made = random_model(small, {"text_config": text, "vision_config": vision}, DEVICE, torch.bfloat16)
    prefer_two_experts(made)
    return made


def prefer_two_experts(model: PlumeModel) -> None:
    with torch.no_grad():
        model.transition.router.bias.copy_(torch.tensor([4.0, 4.0, 0.0, 0.0]))


def texts(model: PlumeModel, count: int, seed: int = 0) -> dict:
    """Inputs of random words, 1 to 40 of them."""
    chosen = random.Random(seed)
    raws = [" ".join(chosen.choices(("red", "kite", "blue"), k=chosen.randint(1, 40))) for _ in range(count)]
    return dict(model.processor.encode([Item.parse(raw) for raw in raws]))


@pytest.mark.parametrize("shapes", ["2b", "7b"])
def test_every_kernel_errs_at_most_twice_as_much_as_plain_operations_in_bfloat16(shapes):
    checks = check_all(BY_NAME[shapes], GATED, dtype=torch.bfloat16, device=DEVICE)
    assert not [one for one in checks if not one.is_green]


@pytest.mark.parametrize("lengths", [[1], [64, 65, 3], [256, 257, 300] * 6], ids=len)
@pytest.mark.parametrize("num_new", [1, 5, 6])
def test_every_kernel_is_right_in_float32_at_odd_shapes(lengths, num_new):
    wide = Shapes(hidden_size=320, num_heads=5, num_key_value_heads=1, channels=64, inner_size=1088, expert_size=192)
    for shapes in (Shapes(), wide):
        for name, args in arguments(shapes, lengths, num_new=num_new, device=DEVICE).items():
            compare(name, args)


def test_kernels_give_the_same_bits_twice():
    cases = arguments(BY_NAME[TRUE_SHAPES], [300, 7, 64, 1], dtype=torch.bfloat16, device=DEVICE)
    for name, args in cases.items():
        for one, other in zip(*(tensors(kernel(name)(*args)) for _ in range(2)), strict=True):
            assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), name


@torch.inference_mode()
@pytest.mark.parametrize("num_new", [1, 6])
def test_a_row_gives_the_same_bits_alone_and_among_seven_others(model, num_new):
    layers = FusedTextLayers(text_weights(model.backbone))
    lengths = torch.tensor([300, 7, 64, 1, 256, 90, 2, 30], device=DEVICE)
    shape = LAYERS, 2, 8, layers.weights.num_key_value_heads, 512, layers.weights.channels
    kv = torch.randn(shape, device=DEVICE).bfloat16()
    embeds = torch.randn(8, num_new, len(layers.norm), device=DEVICE).bfloat16()
    found = []
    for rows in ([0, 1, 2, 3, 4, 5, 6, 7], [0], [6, 3, 0], [5, 0]):
        found.append(read(layers, kv[:, :, rows], lengths[rows], embeds[rows])[rows.index(0)])
    for other in found[1:]:
        assert torch.equal(found[0], other)


@torch.inference_mode()
@pytest.mark.parametrize("num_new", [1, 6])
def test_all_layers_err_at_most_twice_as_much_as_plain_operations(model, num_new):
    exact = copy.deepcopy(model).double()
    lengths = torch.tensor([300, 17], device=DEVICE)
    parts = text_weights(model.backbone)
    kv = torch.randn(LAYERS, 2, 2, parts.num_key_value_heads, 512, parts.channels, device=DEVICE).bfloat16()
    embeds = torch.randn(2, num_new, len(parts.norm.weight), device=DEVICE).bfloat16()
    expected = read(TextLayers(text_weights(exact.backbone)), kv.double(), lengths, embeds.double())
    plain, fused = (read(kind(parts), kv, lengths, embeds).double() for kind in (TextLayers, FusedTextLayers))
    own = (fused - expected).norm() / expected.norm()
    assert own <= 2 * (plain - expected).norm() / expected.norm()
    assert own <= 2e-2


def read(layers: TextLayers, kv: torch.Tensor, lengths: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """Hidden states of new tokens behind a cache that is filled."""
    cache = layers.new_cache(len(embeds), kv.shape[4])
    cache.kv.copy_(kv)
    if not isinstance(layers, FusedTextLayers):
        cache.kv.masked_fill_((torch.arange(kv.shape[4], device=kv.device) >= lengths[:, None])[:, None, :, None], 0)
    cache.lengths.copy_(lengths)
    places = lengths[:, None] + torch.arange(embeds.shape[1], device=kv.device)
    mask = torch.ones_like(places).bool()
    return layers.read_next(Segment(embeds, mask, places.expand(3, -1, -1).contiguous()), cache)


@torch.inference_mode()
def test_vectors_and_neighbours_are_as_near_to_those_of_float32_as_of_plain_operations(model):
    exact = Engine(copy.deepcopy(model).float(), backend="eager")
    engines = {"exact": exact, "plain": Engine(model, backend="eager"), "kernels": Engine(model, backend="triton")}
    vectors: dict[str, list] = {name: [] for name in engines}
    for seed in range(8):  # eight at a time, so that kernels take the suffix too
        batch = texts(model, 8, seed)
        results = {name: engine(batch) for name, engine in engines.items()}
        is_clear = is_clearly_routed(results["exact"].gates, model.transition.top_k)
        for name, result in results.items():
            vectors[name].append(result.embedding.float()[is_clear])
    found = {name: torch.cat(parts) for name, parts in vectors.items()}
    assert len(found["exact"]) >= 32
    own, plain = ((found[name] - found["exact"]).norm() for name in ("kernels", "plain"))
    kept, theirs = (share_of_neighbours(found[name], found["exact"]) for name in ("kernels", "plain"))
    assert own <= 2 * plain, (own, plain)
    assert kept >= theirs - 0.1, (kept, theirs)


def share_of_neighbours(found: torch.Tensor, exact: torch.Tensor, count: int = 10) -> float:
    """Share of the nearest vectors of the first twelve that are the same."""
    own, expected = ((one[:12] @ one[12:].T).topk(count).indices for one in (found, exact))
    return float((own[:, :, None] == expected[:, None]).any(dim=2).float().mean())


def is_clearly_routed(gates: torch.Tensor, top_k: int, margin: float = 0.03) -> torch.Tensor:
    """Rows `[B]` in none of whose steps rounding could decide which experts are kept; gates `[B, K, E]`."""
    ordered = gates.sort(dim=-1, descending=True).values
    return (ordered[..., top_k - 1] - ordered[..., top_k] > margin).all(dim=1)


@torch.inference_mode()
def test_a_whole_rollout_gives_the_same_bits_alone_and_among_seven_others(model):
    engine = Engine(model, backend="triton")
    lengths = torch.tensor([300, 7, 64, 1, 256, 90, 2, 30], device=DEVICE)
    kept, read_before = None, torch.randn(8, 2, model.config.hidden_size, device=DEVICE).bfloat16()
    found = []
    for rows in (list(range(8)), [0], [5, 0]):
        buffers = engine.rollout_buffers(len(rows), 400)
        kept = torch.randn_like(buffers.cache.kv) if kept is None else kept
        launch = engine.rollout_launcher(buffers, 8)
        buffers.cache.kv.fill_(torch.nan)
        buffers.cache.kv[:, :, : len(rows)] = kept[:, :, rows]
        buffers.prefix_states[: len(rows)] = read_before[rows]
        buffers.cache.lengths[: len(rows)] = lengths[rows]
        buffers.start[: len(rows)] = lengths[rows]
        buffers.num_latent_steps.fill_(8)
        result, place = launch(), rows.index(0)
        found.append((result.states[place].clone(), result.suffix[place].clone(), result.gates[place].clone()))
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert torch.equal(one, same)
            assert one.isfinite().all()


@torch.inference_mode()
@pytest.mark.parametrize("dependent_launch", [False, True])
def test_replayed_directly_launched_and_dependent_kernels_give_the_same_bits(model, monkeypatch, dependent_launch):
    if dependent_launch and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    batch = texts(model, 5)
    replaying = Engine(model, backend="triton", dependent_launch=dependent_launch)
    found = [replaying(batch).states.clone() for _ in range(3)]
    with monkeypatch.context() as patched:
        patched.setattr(graphs, "capture", lambda work, pool: work)
        expected = Engine(model, backend="triton")(batch).states
    for one in found:
        assert torch.equal(one, expected)


@torch.inference_mode()
def test_the_adapter_gives_the_bits_of_a_row_alone(model):
    layers = FusedTextLayers(text_weights(model.backbone))
    adapter = FusedExperts(join_experts(model.transition), layers)
    state = torch.randn(8, len(layers.norm), device=DEVICE).bfloat16()
    context = torch.randn_like(state)
    together = adapter(state.clone(), 0, context)[0]
    alone = adapter(state[3:4].clone(), 0, context[3:4])[0]
    assert torch.equal(together[3], alone[0])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_model_gives_its_own_vectors_whatever_stood_in_memory(tmp_path, dtype):
    """The smallest shapes that kernels take; also what compute-sanitizer looks at (`make sanitize`)."""
    save_tiny_backbone(tmp_path, ["red", "kite"], num_layers=2, vision_layers=1)
    with torch.inference_mode(False):
        small = PlumeModel.from_backbone(str(tmp_path), num_latent_steps=3, **SHORT_STRINGS).to(DEVICE).eval()
        prefer_two_experts(small)
    batch = texts(small, 8)
    there = {name: one.to(DEVICE) for name, one in batch.items()}
    exact, own = (copy.deepcopy(small).to(kind)(**there) for kind in (torch.float64, dtype))
    is_clear = is_clearly_routed(exact.gates, small.transition.top_k)
    assert is_clear.sum() >= 2
    engine = Engine(small.to(dtype), backend="triton")
    usual = (own.embedding - exact.embedding)[is_clear].norm().item()
    for _ in range(3):
        found = engine(batch).embedding
        assert (found - exact.embedding)[is_clear].norm() <= (1e-5 if dtype == torch.float32 else 2 * usual)
        for buffers in engine._buffers:
            buffers.cache.kv.fill_(torch.nan)
            buffers.prefix_states.fill_(torch.nan)

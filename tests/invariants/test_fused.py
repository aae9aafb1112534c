"""The fused ops give the vectors of the model, by their definitions on any device; what the engine does around them.

`tests/plume_kernels` holds the kernels against the definitions.
"""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from plume import Item, PlumeModel
from plume.engine.engine import Engine
from plume.engine.fused import ops
from plume.engine.fused.decoder import FusedTextLayers
from plume.engine.layers.text import TextLayers
from plume.engine.layers.weights import UnsupportedModelError, text_weights
from plume.model.interface import Segment
from plume.random_models import SHORT_STRINGS, save_tiny_backbone
from plume_eval.kernels.cases import Shapes, arguments
from plume_kernels import MODULES, tiles
from tests.processes import run


def built(tmp_path_factory, family: str = "qwen2_vl", **fields) -> PlumeModel:
    folder = tmp_path_factory.mktemp(family)
    save_tiny_backbone(folder, ["red", "kite", "blue"], family=family, num_layers=2, vision_layers=1)  # type: ignore[arg-type]
    return PlumeModel.from_backbone(str(folder), num_latent_steps=3, **{**SHORT_STRINGS, **fields}).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> PlumeModel:
    return built(tmp_path_factory)


@pytest.fixture
def anywhere(monkeypatch):
    """Lets the ops run on a CPU, as their definitions."""
    monkeypatch.setattr(ops, "unsupported_reason", lambda device, **options: None)


def batch(model: PlumeModel) -> dict:
    items = [Item.parse("red kite"), Item.parse("blue"), Item.parse("kite " * 30)]
    return dict(model.processor.encode(items))


@pytest.mark.parametrize("steps", [0, 1, 3, torch.tensor([0, 3, 1])], ids=["0", "1", "3", "mixed"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_fused_ops_give_what_the_model_gives(tmp_path_factory, anywhere, family, steps):
    model = built(tmp_path_factory, family).double()
    with torch.no_grad():
        expected = model(**batch(model), num_latent_steps=steps)
    engine = Engine(model.float(), backend="triton")
    assert engine.backend == "triton"
    found = engine(batch(model), steps)
    for name in ("embedding", "anchor_embedding", "states", "gates"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if other is not None:
            assert (one - other).norm() <= 1e-5 * other.norm(), name


@pytest.mark.parametrize(
    "fields",
    [
        {"transition": "identity"},
        {"transition": "projector"},
        {"router_context": "prefix_last"},
        {"router_context": "none"},
        {"shared_expert": False},
        {"latent_positions": "kv_length"},
        {"latents": "parallel"},
        {"latents": "parallel", "refinements": 2},
        {"latent_scale": "embedding"},
    ],
    ids=str,
)
def test_every_kind_of_adapter_runs_in_fused_ops(tmp_path_factory, anywhere, fields):
    model = built(tmp_path_factory, **fields)
    with torch.no_grad():
        expected = model(**batch(model)).embedding
    assert (Engine(model, backend="triton")(batch(model)).embedding - expected).abs().max() < 1e-5


@torch.inference_mode()
def test_more_rows_than_kernels_take_give_the_bits_of_no_kernels(model, anywhere, monkeypatch):
    monkeypatch.setattr(ops, "has_kernel", lambda name, num_rows, like: num_rows <= 2)
    monkeypatch.setattr(ops, "experts_first", None)
    monkeypatch.setattr(ops, "qkv", None)
    found, expected = (Engine(model, backend=backend)(batch(model), 3) for backend in ("triton", "eager"))
    for name in ("embedding", "states", "gates"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@torch.inference_mode()
@pytest.mark.parametrize("largest", [2, 64])
def test_captured_rollouts_keep_no_trace_and_share_no_memory_with_results(
    model, anywhere, captured, monkeypatch, largest
):
    monkeypatch.setattr(ops, "has_kernel", lambda name, num_rows, like: num_rows <= largest)
    engine = Engine(model, backend="triton")
    expected = [model(**batch(model), num_latent_steps=steps) for steps in (3, 1)]
    for _ in range(2):
        found = [engine(batch(model), steps) for steps in (3, 1)]
        for one, other in zip(found, expected, strict=True):
            assert (one.embedding - other.embedding).abs().max() < 1e-5
            assert (one.states - other.states).norm() < 1e-5 * other.states.norm()
        for buffers in engine._buffers:
            buffers.cache.kv.fill_(torch.nan)
            buffers.prefix_states.fill_(torch.nan)
    assert engine.num_captures > 0


def test_auto_takes_kernels_where_they_have_been_measured(tmp_path_factory, anywhere, captured, monkeypatch, recwarn):
    table = 64, {"qkv/64x64/4": tiles.Tile()}
    monkeypatch.setattr(tiles, "device_name", lambda tensor: "Known GPU")
    monkeypatch.setattr(tiles, "read_table", lambda device: table if device == "Known GPU" else (64, {}))
    model = built(tmp_path_factory)
    assert Engine(model).backend == "graph"  # in float32 kernels are for checking
    model = model.bfloat16()
    engine = Engine(model)
    assert engine.backend == "triton"
    assert torch.equal(engine(batch(model)).embedding, Engine(model, backend="triton")(batch(model)).embedding)
    monkeypatch.setattr(tiles, "device_name", lambda tensor: "Another")
    assert Engine(model).backend == "graph"
    monkeypatch.setattr(tiles, "device_name", lambda tensor: "Known GPU")
    monkeypatch.setattr(ops, "unsupported_reason", lambda device, **options: "no reason")
    assert Engine(model).backend == "graph"
    assert not [one for one in recwarn if "plume" in str(one.message)]


def test_stopping_early_looks_at_finished_states(model, anywhere):
    for tolerance in (1e9, 0.5, 0):
        expected = Engine(model, backend="eager", exit_tolerance=tolerance)(batch(model), 6)
        found = Engine(model, backend="triton", exit_tolerance=tolerance)(batch(model), 6)
        assert torch.equal(found.num_latent_steps, expected.num_latent_steps)
        assert (found.embedding - expected.embedding).abs().max() < 1e-5


@pytest.mark.parametrize("num_new", [1, 6])
def test_fused_ops_need_no_cleared_cache(model, anywhere, num_new):
    model = copy.deepcopy(model)
    parts = text_weights(model.backbone)
    plain, fused = TextLayers(parts), FusedTextLayers(parts)
    lengths, width = torch.tensor([1, 300, 7]), len(plain.norm)
    mask = torch.rand(3, num_new) > 0.3
    mask[:, -1] = True
    embeds, positions = torch.randn(3, num_new, width), torch.arange(num_new).expand(3, 3, -1).contiguous() + 9
    found = []
    kept = torch.randn(len(parts.layers), 2, 3, parts.num_key_value_heads, 320, parts.channels)
    is_filled = (torch.arange(320) < lengths[:, None])[:, None, :, None]  # [B, 1, L, 1]
    with torch.inference_mode():
        for layers, rest in ((plain, 0.0), (fused, torch.nan)):
            cache = layers.new_cache(3, 320)
            cache.kv.copy_(kept.where(is_filled, rest))
            cache.lengths.copy_(lengths)
            found.append(layers.read_next(Segment(embeds, mask, positions), cache)[mask])
            assert torch.equal(cache.lengths, lengths + mask.sum(dim=1))
    assert (found[0] - found[1]).abs().max() < 1e-5


@pytest.mark.parametrize("name", MODULES)
def test_torch_can_look_through_an_op(name):
    op = getattr(ops, name)
    torch.library.opcheck(
        op, arguments(Shapes(), [2, 5], num_new=2)[name], test_utils=("test_schema", "test_faketensor")
    )


def test_an_op_compiles_into_a_graph():
    args = arguments(Shapes(), [2, 5])["gate_up"]
    compiled = torch.compile(lambda *own: ops.gate_up(*own) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), ops.gate_up(*args) * 2)


def test_gradients_through_an_op_are_an_error():
    args = list(arguments(Shapes(), [2])["gate_up"])
    args[3] = args[3].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="plume"):
        ops.gate_up(*args).sum().backward()


def test_on_a_cpu_the_engine_falls_back_with_one_warning(model):
    with pytest.warns(
        UserWarning, match='backend="triton" falls back to "eager": Triton kernels need a CUDA device'
    ) as found:
        engine = Engine(model, backend="triton")
    assert len(found) == 1
    assert engine.backend == "eager"
    assert not isinstance(engine.layers, FusedTextLayers)
    with torch.no_grad():
        expected = model(**batch(model)).embedding
    assert (engine(batch(model)).embedding - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "triton is not installed; torch's CUDA builds bring it along"),
        ((3, 2), "kernels need triton 3.6, and 3.2 is installed; newer torch brings it"),
    ],
    ids=["missing", "old"],
)
def test_where_triton_is_missing_or_old_the_reason_is_told(monkeypatch, version, reason):
    monkeypatch.setattr(ops, "_TRITON", version)
    monkeypatch.setattr(ops, "_launch", None)
    assert ops.unsupported_reason(torch.device("cuda")) == reason


def test_dependent_launch_needs_a_device_that_has_it(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert ops.unsupported_reason(torch.device("cuda")) is None
    expected = "dependent_launch needs compute capability 9.0, and the device has 8.6"
    assert ops.unsupported_reason(torch.device("cuda"), dependent_launch=True) == expected


def test_experts_that_no_kernel_is_written_for_run_without_and_the_engine_says_so(tmp_path_factory, anywhere):
    model = built(tmp_path_factory, expert_hidden_size=100)
    with torch.no_grad():
        expected = model(**batch(model)).embedding
    with pytest.warns(UserWarning, match="adapter runs without kernels: .* multiple of 64; the adapter's have 100"):
        engine = Engine(model, backend="triton")
    assert engine.backend == "triton"
    assert (engine(batch(model)).embedding - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.half(), "in bfloat16 or float32, and the model is in torch.float16"),
        (lambda model: narrow(model), "multiples of 64; the hidden size is 64 and the MLP's 96"),
        (lambda model: unbiased(model), "biases of queries, keys and values alone"),
    ],
    ids=["float16", "width", "bias"],
)
def test_what_no_kernel_is_written_for_falls_back_and_says_so(model, anywhere, change, reason):
    changed = copy.deepcopy(model)
    change(changed)
    with pytest.raises(UnsupportedModelError, match=reason):
        FusedTextLayers(text_weights(changed.backbone))
    with pytest.warns(UserWarning, match=f'"triton" falls back to "eager": .*{reason}'):
        assert Engine(changed, backend="triton").backend == "eager"


def narrow(model: PlumeModel) -> None:
    for layer in model.backbone.language_model.layers:
        for name, size in (("gate_proj", (96, 64)), ("up_proj", (96, 64)), ("down_proj", (64, 96))):
            setattr(layer.mlp, name, torch.nn.Linear(size[1], size[0], bias=False))


def unbiased(model: PlumeModel) -> None:
    for layer in model.backbone.language_model.layers:
        layer.self_attn.q_proj.bias = None


def test_dependent_launch_belongs_to_the_kernels(model):
    with pytest.raises(ValueError, match="dependent_launch belongs to backend=\"triton\"; received backend='graph'"):
        Engine(model, backend="graph", dependent_launch=True)


def test_running_without_kernels_loads_none():
    code = "import sys, plume, plume.engine; sys.exit('plume_kernels.launch' in sys.modules)"
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr

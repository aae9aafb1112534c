"""The bench of the kernels, with clocks that count instead of measuring: nothing is timed on red; sums are right."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from plume import PlumeModel
from plume.engine.fused import ops, reference
from plume.random_models import SHORT_STRINGS, save_tiny_backbone
from plume_eval.kernels import cases, gate, step, timing, tuning
from plume_eval.kernels import run as bench
from plume_eval.kernels.adapter import adapter_shares
from plume_eval.speed.config import InputSize
from plume_eval.speed.floors import Device, Work
from plume_kernels import tiles

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> PlumeModel:
    folder = tmp_path_factory.mktemp("small")
    save_tiny_backbone(folder, ["red", "kite"], num_layers=2, vision_layers=1)
    return PlumeModel.from_backbone(str(folder), num_latent_steps=2, **SHORT_STRINGS).eval()


def counting(launches) -> list[float]:
    """Runs all, and says 2 microseconds."""
    for launch in launches:
        launch()
    return [1.0, 2.0, 4.0]


def test_a_wrong_kernel_is_named_and_nothing_is_timed(monkeypatch):
    right = ops.down
    monkeypatch.setattr(ops, "down", lambda *args: right(*args) + 1e-3)
    with pytest.raises(bench.GateError, match=r"nothing is timed, since kernels are wrong:\ndown \(result\), 1 x 1: "):
        bench.gate(cases.Shapes(), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_is_red(monkeypatch, value):
    monkeypatch.setattr(ops, "gate_up", lambda x, *args: torch.full((len(x), 128), value))
    with pytest.raises(bench.GateError, match="gate_up"):
        bench.gate(cases.Shapes(), dtype=torch.float32, device="cpu")


def test_a_kernel_that_rounds_its_probabilities_is_right_in_bfloat16_and_one_that_errs_more_is_not(monkeypatch):
    args = cases.arguments(cases.QWEN2_VL_2B, [300], dtype=torch.bfloat16)["attention"]
    monkeypatch.setattr(bench, "MODULES", ["attention"])
    monkeypatch.setattr(gate, "MODULES", ["attention"])
    monkeypatch.setattr(gate, "arguments", lambda *own, **more: {"attention": args})

    def kernel(error):
        def attention(queries, kv, mask, lengths):
            heads = queries.float().unflatten(1, (2, 6))  # [1, G, h, C]
            keys, values = kv[:, 0, :, :301].float()
            logits = torch.einsum("bghc,glc->bghl", heads, keys) / 128**0.5
            outputs, lse = reference.attention(queries, kv, mask, lengths)
            for split, slots in enumerate(slice(start, start + tiles.SPLIT) for start in range(0, 301, tiles.SPLIT)):
                raised = (logits[..., slots] - logits[..., slots].amax(-1, keepdim=True)).exp()
                summed = torch.einsum("bghl,glc->bghc", raised.bfloat16().float(), values[:, slots])
                outputs[split] = (summed / raised.sum(-1, keepdim=True)).flatten(1, 2) * (1 + error)
            return outputs, lse

        return attention

    for error, is_green in ((0, True), (1e-2, False)):
        monkeypatch.setattr(ops, "attention", kernel(error))
        checks = gate.check_all(cases.QWEN2_VL_2B, [(1, 1)], dtype=torch.bfloat16, device="cpu")
        assert all(one.is_green for one in checks) == is_green, checks


@pytest.mark.slow
def test_every_kernel_is_timed_in_every_way_against_the_bytes_it_moves(monkeypatch, small, tmp_path):
    monkeypatch.setattr(ops, "unsupported_reason", lambda device, **options: None)
    checks = bench.gate(cases.Shapes(), dtype=torch.float32, device="cpu")
    rows = bench.time_kernels(cases.Shapes(), [1, 3], 1e9, dtype=torch.float32, device="cpu", clock=counting)
    assert len(rows) == 2 * 8 * 3
    many = bench.time_kernels(cases.Shapes(), [70], 1e9, dtype=torch.float32, device="cpu", clock=counting)
    assert {one["kernel"] for one in many if one["implementation"] == "kernel"} == {
        "attention",
        "final_norm",
    }  # others are cuBLAS's
    down = next(one for one in rows if one["kernel"] == "down" and one["batch_size"] == 3)
    moved = 4 * (3 * 128 + 64 * 128 + 3 * 64 + 3 * 64)  # activations, weight, stream in and out
    assert down["bytes"] == moved
    assert down["floor_us"] == pytest.approx(moved / 1e3)
    assert down["median_us"] == 2

    monkeypatch.setattr(ops, "unsupported_reason", lambda device, **options: None)
    steps = bench.time_steps(
        small,
        [2],
        Work.of(small),
        Device(1e9, 1e12),
        clock=lambda *both: [one() for one in both] and 7.0,
        implementations=["eager"],
    )
    assert steps[0]["step_us"] == 0  # one call is as long as the other
    result = {
        "gate": [vars(one) for one in checks],
        "bytes_per_s": 1e9,
        "operations_per_s": 1e12,
        "kernels": rows,
        "steps": [{**steps[0], "step_us": 3.0}],
        "shares_us": {"down": 1.0},
        "node_us": 1.5,
    }
    path = bench.write(result, tmp_path, "tiny", "kernels/bench.py")
    assert json.loads(path.with_suffix(".json").read_text())["results"]["kernels"]
    assert "| down | 3 | kernel | 2.0 |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_a_step_is_what_eight_more_steps_take(small, monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "unsupported_reason", lambda device, **options: None)
    own = ops.gate_up
    monkeypatch.setattr(ops, "gate_up", lambda *args: calls.append(1) or own(*args))

    def clock(before, work):
        before()
        calls.clear()
        work()
        return float(len(calls))

    assert step.Steps(small, "triton", 2, 20, clock).step_us() == 2  # layers
    with step.left_out("gate_up"):
        assert step.Steps(small, "triton", 2, 20, clock).step_us() == 0
    assert ops.gate_up is not own


@pytest.mark.slow
def test_a_compiled_step_gives_the_states_of_a_plain_one(small, captured):
    compiled = step.Steps(small, "compiled", 2, 20, lambda *both: 1.0, compile_backend="aot_eager")
    plain = step.Steps(small, "graph", 2, 20)
    assert compiled.step_us() == 0  # runs
    with torch.inference_mode():
        plain.buffers.cache.kv.copy_(compiled.buffers.cache.kv)
        plain.buffers.prefix_states.copy_(compiled.buffers.prefix_states)
        found = []
        for one in (compiled, plain):
            launch = one.engine.rollout_launcher(one.buffers, 2)
            one._reset(2)
            found.append(launch().states.clone())
    assert (found[0] - found[1]).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:plume")
@pytest.mark.parametrize("implementation", ["graph", "triton"])
def test_a_step_is_not_timed_under_the_name_of_what_could_not_be_run(small, implementation):
    with pytest.raises(RuntimeError, match=f"{implementation} could not be run: the engine fell back to eager"):
        step.Steps(small, implementation, 2, 20)


def test_the_share_of_an_op_is_what_a_step_saves_without_it(small, monkeypatch):
    monkeypatch.setattr(ops, "unsupported_reason", lambda device, **options: None)
    counts = dict.fromkeys(("down", "experts_second"), 0)
    for name in counts:
        own = getattr(ops, name)

        def count(*args, own=own, name=name):
            counts[name] += 1
            return own(*args)

        monkeypatch.setattr(ops, name, count)

    def clock(before, work):
        before()
        counts.update(dict.fromkeys(counts, 0))
        work()
        return float(sum(counts.values()))

    found = step.shares(small, 1, 20, clock)
    assert found["down"] == 2
    assert found["experts_second"] == 1
    assert found["qkv"] == 0


def test_the_adapters_share_of_training_is_a_share(small):
    own = copy.deepcopy(small).train()
    (found,) = adapter_shares(own, {"text": InputSize(tokens=30)}, [2], num_steps=2, num_runs=1)
    assert found["num_tokens"] == 30
    assert 0 < found["adapter_ms"] < found["step_ms"]
    assert found["share"] == found["adapter_ms"] / found["step_ms"]


def test_bytes_are_those_that_must_be_moved():
    args = cases.arguments(cases.Shapes(), [100, 20], num_slots=512)
    attention = timing.num_bytes("attention", args["attention"])
    # Queries, slots, outputs of four splits.
    assert attention == 4 * (2 * 4 * 16 + 2 * (101 + 21) * 2 * 16 + 4 * 2 * 4 * 16)
    assert timing.num_bytes("qkv", args["qkv"]) < args["qkv"][9].nbytes + 4 * 128 * 64 + 10_000
    few, all_used = (timing.num_bytes("experts_first", args["experts_first"], count) for count in (3, 5))
    assert all_used - few == 2 * 4 * (128 * 64 + 128 + 2 * 128)  # two experts less: weights, biases, inner activations


def test_the_bytes_and_times_in_the_readme_are_those_that_are_counted_and_measured():
    lines = (ROOT / "kernels" / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    told = {row[0].strip("`"): [float(cell) for cell in row[2:8]] for row in rows if len(row) == 8}
    measured = json.loads((ROOT / "eval" / "results" / "kernels_2b_cuda_202611.json").read_text())["results"]["kernels"]
    assert set(told) == {*tuning.products(cases.QWEN2_VL_2B), "attention"}
    for place, size in ((0, 1), (3, 8)):
        times = {
            row["kernel"]: row["median_us"]
            for row in measured
            if row["batch_size"] == size and row["implementation"] == "kernel"
        }
        args = cases.arguments(cases.QWEN2_VL_2B, [300] * size, num_slots=512, dtype=torch.bfloat16)
        for name, numbers in told.items():
            used = 3 if size == 1 and name.startswith("experts") else None  # all five in a batch of eight
            moved = timing.num_bytes(name, args[name], used)
            assert numbers[place] == pytest.approx(moved / 1e6, abs=0.006), name
            assert numbers[place + 1] == pytest.approx(moved / 4.3e6, abs=0.06), name
            assert numbers[place + 2] == pytest.approx(times[name], abs=0.051), name


def test_tuning_takes_the_fastest_tile_that_is_right(monkeypatch):
    monkeypatch.setattr(tuning, "kernel", lambda name: lambda *args: run(name, args))
    monkeypatch.setattr(tuning, "CROSSOVER_ROWS", (16, 32))
    monkeypatch.setattr(tuning, "num_copies", lambda args: 2)
    definitions = {name: getattr(ops, name) for name in tuning.products(cases.Shapes())}
    wrong, too_large = tiles.Tile(16, 64, 128, 4, 3), tiles.Tile(16, 32, 256, 4, 3)

    def forced(name):
        return tiles._forced.get(name)

    def run(name, args):
        if forced(name) == too_large:
            raise OutOfResources(300_000, 232_448, "shared memory")
        result = definitions[name](*args)
        return result + 1 if name == "gate_up" and forced(name) == wrong else result

    def clock(launches):
        for launch in launches:
            launch()
        own = next(iter(tiles._forced.values()), None)
        return [0.5 if own == wrong else 1.0 if own and own.block_k == 256 else 3.0]

    told = []
    table = tuning.tune([cases.Shapes()], definitions, device="cpu", clock=clock, report=told.append)
    best = table["tiles"]["gate_up/128x64/16"]
    assert best["block_k"] == 256
    assert best["block_n"] == 16  # the larger one does not run, and the fastest one is wrong
    assert any("gate_up/128x64/16: 1.0 us" in line for line in told)
    assert table["largest_rows"] == 64  # at least, so that rows do not depend on their batch
    late = tuning.tune([cases.Shapes()], definitions, device="cpu", clock=clock, time_limit_s=-1, report=told.append)
    assert late["tiles"] == {}
    assert "time is up" in told[-4]

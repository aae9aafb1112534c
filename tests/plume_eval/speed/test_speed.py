"""The latency bench: what it compares agrees, what it reports follows from what it measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from plume import PlumeModel
from plume.engine.engine import Engine
from plume_eval.__main__ import app
from plume_eval.speed import run as bench
from plume_eval.speed.cases import make_items, make_model
from plume_eval.speed.clock import Timing, num_launches
from plume_eval.speed.config import ConfigError, InputSize, LatencyConfig, Limit, read_config
from plume_eval.speed.floors import Device, Work
from plume_eval.speed.implementations import Compiled, Implementation, ImplementationError, InEngine, build
from plume_eval.speed.reference import embed_one
from plume_eval.speed.writing import Writer

CONFIGS = Path(__file__).parents[3] / "configs" / "eval"
CPU_IMPLEMENTATIONS = ("reference", "transformers", "compiled", "eager")


@pytest.fixture(scope="module")
def config() -> LatencyConfig:
    return replace(
        read_config(CONFIGS / "latency_tiny.yaml"), num_runs=2, num_written_tokens=6, max_seconds_per_case=3600.0
    )


@pytest.fixture(scope="module")
def model(config):
    return make_model(config, "cpu")


@pytest.fixture(scope="module")
def result(config):
    smaller = {name: config.inputs[name] for name in ("text", "image")}
    return bench.run_bench(replace(config, inputs=smaller), show_progress=False)


@pytest.mark.parametrize("name", CPU_IMPLEMENTATIONS)
def test_every_way_gives_the_vectors_of_the_model(model, config, name):
    items = [item for size in config.inputs.values() for item in make_items(model.processor, size, 2)]
    one, baseline = build(name, model, config), build("transformers", model, config)
    for steps in (0, 1, 4):
        expected = model(**baseline.prepare(items)[0], num_latent_steps=steps).embedding
        assert torch.allclose(one.embed(one.prepare(items), steps), expected, atol=1e-5)


@pytest.mark.parametrize("name", CPU_IMPLEMENTATIONS)
def test_every_way_writes_the_same_rationale_forced_or_not(model, config, name):
    items = make_items(model.processor, config.inputs["image"], 3)
    one, baseline = build(name, model, config), build("transformers", model, config)
    first = baseline.write(baseline.prepare(items), 5, stops=False)
    assert first[1] == 5
    # A model that says <gen_emb> at once: writing stops there, unless its length is forced.
    head = model.get_input_embeddings().weight
    state = model(**baseline.prepare(items)[0], num_latent_steps=0).states[:, 0].mean(dim=0)
    kept = head[model.config.read_out_token_id].clone()
    try:
        for read_out in (False, True):
            if read_out:
                head.data[model.config.read_out_token_id] = 100 * state
            for stops in (False, True):
                expected, count = baseline.write(baseline.prepare(items), 5, stops=stops)
                found, own_count = one.write(one.prepare(items), 5, stops=stops)
                assert own_count == count
                assert torch.allclose(found, expected, atol=1e-5)
                if not stops:
                    assert count == 5
    finally:
        head.data[model.config.read_out_token_id] = kept


def test_the_reference_asks_the_device_and_uses_the_head_on_the_whole_prefix(model, config, monkeypatch):
    asked, widths = [], []
    original = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: asked.append(1) or original(self))
    logits = PlumeModel.logits
    monkeypatch.setattr(
        PlumeModel, "logits", lambda self, hidden: widths.append(hidden.shape[1]) or logits(self, hidden)
    )
    (batch,) = build("reference", model, config).prepare(make_items(model.processor, InputSize(tokens=60), 1))
    embed_one(model, batch, 3)
    assert widths[0] == 60
    assert len(asked) >= 3 * model.config.top_k * model.config.num_experts


def test_a_writer_stops_when_all_rows_are_done_and_remembers_how_long_each_was(model, config):
    engine = Engine(model)
    items = make_items(model.processor, config.inputs["text"], 2)
    embedding, count = Writer(engine)(dict(model.processor.encode(items)), 3, stops=False)
    assert embedding.shape == (2, model.config.hidden_size)
    assert count.tolist() == [3, 3]


def test_inputs_have_the_sizes_asked_for_and_differ(model, config):
    for name, size in config.inputs.items():
        batch = model.processor.encode(make_items(model.processor, size, 3))
        if name != "video":
            assert batch["attention_mask"].sum(dim=1).tolist() == [size.tokens] * 3, name
        if size.pixels is None:
            assert len({tuple(row.tolist()) for row in batch["input_ids"]}) == 3
        else:
            pixels = batch["pixel_values_videos" if size.num_frames else "pixel_values"].chunk(3)
            assert not torch.equal(pixels[0], pixels[1])


def test_the_real_shapes_have_the_published_numbers_of_parameters():
    from transformers import Qwen2VLConfig, Qwen2VLModel

    from plume.random_models import SHAPES_2B, SHAPES_7B

    for shapes, billions in ((SHAPES_2B, 2.21), (SHAPES_7B, 7.75)):
        with torch.device("meta"):
            count = sum(one.numel() for one in Qwen2VLModel(Qwen2VLConfig(**shapes)).parameters())
        assert abs(count / 1e9 - billions) < 0.01


def test_floors_are_those_of_the_shapes_in_the_reference():
    """One latent step of Qwen2-VL-2B on an H200 (4.3 TB/s, 790 TFLOP/s): 0.625 ms at batch 1, 0.894 at 128."""
    work = Work(
        text=1_310_000_000, head=233_000_000, expert=9_440_000, num_experts=4, top_k=2, has_shared_expert=True,
        vision=631_000_000, merger=34_000_000, patches_per_token=4, hidden_size=1536, num_layers=28,
        cached_per_token=14_336, vision_width=1280,
        vision_depth=32, bytes_per_number=2,
    )  # fmt: skip
    h200 = Device(4.3e12, 790e12)
    for rows, context, expected in ((1, 300, 0.625), (8, 300, 0.648), (128, 300, 0.894), (128, 1300, 1.748)):
        assert work.pass_ms(h200, rows, context, adapter=True, head=False) == pytest.approx(expected, rel=0.02)
    assert work.rollout_ms(h200, 1, 300, 8, 5) == pytest.approx(5.0, rel=0.02)
    assert work.rollout_ms(h200, 1, 300, 0, 5) == 0
    assert work.vision_ms(h200, (1024,)) == pytest.approx(1.9, rel=0.05)
    assert work.prefill_ms(h200, 1, 300) == pytest.approx(1.0, rel=0.05)


def test_percentiles_are_those_of_the_runs():
    timing = Timing([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (timing.median_ms, timing.percentile(0), timing.percentile(1)) == (3.0, 1.0, 5.0)


def test_launches_leave_out_views():
    x = torch.ones(4, 4)
    assert num_launches(lambda: (x.T.view(4, 2, 2)[0] + 1).relu(), x.device) == 2


def test_the_engine_launches_a_third_less_than_transformers_does(model, config):
    (batch,) = build("eager", model, config).prepare(make_items(model.processor, InputSize(tokens=60), 1))
    counts = {}
    for name in ("transformers", "eager"):
        one = build(name, model, config)
        few, many = (num_launches(lambda k=k, one=one: one.embed([batch], k), torch.device("cpu")) for k in (1, 2))
        counts[name] = many - few
    assert 0 < counts["eager"] < 0.7 * counts["transformers"]  # both with the adapter's operations


def test_a_bench_times_each_case_and_its_ratios_follow_from_them(result, config):
    cases = {
        (one["input"], one["batch_size"], one["implementation"], one["mode"], one["count"]): one
        for one in result["cases"]
    }
    assert len(cases) == len(result["cases"]) > 60
    for one in cases.values():
        assert one["num_runs"] == 2
        assert 0 < one["p20_ms"] <= one["median_ms"] <= one["p80_ms"]
        if one["floor_ms"] is not None:
            assert one["times_floor"] == one["median_ms"] / one["floor_ms"]
    for one in result["comparisons"]:
        latent = {
            name: cases[one["input"], one["batch_size"], name, "latent", config.main_steps]["median_ms"]
            for name in CPU_IMPLEMENTATIONS
        }
        assert one["best_latent"] == min(latent, key=latent.__getitem__)
        assert one["reference_latent_to_best"] == latent["reference"] / min(latent.values())
    whole = next(one for one in result["comparisons"] if one["batch_size"] == 1)
    assert whole["reference_explicit_to_latent"] > 0
    stage = next(one for one in result["stages"] if (one["implementation"], one["input"]) == ("eager", "image"))
    again = [cases["image", 1, "eager", "latent", k]["median_ms"] for k in (0, 1, 4)]
    total = stage["vision_ms"] + stage["prefill_ms"] + stage["suffix_ms"] + stage["step_ms"]
    assert total == pytest.approx(again[1])
    assert stage["step_ms"] == pytest.approx((again[2] - again[1]) / 3)


def test_a_way_with_other_vectors_is_not_timed(config, monkeypatch):
    monkeypatch.setattr(Implementation, "embed", lambda self, batches, steps: torch.randn(2, 64))
    with pytest.raises(bench.GateError, match=r"has cosine .* expected 0\.9999 in float32; nothing is timed"):
        bench.run_bench(config, show_progress=False)


def test_a_way_of_others_that_fails_is_left_out_and_named_and_our_own_is_an_error(config, monkeypatch):
    def fails(self, batch, steps):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(Compiled, "_embed", fails)
    few = replace(
        config, inputs={"text": InputSize(tokens=20)}, batch_sizes=(1,), implementations=("compiled", "eager")
    )
    found = bench.run_bench(few, show_progress=False)
    assert found["left_out"] == ["compiled: RuntimeError: no compiler"]
    assert {one["implementation"] for one in found["cases"]} == {"eager"}
    monkeypatch.setattr(InEngine, "_embed", fails)
    with pytest.raises(RuntimeError, match="no compiler"):
        bench.run_bench(few, show_progress=False)


def test_an_engine_that_falls_back_is_not_timed_as_graphs(model, config):
    one = build("eager", model, config)
    batches = one.prepare(make_items(model.processor, InputSize(tokens=20), 1))
    one._backend = "graph"  # as it was when it began
    for run in (lambda: one.embed(batches, 1), lambda: one.write(batches, 1, stops=False)):
        with pytest.raises(ImplementationError, match="graph could not be run: the engine fell back to eager"):
            run()


def test_a_way_is_measured_for_what_its_limit_allows(config):
    limited = replace(
        config,
        inputs={"text": config.inputs["text"], "image": replace(config.inputs["image"], batch_sizes=(1,))},
        implementations=("transformers", "eager"),
        limits={"transformers": Limit(inputs=("text",), batch_sizes=(4,))},
    )
    found = bench.run_bench(limited, show_progress=False)
    measured = {(one["implementation"], one["input"], one["batch_size"]) for one in found["cases"]}
    assert {one[1:] for one in measured if one[0] == "transformers"} == {("text", 4)}
    assert {one[1:] for one in measured if one[0] == "eager"} == {("text", 1), ("text", 4), ("image", 1)}
    preparing = [
        (one["implementation"], one["input"], one["batch_size"]) for one in found["cases"] if one["mode"] == "preparing"
    ]
    assert preparing == [("eager", "text", 1), ("eager", "image", 1), ("transformers", "text", 4)]  # shared where both
    assert all(one["preparing_ms"] > 0 for one in found["stages"])


def test_what_time_does_not_allow_is_named(config):
    found = bench.run_bench(replace(config, time_limit_s=0.0), show_progress=False)
    assert found["cases"] == []
    assert "video at batch size 4: time is up" in found["left_out"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shapes: huge", "shapes is 'huge'; expected one of tiny, mid, 2b, 7b"),
        ("model: a\nshapes: tiny", "give one of model and shapes"),
        ("shapes: tiny\nimplementations: [eagre]", "implementations holds 'eagre'; expected some of reference"),
        ("shapes: tiny\nbatchsizes: [1]", "unknown field 'batchsizes'; did you mean 'batch_sizes'?"),
        ("shapes: tiny\nwritten_inputs: [page]", "written_inputs holds 'page'; inputs are text"),
        ("shapes: tiny\nbatch_sizes: []", "at least one input and batch sizes from 1"),
        ("shapes: tiny\ninputs: {text: {length: 3}}", "length"),
        ("shapes: tiny\nlimits: {graph: {inputs: [text]}}", "limits holds 'graph'; implementations are reference"),
        ("shapes: tiny\nspeed: 3", "unknown field 'speed'; known are model"),
        ("shapes: [", "is not YAML"),
    ],
)
def test_a_configuration_that_cannot_be_measured_is_named_with_its_file(tmp_path, text, message):
    path = tmp_path / "bench.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"{path}.*{re.escape(message)}"):
        read_config(path)


@pytest.mark.parametrize("implementation", ["graph", "triton", "dependent"])
def test_graphs_without_a_gpu_are_an_error(config, implementation):
    with pytest.raises(ConfigError, match=f"{implementation} needs a CUDA device"):
        bench.run_bench(replace(config, implementations=(implementation,)), show_progress=False)


def test_a_model_of_parallel_latents_is_refused(config, plume_folder, tmp_path):
    model, _ = PlumeModel.from_pretrained(plume_folder).reconfigured(latents="parallel")
    model.save_pretrained(tmp_path / "parallel")
    with pytest.raises(ConfigError, match="has parallel latents, and the bench measures sequential ones"):
        bench.run_bench(replace(config, model=str(tmp_path / "parallel"), shapes=None), show_progress=False)


def test_the_command_prints_a_table_and_one_json_object_and_writes_a_picture(tmp_path):
    path = tmp_path / "bench.yaml"
    path.write_text(
        "shapes: tiny\nimplementations: [transformers, eager]\ninputs: {text: {tokens: 20}}\nbatch_sizes: [1]\n"
        "num_latent_steps: [1, 2]\nmain_steps: 2\nnum_written_tokens: 3\nnum_runs: 2\n"
    )
    done = CliRunner().invoke(app, ["latency", "--config", str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["comparisons"][0]["best_latent"] in ("transformers", "eager")
    (picture,) = (tmp_path / "out").glob("latency_tiny_cpu_*.png")
    assert picture.stat().st_size > 10_000
    written = json.loads(picture.with_suffix(".json").read_text())
    assert written["command"].startswith("plume-eval latency")
    assert "| text, 20 tokens | 1 | eager |" in picture.with_suffix(".md").read_text()
    failed = CliRunner().invoke(app, ["latency", "--config", str(tmp_path / "none.yaml")])
    assert failed.exit_code == 1
    assert "none.yaml is no file of settings" in failed.stderr

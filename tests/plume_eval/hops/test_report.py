"""The report of the grid: what it makes of results whose truth is known."""

from __future__ import annotations

import json
import shutil
from functools import partial

import numpy as np
import pytest
from typer.testing import CliRunner

import plume_hops
from plume_eval.__main__ import app
from plume_eval.hops.make import Sizes
from plume_eval.hops.report import (
    CLAIMS,
    MAIN,
    QUESTIONS,
    Claim,
    estimate,
    judge,
    read_results,
    rights,
    write_text,
)
from plume_hops import mode_of, settings, systems

HOPS = [1, 2] * 100


def result(system, seed, share):
    rng = np.random.default_rng([seed, int(1000 * share)])
    right = "".join("1" if draw < share else "0" for draw in rng.random(len(HOPS)))
    read = {"right": {"name": right}, "num_hops": HOPS, "num_queries": 200, "num_candidates": 9, "num_layers": 2}
    read["by_start"] = {"name": {"named": {"mean": share}}}
    read["best_rule"] = {"rule": "start", "recall_at_1": 0.1}
    read["best_rule"]["by_hops"] = {count: {"rule": "start", "recall_at_1": 0.1} for count in "12"}
    whole = {"family": "page", "system": system, "seed": seed, "mode": "latent", "num_latent_steps": 6, "minutes": 3.0}
    return {**whole, "result": read, "at_zero": {"result": read}, "control": {"recall_at_1": {"mean": 0.9}}}


@pytest.fixture
def grid(tmp_path):
    for system, share in (("latent", 0.9), ("explicit_long", 0.9), ("parallel", 0.3), ("no_latents", 0.9)):
        for seed in range(3):
            folder = tmp_path / "runs" / str(seed) / system
            folder.mkdir(parents=True)
            (folder / "hops.json").write_text(json.dumps(result(system, seed, share)))
    return tmp_path / "runs"


def test_a_claim_is_judged_by_its_interval(grid):
    runs = read_results(grid)["page"]
    assert judge(Claim("", "latent", "parallel"), runs)[0] == "holds"
    assert judge(Claim("", "parallel", "latent"), runs)[0] == "does not hold"
    assert judge(Claim("", "latent", "no_latents"), runs)[0] == "undecided"
    assert judge(Claim("", "parallel", "latent", margin=0.02), runs)[0] == "does not hold"
    few = {system: {0: of_system[0]} for system, of_system in runs.items()}
    assert judge(Claim("", "latent", "parallel"), few)[0] == "no verdict: 1 seed of at least 3"
    assert judge(Claim("", "latent", "explicit_long", margin=0.2), runs)[0] == "holds"
    assert judge(Claim("", "latent", "single_pass"), runs) == ("not run (single_pass)", None)


def test_public_sets_stand_beside_published_figures(tmp_path):
    for seed, share in ((0, 0.5), (1, 0.7)):
        found = result("latent", seed, share)
        found["result"]["of_choices"] = {
            "name": {"all": {"mean": share}, "task 2": {"mean": share}, "task 15": {"mean": 1.0}}
        }
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "hops.json").write_text(json.dumps({**found, "family": "babi", "control": None}))
    text, _, _ = write_text(tmp_path)
    assert "| task 2 | 60.0 | 20 | 83 | 98.3 |\n| task 15 | 100.0 | 21 | 100 | 98.4 |" in text


def test_intervals_are_students_over_seeds_and_over_questions_with_too_few():
    apart = np.stack([np.full(200, 0.4), np.full(200, 0.5), np.full(200, 0.6)])
    found = estimate(apart)
    assert found.mean == pytest.approx(0.5)
    assert found.high - found.mean == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert estimate(np.tile([1.0, 0.0], (1, 100))).high < 0.6


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_where_nothing_differs_few_verdicts_say_so(num_seeds):
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        shares = 0.6 + 0.08 * rng.standard_normal((2, num_seeds, 1))
        better, worse = (rng.random((2, num_seeds, 200)) < shares).astype(float)
        difference = estimate(better - worse)
        wrong += difference.low > 0 or difference.high < 0
    assert wrong / 300 < 0.09


def test_rights_are_in_the_order_of_seeds(grid):
    runs = read_results(grid)["page"]["latent"]
    assert rights(runs, lambda one: one["result"]).shape == (3, 200)


def test_the_command_writes_tables_and_pictures(grid, tmp_path):
    said = CliRunner().invoke(app, ["report", str(grid), "--out", str(tmp_path / "out")])
    assert said.exit_code == 0, said.output
    (table,) = (tmp_path / "out").glob(f"{grid.name}_*.md")
    text = table.read_text()
    assert "| start named | start shown |" in text
    assert "| 0.30 |  |" in text
    assert "about: 2. A single pass can follow as many hops if each layer follows one, and at most 3" in text
    assert "| the latent transition matters (61.6, without 58.8) | page |" in text
    assert "not run (stages_1)" in text
    assert "best rule (start)" in text
    assert list((tmp_path / "out").glob(f"{grid.name}_*_page.png"))
    wrong = CliRunner().invoke(app, ["report", str(tmp_path / "out"), "--out", str(tmp_path / "x")])
    assert wrong.exit_code == 1
    assert "holds no hops.json; run `plume-hops --out" in wrong.output


def test_systems_are_trained_measured_and_reported(tmp_path, monkeypatch):
    """The whole way of the grid, with a few records and twelve steps of each training."""
    own = settings

    def shorter(*args):
        found = own(*args)
        found.max_steps, found.per_device_train_batch_size, found.lr_scheduler_kwargs = 12, 4, {}
        found.lr_scheduler_type = "constant"
        return found

    monkeypatch.setattr(plume_hops, "settings", shorter)
    monkeypatch.setattr(plume_hops, "Sizes", partial(Sizes, num_validation=2, num_test=12))
    plume_hops.prepare(tmp_path, "page", 0, 48)
    found = {system: plume_hops.run_system(tmp_path, "page", 0, system) for system in ("parallel", "no_latents")}
    assert found["parallel"]["mode"] == "latent"
    assert found["parallel"]["num_latent_steps"] == 6
    assert len(found["parallel"]["at_zero"]["result"]["right"]["name"]) == 12
    assert found["no_latents"]["mode"] == "single_pass"
    runs = read_results(tmp_path)["page"]
    assert set(runs) == {"explicit", "parallel", "no_latents"}  # explicit is what the others start from
    minutes = runs["parallel"][0]["minutes"]
    assert plume_hops.run_system(tmp_path, "page", 0, "parallel")["minutes"] == minutes  # not trained again
    shutil.rmtree(tmp_path / "page" / "0" / "no_latents")
    for file in (tmp_path / "page" / "0" / "explicit").iterdir():  # as where results were copied without models
        if file.name != "hops.json":
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    with pytest.raises(ValueError, match="holds a result without its model, and systems can be compared only if"):
        plume_hops.run_system(tmp_path, "page", 0, "no_latents")
    assert not (tmp_path / "page" / "0" / "no_latents").exists()
    with pytest.raises(ValueError, match="holds 48 training records; received --num-train 8; name another --out"):
        plume_hops.prepare(tmp_path, "page", 0, 8)


def test_every_system_that_is_compared_is_a_configuration(tmp_path):
    known = systems()
    assert set(MAIN) <= set(known)
    assert {system for claim in (*CLAIMS, *QUESTIONS) for system in (claim.better, claim.worse)} <= set(known)
    for system in known:
        args = settings(tmp_path, "video", 3, system)
        assert str(args.output_dir) == str(tmp_path / "video" / "3" / system)
        assert args.seed == 3
        rows = "3/mined/rows" if system == "mined" else "data"
        assert args.train_file[0] == str(tmp_path / "video" / rows / "train.jsonl")
        assert args.model.startswith(str(tmp_path / "video" / "3"))
    assert mode_of(settings(tmp_path, "page", 0, "explicit")) == "explicit"
    assert mode_of(settings(tmp_path, "page", 0, "no_latents")) == "single_pass"
    assert mode_of(settings(tmp_path, "page", 0, "steps_2")) == "latent"

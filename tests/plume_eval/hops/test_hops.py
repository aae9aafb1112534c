"""The built-in task: its logic, its files, its numbers."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from plume import PlumeModel
from plume_eval.__main__ import app
from plume_eval.hops.inside import look_inside
from plume_eval.hops.make import make_page_task
from plume_eval.hops.page import draw_page, make_page, question, rationale
from plume_eval.hops.run import HopsTask, evaluate
from plume_eval.hops.settings import TOLERANCES, compare_settings
from plume_eval.hops.symbols import BACKGROUND, TILE, alphabet, draw_symbol
from plume_train.data.records import Records


def test_a_path_follows_the_table():
    symbols = alphabet(9)
    page = make_page(symbols, random.Random(0))
    table = dict(page.rows)
    path = page.path(symbols[3], 4)
    assert len(path) == 5
    assert all(table[a] == b for a, b in itertools.pairwise(path))
    assert set(table) == set(symbols)
    sentences = [f"{b.name} follows {a.name}." for a, b in itertools.pairwise(path)]
    assert rationale(path) == " ".join(sentences)
    assert question(path[0], 4) == f"start at {symbols[3].name} and follow the table 4 times"


def test_symbols_look_different_and_stand_where_the_page_says():
    symbols = alphabet(36)
    assert len({symbol.name for symbol in symbols}) == 36
    assert len({draw_symbol(symbol).tobytes() for symbol in symbols}) == 36
    page = make_page(symbols[:9], random.Random(0))
    picture = draw_page(page)
    assert picture.size == (3 * TILE, 3 * TILE)
    key, value = page.rows[4]
    half = TILE // 2
    assert picture.crop((TILE, TILE, TILE + half, 2 * TILE)) == draw_symbol(key, half, TILE)
    assert picture.crop((TILE + half, TILE, 2 * TILE, 2 * TILE)) == draw_symbol(value, half, TILE)
    assert picture.getpixel((0, 0)) == BACKGROUND


def test_the_files_are_what_the_trainer_reads_and_share_no_page(hops_folder):
    train, test = (Records(hops_folder / f"{split}.jsonl") for split in ("train", "test"))
    pages = [{record.query.images[0].read_bytes() for record in records} for records in (train, test)]
    assert len(pages[0]) == 12
    assert not pages[0] & pages[1]
    for record, line in zip(train, (hops_folder / "train.jsonl").read_text().splitlines(), strict=True):
        path = json.loads(line)["path"]
        reached = [sentence.split()[0] for sentence in record.query.rationale.split(". ")]
        assert reached == path[1:]
        assert record.query.answer == path[-1]
        if record.task == "hops/page-name":
            assert record.target.text == path[-1]
        else:
            assert record.target.images[0].stem == path[-1]


def test_the_same_seed_makes_the_same_files(tmp_path, hops_folder):
    make_page_task(tmp_path / "again", num_train=12, num_test=6, num_symbols=4, num_hops=2, show_progress=False)
    assert (tmp_path / "again" / "train.jsonl").read_text() == (hops_folder / "train.jsonl").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hops": 0}, "num_hops must be at least 1; received 0"),
        ({"num_symbols": 40, "num_hops": 2}, "num_symbols must lie in 2..36; received 40"),
        ({"num_symbols": 2, "num_hops": 1, "num_train": 100}, "fewer than 101 different pages"),
    ],
)
def test_a_task_that_cannot_be_made_is_refused(tmp_path, changes, message):
    sizes = {"num_train": 2, "num_test": 1, "num_symbols": 4, "num_hops": 2, "show_progress": False}
    with pytest.raises(ValueError, match=message):
        make_page_task(tmp_path / "x", **{**sizes, **changes})


def test_what_stands_in_the_folder_of_a_new_data_set_is_not_overwritten(hops_folder, tmp_path):
    (tmp_path / "train.jsonl").write_text("mine")
    for folder in (hops_folder, tmp_path):
        with pytest.raises(FileExistsError, match="is not an empty folder; name a new one"):
            make_page_task(folder, num_train=1, num_test=1)
    assert (tmp_path / "train.jsonl").read_text() == "mine"


def test_recall_counts_right_answers_and_a_constant_model_gets_none(plume_folder, hops_folder, monkeypatch):
    task = HopsTask(hops_folder)
    model = PlumeModel.from_pretrained(plume_folder).eval()
    answers = iter([task.paths[:, -1], list(range(4)), task.paths[:, 0] * 0, [0] * 4])

    def fake(model, items, mode, **settings):
        from plume_eval.baselines import Embedded

        index = torch.as_tensor(next(answers))
        whole = torch.ones(len(index), dtype=torch.bool)
        return Embedded(torch.eye(4)[index], torch.zeros(len(index)), whole)

    monkeypatch.setattr("plume_eval.hops.run.embed", fake)
    assert evaluate(model, task, forms=("name",))["recall_at_1"]["name"]["mean"] == 1
    assert evaluate(model, task, forms=("name",))["recall_at_1"]["name"]["mean"] == 0


def test_what_states_hold_is_a_probability(plume_folder, hops_folder):
    inside = look_inside(PlumeModel.from_pretrained(plume_folder).eval(), HopsTask(hops_folder))
    assert inside.held.shape == (5, 3)
    assert inside.gates.shape == (4, 4)
    assert ((inside.held >= 0) & (inside.held <= 1)).all()
    assert inside.gates.sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_the_commands_make_and_run_a_task(tmp_path, plume_folder):
    runner = CliRunner()
    made = ["hops", "make", "--out", str(tmp_path / "data"), "--num-train", "3", "--num-test", "2"]
    assert runner.invoke(app, [*made, "--num-symbols", "4", "--num-hops", "2"]).exit_code == 0
    assert Image.open(tmp_path / "data" / "images" / "pages" / "000000.png").size == (56, 56)
    run = ["hops", "run", "--model", str(plume_folder), "--data", str(tmp_path / "data")]
    for mode in ("latent", "single_pass"):
        result = runner.invoke(app, [*run, "--mode", mode])
        assert result.exit_code == 0, result.output
        last = json.loads(result.stdout.splitlines()[-1])
        assert last["mode"] == mode
        assert last["num_queries"] == 2
        assert set(last["recall_at_1"]) == {"name", "picture"}
        assert 0 <= last["mrr"]["name"]["low"] <= last["mrr"]["name"]["high"] <= 1
    wrong = runner.invoke(app, ["hops", "run", "--model", str(plume_folder), "--data", str(tmp_path)])
    assert wrong.exit_code == 1
    assert "holds no task.json; make a data set with" in wrong.output


def test_settings_that_change_vectors_are_compared_on_the_task(model, hops_folder):
    found = {one["setting"]: one for one in compare_settings(model, HopsTask(hops_folder))}
    assert found["transformers"]["lowest_cosine"] == pytest.approx(1)
    assert found["engine"]["lowest_cosine"] > 0.99999
    assert found["engine"]["recall_at_1"] == found["transformers"]["recall_at_1"]
    assert 0.9 < found["engine, int8"]["lowest_cosine"] < 0.999999
    steps = [found[f"engine, exit_tolerance = {tolerance}"]["reasoning_steps"] for tolerance in TOLERANCES]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < found["engine"]["reasoning_steps"]

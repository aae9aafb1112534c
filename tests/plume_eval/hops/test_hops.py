"""The built-in tasks: their logic, their files, their numbers."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from plume import PlumeModel
from plume.random_models import save_tiny_backbone
from plume_eval.__main__ import app
from plume_eval.hops.inside import look_inside
from plume_eval.hops.make import FAMILIES, Sizes, make_task
from plume_eval.hops.page import draw_tiles
from plume_eval.hops.puzzle import Difficulty
from plume_eval.hops.run import HopsTask, best_rule, evaluate, evaluate_control
from plume_eval.hops.settings import TOLERANCES, compare_settings
from plume_eval.hops.symbols import BACKGROUND, TILE, alphabet
from plume_train.data.records import Records
from tests.plume_eval.hops.solving import read_easy, solve

SMALL = Sizes(num_train=24, num_validation=2, num_test=72)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """The folder of a small data set of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    make_task(folder, request.param, SMALL, show_progress=False)
    return folder


def rows_of(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def puzzles(name, form, num_hops, count=200):
    """Puzzles as they are, without files."""
    made = FAMILIES[name]
    difficulty = Difficulty(
        num_symbols=made.num_symbols, num_hops=num_hops, max_hops=6, num_distractors=made.num_distractors
    )
    symbols = made.symbols(made.num_symbols)
    return [made.make(form, symbols, difficulty, Random(seed)) for seed in range(count)]


def test_every_record_is_solved_by_a_program_that_sees_what_a_model_sees(family):
    rows = rows_of(family, "test")
    assert Counter(row["num_hops"] for row in rows) == dict.fromkeys(range(1, 7), 12)
    assert [solve(row, family) for row in rows] == [row["path"][-1] for row in rows]
    assert any("this one" in row["query"]["text"] for row in rows) == (family / "media" / "000").exists()


def test_rows_are_what_the_trainer_reads_and_their_rationale_is_the_path(family):
    for record, row in zip(Records(family / "train.jsonl"), rows_of(family, "train"), strict=True):
        sentences = record.query.rationale.removesuffix(".").split(". ")
        assert [sentence.split()[0] for sentence in sentences] == row["path"][1:]
        assert len(row["path"]) == row["num_hops"] + 1
        answer = row["path"][-1]
        assert answer not in row["hard_negatives"]
        assert set(row["path"][1:-1]) - {answer} <= set(row["hard_negatives"]) <= set(HopsTask(family).symbols)
        assert (record.target.text or record.target.images[0].stem) == answer
    words = set(HopsTask(family).settings["words"])
    for row in [row for split in ("read", "train", "test") for row in rows_of(family, split)]:
        said = f"{row['query']['text']} {row['query']['rationale']}".replace(".", "").split()
        assert not set(said) - words


def test_no_record_shows_what_another_shows(family):
    rows = [row for split in ("train", "validation", "test") for row in rows_of(family, split)]
    if "video" in rows[0]["query"] or "image" in rows[0]["query"]:
        shown = [row["query"].get("video") or row["query"]["image"][0] for row in rows]
        contents = [(family / path).read_bytes() for path in shown]
    else:
        contents = [row["query"]["text"].rpartition(". ")[0] for row in rows]
    assert len(set(contents)) == len(contents) == 98
    control = [row["query"]["text"] for split in ("control", "control_test") for row in rows_of(family, split)]
    assert len(set(control)) == len(control)


def test_the_same_seed_makes_the_same_files_to_the_byte(family, tmp_path):
    def digests(folder):
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    for seed in (0, 1):
        make_task(tmp_path / str(seed), HopsTask(family).settings["task"], SMALL, seed=seed, show_progress=False)
    assert digests(tmp_path / "0") == digests(family)
    assert digests(tmp_path / "1") != digests(family)


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, made in FAMILIES.items() for form in made.forms])
def test_no_shallow_rule_comes_near(name, form):
    for num_hops in (2, 4, 6):
        made = puzzles(name, form, num_hops)
        right = {rule: np.mean([p.guesses[rule] == p.answer for p in made]) for rule in made[0].guesses}
        # Of the two concepts that a graph's question names one is right.
        assert max(right.values()) < (0.65 if form == "graph" else 0.3), (num_hops, right)
        counts = Counter(puzzle.answer for puzzle in made)
        assert counts.most_common(1)[0][1] / len(made) < 0.3


def test_recall_is_told_apart_by_whether_the_start_is_named(family):
    task = HopsTask(family)
    shown = {
        row["query"]["text"] for row in task.rows if any("symbols" in file for file in row["query"].get("image", []))
    }
    assert [start == "shown" for start in task.starts] == [row["query"]["text"] in shown for row in task.rows]


def test_what_a_question_shows_is_named_where_reading_is_learnt(family):
    for row, read in zip(rows_of(family, "train"), rows_of(family, "read"), strict=True):
        assert row["query"].get("image") == read["query"].get("image")
        first, *rest = read["query"]["rationale"].split(". ")
        assert (first == f"this one {row['path'][0]}") == ("this one" in row["query"]["text"])
        assert not any("this one" in sentence for sentence in rest)


@pytest.mark.parametrize("name", [name for name, made in FAMILIES.items() if made.easy])
def test_easy_scenes_say_what_they_show(name, tmp_path):
    make_task(tmp_path, name, SMALL, show_progress=False)
    rows = rows_of(tmp_path, "read_easy")
    assert len(rows) == SMALL.num_train
    for row in rows:
        told = [sentence.split() for sentence in row["query"]["rationale"].removesuffix(".").split(". ")]
        assert {(words[0], words[-1]) for words in told} == read_easy(row, tmp_path)
    assert len({len(row["query"]["rationale"].split(". ")) for row in rows}) > 3


def test_a_clip_has_a_frame_for_everything_that_happens(family):
    for row in rows_of(family, "train"):
        if "video" in row["query"]:
            frames = Image.open(family / row["query"]["video"]).n_frames
            read = next(one for one in rows_of(family, "read") if one["query"]["video"] == row["query"]["video"])
            told = read["query"]["rationale"].removesuffix(".").split(". ")
            assert frames == len([sentence for sentence in told if "this one" not in sentence])
            assert all(
                int(word) <= frames for word in row["query"]["rationale"].replace(".", "").split() if word.isdigit()
            )


@pytest.mark.parametrize(("name", "form"), [("page", "tiles"), ("text", "chain")])
def test_no_answer_is_nearer_backwards(name, form):
    symbols = [symbol.name for symbol in FAMILIES[name].symbols(FAMILIES[name].num_symbols)]
    for puzzle in puzzles(name, form, 6, 50):
        pairs = [read.rstrip(".").split() for read in puzzle.reading]
        before = {b: a for a, b in pairs if a in symbols}
        at, steps = puzzle.path[1], 0
        while at != puzzle.answer:
            at, steps = before[at], steps + 1
        assert steps >= 5


@pytest.mark.parametrize("num_hops", [2, 4, 6])
def test_the_order_of_frames_alone_does_not_tell_where_the_ball_is(num_hops):
    """A cup that is raised in two neighbouring frames may belong to either ball, and no frame is the answer's."""
    made = puzzles("video", "cups", num_hops, 300)
    swaps = [[set(frame.rstrip(".").split()) for frame in puzzle.reading] for puzzle in made]
    for frame in range(num_hops - 1, 10):
        shared = [frames[frame] & frames[frame + 1] for frames in swaps]
        right = [both == {puzzle.answer} for both, puzzle in zip(shared, made, strict=True)]
        assert np.mean(right) < 0.45
    for frame in range(12):
        assert np.mean([puzzle.answer in frames[frame] for frames, puzzle in zip(swaps, made, strict=True)]) / 2 < 0.45


@pytest.mark.parametrize("num_hops", [1, 3, 6])
def test_the_depth_of_the_choices_of_a_graph_does_not_tell_which_is_right(num_hops):
    deeper = []
    for puzzle in puzzles("text", "graph", num_hops, 200):
        facts = [tuple(fact.replace("every ", "").split(" is a ")) for fact in puzzle.facts.rstrip(".").split(". ")]
        people = {a for a, _ in facts} - {b for _, b in facts}
        depth, reached = {}, people
        for step in range(20):
            depth |= {node: depth.get(node, step) for node in reached}
            reached = reached | {b for a, b in facts if a in reached}
        deeper.append(
            (depth[puzzle.answer] > depth[puzzle.beyond]) + (depth[puzzle.answer] == depth[puzzle.beyond]) / 2
        )
    assert 0.4 < np.mean(deeper) < 0.6


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, made in FAMILIES.items() for form in made.forms if form != "graph"]
)
def test_a_path_of_more_hops_is_the_longer_one_of_the_same_puzzle(name, form):
    """One hop more leads to another answer, and that one is among the hard negatives."""
    for puzzle in puzzles(name, form, 3, 50):
        assert puzzle.beyond != puzzle.answer
        assert puzzle.beyond in puzzle.hard_negatives
        assert puzzle.path[-2] in puzzle.hard_negatives


def test_a_graph_has_the_shortest_path_that_was_asked_for():
    for num_hops in (1, 3, 6):
        for puzzle in puzzles("text", "graph", num_hops, 50):
            facts = [tuple(fact.replace("every ", "").split(" is a ")) for fact in puzzle.facts.rstrip(".").split(". ")]
            reached, steps = {puzzle.path[0]}, 0
            while puzzle.answer not in reached:
                reached |= {b for a, b in facts if a in reached}
                steps += 1
            assert steps == num_hops
            for _ in facts:
                reached |= {b for a, b in facts if a in reached}
            assert puzzle.beyond not in reached


def test_symbols_look_different_and_stand_where_the_page_says():
    symbols = alphabet(36)
    assert len({symbol.name for symbol in symbols}) == 36
    assert len({symbol.draw().tobytes() for symbol in symbols}) == 36
    rows = list(itertools.pairwise(symbols[:10]))
    picture = draw_tiles(rows, columns=3)
    assert picture.size == (3 * TILE, 3 * TILE)
    half = TILE // 2
    assert picture.crop((TILE, TILE, TILE + half, 2 * TILE)) == rows[4][0].draw(half, TILE)
    assert picture.crop((TILE + half, TILE, 2 * TILE, 2 * TILE)) == rows[4][1].draw(half, TILE)
    assert picture.getpixel((0, 0)) == BACKGROUND


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("page", {"min_hops": 0}, "hops must be at least 1"),
        ("page", {"min_hops": 3, "max_hops": 2}, "received min_hops=3 and max_hops=2"),
        ("page", {"num_symbols": 40}, "num_symbols must lie in 2..36; received 40"),
        ("page", {"num_symbols": 9}, "6 hops and 0 distractors need at least 12 symbols; received num_symbols=9"),
        ("page", {"num_distractors": 1}, "num_distractors must not be 1"),
        ("page", {"num_symbols": 3, "max_hops": 1, "num_train": 100}, "fewer than 174 different puzzles"),
        ("page", {"forms": ("bars",)}, "page has no form 'bars'; its forms are tiles, words, chart"),
        ("image", {"num_symbols": 12}, "num_symbols must be 4, 9, ... 36; received 12"),
        ("video", {"num_symbols": 9}, "need at least 11 symbols"),
        ("text", {"num_symbols": 10}, "need at least 12 symbols"),
        ("text", {"num_distractors": 1}, "num_distractors must not be 1"),
    ],
)
def test_a_task_that_cannot_be_made_is_refused(tmp_path, name, changes, message):
    with pytest.raises(ValueError, match=message):
        make_task(tmp_path / "x", name, replace(SMALL, **changes), show_progress=False)


def test_what_stands_in_the_folder_of_a_new_data_set_is_not_overwritten(hops_folder, tmp_path):
    (tmp_path / "train.jsonl").write_text("mine")
    for folder in (hops_folder, tmp_path):
        with pytest.raises(FileExistsError, match="is not an empty folder; name a new one"):
            make_task(folder, "page", SMALL)
    assert (tmp_path / "train.jsonl").read_text() == "mine"


def test_recall_counts_right_answers_by_hops_and_a_constant_model_gets_none(family, plume_folder, monkeypatch):
    task = HopsTask(family)
    model = PlumeModel.from_pretrained(plume_folder).eval()
    size = len(task.symbols)
    half = np.where(task.num_hops > 3, task.answers, (task.answers + 1) % size)
    answers = iter([half, range(size), task.answers * 0, [0] * size])

    def fake(model, items, mode, **settings):
        from plume_eval.baselines import Embedded

        index = torch.as_tensor(next(answers))
        return Embedded(torch.eye(size)[index], torch.zeros(len(index)), torch.ones(len(index), dtype=torch.bool))

    monkeypatch.setattr("plume_eval.hops.run.embed", fake)
    result = evaluate(model, task, forms=("name",))
    assert result["recall_at_1"]["name"]["mean"] == 0.5
    assert [one["mean"] for one in result["by_hops"]["name"].values()] == [0, 0, 0, 1, 1, 1]
    assert evaluate(model, task, forms=("name",))["recall_at_1"]["name"]["mean"] == 0


def test_the_best_rule_is_told_for_each_number_of_hops(family):
    rule = best_rule(HopsTask(family))
    assert list(rule["by_hops"]) == list("123456")
    assert rule["by_hops"]["1"]["rule"] != "one hop"
    assert rule["recall_at_1"] < 0.65


def test_a_model_of_each_family_is_evaluated_in_every_mode(family, tmp_path):
    words = HopsTask(family).settings["words"]
    save_tiny_backbone(tmp_path / "b", words, hidden_size=32, temporal_patch_size=1)
    model = PlumeModel.from_backbone(
        str(tmp_path / "b"), num_latent_steps=2, video_num_frames=16, video_min_pixels=784
    ).eval()
    task = HopsTask(family, limit=6)
    result = evaluate(model, task, forms=("name", "picture"))
    assert set(result["by_form"]["picture"]) == set(task.forms)
    assert 0 <= evaluate_control(model, task)["recall_at_1"]["mean"] <= 1
    inside = look_inside(model, task)
    assert inside.held.shape == (3, task.num_hops.max() + 1)


def test_what_states_hold_is_a_probability(plume_folder, hops_folder):
    inside = look_inside(PlumeModel.from_pretrained(plume_folder).eval(), HopsTask(hops_folder))
    assert inside.held.shape == (5, 3)
    assert inside.gates.shape == (4, 4)
    assert ((inside.held >= 0) & (inside.held <= 1)).all()
    assert inside.gates.sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_the_commands_make_and_run_all_tasks(tmp_path, plume_folder):
    runner = CliRunner()
    made = ["hops", "make", "--task", "all", "--out", str(tmp_path / "data"), "--num-train", "3", "--num-test", "6"]
    assert runner.invoke(app, [*made, "--num-validation", "1"]).exit_code == 0
    assert Image.open(tmp_path / "data" / "page" / "media" / "000" / "000000.png").height % TILE == 0
    run = ["hops", "run", "--model", str(plume_folder), "--data", str(tmp_path / "data" / "text")]
    result = runner.invoke(app, [*run, "--mode", "latent", "--mode", "single_pass", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    assert [one["mode"] for one in last["results"]] == ["latent", "single_pass"]
    for one in last["results"]:
        assert one["num_queries"] == 6
        assert set(one["recall_at_1"]) == {"name", "picture"}
        assert 0 <= one["mrr"]["name"]["low"] <= one["mrr"]["name"]["high"] <= 1
    (table,) = (tmp_path / "out").glob("*.md")
    assert "best rule (" in table.read_text()
    assert table.with_suffix(".png").exists()
    for place, message in ((tmp_path, "holds no task.json"), (tmp_path / "data", "but image, page, text, video below")):
        wrong = runner.invoke(app, ["hops", "run", "--model", str(plume_folder), "--data", str(place)])
        assert wrong.exit_code == 1
        assert message in wrong.output


def test_settings_that_change_vectors_are_compared_on_the_task(model, hops_folder):
    found = {one["setting"]: one for one in compare_settings(model, HopsTask(hops_folder))}
    assert found["transformers"]["lowest_cosine"] == pytest.approx(1)
    assert found["engine"]["lowest_cosine"] > 0.99999
    assert found["engine"]["recall_at_1"] == found["transformers"]["recall_at_1"]
    assert 0.9 < found["engine, int8"]["lowest_cosine"] < 0.999999
    steps = [found[f"engine, exit_tolerance = {tolerance}"]["reasoning_steps"] for tolerance in TOLERANCES]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < found["engine"]["reasoning_steps"]

"""bAbI and ProsQA from files of their published form."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from plume_eval.__main__ import app
from plume_eval.hops.public import make_babi, make_prosqa, read_babi
from plume_eval.hops.run import HopsTask, best_rule
from plume_train.data.records import Records

STORY = """\
1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary got the milk.
5 Mary went to the garden.
6 Where is the milk?\tgarden\t4 5
1 Sandra went to the office.
2 Where is Sandra?\toffice\t1
"""

GRAPHS = [
    {
        "question": f"Every lempus is a rorpus. Tom is a felpus. {name} is a lempus. Every rorpus is a storpus. Every "
        f"felpus is a bompus. Is {name} a storpus or bompus?",
        "answer": f"{name} is a storpus.",
        "steps": [f"{name} is a lempus.", "Every lempus is a rorpus.", "Every rorpus is a storpus."],
        "idx_to_symbol": [name, "Tom", "lempus", "rorpus", "storpus", "felpus", "bompus", "wumpus", "yumpus"],
        "edges": [[0, 2]],
    }
    for name in ("Alex", "Rex", "Max", "Fae")
]


@pytest.fixture
def babi(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"qa1_some-facts_{split}.txt").write_text(STORY * (3 if split == "train" else 1))
    return folder


@pytest.fixture
def prosqa(tmp_path):
    file = tmp_path / "prosqa_valid.json"
    file.write_text(json.dumps(GRAPHS))
    return file


def test_stories_begin_anew_at_one_and_questions_know_their_facts(babi):
    first, second = read_babi(babi / "qa1_some-facts_test.txt")
    assert [question.answer for question in first] == ["bathroom", "garden"]
    assert first[1].asked == "where is the milk?"
    assert [first[1].facts[place] for place in first[1].support] == ["mary got the milk.", "mary went to the garden."]
    assert len(first[0].facts) == 2
    assert second[0].facts == ("sandra went to the office.",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Mary moved.", r"txt:1: 'Mary moved.' is no line of bAbI; expected `ID text` or"),
        ("1 Where is Mary?\tgarden", "is no line of bAbI"),
        ("1 Where is Mary?\tgarden\t4", "the supporting fact 4 is not in the story"),
    ],
)
def test_a_file_of_another_form_is_named_with_its_line(tmp_path, line, message):
    (tmp_path / "qa.txt").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        list(read_babi(tmp_path / "qa.txt"))


def test_babi_becomes_rows_whose_rationale_is_the_support(babi, tmp_path):
    counts = make_babi(tmp_path / "out", babi, [1], num_validation=2)
    assert counts["1"]["test"] == 3
    assert counts["1"]["train"] + counts["1"]["validation"] == 9
    assert counts["1"]["share_told"] == 1
    task = HopsTask(tmp_path / "out")
    assert task.symbols == ["bathroom", "garden", "office"]
    assert task.num_hops.tolist() == [1, 2, 1]
    record = list(Records(tmp_path / "out" / "test.jsonl"))[1]
    assert record.query.text.endswith("mary went to the garden. where is the milk")
    assert record.query.rationale == "mary got the milk. mary went to the garden."
    assert record.target.text == "garden"
    assert task.target_forms == ("name",)
    assert not task.has_control
    assert best_rule(task)["rule"] == "last shown"


def test_stories_are_cut_alike_and_what_is_lost_is_counted(babi, tmp_path):
    counts = make_babi(tmp_path / "out", babi, [1], max_facts=2, num_validation=1)
    assert counts["1"]["share_told"] == 1
    rows = list(Records(tmp_path / "out" / "test.jsonl"))
    assert rows[1].query.text == "mary got the milk. mary went to the garden. where is the milk"
    assert make_babi(tmp_path / "one", babi, [1], max_facts=1, num_validation=1)["1"]["share_told"] == pytest.approx(
        1 / 3
    )


def test_more_to_tune_with_than_there_is_is_refused(babi, tmp_path):
    with pytest.raises(ValueError, match="task 1 has 9 training questions; received num_validation=9; hold out fewer"):
        make_babi(tmp_path / "out", babi, [1], num_validation=9)


def test_prosqa_is_halved_and_trained_on_graphs_of_its_names(prosqa, tmp_path):
    counts = make_prosqa(tmp_path / "out", prosqa, num_train=20)
    assert counts == {"train": 20, "validation": 2, "test": 2}
    task = HopsTask(tmp_path / "out")
    assert {row["path"][0] for row in task.rows} == {"rex", "fae"}
    assert task.rows[0]["path"] == ["rex", "lempus", "rorpus", "storpus"]
    assert task.rows[0]["choices"] == ["storpus", "bompus"]
    assert task.choices.sum(axis=1).tolist() == [2, 2]
    for row in map(json.loads, (tmp_path / "out" / "train.jsonl").read_text().splitlines()):
        assert row["num_hops"] == 3
        assert row["query"]["text"].rpartition(". ")[2].startswith(f"is {row['path'][0]} a ")
        assert row["path"][0] in {"alex", "tom", "max"}  # names of the tuning half


def test_the_commands_say_what_they_wrote_and_what_is_missing(babi, prosqa, tmp_path):
    runner = CliRunner()
    made = ["hops", "babi", "--data", str(babi), "--out", str(tmp_path / "b"), "--num-validation", "1"]
    said = runner.invoke(app, [*made, "--task", "1"])
    assert said.exit_code == 0, said.output
    assert "100.0% of these are told all that they need" in said.output
    said = runner.invoke(
        app, ["hops", "prosqa", "--file", str(prosqa), "--out", str(tmp_path / "p"), "--num-train", "3"]
    )
    assert "3 train rows, 2 validation rows, 2 test rows" in said.output
    for out, task, message in (("x", "7", "holds no qa7_*_train.txt"), ("b", "1", "is not an empty folder")):
        wrong = runner.invoke(app, [*made[:4], "--out", str(tmp_path / out), "--task", task])
        assert wrong.exit_code == 1
        assert message in wrong.output
    prosqa.write_text(json.dumps([{"question": "Is Tom a x?"}]))
    wrong = runner.invoke(app, ["hops", "prosqa", "--file", str(prosqa), "--out", str(tmp_path / "q")])
    assert "question 0 has no 'answer'; expected a list of ProsQA's questions" in wrong.output


def test_rows_to_read_ask_for_the_latest_facts_with_some_words(babi, prosqa, tmp_path):
    make_babi(tmp_path / "babi", babi, [1], num_validation=2)
    make_prosqa(tmp_path / "prosqa", prosqa, num_train=20)
    for name in ("babi", "prosqa"):
        trained = (tmp_path / name / "train.jsonl").read_text().splitlines()
        for split, most in (("read", 99), ("read_easy", 6)):
            rows = [json.loads(line) for line in (tmp_path / name / f"{split}.jsonl").read_text().splitlines()]
            assert len(rows) == len(trained)
            for row in rows:
                told, _, word = row["query"]["text"].rpartition(" read ")
                facts = [f"{fact.strip('.')}." for fact in told.split(". ")]
                assert len(facts) <= most
                said = [f"{one.strip('.')}." for one in row["query"]["rationale"].split(". ")]
                asked = [word, *(one.partition(" ")[0] for one in said[1:])]
                latest = [next(fact for fact in facts[::-1] if one in fact.strip(".").split()) for one in asked]
                assert said == [latest[0], *(f"{one} {fact}" for one, fact in zip(asked[1:], latest[1:], strict=True))]
                assert 1 <= len(set(asked)) == len(asked) <= 4

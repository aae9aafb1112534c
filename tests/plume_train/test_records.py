"""Rows: what is read from them, and what is said of bad ones."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from plume_train.records import Records
from plume_train.rows import RecordFormat, RowError


def row(**changes):
    good = {
        "dataset_name": "pairs",
        "qry": {
            "conversations": [
                {"from": "human", "value": "<image>\nwhich bird?\n<disc_emb>\nRepresent the above"},
                {"from": "gpt", "value": "<think>It is red.</think><answer>kite</answer>\n<gen_emb>"},
            ],
            "image": ["bird.png"],
        },
        "pos": {"conversations": [{"role": "user", "content": "a red kite"}]},
    }
    return {**good, **changes}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (28, 28)).save(tmp_path / "bird.png")
    return tmp_path


def write(folder, *rows):
    lines = [one if isinstance(one, str) else json.dumps(one) for one in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "pairs.jsonl"


def test_a_row_in_the_published_format_is_read(folder):
    (record,) = Records(write(folder, row()))
    assert record.query.text == "which bird?"
    assert record.query.images == (folder / "bird.png",)
    assert (record.query.rationale, record.query.answer) == ("It is red.", "kite")
    assert record.target.text == "a red kite"
    assert (record.task, record.where) == ("pairs", "pairs.jsonl:1")


def test_rows_are_found_again_by_index_after_blank_and_bad_lines(folder):
    rows = [row(), "", "{broken", row(pos={"conversations": [{"from": "human", "value": "déjà vu"}]}), row()]
    records = Records(write(folder, *rows), on_bad_row="skip")
    assert [record.where for record in records] == ["pairs.jsonl:1", "pairs.jsonl:4", "pairs.jsonl:5"]
    assert records[1].target.text == "déjà vu"
    assert len(records.bad_rows) == 1
    assert "pairs.jsonl:3" in records.bad_rows[0]


SIDE = row()["qry"]
BAD = {
    "no target": (row(pos=None), "no target ('pos'); add one"),
    "no query": (row(qry=None), "no query ('qry')"),
    "missing file": (row(qry={**SIDE, "image": ["gone.png"]}), "names gone.png, but there is no file"),
    "images without tags": (
        row(pos={"conversations": [{"from": "human", "value": "x"}], "image": "bird.png"}),
        "has 1 images but its text holds 0 <image>",
    ),
    "unclosed answer": (
        row(qry={**SIDE, "conversations": [SIDE["conversations"][0], {"from": "gpt", "value": "<answer>x"}]}),
        "<answer> is not closed by </answer>; close it",
    ),
    "token in the text": (
        row(pos={"conversations": [{"from": "human", "value": "a <bot> b"}]}),
        "the text holds '<bot>', a token that plume places itself",
    ),
    "empty side": (row(pos={"conversations": [{"from": "human", "value": " "}]}), "neither text nor media"),
    "no conversations": (row(pos={"text": "x"}), "has no list 'conversations'"),
    "unknown role": (row(pos={"conversations": [{"from": "cat", "value": "x"}]}), "role 'cat'"),
    "videos without tags": (row(pos={**SIDE, "video": ["a.png"]}), "has 1 videos but its text holds 0 <video>"),
    "image of a wrong type": (row(qry={**SIDE, "image": 5}), "'qry': an image is a int; expected a path"),
    "file that is no image": (row(qry={**SIDE, "image": ["pairs.jsonl"]}), "cannot be read as an image"),
    "video tag": (
        row(pos={"conversations": [{"from": "human", "value": "<video>x"}]}),
        "has 0 videos but its text holds 1 <video>",
    ),
    "read-out in the rationale": (
        row(
            qry={
                **SIDE,
                "conversations": [SIDE["conversations"][0], {"from": "gpt", "value": "<think>a<gen_emb></think>"}],
            }
        ),
        "'qry': the rationale: the text holds '<gen_emb>'",
    ),
    "no object": ("[1]", "a list; expected an object"),
    "broken JSON": ('{"qry": ', "not a JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_file_and_line_with_a_remedy(folder, name):
    bad, message = BAD[name]
    file = write(folder, row(), bad)
    with pytest.raises(RowError) as caught:
        Records(file)
    assert str(caught.value).startswith("pairs.jsonl:2")
    assert message in str(caught.value)
    records = Records(file, on_bad_row="skip")
    assert len(records) == 1
    assert message in records.bad_rows[0]


def test_unclosed_answers_and_missing_targets_are_read_where_that_is_asked_for(folder):
    written = {"from": "gpt", "value": "<think>a</think><answer>b\n<gen_emb>"}
    file = write(folder, row(qry={**SIDE, "conversations": [SIDE["conversations"][0], written]}, pos=None))
    row_format = RecordFormat(media_root=folder, needs_target=False, unclosed_answer="accept")
    (record,) = Records(file, row_format=row_format)
    assert record.target is None
    assert record.query.answer == "b\n<gen_emb>"


def test_a_line_that_is_not_utf8_is_a_bad_row_like_others(folder):
    file = write(folder, row())
    file.write_bytes(file.read_bytes() + b"\n\xff\xfe\n")
    with pytest.raises(RowError, match=r"pairs\.jsonl:2: not UTF-8"):
        Records(file)
    assert len(Records(file, on_bad_row="skip")) == 1


def test_a_file_without_a_usable_row_is_an_error(folder):
    with pytest.raises(RowError, match="no usable row"):
        Records(write(folder, "nonsense"), on_bad_row="skip")

"""What the commands that take rows have in common: bad rows, unfinished answers, data of every format."""

from __future__ import annotations

import io
import json

import pytest
from datasets import Dataset, Image
from PIL import Image as Pictures

from plume_train.data.rows import RowError
from plume_train.gate import gate
from plume_train.mine import mine
from plume_train.rationales.command import rationales
from plume_train.vectors import vectors
from tests.plume_train.rationales.fake_server import answer_for, completion, serving

WORDS = ["red", "kite", "blue", "bird", "table", "rain", "sun", "sea"]
COMMANDS = ["mine", "vectors", "gate", "rationales"]


@pytest.fixture
def run(tmp_path, plume_folder):
    """Runs a command on some data; returns the rows that it wrote, where it writes rows."""

    def run(command, data, *more):
        out = tmp_path / ("out" if command in ("vectors", "gate") else "out.jsonl")
        words = [str(data), "--out", str(out), *more]
        if command == "mine":
            assert mine([*words, "--model", str(plume_folder)]) == 0
        elif command == "vectors":
            assert vectors([*words, "--model", str(plume_folder)]) == 0
        elif command == "gate":
            assert gate([str(plume_folder), "--data", *words, "--anyway"]) == 0
        else:
            with serving(lambda question, body: completion(answer_for(question.split()[-1]))) as server:
                assert rationales([*words, "--base-url", server.address, "--model", "m"]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else None

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_row_stops_a_command_or_is_left_out_by_name(tmp_path, run, command, capsys):
    pairs = [{"query": f"{one} {other}", "target": other} for one in WORDS for other in WORDS]
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in [*pairs, {"query": {"image": "none.png"}, "target": "x"}])
    )
    with pytest.raises(RowError, match=r"pairs.jsonl:65: .*none.png"):
        run(command, file)
    rows = run(command, file, "--on-bad-row", "skip")
    assert rows is None or len(rows) == 64
    told = capsys.readouterr().err
    assert "1 row that cannot be used, left out:" in told
    assert "pairs.jsonl:65" in told


def test_an_answer_that_is_never_closed_is_taken_where_that_is_said(tmp_path, run):
    """As the published data have them."""
    sides = [[{"from": "human", "value": text}, {"from": "gpt", "value": f"<answer>{text}"}] for text in ("red", "sea")]
    rows = [{"qry": {"conversations": one}, "pos": {"conversations": one}} for one in sides]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RowError, match="unclosed_answer=accept"):
        run("vectors", file)
    run("vectors", file, "--unclosed-answer", "accept")


@pytest.mark.parametrize("command", ["mine", "rationales"])
def test_rows_of_other_formats_are_written_as_jsonl(tmp_path, run, command):
    rows = [{"query_text": f"{one} {other}", "target_text": other} for one in WORDS[:3] for other in WORDS[:3]]
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    written = run(command, tmp_path / "pairs.parquet")
    assert [{name: row[name] for name in ("query_text", "target_text")} for row in written] == rows
    assert any({"margin", "query_rationale"} & row.keys() for row in written)


@pytest.mark.parametrize("command", ["mine", "rationales"])
def test_embedded_media_are_refused_before_anything_is_done(tmp_path, run, command):
    picture = io.BytesIO()
    Pictures.new("RGB", (28, 28), "red").save(picture, "PNG")
    whole = {"query_image": {"bytes": picture.getvalue(), "path": None}, "query_text": "what", "target_text": "red"}
    rows = Dataset.from_list([{**whole, "query_image": None}, whole])  # not in the first row
    rows.cast_column("query_image", Image()).save_to_disk(tmp_path / "pairs")
    with pytest.raises(ValueError, match=r"in 'query_image', which a file .jsonl cannot; write its media to files"):
        run(command, tmp_path / "pairs")

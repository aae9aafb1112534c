"""`plume classify`, as `Plume.classify`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from plume import Plume
from plume.cli.main import app


@pytest.fixture(scope="module")
def model(plume_folder) -> Plume:
    return Plume(plume_folder, device="cpu")


@pytest.fixture
def folder(tmp_path):
    for label, texts in {"bird": ["a kite", "a bird"], "room": ["a table", "red table", "it is red"]}.items():
        (tmp_path / "labelled" / label).mkdir(parents=True)
        for number, text in enumerate(texts):
            (tmp_path / "labelled" / label / f"{number}.txt").write_text(text)
    (tmp_path / "one.txt").write_text("what is it")
    return tmp_path


def run(plume_folder, *words):
    return CliRunner().invoke(app, ["classify", "--model", str(plume_folder), *map(str, words)])


def test_labels_and_their_templates(model, plume_folder, folder):
    words = ["--label", "red", "--label", "blue", "--template", "a {} kite", "--template", "{}"]
    result = run(plume_folder, folder / "one.txt", "--text", "a blue hill", *words, "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    expected = model.classify(["what is it", "a blue hill"], ["red", "blue"], templates=["a {} kite", "{}"])
    assert [row["name"] for row in rows] == [str(folder / "one.txt"), "a blue hill"]
    assert list(rows[0]["labels"]) == ["red", "blue"]
    np.testing.assert_allclose([list(row["labels"].values()) for row in rows], expected, atol=1e-5)
    told = run(plume_folder, folder / "one.txt", *words)
    best = max(rows[0]["labels"], key=rows[0]["labels"].get)
    assert told.stdout.split() == [f"{rows[0]['labels'][best]:.3f}", best, str(folder / "one.txt")]


def test_examples_and_calibration_come_from_folders(model, plume_folder, folder):
    words = ["--examples", folder / "labelled", "--calibrate-on", folder / "labelled", "--json"]
    result = run(plume_folder, "--text", "a kite", *words)
    assert result.exit_code == 0, result.output
    assert "of 5 labelled inputs" in result.stderr
    assert "5 labelled inputs; probabilities that are fitted to fewer than 200 are rough" in result.stderr
    examples = {"bird": ["a kite", "a bird"], "room": ["a table", "red table", "it is red"]}
    with pytest.warns(UserWarning, match="5 labelled inputs"):
        calibration = model.calibrate([*examples["bird"], *examples["room"]], examples, ["bird"] * 2 + ["room"] * 3)
    expected = model.classify("a kite", examples, calibration=calibration)
    np.testing.assert_allclose(list(json.loads(result.stdout)["labels"].values()), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--text", "a"], "give --label for each label, or --examples"),
        (["--label", "a", "--label", "b"], "nothing to classify"),
        (["--text", "a", "--label", "a"], "at least two different names"),
        (["--text", "a", "--examples", "nowhere"], "nowhere is no folder"),
        (["--text", "a", "--label", "a", "--label", "b", "--template", "photo"], "once, for the name of the label"),
    ],
)
def test_what_cannot_be_classified_is_told(plume_folder, words, expected):
    result = run(plume_folder, *words)
    assert result.exit_code == 1
    assert expected in result.output


def test_folders_without_files_are_told(plume_folder, folder):
    (folder / "labelled" / "empty").mkdir()
    result = run(plume_folder, "--text", "a", "--examples", folder / "labelled")
    assert result.exit_code == 1
    assert "empty holds no file that plume reads" in result.output


def test_examples_that_cannot_be_read_are_named(plume_folder, folder):
    (folder / "labelled" / "bird" / "blank.txt").write_text(" ")
    (folder / "labelled" / "bird" / "letter.docx").write_text("no")
    result = run(plume_folder, "--text", "a", "--examples", folder / "labelled")
    assert result.exit_code == 1
    assert "letter.docx" in result.output
    (folder / "labelled" / "bird" / "letter.docx").unlink()
    result = run(plume_folder, "--text", "a", "--examples", folder / "labelled")
    assert result.exit_code == 1
    assert "blank.txt" in result.output
    assert "the sentence ' '" in run(plume_folder, "--text", "a", "--label", " ", "--label", "b").output

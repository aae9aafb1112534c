"""`plume encode` on the user's own files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from plume import Plume, pages
from plume.cli.main import app
from tests.mixed import write_clip


@pytest.fixture
def files(tmp_path):
    (tmp_path / "note.txt").write_text("a red kite", encoding="utf-8")
    Image.new("RGB", (56, 56), "red").save(tmp_path / "my photo é.png")
    (tmp_path / "broken.png").write_text("not an image")
    (tmp_path / "empty.md").write_text("")
    (tmp_path / "data.xyz").write_text("?")
    return tmp_path


def run(plume_folder, *arguments):
    return CliRunner().invoke(app, ["encode", "--model", str(plume_folder), *map(str, arguments)])


def test_vectors_of_text_and_image_files_are_written(plume_folder, files):
    out = files / "vectors.npz"
    inputs = [files / "note.txt", files / "my photo é.png"]
    result = run(plume_folder, *inputs, "--text", "blue", "--out", out)
    assert result.exit_code == 0, result.output
    saved = np.load(out)
    assert saved["names"].tolist() == [*map(str, inputs), "blue"]
    expected = Plume(plume_folder, device="cpu").encode(["a red kite", inputs[1], "blue"])
    assert np.allclose(saved["embeddings"], expected, atol=1e-6)


def test_files_that_cannot_be_embedded_are_named_and_the_rest_is_written(plume_folder, files):
    out = files / "vectors.jsonl"
    bad = ["broken.png", "empty.md", "data.xyz", "missing.txt"]
    result = run(plume_folder, *(files / name for name in ("note.txt", *bad)), "--out", out)
    assert result.exit_code == 1
    for name in bad:
        assert name in result.output
    (line,) = out.read_text().splitlines()
    assert json.loads(line)["name"].endswith("note.txt")
    assert len(json.loads(line)["embedding"]) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to encode"),
        (["--text", "red", "--out", "x.csv"], "ends with .npz, .npy or .jsonl"),
        (["--text", "red", "--num-latent-steps", "99", "--out", "x.npy"], "exceeds the step table"),
        (["missing.txt", "--on-error", "raise"], "missing.txt"),
    ],
)
def test_a_wrong_call_stops_with_a_message_and_no_traceback(plume_folder, arguments, message):
    result = run(plume_folder, *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_pages_clips_and_presets_are_embedded_by_name(plume_folder, two_page_pdf, tmp_path):
    write_clip(tmp_path / "clip.mp4", [0, 100, 200])
    out = tmp_path / "vectors.npz"
    result = run(plume_folder, two_page_pdf, tmp_path / "clip.mp4", "--prompt-name", "classify", "--out", out)
    assert result.exit_code == 0, result.output
    saved = np.load(out)
    assert [name.rpartition("/")[2] for name in saved["names"]] == [
        "two pages.pdf#page=1",
        "two pages.pdf#page=2",
        "clip.mp4",
    ]
    plume = Plume(plume_folder, device="cpu")
    inputs = [*pages(two_page_pdf), tmp_path / "clip.mp4"]
    assert np.allclose(saved["embeddings"], plume.encode(inputs, prompt_name="classify"), atol=1e-5)


def test_convert_writes_a_folder_that_opens_everywhere(tmp_path):
    from tests.plume.checkpoints.test_published import save_published

    source = save_published(tmp_path / "published")
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "converted")])
    assert result.exit_code == 0, result.output
    assert "K = 3, 4 experts, positions kv_length" in result.output
    assert Plume(tmp_path / "converted", device="cpu").encode("red").shape == (32,)
    again = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "converted")])
    assert again.exit_code == 1
    assert "is not empty" in again.output


def test_convert_says_what_is_no_published_checkpoint(backbone_folder, tmp_path):
    result = CliRunner().invoke(app, ["convert", str(backbone_folder), str(tmp_path / "converted")])
    assert result.exit_code == 1
    assert "nothing to convert" in result.output


def test_convert_says_that_there_is_nothing_at_a_place(tmp_path):
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "missing" / "deep"), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "plume: no folder at" in result.output


def test_a_name_that_is_too_long_or_no_unicode_ends_no_command(plume_folder, tmp_path):
    result = run(plume_folder, "--text", "a", "--out", tmp_path / ("a" * 300 + ".npz"))
    assert result.exit_code == 1
    assert "cannot be written" in result.output
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    odd = tmp_path / "\udcff.png"
    (tmp_path / "a.png").rename(odd)
    result = run(plume_folder, odd, "--out", tmp_path / "v.jsonl")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "v.jsonl").read_text(encoding="utf-8"))["name"] == str(odd)


def test_a_file_that_is_refused_keeps_its_name(plume_folder, tmp_path):
    refused = tmp_path / "the input 0 of x.txt"
    refused.write_text(" ")
    result = run(plume_folder, refused, "--text", "kite", "--out", tmp_path / "v.npz", "--on-error", "skip")
    assert "the input 0 of x.txt: it is empty" in result.output

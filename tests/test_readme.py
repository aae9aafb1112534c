"""The README's Python blocks run and print what they say; its `plume` commands run too."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from plume.cli import app
from tests.mixed import write_clip, write_pdf
from tests.plume.checkpoints.test_published import save_published

ROOT = Path(__file__).parent.parent
FILES = ["README.md", "train/README.md", "eval/README.md"]


def blocks(language: str) -> list:
    found = []
    for name in FILES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for number, code in enumerate(re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)):
            found.append(pytest.param(code, id=f"{name}:{number}"))
    return found


@pytest.fixture
def somewhere(tmp_path, monkeypatch, plume_folder, hops_folder, backbone_folder):
    """A folder that looks as it does after `make demo`, with an untrained checkpoint."""
    shutil.copytree(plume_folder, tmp_path / "runs" / "demo" / "latent")
    shutil.copytree(hops_folder, tmp_path / "runs" / "demo" / "data")
    shutil.copytree(backbone_folder, tmp_path / "runs" / "demo" / "backbone")
    pages = tmp_path / "runs" / "demo" / "data" / "images" / "pages"
    shutil.copy(pages / "000000.png", pages / "004000.png")  # the first held-out page of the demo
    write_files(tmp_path)
    (tmp_path / "holiday").mkdir()
    write_files(tmp_path / "holiday")
    save_published(tmp_path / "PLUME-Qwen2-VL-2B")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_files(folder: Path) -> None:
    """What a user might have."""
    (folder / "notes.txt").write_text("a red kite at the sea")
    Image.effect_noise((90, 60), 50).convert("RGB").save(folder / "photo.png")
    write_clip(folder / "clip.mp4", list(range(0, 250, 10)))
    write_pdf(folder / "report.pdf", ["red"])


@pytest.mark.parametrize("code", blocks("python"))
def test_a_python_block_runs_and_prints_what_it_says(somewhere, code):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README", "exec"), {})
    said = re.findall(r"^print\(.*?\)  # (.*)$", code, re.MULTILINE)
    lines = printed.getvalue().splitlines()
    for line, claim in zip(lines, said, strict=True):
        # What depends on training is marked "after make demo"; its form must still be right.
        if "after `make demo`" in claim:
            claim = claim.split("  (")[0]
            number = re.compile(r"-?\d+(?:\.\d+)?")
            assert number.sub("#", line) == number.sub("#", claim)
        else:
            assert line == claim


@pytest.mark.parametrize("code", blocks("bash"))
def test_a_command_names_files_and_targets_that_exist(code):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in code.splitlines():
        for target in re.findall(r"\bmake ([a-z][a-z-]*)", line):
            assert f"\n{target}:" in makefile, line
        for file in re.findall(r"(?:configs|kernels|train|eval)/[\w./-]+\.(?:yaml|py)", line):
            assert (ROOT / file).exists(), line


@pytest.mark.parametrize("code", [block for block in blocks("bash") if "/bin/plume " in block.values[0]])
def test_the_commands_of_a_block_run_one_after_the_other(somewhere, code):
    for line in code.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == ".venv/bin/plume"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}"
        if "--out" in arguments:
            assert Path(arguments[arguments.index("--out") + 1]).exists()
    for file in re.findall(r"--html (\S+)", code):
        assert "photo.png" in Path(file).read_text()


def test_the_readme_links_to_files_that_exist():
    for name in FILES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!http|#)([^)]+)\)", text):
            target, _, heading = link.partition("#")
            file = (ROOT / name).parent / target
            assert file.exists(), f"{name}: {link}"
            if heading:
                words = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                assert heading in [re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in words], link

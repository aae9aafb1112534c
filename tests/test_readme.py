"""The README runs from top to bottom: Python blocks print what they say, `plume` commands end well."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from plume.cli.main import app
from plume_eval.hops.make import write_examples
from tests.plume.checkpoints.test_published import save_published

ROOT = Path(__file__).parent.parent
FILES = ["README.md", "train/README.md", "eval/README.md"]


def blocks(file: str, languages: str = "python|bash") -> list[tuple[str, str]]:
    """Language and code of the blocks of a file, in order; one inside a list is indented."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return re.findall(rf"^```({languages})\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def after_demo(tmp_path, monkeypatch, plume_folder, hops_folder, backbone_folder):
    """A folder that looks as it does after `make demo`, with an untrained checkpoint."""
    demo = tmp_path / "runs" / "demo"
    shutil.copytree(plume_folder, demo / "latent")
    shutil.copytree(hops_folder, demo / "data")
    shutil.copytree(backbone_folder, demo / "backbone")
    media = demo / "data" / "media"
    (media / "004").mkdir()
    shutil.copy(media / "000" / "000000.png", media / "004" / "004000.png")  # the first held-out page of the demo
    write_examples(demo / "files", demo / "data")
    (tmp_path / "CUDAOUTOFMEMORY").mkdir()
    save_published(tmp_path / "CUDAOUTOFMEMORY" / "PLUME-Qwen2-VL-2B")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("after_demo")
def test_the_readme_runs_from_top_to_bottom():
    num_commands = 0
    for language, code in blocks("README.md"):
        if language == "python":
            check_python(code)
            continue
        for line in code.splitlines():
            program, *arguments = shlex.split(line, comments=True)
            if program == ".venv/bin/plume":
                check_command(line, arguments)
                num_commands += 1
    assert num_commands >= 6


def check_python(code: str) -> None:
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


def check_command(line: str, arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{line}\n{result.output}"
    for flag in ("--out", "--html"):
        if flag in arguments:
            assert Path(arguments[arguments.index(flag) + 1]).exists()


@pytest.mark.parametrize("file", FILES)
def test_commands_name_files_targets_and_programs_that_exist(file):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = [line for _, code in blocks(file, "bash") for line in code.splitlines()]
    assert lines
    for line in lines:
        for target in re.findall(r"\bmake ([a-z][a-z-]*)", line):
            assert f"\n{target}:" in makefile, line
        for name in re.findall(r"(?:configs|kernels|train|eval)/[\w./-]+\.(?:yaml|py)", line):
            assert (ROOT / name).exists(), line
        for program in re.findall(r"(?:^|(?<!-m)\s)(plume(?:-\w+)?|accelerate)\s", line):
            pytest.fail(f"{program} is in .venv/bin: {line}")


def test_the_readme_links_to_files_that_exist():
    for name in FILES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
            target, _, heading = link.partition("#")
            file = (ROOT / name).parent / target if target else ROOT / name
            assert file.exists(), f"{name}: {link}"
            if heading:
                words = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                assert heading in [re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in words], link

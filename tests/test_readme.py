"""The README's Python blocks run, and print what they say."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from pathlib import Path

import pytest

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
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
        for target in re.findall(r"\bmake ([a-z]+)", line):
            assert f"\n{target}:" in makefile, line
        for file in re.findall(r"(?:configs|kernels|train|eval)/[\w./-]+\.(?:yaml|py)", line):
            assert (ROOT / file).exists(), line


def test_the_readme_links_to_files_that_exist():
    for name in FILES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!http|#)([^)]+)\)", text):
            assert ((ROOT / name).parent / link).exists(), f"{name}: {link}"

"""`make gpu` on a bare machine: its files load without the optional packages, and its parts stand alone."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.processes import run

pytestmark = pytest.mark.launching

ROOT = Path(__file__).parent.parent
#: The parts of the GPU targets at toy size.
TINY = {
    "kernels": ["kernels/bench.py", "--shapes", "tiny"],
    "latency": ["-m", "plume_eval", "latency", "--config", "configs/eval/latency_tiny.yaml", "--out", "{out}"],
    "train": ["train/bench.py", "--shapes", "tiny", "--runs", "1", "--batch-size", "2", "--out", "{out}"],
}
PATHS = {"PYTHONPATH": ".:kernels:train:eval"}


def recipe(target: str, **variables: str) -> str:
    """What make would run."""
    done = run(["make", "-n", target, *(f"{name}={value}" for name, value in variables.items())], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tests_of_the_gpu_targets_are_collected_without_optional_packages():
    named = re.findall(r"-m gpu (\S+)", recipe("gpu-kernels") + recipe("gpu-train"))
    files = sorted({name.rstrip(';"') for name in named})
    assert files == ["tests/test_gpu.py", "tests/test_gpu_kernels.py"]
    done = run(
        [sys.executable, "-m", "pytest", "-p", "tests.without_optional", "-m", "gpu", "--collect-only", *files],
        cwd=ROOT,
        env={**environment(), **PATHS},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("::test_") > 20


def environment() -> dict[str, str]:
    """Without what this test's own pytest has set."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def test_the_given_path_is_kept_and_every_part_has_a_limit():
    for target in ("gpu-kernels", "gpu-latency", "gpu-train"):
        text = recipe(target, PYTHONPATH="/tmp/site")
        assert "PYTHONPATH=.:kernels:train:eval:/tmp/site" in text
        seconds = [int(limit) for limit in re.findall(r"(?<!FAILED: )env \S+ timeout (\d+) ", text)]
        assert 0 < sum(set(seconds)) <= 480
    assert "PYTHONPATH=.:kernels:train:eval timeout" in recipe("gpu-train", PYTHONPATH="")


def test_the_environment_of_make_is_used_unless_another_python_is_named(monkeypatch):
    assert "timeout 300 python9 -m pytest" in recipe("gpu-kernels", PYTHON="python9")
    monkeypatch.delenv("PYTHON", raising=False)
    expected = ".venv/bin/python" if (ROOT / ".venv" / "bin" / "python").exists() else "python3"
    assert f"timeout 300 {expected} -m pytest" in recipe("gpu-kernels")


def test_a_part_that_fails_is_reported_and_the_next_one_runs():
    done = run(["make", "gpu", "PYTHON=false"], cwd=ROOT)
    assert done.returncode != 0
    assert re.findall(r"== (gpu-\S+): FAILED", done.stdout) == ["gpu-kernels", "gpu-latency", "gpu-train"]
    assert len(re.findall(r"^== FAILED: ", done.stdout, re.MULTILINE)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("part", TINY)
def test_a_part_runs_at_toy_size_without_optional_packages(tmp_path, part):
    first, *words = [word.format(out=tmp_path) for word in TINY[part]]
    call, name, *arguments = ("run_module", *words) if first == "-m" else ("run_path", first, *words)
    start = f"runpy.{call}({name!r}, run_name='__main__')"
    code = f"import sys, runpy, tests.without_optional; sys.argv = ['part', *{arguments!r}]; {start}"
    settings = {**environment(), **PATHS, "TRITON_INTERPRET": "1" if part == "kernels" else "0"}
    done = run([sys.executable, "-c", code], cwd=ROOT, env=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert part == "kernels" or list(tmp_path.glob("*.json"))

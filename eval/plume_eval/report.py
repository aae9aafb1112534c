"""Results files: numbers with the command, commit, versions and hardware that made them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch


def header(command: str) -> dict:
    """What a reader needs to judge or repeat a result.

    Args:
        command: what was typed.
    """
    return {
        "command": command,
        "commit": commit(),
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": _device(),
        "threads": torch.get_num_threads(),
    }


def write_report(out: Path, name: str, title: str, command: str, text: str, results: object) -> Path:
    """Write `<name>_<device>_<yyyymm>.{md,json}`; returns the path without suffix.

    Args:
        out: folder, made if missing.
        name: what was measured.
        title: heading of the page.
        command: what was typed.
        text: the page below its header, Markdown.
        results: plain data for JSON.
    """
    head = header(command)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = out / f"{name}_{device}_{head['date'][:4]}{head['date'][5:7]}"
    out.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(f"# {title}\n\n{markdown_header(head)}\n\n{text}\n", encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps({**head, "results": results}, indent=1) + "\n", encoding="utf-8")
    return path


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table.

    Example:
        >>> print(markdown_table(["mode", "recall"], [["latent", 1.0]]))
        | mode | recall |
        |---|---|
        | latent | 1.0 |
    """
    lines = [columns, ["---"] * len(columns), *rows]
    joined = [
        "|".join(["", *(f" {cell} " if cell != "---" else cell for cell in map(str, line)), ""]) for line in lines
    ]
    return "\n".join(joined)


def markdown_header(fields: dict) -> str:
    """The header as a list."""
    return "\n".join(f"- {name}: {value}" for name, value in fields.items())


@cache
def commit() -> str:
    """The commit of the checkout that runs, and whether it has changes."""
    try:
        here = Path(__file__).parent
        run = {"capture_output": True, "text": True, "check": True, "cwd": here}
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
    return found + (" with local changes" if changed else "")


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"

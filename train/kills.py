"""Kills a training run at random moments, starts it again each time, and compares it with one left alone.

    python train/kills.py --config configs/train/demo.yaml --times 10

The weights must be equal to the bit, and the logs too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from plume.terminal import Parser, run_script
from plume_eval.report import header, markdown_header
from plume_train.config import arguments_from

#: Numbers of a log that depend on the clock or the machine.
TIMED = ("pairs_per_second", "tokens_per_second", "peak_memory_gib")


def start(config: Path, out: Path, save_steps: int) -> subprocess.Popen:
    """Start the run, or go on with it; the command is the same."""
    flags = ["--output_dir", out, "--save_strategy", "steps", "--save_steps", save_steps, "--logging_steps", 1]
    command = [sys.executable, "-m", "plume_train", "--config", config, *flags, "--disable_tqdm", "true"]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def last_step(out: Path) -> int:
    """The last step in the log."""
    log = out / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def run_with_kills(config: Path, out: Path, save_steps: int, moments: list[int], rng: random.Random) -> list[dict]:
    """Run until it is done, killed a moment after each of these steps; returns where it was and where it went on."""
    kills = []
    for moment in [*moments, None]:
        process = start(config, out, save_steps)
        while process.poll() is None and (moment is None or last_step(out) < moment):
            time.sleep(0.01)
        if process.poll() is None:
            time.sleep(rng.random() * 0.3)
            os.kill(process.pid, signal.SIGKILL)
        errors = process.communicate()[1]
        if process.returncode not in (0, -signal.SIGKILL):
            sys.exit(errors)
        if moment is not None:
            saved = sorted(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
            was_saving = (out / "unfinished").exists()
            kills.append(
                {"step": last_step(out), "last_checkpoint": saved[-1] if saved else 0, "while_saving": was_saving}
            )
            print(f"killed at step {kills[-1]['step']}, goes on at {kills[-1]['last_checkpoint']}")  # noqa: T201
    return kills


def log_of(out: Path) -> list[dict]:
    """The log without what a clock decides."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines if "loss" in line]


def main() -> None:
    """Run twice, compare, write."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/train/demo.yaml"))
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--save-steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/kills"))
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    args = arguments_from(options.config)
    rng = random.Random(options.seed)
    moments = sorted(rng.sample(range(1, args.max_steps), options.times))
    whole, killed = options.work / "whole", options.work / "killed"
    reference = start(options.config, whole, options.save_steps)
    kills = run_with_kills(options.config, killed, options.save_steps, moments, rng)
    if reference.wait() != 0:
        sys.exit(reference.communicate()[1])

    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    differ = [name for name, weight in expected.items() if not torch.equal(weight, found[name])]
    report = {
        "kills": kills,
        "tensors": len(expected),
        "tensors_that_differ": len(differ),
        "log_lines": len(log_of(whole)),
        "logs_are_equal": log_of(whole) == log_of(killed),
    }
    fields = header(" ".join(["train/kills.py", *sys.argv[1:]]))
    name = options.out / f"resume_after_kills_cpu_{fields['date'][:4]}{fields['date'][5:7]}"
    name.with_suffix(".json").write_text(json.dumps({"header": fields, **report}, indent=1) + "\n", encoding="utf-8")
    listed = "\n".join(
        f"- at step {kill['step']}{', while saving' if kill['while_saving'] else ''}: went on at step "
        f"{kill['last_checkpoint']}"
        for kill in kills
    )
    text = (
        f"# A run that was killed {len(kills)} times\n\n{markdown_header(fields)}\n\n{listed}\n\n"
        f"{len(differ)} of {len(expected)} tensors differ from those of a run that was left alone; the logs of "
        f"{report['log_lines']} steps are {'equal' if report['logs_are_equal'] else 'not equal'}.\n"
    )
    name.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)  # noqa: T201
    sys.exit(bool(differ) or not report["logs_are_equal"])


if __name__ == "__main__":
    run_script("kills.py", main)

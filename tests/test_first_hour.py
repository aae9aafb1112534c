"""A first hour, as it is typed: the demo, an own folder, own pairs in every format, LoRA, two processes, resume."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from tests.mixed import write_clip, write_pdf
from tests.processes import HANGS_AFTER_S, run, started

pytestmark = [pytest.mark.slow, pytest.mark.launching]

ROOT = Path(__file__).parent.parent
COLOURS = ["red", "blue", "green", "yellow"]


class Shell:
    """Types commands of an installed package, from a folder that is not the clone's."""

    def __init__(self, folder: Path):
        self.folder = folder / "work"
        self.folder.mkdir()
        site = folder / "site"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        done = run([*install, "--target", site, ROOT])
        assert done.returncode == 0, done.stderr
        self.environment = {**os.environ, "PYTHONPATH": str(site)}

    def command(self, line: str) -> list[str]:
        program, *words = line.split()
        module = {"plume": "plume", "plume-train": "plume_train", "accelerate": "accelerate.commands.launch"}[program]
        return [sys.executable, "-m", module, *words]

    def says(self, line: str, code: int = 0, **environment: str) -> str:
        """What a command prints; nothing but sentences may stand on stderr."""
        done = run(self.command(line), cwd=self.folder, env={**self.environment, **environment})
        assert done.returncode == code, f"{line}\n{done.stdout}\n{done.stderr}"
        for noise in ("Traceback", "Warning:", "warnings.warn", "Loading weights", "[WARNING]"):
            assert noise not in done.stderr, done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    shell = Shell(tmp_path_factory.mktemp("hour"))
    demo = run([sys.executable, ROOT / "train" / "plume_demo.py"], cwd=shell.folder, env=shell.environment)
    assert demo.returncode == 0, demo.stderr
    assert "Part 5 of 5" in demo.stdout
    assert (shell.folder / "runs" / "demo" / "trace.png").exists()
    return shell


def test_a_folder_is_indexed_and_searched(shell):
    photos = shell.folder / "photos"
    photos.mkdir()
    for colour in COLOURS:
        Image.new("RGB", (640, 480), colour).save(photos / f"{colour}.jpg")
    (photos / "note.txt").write_text("red-disc")
    (photos / "broken.jpg").write_text("no image")
    write_clip(photos / "clip.mp4", [0, 100, 200])
    write_pdf(photos / "report.pdf", ["red", "blue"])
    said = shell.says("plume index photos --out photos.index")
    assert "8 rows in photos.index: 8 embedded" in said
    assert "skipped: broken.jpg: " in said
    assert "0 embedded" in shell.says("plume index photos --out photos.index")
    first = shell.says("plume search red-disc --index photos.index --top-k 3").splitlines()[1]
    assert "note.txt" in first
    assert "search by it with --image red.jpg" in shell.says("plume search red.jpg --index photos.index", code=1)
    shell.says("plume trace photos/red.jpg --out trace")
    assert (shell.folder / "trace" / "000.png").exists()


def pairs() -> list[dict]:
    """200 pairs with rationales."""
    return [
        {
            "query": {
                "text": f"what follows {COLOURS[row % 4]}, number {row}?",
                "image": f"images/{row % 4}.png",
                "rationale": f"It is {COLOURS[row % 4]}. Its number is {row}. Both are asked for.",
                "answer": COLOURS[(row + 1) % 4],
            },
            "target": f"{COLOURS[(row + 1) % 4]} {row}",
        }
        for row in range(200)
    ]


@pytest.fixture(scope="module")
def data(shell):
    folder = shell.folder / "mine"
    (folder / "images").mkdir(parents=True)
    for place, colour in enumerate(COLOURS):
        Image.new("RGB", (56, 56), colour).save(folder / "images" / f"{place}.png")
    lines = [json.dumps(row) for row in pairs()]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    columns = [
        {f"query_{name}": value for name, value in row["query"].items()} | {"target_text": row["target"]}
        for row in pairs()
    ]
    Dataset.from_list(columns).to_parquet(folder / "pairs.parquet")
    ume = (shell.folder / "runs" / "demo" / "data" / "train.jsonl").read_text().splitlines()[:200]
    (shell.folder / "runs" / "demo" / "data" / "ume.jsonl").write_text("\n".join(ume))
    return {"jsonl": "mine/pairs.jsonl", "parquet": "mine/pairs.parquet", "ume": "runs/demo/data/ume.jsonl"}


COMMON = "--model runs/demo/explicit --num_segments 2 --per_device_train_batch_size 8 --use_cpu"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "ume"])
def test_own_pairs_are_checked_and_trained_on(shell, data, kind):
    assert "200 rows can be used, 0 cannot" in shell.says(f"plume-train check {data[kind]} {COMMON}")
    train = f"plume-train --train_file {data[kind]} {COMMON} --max_steps 12 --output_dir runs/{kind}"
    said = shell.says(train)
    assert "step 10/12  loss " in said
    assert (shell.folder / "runs" / kind / "training.png").exists()
    assert "which is finished" in shell.says(train)
    assert "max_steps was 12, now 13" in shell.says(train.replace("12", "13"), code=1)
    assert "1 vector of 96" in shell.says(f"plume encode mine/images/0.png --model runs/{kind} --out v.npz")


def test_lora_is_trained_and_merged(shell, data):
    saving = "--save_strategy steps --save_steps 4 --lora_rank 4"
    shell.says(f"plume-train --train_file {data['jsonl']} {COMMON} {saving} --max_steps 8 --output_dir runs/lora")
    shell.says("plume-train merge runs/lora/checkpoint-4 runs/merged")
    for model in ("runs/lora", "runs/merged"):
        assert "1 vector of 96" in shell.says(f"plume encode mine/images/0.png --model {model} --out v.npz")


def test_two_processes_train_one_model(shell, data):
    launch = f"accelerate --config_file {ROOT}/configs/accelerate/ddp.yaml --num_processes 2 --main_process_port 0"
    train = f"-m plume_train --train_file {data['jsonl']} {COMMON} --max_steps 4 --output_dir runs/two"
    said = shell.says(f"{launch} {train}", ACCELERATE_USE_CPU="true")
    assert said.count("trained in") == 1
    assert json.loads((shell.folder / "runs" / "two" / "run.json").read_text())["world_size"] == 2


def test_a_run_that_is_killed_goes_on(shell, data):
    out = shell.folder / "runs" / "killed"
    saving = "--save_strategy steps --save_steps 5 --save_total_limit 1"
    line = f"plume-train --train_file {data['jsonl']} {COMMON} {saving} --max_steps 200 --output_dir runs/killed"
    with started(shell.command(line), cwd=shell.folder, env=shell.environment) as process:
        while process.poll() is None and not list(out.glob("checkpoint-*")):
            time.sleep(0.05)
        process.kill()
        process.communicate(timeout=HANGS_AFTER_S)
    said = shell.says(line)
    assert "going on from runs/killed/checkpoint-" in said
    assert "step 200/200" in said

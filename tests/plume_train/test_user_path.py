"""From pairs without rationales to a model that is measured: the commands of train/README.md, word for word."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from plume.random_models import SHORT_STRINGS, save_tiny_backbone
from plume_eval.__main__ import app
from plume_train.__main__ import main
from tests.plume_train.rationales.fake_server import answer_for, completion, serving

README = Path(__file__).parents[2] / "train" / "README.md"
WORDS = ["red", "kite", "blue", "bird", "table", "rain", "sun", "sea"]

#: What a machine without a GPU, and a model of random weights, have instead of the README's.
SMALLER = {
    "http://localhost:8000/v1": None,  # the fake server's
    "--config lora": "--config small.yaml",
}


def commands() -> list[str]:
    """The block under the heading."""
    section = README.read_text(encoding="utf-8").partition("## From pairs to an embedder")[2]
    block = re.search(r"^```\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert block is not None
    return block[1].replace("\\\n", " ").splitlines()


def right(question: str, body: dict):
    word = question.split()[-1].rstrip("?")
    return completion(answer_for(word))


def status(program) -> int | str | None:
    """What a program would have exited with."""
    try:
        program()
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.fixture
def folder(tmp_path):
    """Pairs as a user has them, a backbone, and settings that suit both."""
    rows = [{"query": f"what is {one} {other}?", "target": other, "task": "words"} for one in WORDS for other in WORDS]
    for name, some in (("pairs", rows[:48]), ("held_out", rows[48:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    save_tiny_backbone(tmp_path / "Qwen2-VL-2B-Instruct", [*WORDS, "what", "is"], num_layers=1, vision_layers=1)
    small = {
        "model": str(tmp_path / "Qwen2-VL-2B-Instruct"),
        "plume_config": SHORT_STRINGS,
        "lora_rank": 4,
        "num_segments": 2,
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "save_strategy": "no",
        "learning_rate": 1e-3,
    }
    (tmp_path / "small.yaml").write_text(json.dumps(small))  # JSON is YAML
    return tmp_path


def test_every_command_of_the_readme_does_its_part(folder, monkeypatch, capsys):
    lines = commands()
    parts = ["rationales", "check", "--config", "mine", "--config", "gate"]
    assert [line.split()[1] for line in lines if line.startswith("plume-train")] == parts
    assert lines[-1].startswith("plume-eval pairs held_out.jsonl")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with serving(right) as server:
        for line in lines:
            for usual, smaller in SMALLER.items():
                line = line.replace(usual, smaller or server.address)
            program, *words = shlex.split(line)
            if program == "plume-eval":
                done = CliRunner().invoke(app, words)
                assert done.exit_code == 0, f"{line}\n{done.output}"
                continue
            monkeypatch.setattr(sys, "argv", [program, *words])
            assert status(main) in (0, None), f"{line}\n{capsys.readouterr()}"
    rows = [json.loads(line) for line in (folder / "mined.jsonl").read_text().splitlines()]
    assert all(row["query"]["rationale"] for row in rows)
    assert all("margin" in row for row in rows)
    assert any(row.get("negatives") for row in rows)
    assert "48 rationales written" in capsys.readouterr().out
    numbers = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(numbers) == {
        f"{what}_{mode}" for what in ("recall_at_1", "mrr") for mode in ("latent", "single_pass", "latent_k4")
    }

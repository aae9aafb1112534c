"""`plume-eval mmeb` as a user types it, on miniatures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import datasets
import pytest
from typer.testing import CliRunner

from plume_eval.__main__ import app
from plume_eval.mmeb import command, tasks
from plume_eval.mmeb.run import Settings
from tests.plume_eval.mmeb.miniature import make_miniature, miniature_tasks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("mmeb") / "data"
    make_miniature(root)
    return root


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The tasks with the numbers of the miniature."""
    monkeypatch.setattr(tasks, "all_tasks", lambda: tuple(miniature_tasks()))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def typed(*words: object):
    return CliRunner().invoke(app, ["mmeb", *map(str, words)])


def test_two_modes_give_results_and_a_report(small, data, tmp_path, plume_folder):
    shown = typed(
        *("--model", plume_folder, "--data", data, "--out", tmp_path, "--task", "V-MRET", "--task", "GQA"),
        *("--mode", "latent", "--mode", "single_pass", "--num-latent-steps", 2),
    )
    assert shown.exit_code == 0, shown.output
    assert f"{plume_folder.name}_latent_K2: 4 of 4 tasks complete" in shown.output
    (page,) = tmp_path.glob("mmeb_*.md")
    assert f"## {plume_folder.name}_latent_K2 less {plume_folder.name}_single_pass" in page.read_text()
    assert "--task V-MRET --task GQA --mode latent --mode single_pass --num-latent-steps 2" in page.read_text()
    joined = typed("report", *sorted(tmp_path.glob(f"{plume_folder.name}_*")), "--out", tmp_path / "joined")
    assert joined.exit_code == 0, joined.output


def test_a_check_says_what_is_missing(small, data, tmp_path):
    whole = typed("check", "--data", data, "--task", "V-CLS")
    assert whole.exit_code == 0, whole.output
    assert "| K700 | V-CLS | 3 of 3 | 700 | yes |" in whole.output
    missing = typed("check", "--data", tmp_path, "--task", "GQA", "--task", "VATEX")
    assert missing.exit_code == 1
    assert "0 of 2 tasks are complete" in missing.output
    assert "hf download --repo-type dataset ziyjiang/MMEB_Test_Instruct" in missing.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--task", "GQA"], "expected --model and --data"),
        (["--task", "GQB"], "MMEB-V2 has no 'GQB'"),
        (["--mode", "fast"], "there is no mode 'fast'"),
        (["--mode", "explicit", "--num-latent-steps", "3"], "--num-latent-steps has no effect on explicit"),
        (["--max-new-tokens", "8"], "--max-new-tokens has no effect where nothing is written"),
        (["--task", "GQA", "--template", "a {}"], "--template has no effect without a classification task"),
        (["--baseline", "clip"], "there is no baseline 'clip'"),
        (["--baseline", "gme", "--mode", "latent"], "--mode has no effect on a baseline"),
    ],
)
def test_what_cannot_be_honoured_is_refused(data, tmp_path, plume_folder, words, expected):
    place = [] if "--model" in expected else ["--model", plume_folder, "--data", data, "--out", tmp_path]
    shown = typed(*place, *words)
    assert shown.exit_code != 0
    assert expected in " ".join(shown.output.replace("│", " ").split())


def test_a_folder_that_is_not_there_is_told(tmp_path, plume_folder):
    shown = typed("--model", plume_folder, "--data", tmp_path / "none", "--out", tmp_path)
    assert "there is no folder" in shown.output


SCRIPT = """
import sys
from pathlib import Path
import datasets
from tests.plume_eval.mmeb.miniature import miniature_tasks
from plume_eval.mmeb import tasks
from plume_eval.mmeb.command import run_all
from plume_eval.mmeb.run import Settings

model, data, out, cache = sys.argv[1:]
datasets.config.HF_DATASETS_CACHE = cache
tasks.all_tasks = lambda: tuple(miniature_tasks())
run_all(model, Path(data), Path(out), task_names=["V-MRET", "VDRv2"], settings=Settings(shard_size=3))
"""


def results(folder):
    found = {}
    for file in sorted(folder.glob("*/*.json")):
        result = json.loads(file.read_text())
        if "task" in result:
            for side in result["cost"].values():
                side["seconds"] = 0
            found[file.name] = result
    return found


@pytest.mark.slow  # test_evaluation.py stops a run between shards
@pytest.mark.launching
def test_a_killed_run_and_two_processes_give_the_results_of_one(small, data, tmp_path, plume_folder):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}

    def run(out: str) -> None:
        names, settings = ["V-MRET", "VDRv2"], Settings(shard_size=3)
        command.run_all(str(plume_folder), data, tmp_path / out, task_names=names, settings=settings)

    def arguments(out: str) -> list[str]:
        return [str(file), str(plume_folder), str(data), str(tmp_path / out), str(tmp_path / "cache")]

    run("whole")
    killed = subprocess.Popen([sys.executable, *arguments("killed")], env=env, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "killed").glob("*/*/*.npz")) and killed.poll() is None:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    run("killed")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    subprocess.run([*launch, *arguments("two")], env=env, check=True, capture_output=True)

    expected = results(tmp_path / "whole")
    assert len(expected) == 7
    assert all(result["is_complete"] for result in expected.values())
    assert results(tmp_path / "killed") == expected
    assert results(tmp_path / "two") == expected


def test_embedders_are_opened_one_after_the_other(plume_folder):
    modes = ("explicit", "latent")
    opened = command._embedders(
        str(plume_folder), modes, None, {"num_latent_steps": 1, "document_latent_steps": None}, 8, 4
    )
    assert [embedder.settings["mode"] for embedder in opened] == ["latent", "explicit"]

"""A run that is killed, cannot save, or breaks: nothing is lost, and what is said helps."""

from __future__ import annotations

import json
import math
import random
import resource
import shutil
import signal
import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch
from safetensors.torch import load_file

from plume import PlumeModel
from plume_train.config import PlumeTrainingArguments
from plume_train.run import train
from plume_train.saving import RunError
from plume_train.trainer import PlumeTrainer
from tests.plume_train.runs import settings
from tests.processes import run

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 10}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, start, hops_folder):
    """The folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    train(settings(folder, start, hops_folder, **SAVING))
    return folder / "out"


def log_of(folder):
    keep = ("step", "loss", "contrastive", "cross_entropy_query", "grad_norm", "num_latent_steps")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in keep} for line in lines if "loss" in line]


# Dies some time after a step, at the latest when all steps are done.
_KILLED = """
import os, signal, sys, threading, time
from plume_train import __main__ as program, run, trainer
aimed, delay = int(sys.argv.pop(1)), float(sys.argv.pop(1))
step, begun = trainer.PlumeTrainer.training_step, []
def kill():
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)
def training_step(self, *arguments, **settings):
    if self.state.global_step >= aimed and not begun:
        begun.append(threading.Thread(target=kill))
        begun[0].start()
    return step(self, *arguments, **settings)
trainer.PlumeTrainer.training_step = training_step
run.finish = lambda trainer: begun[0].join()
program.main()
"""


def test_a_run_that_is_killed_at_random_ends_with_the_same_weights_and_log(tmp_path, start, hops_folder, whole):
    killed = tmp_path / "killed"
    args = settings(tmp_path, start, hops_folder, output_dir=str(killed), **SAVING)
    flags = {
        "model": start,
        "train_file": hops_folder / "train.jsonl",
        "plume_config": json.dumps(args.plume_config),
        "output_dir": killed,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "use_cpu": "true",
        "logging_steps": 1,
        "num_segments": 2,
        **SAVING,
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
    words += ["--stage_ratios", 0, 0.5, 1, "--stage_shares", 0.4, 0.3, 0.3]
    rng = random.Random(0)
    for _ in range(2):
        # A moment after the step at which the thread begins, wherever that is: also while saving.
        aimed = rng.randrange(last_step(killed), 9)
        process = run([sys.executable, "-c", _KILLED, aimed, rng.random() * 0.1, *words])
        assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    train(args)
    expected, resumed = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(weight, resumed[name]) for name, weight in expected.items())
    assert log_of(whole) == log_of(killed)


def last_step(folder) -> int:
    log = folder / "log.jsonl"
    if not log.exists():
        return 0
    lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return json.loads(lines[-1])["step"] if lines else 0


@contextmanager
def full_disk(limit: int = 50_000):
    """No file can grow beyond some bytes, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("moment", ["save_model", "_save_optimizer_and_scheduler"])
def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(tmp_path, start, hops_folder, monkeypatch, whole, moment):
    real, calls = getattr(PlumeTrainer, moment), []

    def save(self, folder, *args, **kwargs):
        calls.append(folder)
        with full_disk() if len(calls) == 2 else nullcontext():
            return real(self, folder, *args, **kwargs)

    monkeypatch.setattr(PlumeTrainer, moment, save)
    with pytest.raises(RunError, match=r"saving in .* failed: .*checkpoint-2, is untouched\. Make sure") as error:
        train(settings(tmp_path, start, hops_folder, **SAVING))
    assert "the same command again" in str(error.value)
    out = tmp_path / "out"
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (out / "unfinished").exists()
    monkeypatch.undo()
    resumed = train(settings(tmp_path, start, hops_folder, **SAVING)).state_dict()
    expected = load_file(whole / "model.safetensors")
    assert all(torch.equal(weight, resumed[name]) for name, weight in expected.items())


def test_a_final_save_that_fails_leaves_the_earlier_model(tmp_path, start, hops_folder):
    train(settings(tmp_path, start, hops_folder, max_steps=1))
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with full_disk(), pytest.raises(RunError, match="there is no earlier checkpoint"):
        train(settings(tmp_path, start, hops_folder, max_steps=2, overwrite=True))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_loaded(tmp_path, start, hops_folder):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot be written to .*; choose another output_dir"):
        train(settings(tmp_path, start, hops_folder, output_dir=str(tmp_path / "file" / "out"), model="nowhere"))


def test_another_number_of_processes_does_not_go_on_from_a_runs_checkpoints(
    tmp_path, start, hops_folder, whole, monkeypatch
):
    shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(PlumeTrainingArguments, "world_size", 2)
    with pytest.raises(RunError, match="world_size was 1, now 2") as error:
        train(settings(tmp_path, start, hops_folder, **SAVING))
    assert "Start it with the same ones to go on" in str(error.value)
    assert (tmp_path / "out" / "checkpoint-10" / "model.safetensors").exists()


def test_other_settings_do_not_go_on_from_a_runs_checkpoints(tmp_path, start, hops_folder, whole):
    shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(RunError, match=r"temperature was 0\.02, now 0\.05"):
        train(settings(tmp_path, start, hops_folder, temperature=0.05, **SAVING))
    with pytest.raises(RunError, match="per_device_train_batch_size was 4, now 2"):
        train(settings(tmp_path, start, hops_folder, per_device_train_batch_size=2, **SAVING))
    train(settings(tmp_path, start, hops_folder, logging_steps=5, **SAVING))  # what changes no result may change


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_loss_that_is_no_number_stops_with_the_rows_and_keeps_everything(
    tmp_path, start, hops_folder, micro_batch_size
):
    real = PlumeTrainer.training_step

    def step(self, model, inputs, num_items=None):
        if self.state.global_step == 5:
            with torch.no_grad():
                self.bare_model.transition.ln.weight.mul_(math.nan)
        return real(self, model, inputs, num_items)

    mark = pytest.MonkeyPatch()
    mark.setattr(PlumeTrainer, "training_step", step)
    with mark.context(), pytest.raises(RunError, match="the loss of step 6 is no number") as error:
        train(settings(tmp_path, start, hops_folder, micro_batch_size=micro_batch_size, **SAVING))
    mark.undo()
    assert "train.jsonl:" in str(error.value)
    assert "contrastive nan" in str(error.value)
    saved = load_file(tmp_path / "out" / "checkpoint-4" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in saved.values())


def test_a_gradient_that_is_no_number_stops_before_the_weights_change(tmp_path, start, hops_folder, monkeypatch):
    real = PlumeTrainer._clip_grad_norm

    def clip(self, model):
        next(p for p in self.bare_model.parameters() if p.grad is not None).grad[:] = math.inf
        return real(self, model)

    monkeypatch.setattr(PlumeTrainer, "_clip_grad_norm", clip)
    with pytest.raises(RunError, match="the gradient of step 1 is no number"):
        train(settings(tmp_path, start, hops_folder, **SAVING))


def test_a_file_that_ends_in_the_middle_of_a_line_says_so(tmp_path, start, hops_folder):
    data = tmp_path / "data"
    shutil.copytree(hops_folder, data)
    text = (data / "train.jsonl").read_text().rstrip("\n")
    (data / "train.jsonl").write_text(text[:-10])
    number = len(text.splitlines())
    with pytest.raises(ValueError, match=rf"train\.jsonl:{number}: .*the file ends in the middle of this line"):
        train(settings(tmp_path, start, data))
    model = train(settings(tmp_path, start, data, on_bad_row="skip", max_steps=2))
    assert model is not None
    assert f"train.jsonl:{number}" in (tmp_path / "out" / "bad_rows.txt").read_text()


def test_a_folder_with_checkpoints_is_not_begun_anew_and_other_folders_are_left_alone(tmp_path, start, hops_folder):
    args = settings(tmp_path, start, hops_folder, **SAVING)
    (args.output_folder / "checkpoint-best-3").mkdir(parents=True)
    train(args)
    names = {path.name for path in args.output_folder.glob("checkpoint-*")}
    assert names == {"checkpoint-best-3", "checkpoint-8", "checkpoint-10"}
    with pytest.raises(RunError, match="holds checkpoints, but resume_from_checkpoint is off"):
        train(settings(tmp_path, start, hops_folder, resume_from_checkpoint=False, **SAVING))
    with pytest.raises(RunError, match=r"no checkpoint that training can go on from: .* holds no trainer_state\.json"):
        train(settings(tmp_path, start, hops_folder, resume_from_checkpoint=str(tmp_path), **SAVING))
    with pytest.raises(RunError, match=r"adam_beta2 was 0\.999, now 0\.9"):
        train(settings(tmp_path, start, hops_folder, adam_beta2=0.9, **SAVING))


def test_a_checkpoint_in_the_middle_has_the_k_of_its_stage(tmp_path, start, hops_folder):
    train(settings(tmp_path, start, hops_folder, save_total_limit=9, **SAVING))
    steps = {
        step: PlumeModel.from_pretrained(tmp_path / "out" / f"checkpoint-{step}").config.num_latent_steps
        for step in (2, 6, 10)
    }
    assert steps == {2: 0, 6: 1, 10: 2}


def test_data_that_changed_are_not_gone_on_with(tmp_path, start, hops_folder):
    data = tmp_path / "data"
    shutil.copytree(hops_folder, data)
    train(settings(tmp_path, start, data, **SAVING))
    with (data / "train.jsonl").open("a") as file:
        file.write(json.dumps({"query": "a", "target": "b", "task": "hops/page-name"}) + "\n")
    with pytest.raises(RunError, match="num_rows was 12, now 13"):
        train(settings(tmp_path, start, data, **SAVING))

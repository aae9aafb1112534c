"""`accelerate launch` with every configuration, on two CPU processes: the same weights as one process, and resumed."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from plume import PlumeModel
from plume_train.config import arguments_from
from plume_train.run import train
from tests.processes import run

pytestmark = pytest.mark.launching

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hops_folder, start):
    folder = tmp_path_factory.mktemp("launch")
    (folder / "run.yaml").write_text(
        f"""
        model: {start}
        train_file: {hops_folder / "train.jsonl"}
        num_segments: 2
        stage_ratios: [0.0, 0.5, 1.0]
        stage_shares: [0.5, 0.25, 0.25]
        mix_earlier: 0.5
        learn_temperature: true
        temperature: 0.1
        plume_config:
          expert_dropout: 0.0
          prompt_template: "{{content}}<disc_emb><bot>"
          suffix_template: "<eot>{{rationale}}"
          answer_template: ""
          read_out: "<gen_emb>"
          turn_end: ""
        max_steps: 4
        save_strategy: steps
        save_steps: 2
        optim: sgd  # Adam would turn rounding of vanishing gradients into steps of full size
        learning_rate: 0.01
        disable_tqdm: true
        """
    )
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """Weights after the run on one process, in one pass per side."""
    args = arguments_from(
        folder / "run.yaml", per_device_train_batch_size=4, output_dir=str(folder / "alone"), use_cpu=True
    )
    train(args)
    return load_file(folder / "alone" / "model.safetensors")


def launch(folder, name, **settings):
    """Run the command that a user would run; DeepSpeed finds out by itself that there is no GPU."""
    flags = {"per_device_train_batch_size": 2, "output_dir": folder / name, **settings}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if name.startswith("zero"):
        flags["ddp_backend"] = "gloo"
    else:
        flags["use_cpu"] = "true"
        environment["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{name}.yaml"]
    program = [Path(__file__).parent / "fsdp_on_cpu.py"] if name == "fsdp2" else ["-m", "plume_train"]
    command += ["--num_processes", 2, "--main_process_port", 0, *program, "--config", folder / "run.yaml"]
    command += [word for flag, value in flags.items() for word in (f"--{flag}", value)]
    return run(command, env=environment)


#: What only this way of sharing leaves in a checkpoint.
TRACES = {"zero1": "global_step2", "zero2": "global_step2", "zero3": "global_step2", "fsdp2": "pytorch_model_fsdp.bin"}


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2")]


@pytest.mark.parametrize("name", ["ddp", *LONG, "zero3", "fsdp2"])
def test_a_launched_run_equals_one_process(folder, alone, name):
    # Micro-batches of one row: GradCache, text rows beside rows with pages, rows of other stages.
    done = launch(folder, name, micro_batch_size=1)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(folder / name / "model.safetensors")
    assert found.keys() == alone.keys()
    for key, weight in alone.items():
        assert torch.allclose(weight, found[key], atol=1e-6), key
    if name in TRACES:
        assert (folder / name / "checkpoint-2" / TRACES[name]).exists()
    assert not (folder / name / "unfinished").exists()
    model = PlumeModel.from_pretrained(folder / name)
    assert model.config.num_latent_steps == 2
    assert "expert 3" in (folder / name / "README.md").read_text()  # the card reads weights that are shared out


@pytest.mark.parametrize("name", [pytest.param("zero3", marks=pytest.mark.slow), "fsdp2"])
def test_a_launched_run_that_is_resumed_equals_one_that_was_not(folder, name):
    changes = {"optim": "adamw_torch", "output_dir": folder / f"{name}-resumed", "bf16": "false"}
    done = launch(folder, name, **changes)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = load_file(folder / f"{name}-resumed" / "model.safetensors")
    shutil.rmtree(folder / f"{name}-resumed" / "checkpoint-4")
    (folder / f"{name}-resumed" / "model.safetensors").unlink()
    done = launch(folder, name, **changes)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = load_file(folder / f"{name}-resumed" / "model.safetensors")
    for key, weight in whole.items():
        assert torch.allclose(weight, resumed[key], atol=1e-6), key


def test_gradcache_with_accumulation_is_refused_under_deepspeed(folder):
    changes = {"output_dir": folder / "refused", "micro_batch_size": 1, "gradient_accumulation_steps": 2}
    done = launch(folder, "zero2", **changes)
    assert done.returncode != 0
    assert "raise per_device_train_batch_size" in done.stderr


def test_another_number_of_processes_is_refused_on_resume(folder, alone):
    shutil.copytree(folder / "alone", folder / "ddp_other")
    flags = {"output_dir": folder / "ddp_other", "per_device_train_batch_size": 4}
    done = launch(folder, "ddp", **flags)
    assert done.returncode != 0
    assert "world_size was 1, now 2" in done.stderr
    assert "Start it with the same ones to go on" in done.stderr
    assert (folder / "ddp_other" / "checkpoint-4" / "model.safetensors").exists()

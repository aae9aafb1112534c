"""`accelerate launch` with every configuration, on two CPU processes: the same weights as one process, and resumed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from plume import PlumeModel
from plume_eval.pairs import PairsEvaluation
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


def launch(folder, name, *runs):
    """Run the command that a user would run, but for what CPU processes need instead.

    Args:
        folder: of all runs.
        name: of the configuration.
        runs: settings of each run; of several under FSDP2, which one launch takes one after the other.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    flags = {"per_device_train_batch_size": 2, "output_dir": folder / name}
    if name.startswith("zero"):
        flags["ddp_backend"] = "gloo"
    else:
        flags["use_cpu"] = "true"
        environment["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{name}.yaml"]
    command += ["--num_processes", 2, "--main_process_port", 0]
    if name == "ddp":
        command += ["-m", "plume_train"]
    else:
        command += [Path(__file__).parent / ("fsdp_on_cpu.py" if name == "fsdp2" else "deepspeed_on_cpu.py")]
    for number, settings in enumerate(runs):
        words = [word for flag, value in {**flags, **settings}.items() for word in (f"--{flag}", value)]
        command += [*["then"] * bool(number), "--config", folder / "run.yaml", *words]
    done = run(command, env=environment)
    assert done.returncode == 0, done.stderr[-12000:]


#: What only this way of sharing leaves in a checkpoint.
TRACES = {"zero1": "global_step2", "zero2": "global_step2", "zero3": "global_step2", "fsdp2": "pytorch_model_fsdp.bin"}
#: Micro-batches of one row: GradCache, text rows beside rows with pages, rows of other stages.
CACHED = {"micro_batch_size": 1}
ADAM = {"optim": "adamw_torch", "bf16": "false", "logging_steps": 1}


def check_equals_one_process(folder, alone, name):
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


PAIRS = {"modes": ["latent", "single_pass"]}


def evaluated_on(folder):
    """Settings that evaluate every second step, on pairs that are written for it."""
    words = ("red", "blue", "kite", "table", "what")
    pairs = [{"query": one, "target": other} for one in words for other in words if one < other]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return {
        "evaluation": "plume_eval.pairs:PairsEvaluation",
        "evaluation_arguments": json.dumps({"file": str(folder / "pairs.jsonl"), **PAIRS}),
        "evaluate_every": 2,
    }


def check_evaluated_as_saved(folder, run_folder):
    """The model that was evaluated in the last step, from shares of its weights, is the one that was saved."""
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    (logged,) = [line for line in lines if "recall_at_1_latent" in line and line["step"] == 4]
    saved = PlumeModel.from_pretrained(run_folder).eval()
    expected = PairsEvaluation(folder / "pairs.jsonl", **PAIRS)(saved, 4, 2)
    assert {name: logged[name] for name in expected} == pytest.approx(expected)


def check_resumed_equals_whole(folder, name):
    assert (folder / f"{name}-resumed" / "checkpoint-4").exists()
    whole, resumed = (load_file(folder / f"{name}-{kind}" / "model.safetensors") for kind in ("whole", "resumed"))
    for key, weight in whole.items():
        assert torch.allclose(weight, resumed[key], atol=1e-6), key


LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2", "zero3")]


@pytest.mark.parametrize("name", ["ddp", *LONG])
def test_a_launched_run_equals_one_process(folder, alone, name):
    launch(folder, name, CACHED)
    check_equals_one_process(folder, alone, name)


def test_runs_under_fsdp2_equal_one_process_and_go_on_where_they_stopped(folder, alone):
    whole, resumed = folder / "fsdp2-whole", folder / "fsdp2-resumed"
    evaluation = evaluated_on(folder)
    launch(
        folder,
        "fsdp2",
        CACHED,
        {"output_dir": whole, **ADAM},
        {"output_dir": resumed, **ADAM, **evaluation},  # where the first checkpoint of that has been copied to
    )
    check_equals_one_process(folder, alone, "fsdp2")
    check_resumed_equals_whole(folder, "fsdp2")
    steps = [json.loads(line)["step"] for line in (resumed / "log.jsonl").read_text().splitlines()]
    assert min(steps) == 3
    check_evaluated_as_saved(folder, resumed)


@pytest.mark.slow
def test_a_run_under_zero3_goes_on_where_it_stopped(folder):
    whole, resumed = folder / "zero3-whole", folder / "zero3-resumed"
    launch(folder, "zero3", {"output_dir": whole, **ADAM})
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-4")
    (resumed / "model.safetensors").unlink()
    launch(folder, "zero3", {"output_dir": resumed, **ADAM, **evaluated_on(folder)})
    check_resumed_equals_whole(folder, "zero3")
    check_evaluated_as_saved(folder, resumed)


@pytest.mark.slow  # tests/plume_train/test_options.py refuses it without a launch
def test_gradcache_with_accumulation_is_refused_under_deepspeed(folder):
    changes = {"output_dir": folder / "refused", "micro_batch_size": 1, "gradient_accumulation_steps": 2}
    with pytest.raises(AssertionError, match="raise per_device_train_batch_size"):
        launch(folder, "zero2", changes)

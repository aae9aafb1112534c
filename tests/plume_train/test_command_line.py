"""`plume-train`: flags are whole words, what is wrong is one line, help is short."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from plume_train import __main__ as program
from plume_train.config import PlumeTrainingArguments, SettingsError, parse_arguments
from plume_train.help import settings_help
from plume_train.run import train
from plume_train.saving import RunError
from tests.plume_train.runs import settings
from tests.processes import run


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 0.5\nseed: 3\nbf16: false\nnum_segments: 2\n")
    args = parse_arguments(["--config", str(tmp_path / "run.yaml"), "--seed", "4", "--use_cpu", "--random_steps"])
    assert (args.learning_rate, args.seed, args.num_segments, args.random_steps) == (0.5, 4, 2, True)
    assert (args.logging_steps, args.logging_first_step, args.use_cpu) == (10, True, True)
    words = "--no_mask_duplicates --train_file a b --stage_ratios 0 1 --stage_shares 0.5 0.5 --use_cpu --task_weights"
    args = parse_arguments([*words.split(), '{"birds": 0.5}'])
    assert (args.mask_duplicates, args.train_file, args.stage_ratios) == (False, ["a", "b"], [0.0, 1.0])
    assert args.task_weights == {"birds": 0.5}


def test_yaml_values_are_read_as_flags_are(tmp_path):
    (tmp_path / "run.yaml").write_text('learning_rate: 1e-4\nlearn_temperature: "no"\ntask_weights: {birds: 1}\n')
    args = parse_arguments(["--config", str(tmp_path / "run.yaml"), "--use_cpu"])
    assert (args.learning_rate, args.learn_temperature, args.task_weights) == (1e-4, False, {"birds": 1})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("micro_batch_size: two", "micro_batch_size must be a whole number; received 'two'"),
        ("lora_rank: 2.5", "lora_rank must be a whole number; received 2.5"),
        ("learning_rate: fast", "learning_rate must be a number; received 'fast'"),
        ("learning_rate: true", "learning_rate must be a number; received True"),
        ("random_steps: maybe", "random_steps must be true or false; received 'maybe'"),
        ("stage_ratios: [0, half]", "stage_ratios must be a number; received 'half'"),
        ("curriculum: foo", "curriculum must be one of 'paper', 'published', 'explicit', 'direct'; received 'foo'"),
    ],
)
def test_a_yaml_value_of_another_type_is_named_with_file_and_key(tmp_path, line, message):
    (tmp_path / "run.yaml").write_text(line)
    with pytest.raises(SettingsError) as error:
        parse_arguments(["--config", str(tmp_path / "run.yaml"), "--use_cpu"])
    assert str(error.value) == f"{tmp_path / 'run.yaml'}: {message}"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("rows.jsonl", "there is nothing at 'rows.jsonl'; expected a file .jsonl"),
        ("runs/rows", "there is nothing at 'runs/rows'"),
        ("runs", "runs is a folder that `datasets` has not saved"),
        ("note.pdf", "note.pdf is no data that plume knows"),
        ("s3://bucket/rows.jsonl", "s3://bucket/rows.jsonl is an address; download the data"),
        ("", "there is nothing at ''"),
    ],
)
@pytest.mark.parametrize("name", ["train_file", "validation_file"])
def test_data_that_is_not_there_is_named_before_any_row_is_read(
    tmp_path, plume_folder, hops_folder, monkeypatch, name, place, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "note.pdf").touch()
    monkeypatch.setattr("plume_train.run.load_records", lambda *args: pytest.fail("rows are read"))
    args = settings(tmp_path, plume_folder, hops_folder, **{name: [place]})
    with pytest.raises(SettingsError) as error:
        train(args)
    assert str(error.value).startswith(f"{name}: {message}")


BAD_FLAGS = {
    "--learning_rat 1e-3": "unknown argument '--learning_rat'; did you mean '--learning_rate'?",
    "--num_seg=3": "unknown argument '--num_seg'",
    "--warmup_ratio 0.1": "did you mean '--warmup_steps'?",
    "--curriculum foo": "--curriculum: invalid choice: 'foo' (choose from 'paper', 'published', 'explicit', 'direct')",
    "--num_segments x": "invalid int value: 'x'",
    "--eval_strategy steps": "eval_strategy='steps' is not available here: set validation_file",
    "--task_weights birds=1": """which is not JSON (Expecting value: line 1 column 1 (char 0)); expected an object""",
    "--config": "--config: expected one argument",
    "--config gone.yaml": "gone.yaml is no file of settings; those that come with plume are demo, ",
    "--config demoo": "demoo is no file of settings; did you mean 'demo'?",
    "--bf16 maybe": "--bf16: Truthy value expected",
}


@pytest.mark.parametrize("words", BAD_FLAGS)
def test_a_flag_that_is_wrong_is_named_in_one_line(words):
    with pytest.raises(SettingsError) as error:
        parse_arguments(["--use_cpu", *words.split()])
    assert BAD_FLAGS[words] in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": "a:b"}, "would never be called; set evaluate_every"),
        ({"report_to": ["tensorbord"]}, "report_to is 'tensorbord'; did you mean 'tensorboard'"),
        ({"report_to": ["wandb"]}, "report_to is 'wandb', which needs the package wandb; pip install wandb"),
        ({"model": "runs/no/such"}, "no folder at 'runs/no/such'"),
    ],
    ids=str,
)
def test_what_would_be_found_late_is_said_at_once(tmp_path, plume_folder, changes, message, monkeypatch):
    monkeypatch.setattr("plume_train.config.get_available_reporting_integrations", lambda: ["tensorboard"])
    given = {"model": str(plume_folder), "train_file": ["rows.jsonl"], "output_dir": str(tmp_path / "out")}
    args = PlumeTrainingArguments(use_cpu=True, **{**given, "report_to": "none", **changes})
    with pytest.raises(ValueError) as error:  # noqa: PT011
        args.check()
    assert message in str(error.value)


def test_one_process_where_several_were_asked_for_is_refused(tmp_path, start, hops_folder, monkeypatch):
    for name in [name for name in os.environ if name.endswith(("RANK", "WORLD_SIZE"))]:
        monkeypatch.delenv(name)
    # What `accelerate launch --cpu --num_processes 2` sets.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(SettingsError, match="starts one process, whatever --num_processes says"):
        train(settings(tmp_path, start, hops_folder))


def test_help_names_every_setting_of_ours_on_a_page_and_a_half(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = settings_help()
    ours = {field.name for field in dataclasses.fields(PlumeTrainingArguments)}
    ours -= {field.name for field in dataclasses.fields(TrainingArguments)}
    assert all(f"--{name} " in text for name in ours)
    assert len(text.splitlines()) <= 110
    assert text.index("--num_segments") < text.index("Objective") < text.index("--learning_rate")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chek", "rows.jsonl"], "plume-train: no command 'chek'; did you mean 'check'?"),
        (["rows.jsonl"], "plume-train: no command 'rows.jsonl'; see --help"),
        (["check", "--learning_rat", "1"], "did you mean '--learning_rate'?"),
        (["check"], "no data is named; expected for example `plume-train check pairs.jsonl`"),
        (["check", "nosuch.jsonl"], "train_file: there is nothing at 'nosuch.jsonl'"),
        (["--model", "", "--train_file", "a.jsonl"], "model: a checkpoint is ''"),
        (["--model", "--train_file", "a.jsonl"], "--model: expected one argument"),
        (["check", "--lod-media"], "did you mean '--load-media'?"),
        (["merge", "--foo"], "plume-train merge: "),
        (["accelerate", "zero4"], "zero4 is no file of settings; did you mean 'zero"),
        (["accelerate"], "those that come with plume are ddp, fsdp2, single, zero1, zero2, zero3"),
    ],
    ids=" ".join,
)
def test_a_command_that_is_wrong_is_named_in_one_line(monkeypatch, capsys, words, message):
    monkeypatch.setattr("sys.argv", ["plume-train", *words])
    with pytest.raises(SystemExit) as stopped:
        program.main()
    said = str(stopped.value.code) + capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_one_of_several_processes_says_what_is_wrong(monkeypatch):
    monkeypatch.setattr("sys.argv", ["plume-train", "--learning_rat", "1"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        program.main()
    assert stopped.value.code == 1


def test_what_fails_in_one_of_several_processes_is_said_by_it(monkeypatch):
    def fail(args):
        raise RunError("row 7 made the loss infinite")

    monkeypatch.setattr("plume_train.run.train_and_save", fail)
    monkeypatch.setattr("plume_train.config.parse_arguments", lambda words: SimpleNamespace(output_folder=None))
    monkeypatch.setattr("sys.argv", ["plume-train", "--use_cpu"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="row 7 made the loss infinite"):
        program.main()


def test_names_on_the_hub_are_not_retried_without_a_network(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(program, "stay_offline_without_network", asked.append)
    (tmp_path / "run.yaml").write_text("model: you/kite\ntrain_file: [birds/pairs]\nlearning_rate: 1e-4\n")
    program._check_places(["--config", str(tmp_path / "run.yaml")])
    program._check_places(["check", "some/pairs", "--seed", "4"])
    assert asked == ["you/kite", "birds/pairs", "some/pairs"]


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"]])
def test_help_and_version_load_nothing(words):
    code = (
        "import sys; from plume_train.__main__ import main; sys.argv = ['plume-train', *sys.argv[1:]]\n"
        "try: main()\n"
        "finally: print('loaded', *sys.modules)"
    )
    done = run([sys.executable, "-c", code, *words])
    said, _, loaded = done.stdout.rpartition("loaded")
    assert "plume-train" in said
    assert not {"torch", "transformers", "numpy"} & set(loaded.split())


def test_a_finished_demo_is_not_replaced_and_a_stopped_one_leaves_what_is_not_its_own(tmp_path, monkeypatch):
    demo = importlib.import_module("plume_demo")
    sizes = {"num_train": 2, "num_validation": 1, "num_test": 1, "num_symbols": 4, "min_hops": 2, "max_hops": 2}
    demo.prepare(tmp_path / "demo", 0, sizes)
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    (tmp_path / "demo" / "latent").mkdir()
    demo.prepare(tmp_path / "demo", 0, sizes)
    assert (tmp_path / "demo" / "notes.txt").exists()
    assert not (tmp_path / "demo" / "latent").exists()
    (tmp_path / "demo" / "results.json").touch()
    with pytest.raises(SystemExit, match="holds a finished demo; remove it, or name another folder"):
        demo.prepare(tmp_path / "demo", 0, sizes)

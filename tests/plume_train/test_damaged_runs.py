"""A run whose files were damaged, or whose data changed: the file is named, and nothing that is whole is lost."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from plume_train.__main__ import main
from plume_train.run import train
from plume_train.saving import CHECKSUMS_FILE, RunError, damage
from plume_train.trainer import PlumeTrainer
from tests.plume_train.runs import settings, stopped_before_its_end

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "save_total_limit": None}
FILES = [
    "optimizer.pt",
    "trainer_state.json",
    "scheduler.pt",
    "rng_state.pth",
    "model.safetensors",
    "progress.json",
    "config.json",
    CHECKSUMS_FILE,
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, start, hops_folder):
    """A finished run and its weights; it may be copied."""
    folder = tmp_path_factory.mktemp("whole")
    weights = train(settings(folder, start, hops_folder, **SAVING)).state_dict()
    return folder, {name: weight.clone() for name, weight in weights.items()}


@pytest.fixture
def run(whole, tmp_path, start, hops_folder):
    """A copy of the run, and its settings."""
    stopped_before_its_end(shutil.copytree(whole[0] / "out", tmp_path / "out"))
    return settings(tmp_path, start, hops_folder, **SAVING)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {"cut": cut, "flipped": flip, "missing": Path.unlink, "empty": lambda file: file.write_bytes(b"")}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_of_any_file_of_a_checkpoint_is_noticed_and_named(run, name, how):
    checkpoint = run.output_folder / "checkpoint-6"
    assert damage(checkpoint) is None
    DAMAGES[how](checkpoint / name)
    if name == CHECKSUMS_FILE and how == "missing":
        assert damage(checkpoint) is None  # as of an earlier version: its formats are looked at instead
        cut(checkpoint / "optimizer.pt")
        name = "optimizer.pt"
    assert name in damage(checkpoint) or (name == CHECKSUMS_FILE and how == "flipped")  # another name, or another sum
    assert damage(checkpoint) is not None


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "model.safetensors", "scheduler.pt", "progress.json", "rng_state.pth"]
)
def test_damage_is_seen_without_checksums_too(run, name):
    checkpoint = run.output_folder / "checkpoint-6"
    (checkpoint / CHECKSUMS_FILE).unlink()
    cut(checkpoint / name)
    assert f"has a damaged {name}" in damage(checkpoint)


def test_a_run_falls_back_to_the_newest_checkpoint_that_is_whole(run, whole):
    (run.output_folder / "checkpoint-6" / "optimizer.pt").unlink()
    flip(run.output_folder / "checkpoint-4" / "model.safetensors")
    with pytest.warns(UserWarning, match="The run goes on from") as caught:
        weights = train(run).state_dict()
    (told,) = (str(one.message) for one in caught if "goes on from" in str(one.message))
    assert "checkpoint-6 holds no optimizer.pt" in told
    assert "checkpoint-4 has a damaged model.safetensors, which is not what was written" in told
    assert told.endswith("checkpoint-2")
    assert all(torch.equal(weight, weights[name]) for name, weight in whole[1].items())
    assert damage(run.output_folder / "checkpoint-6") is None


def test_where_nothing_is_whole_the_files_are_named(run):
    for number in (2, 4, 6):
        cut(run.output_folder / f"checkpoint-{number}" / "trainer_state.json")
    with pytest.raises(
        RunError, match=r"no checkpoint that training can go on from: .*checkpoint-6 has a damaged trainer"
    ):
        train(run)


def test_a_checkpoint_that_was_named_is_not_exchanged_for_another(run, tmp_path, start, hops_folder):
    cut(run.output_folder / "checkpoint-4" / "scheduler.pt")
    asked = str(run.output_folder / "checkpoint-4")
    with pytest.raises(RunError, match=r"checkpoint-4 has a damaged scheduler\.pt"):
        train(settings(tmp_path, start, hops_folder, resume_from_checkpoint=asked, **SAVING))


def test_a_damaged_run_file_is_named_and_a_damaged_log_line_left_out(run):
    shutil.rmtree(run.output_folder / "checkpoint-6")
    before = (run.output_folder / "run.json").read_text()
    cut(run.output_folder / "run.json")
    with pytest.raises(RunError, match=r"run\.json is damaged .*copy it back, or delete it"):
        train(run)
    (run.output_folder / "run.json").write_text(before)
    log = run.output_folder / "log.jsonl"
    lines = log.read_text().splitlines()
    lines[1] = lines[1][:10]
    log.write_bytes("\n".join(lines).encode() + b"\n\xff{")
    with pytest.warns(UserWarning, match=r"2 lines of .*log\.jsonl are damaged and left out"):
        train(run)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 6


@pytest.mark.parametrize("change", ["a word", "a rationale", "the order", "a picture", "the validation rows"])
def test_other_data_of_the_same_length_are_noticed(tmp_path, start, hops_folder, change):
    data = shutil.copytree(hops_folder, tmp_path / "data")
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    given = {"train_file": str(data / "train.jsonl"), "validation_file": str(data / "test.jsonl"), "max_steps": 2}
    given |= {"save_strategy": "steps", "save_steps": 1}
    train(settings(tmp_path, start, hops_folder, **given))
    file = data / "train.jsonl"
    if change == "a word":
        rows[-1]["query"]["text"] += " now"
    elif change == "a rationale":
        rows[0]["query"] |= {"rationale": "Other words.", "answer": "a"}
    elif change == "the order":
        rows.reverse()
    elif change == "a picture":
        picture = data / rows[3]["query"]["image"][0]
        Image.new("RGB", Image.open(picture).size, "blue").save(picture)
    else:
        file, rows = data / "test.jsonl", [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
        rows[0]["query"]["text"] += " now"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = "validation_digest" if "validation" in change else "data_digest"
    with pytest.raises(RunError, match=f"of a run with other settings or data: {name} was"):
        train(settings(tmp_path, start, hops_folder, **{**given, "max_steps": 2}))


def words(args, *more) -> list[str]:
    flags = {"model": args.model, "train_file": args.train_file[0], "plume_config": json.dumps(args.plume_config)}
    flags |= {"output_dir": args.output_dir, "use_cpu": "true", "num_segments": 2, "logging_steps": 1}
    listed = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
    return [str(word) for word in (*listed, *more)]


def test_a_command_that_is_stopped_says_where_it_would_go_on(tmp_path, start, hops_folder, monkeypatch):
    args, step = settings(tmp_path, start, hops_folder), PlumeTrainer.training_step

    def step_until_stopped(*args_of_step, **kwargs):
        if list(args.output_folder.glob("checkpoint-*")):
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("went on")
        return step(*args_of_step, **kwargs)

    monkeypatch.setattr(PlumeTrainer, "training_step", step_until_stopped)
    saving = ["--save_strategy", "steps", "--save_steps", 2, "--max_steps", 6, "--per_device_train_batch_size", 4]
    message = stopped(monkeypatch, words(args, *saving))
    assert message.startswith("plume-train: stopped; the last checkpoint is ")
    assert "checkpoint-2" in message
    assert message.endswith("start the same command again to go on from it")
    assert len(message.splitlines()) == 1


def stopped(monkeypatch, command) -> str:
    """What a command that ends with an error says at its end; it runs in this process."""
    monkeypatch.setattr(sys, "argv", ["plume-train", *command])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    return str(stopped.value)


BAD_CALLS = {
    "load_best_model_at_end": (
        ["--load_best_model_at_end", "true"],
        "load_best_model_at_end=True is not available here",
    ),
    "no JSON": (["--plume_config", "{"], "plume_config is '{', which is not JSON"),
    "a field that the model has not": (["--plume_config", '{"experts": 3}'], "PlumeConfig has no field 'experts'"),
    "a value that it cannot have": (["--plume_config", '{"top_k": 9}'], "top_k must lie in 1..num_experts"),
    "no data": (["--train_file", "gone.jsonl"], "gone.jsonl"),
    "no model": (["--model", "/no/such/model"], "no folder at '/no/such/model'"),
    "no configuration": (["--config", "gone.yaml"], "gone.yaml"),
}


@pytest.mark.parametrize("case", [*BAD_CALLS, "a broken picture", "a broken picture in a worker"])
def test_commands_end_their_errors_in_a_line(tmp_path, start, hops_folder, monkeypatch, case):
    args = settings(tmp_path, start, hops_folder)
    if case in BAD_CALLS:
        more, message = BAD_CALLS[case]
    else:
        broken = shutil.copytree(hops_folder, tmp_path / "data")
        for picture in (broken / "media" / "000").glob("*.png"):
            cut(picture)
        workers = int("worker" in case)
        if workers:  # the first rows are looked at before, to tell what memory they need
            monkeypatch.setattr("plume_train.run.tell_memory", lambda trainer: None)
        more = ["--train_file", broken / "train.jsonl", "--max_steps", 1, "--dataloader_num_workers", workers]
        message = "cannot be read as an image"
    said = stopped(monkeypatch, words(args, *more))
    assert said.startswith("plume-train: ")
    assert message in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.parametrize("content", ["{}", "[]"])
def test_checksums_that_list_nothing_are_damage(run, content):
    checkpoint = run.output_folder / "checkpoint-6"
    assert damage(checkpoint) is None
    (checkpoint / CHECKSUMS_FILE).write_text(content)
    assert "damaged checksums.json" in damage(checkpoint)


def test_a_flipped_bit_is_seen_in_a_file_of_torch_without_checksums(run):
    checkpoint = run.output_folder / "checkpoint-6"
    (checkpoint / CHECKSUMS_FILE).unlink()
    flip(checkpoint / "optimizer.pt")
    assert "damaged optimizer.pt" in damage(checkpoint)

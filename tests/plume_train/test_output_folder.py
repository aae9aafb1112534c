"""What stands in an output folder is not replaced unless told to, and a finished run is not trained again."""

from __future__ import annotations

import shutil

import pytest
import torch

from plume import PlumeModel
from plume_train.config import SettingsError
from plume_train.run import train
from plume_train.saving import RunError, move_into, whole_or_nothing
from plume_train.trainer import PlumeTrainer
from tests.plume_train.runs import settings, stopped_before_its_end

SHORT = {"max_steps": 2}
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, start, hops_folder):
    """A finished run; copy it."""
    folder = tmp_path_factory.mktemp("finished")
    train(settings(folder, start, hops_folder, **SHORT))
    return folder / "out"


@pytest.fixture
def out(tmp_path, finished):
    return shutil.copytree(finished, tmp_path / "out")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def untrainable(monkeypatch):
    monkeypatch.setattr(PlumeTrainer, "train", lambda *args, **kwargs: pytest.fail("it trains"))


@pytest.mark.usefixtures("untrainable")
@pytest.mark.parametrize("lost", [[], ["config.json", "model.safetensors"]], ids=["finished", "stopped without a save"])
def test_a_run_with_other_settings_is_refused_before_its_rows_are_read(tmp_path, start, hops_folder, out, lost):
    for name in lost:
        (out / name).unlink()
    before = content(out)
    with pytest.raises(RunError, match=r"max_steps was 2, now 3.*choose another output_dir, or set overwrite=true"):
        train(settings(tmp_path, start, hops_folder, max_steps=3, on_bad_row="error"))
    assert content(out) == before


@pytest.mark.usefixtures("untrainable")
def test_a_run_with_other_data_is_refused(tmp_path, start, hops_folder, out):
    data = shutil.copytree(hops_folder, tmp_path / "data")
    before = content(out)
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    with pytest.raises(RunError, match=r"train_file was .*, now .*"):
        train(settings(tmp_path, start, data, **SHORT))
    (hops_copy := tmp_path / "same.jsonl").write_text("".join(lines))
    with pytest.raises(RunError):
        train(settings(tmp_path, start, hops_folder, train_file=str(hops_copy), **SHORT))
    assert content(out) == before


@pytest.mark.usefixtures("untrainable")
def test_a_model_that_was_not_trained_there_is_refused(tmp_path, start, hops_folder, plume_folder):
    out = shutil.copytree(plume_folder, tmp_path / "out")
    before = content(out)
    with pytest.raises(RunError, match="holds a model that was not trained there; choose another output_dir"):
        train(settings(tmp_path, start, hops_folder, **SHORT))
    assert content(out) == before
    with pytest.raises(SettingsError, match="output_dir and model are both"):
        train(settings(tmp_path, start, hops_folder, model=str(out), overwrite=True, **SHORT))
    assert content(out) == before


@pytest.mark.usefixtures("untrainable")
def test_a_finished_run_says_so_and_gives_its_model(tmp_path, start, hops_folder, out, capsys):
    before = content(out)
    model = train(settings(tmp_path, start, hops_folder, disable_tqdm=False, **SHORT))
    assert content(out) == before
    assert "is finished; set overwrite=true to train it again" in capsys.readouterr().err
    saved = PlumeModel.from_pretrained(out).state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("changes", [SHORT, {"max_steps": 3}], ids=["the same settings", "other settings"])
def test_overwrite_trains_again_and_leaves_what_is_not_the_runs(tmp_path, start, hops_folder, out, changes):
    (out / "notes.txt").write_text("mine")
    train(settings(tmp_path, start, hops_folder, overwrite=True, **changes))
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "log.jsonl").read_text().count("train_runtime") == 1
    assert (out / "model.safetensors").exists()


def test_a_run_that_overwrites_goes_on_after_an_interruption(tmp_path, start, hops_folder, out, monkeypatch, capsys):
    args = {"overwrite": True, "disable_tqdm": False, **SAVING}
    real, before = PlumeTrainer.save_whole, (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(PlumeTrainer, "save_whole", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(settings(tmp_path, start, hops_folder, **args))
    monkeypatch.setattr(PlumeTrainer, "save_whole", real)
    train(settings(tmp_path, start, hops_folder, **args))
    assert f"going on from {out / 'checkpoint-4'}" in capsys.readouterr().err  # the earlier model is not this run's
    assert (out / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("sizes", [("1GB", "20KB"), ("20KB", "1GB"), ("20KB", "40KB")])
def test_weights_that_replace_others_are_the_only_ones(tmp_path, plume_folder, sizes):
    """Weights in one file are loaded before those in several, and files of another number have other names."""
    old, new = PlumeModel.from_pretrained(plume_folder), PlumeModel.from_pretrained(plume_folder)
    with torch.no_grad():
        new.transition.router.weight.add_(1.0)
    for model, size in zip((old, new), sizes, strict=True):
        with whole_or_nothing(tmp_path / "out", True) as unfinished:
            model.save_pretrained(unfinished, max_shard_size=size)
            move_into(unfinished, tmp_path / "out")
    found = PlumeModel.from_pretrained(tmp_path / "out")
    assert torch.equal(found.transition.router.weight, new.transition.router.weight)
    num_files = len(list((tmp_path / "out").glob("*.safetensors")))
    new.save_pretrained(tmp_path / "alone", max_shard_size=sizes[1])
    assert num_files == len(list((tmp_path / "alone").glob("*.safetensors")))


def test_a_run_that_failed_before_its_first_step_may_be_begun_with_other_settings(tmp_path, start, hops_folder):
    with pytest.raises(SettingsError, match="matryoshka_dims"):
        train(settings(tmp_path, start, hops_folder, matryoshka_dims=[512], matryoshka_weight=1.0, **SHORT))
    assert (tmp_path / "out" / "run.json").exists()
    train(settings(tmp_path, start, hops_folder, **SHORT))


@pytest.mark.usefixtures("untrainable")
@pytest.mark.parametrize("name", ["log.jsonl", "README.md", "config.json", "training.png"])
def test_files_of_somebody_else_are_not_replaced(tmp_path, start, hops_folder, name):
    (out := tmp_path / "out").mkdir()
    (out / "run.log").write_text("what a shell writes there is no hindrance")
    (out / name).write_text("{}")
    before = content(out)
    with pytest.raises(RunError, match=f"holds a {name} that no run has written there; choose another output_dir"):
        train(settings(tmp_path, start, hops_folder, **SHORT))
    assert content(out) == before


@pytest.mark.parametrize("setting", ["model", "train_file"])
def test_overwrite_does_not_remove_what_the_run_needs(tmp_path, start, hops_folder, out, setting):
    train(settings(tmp_path, start, hops_folder, overwrite=True, **SAVING))
    (out / "rows.jsonl").write_bytes((hops_folder / "train.jsonl").read_bytes())
    inside = {"model": str(out / "checkpoint-2"), "train_file": [str(out / "rows.jsonl")]}[setting]
    with pytest.raises(SettingsError, match="lies in output_dir, which overwrite=true would replace"):
        train(settings(tmp_path, start, hops_folder, overwrite=True, **{**SAVING, setting: inside}))
    assert (out / "checkpoint-2").exists()
    assert (out / "checkpoint-4").exists()


def test_overwrite_removes_nothing_before_the_new_run_can_begin(tmp_path, start, hops_folder, out):
    train(settings(tmp_path, start, hops_folder, overwrite=True, **SAVING))
    before = content(out)
    with pytest.raises(ValueError, match="nosuch"):
        train(settings(tmp_path, start, hops_folder, overwrite=True, lora_rank=2, lora_targets="nosuch", **SAVING))
    assert content(out) == before
    assert (out / "checkpoint-4" / "trainer_state.json").exists()


def test_overwrite_without_resuming_leaves_no_checkpoint_of_before(tmp_path, start, hops_folder, out, monkeypatch):
    train(settings(tmp_path, start, hops_folder, overwrite=True, lora_rank=2, lora_targets=r".*q_proj", **SAVING))
    assert (out / "adapter").exists()
    stopped_before_its_end(out)
    real = PlumeTrainer.train

    def look_and_train(*args, **kwargs):
        assert not list(out.glob("checkpoint-*"))
        return real(*args, **kwargs)

    monkeypatch.setattr(PlumeTrainer, "train", look_and_train)
    train(settings(tmp_path, start, hops_folder, overwrite=True, resume_from_checkpoint="no", **SAVING))
    assert not (out / "adapter").exists()  # it was learnt for another model


def test_checkpoints_without_run_json_are_gone_on_from_and_get_one(tmp_path, start, hops_folder, out):
    train(settings(tmp_path, start, hops_folder, overwrite=True, **SAVING))
    for name in ("run.json", "config.json", "model.safetensors"):
        (out / name).unlink()
    train(settings(tmp_path, start, hops_folder, **SAVING))
    with pytest.raises(RunError, match="max_steps was 4, now 5"):
        train(settings(tmp_path, start, hops_folder, **{**SAVING, "max_steps": 5}))

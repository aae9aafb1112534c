"""A folder on disk: what is wrong with it is said by name, weights are cut into files, anybody may read them."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from plume import Plume, PlumeModel
from plume.checkpoints.fingerprint import fingerprint
from plume.cli.main import app
from plume.random_models import SHORT_STRINGS, save_tiny_backbone
from plume_train.config import PlumeTrainingArguments
from plume_train.run import load_model

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 4401\n"


@pytest.fixture
def folder(plume_folder, tmp_path) -> Path:
    return Path(shutil.copytree(plume_folder, tmp_path / "mine"))


def open_for_training(place):
    load_model(PlumeTrainingArguments(output_dir="unused", model=str(place), use_cpu=True, report_to="none"))


DOORS = {"Plume": Plume, "PlumeModel": PlumeModel.from_pretrained, "training": open_for_training}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("damage", ["cut", "pointer", "empty"])
def test_a_damaged_file_is_named_with_what_to_do(folder, door, name, damage):
    file = folder / name
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[: len(whole) // 2], "pointer": LFS_POINTER.encode(), "empty": b""}[damage])
    remedy = "run `git lfs pull`" if damage == "pointer" else "is damaged .*; copy it again"
    with pytest.raises(ValueError, match=f"{name}.*{remedy}"):
        DOORS[door](folder)


@pytest.mark.parametrize("damage", ["cut", "pointer"])
def test_a_damaged_backbone_is_named(backbone_folder, tmp_path, damage):
    stock = Path(shutil.copytree(backbone_folder, tmp_path / "stock"))
    whole = (stock / "model.safetensors").read_bytes()
    (stock / "model.safetensors").write_bytes(whole[:-9] if damage == "cut" else LFS_POINTER.encode())
    with pytest.raises(ValueError, match=r"stock/model.safetensors (is damaged|is a Git LFS pointer)"):
        PlumeModel.from_backbone(str(stock))


@pytest.mark.parametrize("door", [*DOORS, "from_backbone"])
def test_a_place_without_a_checkpoint_is_described(tmp_path, door):
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("a")
    (tmp_path / "file").write_text("a")
    for place, message in (
        ("missing/deep/model", "no folder at '.*missing/deep/model'; expected a folder that save_pretrained wrote"),
        ("empty", "empty is an empty folder; expected a folder that save_pretrained wrote"),
        ("photos", "photos holds no config.json; expected"),
        ("file", "file is a file; expected"),
    ):
        with pytest.raises(ValueError, match=message):
            ({**DOORS, "from_backbone": PlumeModel.from_backbone})[door](str(tmp_path / place))


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_described(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no folder "runs"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ValueError, match="no folder at 'runs/mine', and no such model on the Hub, or it cannot be reached"
    ):
        Plume("runs/mine", local_files_only=True)


@pytest.mark.parametrize("command", ["encode", "index", "trace", "convert"])
def test_commands_end_with_a_line_where_the_checkpoint_is_damaged(folder, tmp_path, command):
    (folder / "model.safetensors").write_text(LFS_POINTER)
    (tmp_path / "notes").mkdir()
    words = {
        "encode": ["--text", "red", "--model", str(folder), "--out", str(tmp_path / "v.npz")],
        "index": [str(tmp_path / "notes"), "--model", str(folder), "--out", str(tmp_path / "index")],
        "trace": ["--text", "red", "--model", str(folder), "--out", str(tmp_path / "trace")],
        "convert": [str(folder), str(tmp_path / "converted")],
    }[command]
    done = CliRunner().invoke(app, [command, *words])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert "plume: " in done.stderr.splitlines()[-1]
    assert "git lfs pull" in done.stderr or command == "convert"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_umask_decides_who_may_read_a_saved_model(model, tmp_path, umask):
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "one")
        model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
        Plume(tmp_path / "one", device="cpu").save_pretrained(str(tmp_path / "again"))
    finally:
        os.umask(before)
    files = [*tmp_path.glob("*/*.safetensors"), *tmp_path.glob("*/config.json")]
    assert len(files) > 5
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask, file


def test_weights_are_cut_into_files_and_open_through_every_door(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    assert all(file.stat().st_size < max(100_000, largest) + 10_000 for file in shards)
    assert set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values()) == {
        file.name for file in shards
    }
    loaded = PlumeModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    expected = Plume(tmp_path, device="cpu").encode("red")
    assert np.allclose(SentenceTransformer(str(tmp_path), device="cpu").encode("red"), expected, atol=2e-6)
    shards[1].write_bytes(shards[1].read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"{shards[1].name} is damaged"):
        PlumeModel.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # in one file again: nothing of the many is left
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_fields_that_came_later_leave_fingerprints_as_they_were(backbone_folder):
    """Else every index that was made before would be refused."""
    model = PlumeModel.from_backbone(str(backbone_folder), **SHORT_STRINGS)
    before = fingerprint(model)
    model.config.background = None
    other = fingerprint(model)
    model.config.background, model.config.vision_positions = "white", "height_width"
    assert len({before, other, fingerprint(model)}) == 3
    model.config.vision_positions = "all_axes"
    assert fingerprint(model) == before


def test_a_model_that_is_slow_here_says_so_when_it_is_loaded(tmp_path, monkeypatch):
    save_tiny_backbone(tmp_path / "stock", ["red"])
    PlumeModel.from_backbone(str(tmp_path / "stock"), **SHORT_STRINGS).save_pretrained(tmp_path / "mine")
    speeds = {torch.float32: 1e6, torch.bfloat16: 1e5}
    monkeypatch.setattr("plume.threads.products_per_second", speeds.__getitem__)
    monkeypatch.setattr("plume.threads._FEW_PRODUCTS", 0)
    with pytest.warns(UserWarning, match=r"an image of 300 tokens takes about \d+ s on this CPU .*int8=True"):
        Plume(tmp_path / "mine", device="cpu")
    with pytest.warns(
        UserWarning, match=r"no fast products of bfloat16, and float32 takes about \d+ s: leave dtype out"
    ):
        Plume(tmp_path / "mine", device="cpu", model_kwargs={"dtype": torch.bfloat16})


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "processor_config.json"])
def test_a_missing_file_is_named(folder, door, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"mine holds no {name}; copy it again"):
        DOORS[door](folder)


@pytest.mark.parametrize("name", ["config.json", "modules.json", "tokenizer_config.json"])
def test_settings_of_another_shape_are_damage(folder, name):
    (folder / name).write_text("7")
    with pytest.raises(ValueError, match=rf"{name} is damaged \(it holds a int\)"):
        Plume(folder)


@pytest.mark.parametrize("door", DOORS)
def test_a_pointer_of_a_file_that_would_be_read_without_an_error_is_noticed(folder, door):
    (folder / "chat_template.jinja").write_text(LFS_POINTER)
    with pytest.raises(ValueError, match=r"chat_template.jinja is a Git LFS pointer"):
        DOORS[door](folder)


@pytest.mark.parametrize("place", [None, 5, "./missing", "../missing", ".hidden/model"])
def test_what_is_no_place_of_a_checkpoint_is_refused_without_asking_the_hub(place):
    with pytest.raises(ValueError, match="expected a folder that save_pretrained wrote, or a Hub name"):
        Plume(place)

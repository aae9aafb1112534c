"""The Hub: what is uploaded, its card, and loading by name."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi

from plume import Plume, PlumeModel
from plume.random_models import SHORT_STRINGS
from tests.processes import run

_COMMIT = "0123456789abcdef0123456789abcdef01234567"

_LOAD = """
import sys
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
import plume
from plume import Item, Plume, PlumeModel
name = "org/kite"
model = PlumeModel.from_pretrained(name).eval()
batch = model.processor.encode([Item.parse("a red kite")])
vectors = [
    model(**batch).embedding[0],
    AutoModel.from_pretrained(name).eval()(**batch).embedding[0],
    Plume(name, device="cpu", backend="torch").encode("a red kite", convert_to_tensor=True),
    SentenceTransformer(name, device="cpu").encode("a red kite", convert_to_tensor=True),
]
assert all(torch.equal(vectors[0], other) for other in vectors)
torch.save(vectors[0].detach(), sys.argv[1])
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Keeps what would be uploaded in a folder; holds no files at first."""
    store = tmp_path / "hub"
    calls = SimpleNamespace(store=store, branches=[], settings=None)

    def upload(self, *, repo_id, folder_path, **settings):
        shutil.copytree(folder_path, store / repo_id)
        calls.settings = settings
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit", pr_url=None)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **settings: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_branch", lambda self, repo_id, branch, **settings: calls.branches.append(branch))
    monkeypatch.setattr(HfApi, "file_exists", lambda self, repo_id, name, **settings: (store / repo_id / name).exists())
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return calls


def put_into_cache(folder: Path, cache: Path, name: str) -> None:
    """The layout that huggingface_hub keeps downloads in."""
    repository = cache / ("models--" + name.replace("/", "--"))
    shutil.copytree(folder, repository / "snapshots" / _COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(_COMMIT)


def test_what_is_pushed_opens_by_its_name_through_every_door(model, hub, tmp_path):
    address = model.push_to_hub("org/kite", revision="v1", private=True)
    assert address == "https://hub/org/kite/commit"
    assert hub.branches == ["v1"]
    assert hub.settings["revision"] == "v1"
    put_into_cache(hub.store / "org" / "kite", tmp_path / "cache" / "hub", "org/kite")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = run([sys.executable, "-c", _LOAD, tmp_path / "vector.pt"], env=environment)
    assert done.returncode == 0, done.stderr
    expected = model(**model.processor.encode([model.processor.parse("a red kite")])).embedding[0]
    assert torch.equal(torch.load(tmp_path / "vector.pt"), expected)


def test_the_embedder_pushes_the_same_folder_with_the_same_card(plume_folder, hub, monkeypatch):
    monkeypatch.setattr("sentence_transformers.base.model.load_file_path", lambda *arguments, **settings: None)
    Plume(plume_folder, device="cpu").push_to_hub("org/kite")
    names = {path.name for path in (hub.store / "org" / "kite").iterdir()}
    assert {"config.json", "model.safetensors", "modules.json", "tokenizer.json", "README.md"} <= names
    assert 'Plume("org/kite")' in (hub.store / "org" / "kite" / "README.md").read_text()


def test_the_card_tells_steps_router_use_and_limits_and_its_example_runs(plume_folder, model, monkeypatch):
    text = (plume_folder / "README.md").read_text(encoding="utf-8")
    assert "takes 4 latent steps" in text
    assert "## Intended use" in text
    assert "## Limits" in text
    rows = re.findall(r"^\| \d \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 4
    with torch.no_grad():
        for step, row in enumerate(rows):
            gates = model.transition.route(torch.zeros(1, 64), step, None)[0]
            assert [float(gate) for gate in row.split("|")] == pytest.approx(gates.tolist(), abs=0.006)
    monkeypatch.chdir(plume_folder.parent)
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "card", "exec"), {})


def test_a_card_that_somebody_wrote_is_kept(model, tmp_path):
    (tmp_path / "README.md").write_text("# My kite\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My kite\n"


def test_a_card_on_the_hub_is_kept(model, hub, monkeypatch):
    (hub.store / "org" / "kite").mkdir(parents=True)
    (hub.store / "org" / "kite" / "README.md").write_text("# My kite\n")
    sent = []

    def upload(self, *, repo_id, folder_path, **settings):
        sent.extend(os.listdir(folder_path))
        return SimpleNamespace(commit_url="")

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    model.push_to_hub("org/kite")
    assert "config.json" in sent
    assert "README.md" not in sent


def test_a_model_without_router_has_a_card_without_one(backbone_folder, tmp_path):
    model = PlumeModel.from_backbone(str(backbone_folder), transition="mlp", num_latent_steps=2, **SHORT_STRINGS)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Gates of the router" not in text
    assert "one residual MLP" in text

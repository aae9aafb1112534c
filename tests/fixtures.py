"""Small things that many tests share, built once: a stock backbone, a checkpoint, a data set."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from plume import PlumeModel
from plume.engine import graphs
from plume.random_models import SHORT_STRINGS, save_tiny_backbone, tiny_tokenizer
from plume_eval.hops.make import Sizes, make_task

if not torch.cuda.is_available():
    # Else deepspeed, which others import where it is installed, prints that it found no accelerator.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_fixture_setup(fixturedef, request):
    """What lives longer than a test is built before the test's own seed; it must not depend on what ran before."""
    if fixturedef.scope != "function":
        random.seed(0)
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def exact_products(monkeypatch):
    """Products and convolutions of float32 in float32: cuDNN else takes TF32, which has 10 bits."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def tokenizer_without_plume_tokens():
    return tiny_tokenizer(["red", "kite"])


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    save_tiny_backbone(folder, ["red", "blue", "kite", "table"])
    return folder


@pytest.fixture(scope="session")
def plume_folder(backbone_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plume")
    torch.manual_seed(0)
    PlumeModel.from_backbone(
        str(backbone_folder), num_latent_steps=4, **SHORT_STRINGS, expert_dropout=0.0
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hops_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hops")
    sizes = Sizes(num_train=12, num_validation=6, num_test=6, num_symbols=6, min_hops=2, max_hops=2, forms=("tiles",))
    make_task(folder, "page", sizes, show_progress=False)
    return folder


@pytest.fixture(scope="session")
def start(tmp_path_factory, hops_folder) -> Path:
    """A stock backbone that knows the words of `hops_folder`."""
    folder = tmp_path_factory.mktemp("start")
    words = json.loads((hops_folder / "task.json").read_text())["words"]
    save_tiny_backbone(folder, words, hidden_size=32, temporal_patch_size=1)
    return folder


@pytest.fixture(scope="session")
def two_page_pdf(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pdf") / "two pages.pdf"
    sheets = [Image.new("RGB", (120, 160), colour) for colour in ("red", "blue")]
    sheets[0].save(path, save_all=True, append_images=sheets[1:], resolution=72)
    return path


@pytest.fixture
def model(plume_folder) -> PlumeModel:
    return PlumeModel.from_pretrained(plume_folder).eval()


@pytest.fixture
def picture():
    """Makes a picture of noise; different for different seeds."""

    def make(width: int = 56, height: int = 56, seed: int = 0) -> Image.Image:
        noise = random.Random(seed).randbytes(width * height * 3)
        return Image.frombytes("RGB", (width, height), noise)

    return make


@pytest.fixture
def captured(monkeypatch):
    """Graphs without a GPU: their buffers, buckets and order are real; replaying launches again."""
    monkeypatch.setattr(graphs, "unsupported_reason", lambda device: None)
    monkeypatch.setattr(graphs, "new_pool", lambda device: None)

    def capture(work, pool):
        work()
        output = work()

        def replay():
            # Into the same memory, as a graph does it, so that a view of an earlier result would change.
            for mine, new in zip(tensors(output), tensors(work()), strict=True):
                mine.copy_(new)
            return output

        return replay

    monkeypatch.setattr(graphs, "capture", capture)


def tensors(output) -> list[torch.Tensor]:
    """All tensors that some work returned."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [] if output is None else [one for one in vars(output).values() if isinstance(one, torch.Tensor)]

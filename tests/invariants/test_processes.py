"""One process = two: losses and gradients of gathered batches."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from PIL import Image
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from plume import PlumeModel
from plume_train.config import PlumeTrainingArguments
from plume_train.curriculum import Curriculum, Stage
from plume_train.data.collate import SUPERVISED, PairCollator
from plume_train.data.records import Records
from plume_train.data.sampler import Draw
from plume_train.objective.gradcache import Step, leveled
from plume_train.objective.losses import Contrast, balance_loss, info_nce
from plume_train.objective.objective import Objective
from tests.processes import free_port

NUM_ROWS = 4  # of each process


def batch():
    generator = torch.Generator().manual_seed(0)
    total = 2 * NUM_ROWS
    query, target = torch.randn(2, total, 8, dtype=torch.double, generator=generator)
    gates = torch.rand(total, 2, 4, dtype=torch.double, generator=generator).softmax(dim=-1)
    return query, target, gates, torch.tensor([1, 2, 3, 1, 4, 5, 6, 3])


def loss(query, target, gates, keys):
    contrast = Contrast.of(torch.ones(len(keys), dtype=torch.bool), target_keys=keys)
    contrastive = info_nce(normalize(query, dim=-1), normalize(target, dim=-1), 0.1, contrast)
    return contrastive + balance_loss(gates.sum(dim=(0, 1)), torch.tensor(2 * len(gates)))


def save_gradients(rank, folder):
    """Those of this process's rows."""
    parts = [part[rank * NUM_ROWS : (rank + 1) * NUM_ROWS] for part in batch()]
    leaves = [part.clone().requires_grad_() for part in parts[:3]]
    loss(*leaves, parts[3]).backward()
    torch.save([leaf.grad / 2 for leaf in leaves], f"{folder}/{rank}.pt")  # DDP averages over processes


def test_gradients_on_two_processes_equal_those_of_the_joined_batch(two_processes):
    query, target, gates, keys = batch()
    leaves = [part.clone().requires_grad_() for part in (query, target, gates)]
    loss(*leaves, keys).backward()
    parts = [torch.load(two_processes / f"{rank}.pt") for rank in range(2)]
    for leaf, *split in zip(leaves, *parts, strict=True):
        assert torch.allclose(leaf.grad, torch.cat(split), atol=1e-10)


# The whole training step, wrapped as it is trained.

ROWS = [
    {"query": {"text": "red kite", "rationale": "It is red. It flies.", "answer": "kite"}, "target": "kite"},
    {"query": {"text": "blue", "rationale": "Blue."}, "target": {"text": "kite"}, "negatives": ["red"]},
    {"query": {"text": "what", "image": "a.png", "rationale": "Red. All."}, "target": {"image": "b.png"}},
    {"query": {"image": "b.png"}, "target": "table", "negatives": [{"image": "a.png"}, "blue"]},
]
MIXES = {
    "text beside images": ([(2, 4)] * 4, ()),
    "latent beside explicit": ([(0, 0), (0, 0), (2, 4), (2, 4)], ()),
    "a process whose rows are all broken": ([(1, 2)] * 4, (2, 3)),
    "every row broken": ([(1, 2)] * 4, (0, 1, 2, 3)),
}


def step_gradients(rank, world, folder, case):
    """Gradients of one step on `world` processes; rows are shared out evenly."""
    (draws, broken), cut = MIXES[case[0]], CUTS[case[1]]
    args = PlumeTrainingArguments(
        model="m",
        train_file=["f"],
        output_dir=f"{folder}/out",
        use_cpu=True,
        report_to="none",
        learn_temperature=True,
        uniformity_weight=0.2,
        balance_weight=10.0,
        temperature=0.1,
        num_negatives=2,
        false_negative_margin=0.05,
        duplicate_similarity=0.99,
        hardness=3.0,
        same_side_negatives=True,
        distillation_weight=1.0,
        ranking_weight=2.0,
        ranking_temperature=0.1,
        per_step_weight=0.5,
    )
    model = PlumeModel.from_pretrained(f"{folder}/model").double().train()
    model.backbone.visual.requires_grad_(False)
    model.backbone.visual.merger.requires_grad_(True)
    objective = Objective(args, model.config.num_experts)
    model.loss_scalars = objective.build_scalars().double()
    curriculum = Curriculum(
        stages=(Stage(ratio=0, share=0.4), Stage(ratio=0.5, share=0.3), Stage(ratio=1, share=0.3)), num_segments=4
    )
    collate = PairCollator(
        model.processor,
        model.config,
        curriculum,
        **cut,
        num_negatives=2,
        share=(rank, world),
        teacher_roles=SUPERVISED,
        touch_all=world > 1,
        on_bad_row="skip",
    )
    records = Records(f"{folder}/rows.jsonl")
    most = max(steps for _, steps in draws)
    share = len(ROWS) // world
    mine = range(rank * share, (rank + 1) * share)
    for row in broken:
        Path(folder, f"broken-{row}.png").touch(exist_ok=True)
    rows = []
    for row in mine:
        record = records[row]
        if row in broken:
            side = replace(record.query, images=(Path(folder, f"broken-{row}.png"),))
            record = replace(record, query=side)
        rows.append((record, Draw(row, *draws[row], most, 2)))
    batch = leveled(collate(rows))
    for one in (one for passes in batch["passes"].values() for one in passes):
        if "pixel_values" in one["inputs"]:
            one["inputs"]["pixel_values"] = one["inputs"]["pixel_values"].double()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    step = Step(
        model=wrapped,
        objective=objective,
        accelerator=Accelerator(cpu=True),
        autocast=nullcontext,
        vision_is_frozen=True,
    )
    parts = step.cached(batch) if cut else step.direct(batch)
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    torch.save((found, parts), f"{folder}/{case_name(case)}-{world}-{rank}.pt")


pytestmark = pytest.mark.launching

# Two rows of the first process have one target, so that passes of one row differ in number between the processes.
CUTS = {"direct": {}, "passes of a row": {"micro_batch_size": 1}, "passes of 30 tokens": {"micro_batch_tokens": 30}}
CASES = [(mix, cut) for mix in MIXES for cut in CUTS]


def case_name(case) -> str:
    return "-".join(case)


def spawned(rank, world, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{folder}/meet-step")
    save_gradients(rank, folder)
    for case in CASES:
        step_gradients(rank, world, folder, case)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, plume_folder) -> Path:
    """Where two processes, started once, have left their gradients of every case."""
    folder = tmp_path_factory.mktemp("steps")
    (folder / "model").symlink_to(plume_folder)
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (56, 84), colour).save(folder / f"{name}.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    mp.spawn(spawned, args=(2, str(free_port()), str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_step_on_two_processes_equals_one_on_the_joined_batch(two_processes, case):
    step_gradients(0, 1, str(two_processes), case)
    whole, parts = torch.load(two_processes / f"{case_name(case)}-1-0.pt")
    halves = [torch.load(two_processes / f"{case_name(case)}-2-{rank}.pt") for rank in range(2)]
    for name, gradient in whole.items():
        for half, _ in halves:
            assert torch.allclose(gradient, half[name], atol=1e-9), name
    for name, value in parts.items():
        shares = [half[name] for _, half in halves]
        assert torch.allclose(value, sum(shares) / 2, atol=1e-9), name
    # Every trainable weight has a gradient everywhere, also where this batch has no use for it.
    assert halves[0][0].keys() == halves[1][0].keys() >= whole.keys()

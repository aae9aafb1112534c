"""One process = two: losses and gradients of gathered batches, also of unequal size."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import normalize

from plume.losses import Contrast, balance_loss, info_nce

SIZES = (3, 5)


def batch():
    generator = torch.Generator().manual_seed(0)
    total = sum(SIZES)
    query, target = torch.randn(2, total, 8, dtype=torch.double, generator=generator)
    gates = torch.rand(total, 2, 4, dtype=torch.double, generator=generator).softmax(dim=-1)
    return query, target, gates, torch.tensor([1, 2, 3, 1, 4, 5, 6, 3])


def loss(query, target, gates, keys):
    contrast = Contrast.of(torch.ones(len(keys), dtype=torch.bool), target_keys=keys)
    contrastive = info_nce(normalize(query, dim=-1), normalize(target, dim=-1), 0.1, contrast)
    return contrastive + balance_loss(gates.sum(dim=(0, 1)), torch.tensor(2 * len(gates)))


def gradients(rank, folder):
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meet")
    start = sum(SIZES[:rank])
    parts = [part[start : start + SIZES[rank]] for part in batch()]
    leaves = [part.clone().requires_grad_() for part in parts[:3]]
    loss(*leaves, parts[3]).backward()
    torch.save([leaf.grad / 2 for leaf in leaves], f"{folder}/{rank}.pt")  # DDP averages over processes
    dist.destroy_process_group()


def test_gradients_on_two_processes_equal_those_of_the_joined_batch(tmp_path):
    mp.spawn(gradients, args=(str(tmp_path),), nprocs=2)
    query, target, gates, keys = batch()
    leaves = [part.clone().requires_grad_() for part in (query, target, gates)]
    loss(*leaves, keys).backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for leaf, *split in zip(leaves, *parts, strict=True):
        assert torch.allclose(leaf.grad, torch.cat(split), atol=1e-10)

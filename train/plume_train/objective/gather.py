"""Rows of all processes, with gradients. Letters: B rows of this process, N = B x processes rows of all."""

from __future__ import annotations

import torch.distributed as dist
from sentence_transformers.util import all_gather
from torch import Tensor


def is_distributed() -> bool:
    """Whether other processes take part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def num_processes() -> int:
    """Processes that take part."""
    return dist.get_world_size() if is_distributed() else 1


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes, in the order of ranks, `[B, ...] -> [N, ...]`; every process has B of them.

    Floating tensors carry gradients back to the process that they came from: the sum of what all processes ask for.
    """
    if not is_distributed():
        return rows
    if rows.is_floating_point():
        return all_gather(rows.contiguous(), with_grad=True)
    return all_gather(rows.long().contiguous()).to(rows.dtype)


def total(value: Tensor) -> Tensor:
    """Sum over all processes, `[...] -> [...]`; gradients as in `gather_rows`."""
    return gather_rows(value[None]).sum(dim=0)


def most(values: Tensor) -> Tensor:
    """The largest of each number on any process, without gradients."""
    if is_distributed():
        dist.all_reduce(values := values.clone(), op=dist.ReduceOp.MAX)
    return values


def rows_before(rows: Tensor) -> int:
    """Rows of the processes of lower rank."""
    return dist.get_rank() * len(rows) if is_distributed() else 0

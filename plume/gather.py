"""Rows of all processes, with gradients. Letters: B rows of this process, N rows of all."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F


def is_distributed() -> bool:
    """Whether other processes take part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def num_processes() -> int:
    """Processes that take part."""
    return dist.get_world_size() if is_distributed() else 1


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes, in the order of ranks, `[B, ...] -> [N, ...]`; B may differ between processes.

    Floating tensors carry gradients back to the process that they came from: the sum of what all processes ask for.
    """
    if not is_distributed():
        return rows
    sizes = _sizes(rows)
    padded = F.pad(rows, [0, 0] * (rows.ndim - 1) + [0, max(sizes) - len(rows)])
    if rows.is_floating_point():
        gathered = list(all_gather(padded.contiguous()))
    else:
        whole = padded.long().contiguous()
        gathered = [torch.empty_like(whole) for _ in sizes]
        dist.all_gather(gathered, whole)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)]).to(rows.dtype)


def total(value: Tensor) -> Tensor:
    """Sum over all processes, `[...] -> [...]`; gradients as in `gather_rows`."""
    return gather_rows(value[None]).sum(dim=0)


def rows_before(rows: Tensor) -> int:
    """Rows of the processes of lower rank."""
    return sum(_sizes(rows)[: dist.get_rank()]) if is_distributed() else 0


def _sizes(rows: Tensor) -> list[int]:
    mine = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, mine)
    return torch.cat(sizes).tolist()

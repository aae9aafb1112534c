"""How long a kernel takes: many launches in one CUDA graph, each on memory of its own, so that weights come cold.

A launch from Python takes longer than a small kernel, and weights that were just used would be in L2, while in a model
every kernel finds those of the next layer in neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plume_kernels import tiles

Launch = Callable[[], Any]
Clock = Callable[[Sequence[Launch]], list[float]]
"""Microseconds per launch, of several runs over all launches."""


def graph_clock(launches: Sequence[Launch], *, num_runs: int = 15) -> list[float]:
    """Time launches in one CUDA graph; see the module."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles, and lets libraries allocate
        for launch in launches:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [launch() for launch in launches]
    times = []
    for _ in range(num_runs + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * begin.elapsed_time(end) / len(launches))
    del kept
    return times[3:]


def num_copies(args: tuple[Any, ...], most_bytes: int = 8 << 30) -> int:
    """How many sets of arguments it takes until the first is out of the cache again, 2 to 256."""
    own = sum(one.nbytes for one in args if isinstance(one, Tensor))
    return max(2, min(256, math.ceil(2 * cache_bytes() / own), most_bytes // own))


def cache_bytes() -> int:
    """Size of the device's last cache."""
    return torch.cuda.get_device_properties(0).L2_cache_size if torch.cuda.is_available() else 1 << 20


def num_bytes(name: str, args: tuple[Any, ...], num_used: int | None = None) -> int:
    """Bytes that a kernel must move: each input that it needs once, each output once.

    Args:
        name: of the kernel.
        args: as it is called.
        num_used: experts that some row has chosen, the shared one among them; None: all.
    """
    sizes = [one.nbytes if isinstance(one, Tensor) else 0 for one in args]
    if name == "qkv":
        stream, weight, kv = args[0], args[3], args[9]
        new = stream.shape[1] * len(weight) * weight.element_size()  # queries, keys and values of the new tokens
        return sum(sizes) - kv.nbytes + new
    if name == "attention":
        queries, kv, mask, lengths = args
        slots = int((lengths + mask.sum(dim=1)).sum())
        splits = -(-kv.shape[3] // tiles.SPLIT)
        read = 2 * slots * kv.shape[2] * kv.shape[4] * kv.element_size()
        return sizes[0] + read + splits * queries.numel() * 4
    if name == "out":
        return sum(sizes) + 4 * args[3][0].numel()
    if name == "gate_up":
        return sum(sizes) + len(args[0]) * len(args[3]) // 2 * args[3].element_size()
    if name == "down":
        rows = len(args[0])
        terms = tiles.num_terms(args[1].shape[0], args[1].shape[1], rows, tiles.device_name(args[1]))
        return sum(sizes) + 4 * terms * args[2].numel()
    if name == "final_norm":
        return sum(sizes) + args[0][0].numel() * args[1].element_size()
    num_experts = len(args[10]) + args[14] if name == "experts_first" else len(args[1])
    share = (num_used if num_used is not None else num_experts) / num_experts
    if name == "experts_first":
        rows, all_inner = len(args[3]), len(args[11])
        by_expert = sizes[11] + sizes[12] + rows * all_inner * args[11].element_size()
        return round(sum(sizes[:11]) + by_expert * share)  # the state is either read or written
    by_expert = sizes[1] + sizes[3] + sizes[4]
    return round(2 * sizes[0] + sizes[2] + by_expert * share)

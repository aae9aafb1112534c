"""Tensors that stay where they are, which CUDA graphs are captured over: what goes in, and the cache.

Letters: B batch, L prefix length, D hidden size, K latent steps, m hidden states that are read, M visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from plume.kept import Kept
from plume.plan import Plan
from plume.stack import TextStack

#: Inputs of prefix graphs that a room keeps, and of all vision towers.
MOST_INPUT_BYTES = 1 << 30


class Room:
    """Where a batch is reasoned about: a cache, and the tensors that go in.

    read `[B, 2, D]`: hidden states at anchor and `<bot>`. start, num_latent_steps `[B]`: as in `Plan`.
    prefixes: graphs that read into it. work: what else is captured over it, by name. is_kept: whether it comes
    again, so that graphs are worth while.
    """

    def __init__(self, stack: TextStack, num_rows: int, num_slots: int, *, is_kept: bool = False, max_graphs: int = 1):
        weight = stack.norm
        self.is_kept = is_kept
        self.cache = stack.new_cache(num_rows, num_slots)
        self.read = weight.new_zeros(num_rows, 2, len(weight))
        self.start = torch.zeros(num_rows, dtype=torch.long, device=weight.device)
        self.num_latent_steps = torch.zeros_like(self.start)
        self.prefixes: Kept[Prefix] = Kept(max_graphs, MOST_INPUT_BYTES, attrgetter("num_bytes"))
        self.work: Kept[Any] = Kept(max_graphs)

    def empty(self) -> None:
        """Leave nothing that could lead beyond the cache, or beyond the steps of another K."""
        for one in (self.cache.lengths, self.start, self.num_latent_steps):
            one.zero_()

    def furnish(self, laid_out: Plan, read: Tensor) -> None:
        """Put a batch in, whose prefix is in the cache; rows beyond it are empty."""
        size = len(read)
        self.read[:size] = read[:, :2]
        for mine, given in (
            (self.cache.lengths, laid_out.lengths),
            (self.start, laid_out.start),
            (self.num_latent_steps, laid_out.num_latent_steps),
        ):
            mine[:size].copy_(given, non_blocking=True)
            mine[size:] = 0


class Pixels:
    """Inputs of a vision tower for media of one size, and its graph."""

    def __init__(self, *inputs: Tensor):
        self.inputs = [one.clone() for one in inputs]
        self.num_bytes = sum(one.nbytes for one in inputs)
        self.launch: Callable[[], Tensor] = lambda: self.inputs[0]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Features of visual tokens, `[M, D]`."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        return self.launch()


class Prefix:
    """Inputs of a prefix graph, `[B, L]` of one shape, and the graph."""

    def __init__(self, stack: TextStack, num_rows: int, length: int, num_columns: int):
        weight = stack.norm
        self.embeds = weight.new_zeros(num_rows, length, len(weight))
        self.positions = torch.zeros(3, num_rows, length, dtype=torch.long, device=weight.device)
        self.columns = torch.zeros(num_rows, num_columns, dtype=torch.long, device=weight.device)
        self.num_bytes = self.embeds.nbytes
        self.launch: Callable[[], Tensor] = lambda: self.embeds

    def __call__(self, embeds: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
        """Hidden states at the columns, `[B, m, D]`."""
        size, length = embeds.shape[:2]
        self.embeds.zero_()
        self.embeds[:size, :length] = embeds
        self.positions[:, :size, :length] = positions
        self.columns[:size] = columns
        return self.launch()[:size]

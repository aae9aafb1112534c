"""Tensors that stay where they are, over which CUDA graphs are captured: what goes in, and the cache.

Letters: B batch, L prefix length, D hidden size, K latent steps, m hidden states that are read, M visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from plume.engine.layers.text import TextLayers
from plume.engine.layout import BatchLayout
from plume.engine.lru import LRUCache

#: Inputs of prefix graphs that the buffers of a rollout hold at most, and of all vision towers.
MAX_INPUT_BYTES = 1 << 30


class RolloutBuffers:
    """The cache of a rollout, and the tensors that go in.

    prefix_states `[B, 2, D]`: hidden states at anchor and `<bot>`. start, num_latent_steps `[B]`: as in `BatchLayout`.
    prefixes: graphs that read into the cache. graphs: of the rollout, by number of steps and gate. Only
    buffers that are reused have both: those that graphs are captured over.
    """

    def __init__(self, layers: TextLayers, num_rows: int, num_slots: int, *, max_graphs: int = 0):
        weight = layers.norm
        self.is_reused = max_graphs > 0
        self.cache = layers.new_cache(num_rows, num_slots)
        self.prefix_states = weight.new_zeros(num_rows, 2, len(weight))
        self.start = torch.zeros(num_rows, dtype=torch.long, device=weight.device)
        self.num_latent_steps = torch.zeros_like(self.start)
        if self.is_reused:
            self.prefixes: LRUCache[PrefixBuffers] = LRUCache(max_graphs, MAX_INPUT_BYTES, attrgetter("num_bytes"))
            self.graphs: LRUCache[Any] = LRUCache(max_graphs)

    def reset(self) -> None:
        """Leave nothing that could lead beyond the cache, or beyond the steps of another K."""
        for tensor in (self.cache.lengths, self.start, self.num_latent_steps):
            tensor.zero_()

    def fill(self, layout: BatchLayout, states: Tensor) -> None:
        """Put a batch in, whose prefix is in the cache; rows beyond it are empty.

        Args:
            layout: of the batch.
            states: hidden states at the layout's columns, `[B, m, D]`.
        """
        size = len(states)
        self.prefix_states[:size] = states[:, :2]
        for buffer, values in (
            (self.cache.lengths, layout.lengths),
            (self.start, layout.start),
            (self.num_latent_steps, layout.num_latent_steps),
        ):
            buffer[:size].copy_(values, non_blocking=True)
            buffer[size:] = 0


class VisionBuffers:
    """Inputs of a vision tower for media of one size, and its graph."""

    def __init__(self, *inputs: Tensor):
        self.inputs = [tensor.clone() for tensor in inputs]
        self.num_bytes = sum(tensor.nbytes for tensor in inputs)
        self.launch: Callable[[], Tensor] = lambda: self.inputs[0]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Features of visual tokens, `[M, D]`."""
        for buffer, tensor in zip(self.inputs, inputs, strict=True):
            buffer.copy_(tensor)
        return self.launch()


class PrefixBuffers:
    """Inputs of a prefix graph, `[B, L]` of one shape, and the graph."""

    def __init__(self, layers: TextLayers, num_rows: int, length: int, num_columns: int):
        weight = layers.norm
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

"""One image under many instructions: what a prefix holds up to its last image is read once and kept.

Keys and values of tokens depend on what stands before them alone. So of every row the part up to its last visual token
is read by itself, at batch 1, and kept; the rest follows through the cache, as latent steps do. Whether it was kept
or has just been read makes no difference to the bit. Against reading prefixes whole there is one of rounding.

Letters: B batch, L prefix length, R tokens behind the shared part, D hidden size, G key/value heads, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plume.backbone import Segment
from plume.kept import Kept
from plume.plan import Plan
from plume.stack import TextStack
from plume.static_cache import StaticCache


class SharedPrefixes:
    """Keys and values `[layer, 2, G, n, C]` of the beginnings of prefixes."""

    def __init__(self, stack: TextStack, max_bytes: int):
        self.stack = stack
        self.kept: Kept[Tensor] = Kept(most_bytes=max_bytes, num_bytes=lambda one: one.nbytes)

    def has_all(self, laid_out: Plan) -> bool:
        """Whether no row's shared part needs to be read, so that its images need not be seen."""
        return all(key is None or self.kept.find(key) is not None for key in laid_out.prefix_keys)

    def read(self, laid_out: Plan, embeds: Tensor, cache: StaticCache) -> Tensor:
        """Read prefixes into a cache; hidden states at the plan's columns, `[B, m, D]`."""
        device = embeds.device
        shared = laid_out.num_shared
        positions = laid_out.positions.to(device)
        cache.clear(0)
        for row, key in enumerate(laid_out.prefix_keys):
            length = int(shared[row])
            if key is None:
                continue
            own = self.kept.find(key)
            if own is None:
                own = self.kept.put(key, self._begin(embeds[row, :length], positions[:, row, :length]))
            cache.kv[:, :, row, :, :length] = own
        cache.lengths.copy_(shared)

        rest = int((laid_out.lengths - shared).max())
        behind = shared[:, None] + torch.arange(rest)  # [B, R]
        is_real = behind < laid_out.lengths[:, None]
        behind = behind.clamp(max=embeds.shape[1] - 1).to(device)
        rows = torch.arange(len(embeds), device=device)[:, None]
        segment = Segment(embeds[rows, behind], is_real.to(device), positions[:, rows, behind])
        hidden = self.stack.read_next(segment, cache)
        return hidden[rows, (laid_out.columns - shared[:, None]).to(device)]

    def _begin(self, embeds: Tensor, positions: Tensor) -> Tensor:
        cache = self.stack.new_cache(1, len(embeds))
        last = torch.full((1, 1), len(embeds) - 1, device=embeds.device)
        self.stack.read_prefix(embeds[None], positions[:, None], last, cache)
        return cache.kv[:, :, 0]

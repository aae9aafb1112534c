"""One image under many instructions: what a prefix holds up to its last image is read once and remembered.

Keys and values of tokens depend on what stands before them alone. So of every row the part up to its last visual token
is read by itself, at batch 1, and remembered; the rest follows through the cache, as latent steps do. Whether it was
remembered or has just been read makes no difference to the bit. Against reading prefixes whole there is one of
rounding.

Letters: B batch, L prefix length, R tokens behind the shared part, D hidden size, G key/value heads, C channels.
"""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor

from plume.engine.layers.text import StaticCache, TextLayers
from plume.engine.layout import BatchLayout
from plume.engine.lru import LRUCache
from plume.model.interface import Segment


class PrefixCache:
    """Keys and values `[layer, 2, G, n, C]` of the beginnings of prefixes."""

    def __init__(self, layers: TextLayers, max_bytes: int):
        self.layers = layers
        self.entries: LRUCache[Tensor] = LRUCache(max_bytes=max_bytes, size_of=attrgetter("nbytes"))

    def has_all(self, layout: BatchLayout) -> bool:
        """Whether no row's shared part needs to be read, so that its images need no vision features."""
        return all(key is None or self.entries.get(key) is not None for key in layout.media.prefix_keys)

    def read(self, layout: BatchLayout, embeds: Tensor, cache: StaticCache) -> Tensor:
        """Read prefixes into a cache; hidden states at the layout's columns, `[B, m, D]`."""
        device, num_shared = embeds.device, layout.media.num_shared
        positions = layout.positions.to(device)
        cache.clear(0)
        for row, key in enumerate(layout.media.prefix_keys):
            length = int(num_shared[row])
            if key is None:
                continue
            shared = self.entries.get(key)
            if shared is None:
                shared = self.entries.put(key, self._begin(embeds[row, :length], positions[:, row, :length]))
            cache.kv[:, :, row, :, :length] = shared
        cache.lengths.copy_(num_shared)

        rest = int((layout.lengths - num_shared).max())
        behind = num_shared[:, None] + torch.arange(rest)  # [B, R]
        is_real = behind < layout.lengths[:, None]
        behind = behind.clamp(max=embeds.shape[1] - 1).to(device)
        rows = torch.arange(len(embeds), device=device)[:, None]
        segment = Segment(embeds[rows, behind], is_real.to(device), positions[:, rows, behind])
        hidden = self.layers.read_next(segment, cache)
        return hidden[rows, (layout.columns - num_shared[:, None]).to(device)]

    def _begin(self, embeds: Tensor, positions: Tensor) -> Tensor:
        cache = self.layers.new_cache(1, len(embeds))
        last = torch.full((1, 1), len(embeds) - 1, device=embeds.device)
        self.layers.read_prefix(embeds[None], positions[:, None], last, cache)
        return cache.kv[:, :, 0]

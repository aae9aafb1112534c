"""A cache of embeddings, for inputs that come again."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor

from plume.embedder.digests import item_key
from plume.embedder.encode import Window, image_settings
from plume.engine.layers.weights import BorrowedWeights
from plume.engine.lru import LRUCache
from plume.model.model import PlumeModel


class VectorCache:
    """Vectors by content, instruction, image size, K and weights, on the CPU.

    A cached vector is returned to the bit. The other inputs are embedded in other company than without a cache, so
    that they may differ in rounding, as between any two batches.
    """

    def __init__(self, model: PlumeModel, max_bytes: int):
        self._model, self._weights = model, BorrowedWeights(model)
        self._entries: LRUCache[Tensor] = LRUCache(max_bytes=max_bytes, size_of=attrgetter("nbytes"))

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_hits(self) -> int:
        """Inputs whose vector was remembered."""
        return self._entries.num_hits

    def clear(self) -> None:
        """Forget all vectors."""
        self._entries.clear()

    def for_call(self, settings: Mapping[str, Any]) -> CallCache:
        """The cache as one call of `encode` sees it: with all that decides a vector beside the input."""
        assert self._model.processor is not None
        size = (image_settings(settings) or {}).get("size") or dict(self._model.processor.image_processor.size)
        config = self._model.config
        steps = settings.get("num_latent_steps", config.num_latent_steps)
        if config.is_gated(settings.get("num_latent_steps")):
            steps = ("gated", steps)
        form = settings.get("truncate_dim"), settings.get("normalize_embeddings")
        return CallCache(self._entries, size, (steps, form, self._weights.revision()))


@dataclass(frozen=True)
class CallCache:
    """See `VectorCache.for_call`."""

    entries: LRUCache[Tensor]
    size: Mapping[str, int]
    settings: Hashable
    _keys: dict[int, Hashable] = field(default_factory=dict)

    def recall(self, window: Window) -> tuple[list[tuple[int, Tensor]], Window]:
        """Indices and vectors of inputs that are known, and the other inputs."""
        known, unknown = [], []
        for loaded in window:
            key = self._keys[loaded.index] = item_key(loaded.item, self.size), self.settings
            vector = self.entries.get(key)
            if vector is None:
                unknown.append(loaded)
            else:
                known.append((loaded.index, vector))
        return known, unknown

    def remember(self, indices: Sequence[int], vectors: Tensor) -> None:
        """Store the vectors of inputs that were not known."""
        for index, vector in zip(indices, vectors.cpu(), strict=True):
            self.entries.put(self._keys.pop(index), vector.clone())

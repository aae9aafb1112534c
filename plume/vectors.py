"""Embeddings that are kept, for inputs that come again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from plume import content
from plume.kept import Kept
from plume.model import PlumeModel
from plume.requests import Window, image_settings
from plume.weights import Weights


class Vectors:
    """Vectors by content, instruction, image budget, K and weights, on the CPU.

    What is kept is returned to the bit. What is not is embedded in other company than without a cache, so that it
    may differ in rounding, as between any two batches.
    """

    def __init__(self, model: PlumeModel, max_bytes: int):
        self._model, self._weights = model, Weights(model)
        self._kept: Kept[Tensor] = Kept(most_bytes=max_bytes, num_bytes=attrgetter("nbytes"))

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget all."""
        self._kept = self._kept.emptied()

    def of_call(self, settings: Mapping[str, Any]) -> VectorsOfCall:
        """The cache as one call of `encode` sees it: with all that decides a vector beside the input."""
        assert self._model.processor is not None
        size = (image_settings(settings) or {}).get("size") or dict(self._model.processor.image_processor.size)
        steps = settings.get("num_latent_steps", self._model.config.num_latent_steps)
        form = settings.get("truncate_dim"), settings.get("normalize_embeddings")
        return VectorsOfCall(self._kept, size, (steps, form, self._weights.revision()))


class VectorsOfCall:
    """See `Vectors.of_call`."""

    def __init__(self, kept: Kept[Tensor], size: Mapping[str, int] | None, call: Any):
        self._kept, self._size, self._call = kept, size, call
        self._keys: dict[int, Any] = {}

    def recall(self, window: Window) -> tuple[list[tuple[int, Tensor]], Window]:
        """Places and vectors of inputs that are known, and the others."""
        known, others = [], []
        for place, item, length in window:
            key = self._keys[place] = content.item_key(item, self._size), self._call
            vector = self._kept.find(key)
            if vector is None:
                others.append((place, item, length))
            else:
                known.append((place, vector))
        return known, others

    def remember(self, places: Sequence[int], vectors: Tensor) -> None:
        """Keep the vectors of inputs that were not known."""
        for place, vector in zip(places, vectors.cpu(), strict=True):
            self._kept.put(self._keys.pop(place), vector.clone())

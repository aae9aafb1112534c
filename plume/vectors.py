"""Embeddings that are kept, for inputs that come again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from plume import content
from plume.inputs import Item
from plume.kept import Kept
from plume.model import PlumeModel
from plume.requests import Window, image_settings


class Vectors:
    """Vectors by content, instruction, image budget, K and weights.

    What is kept is returned to the bit. What is not is embedded in other company than without a cache, so that it
    may differ in rounding, as between any two batches.
    """

    def __init__(self, model: PlumeModel, max_bytes: int):
        self._model = model
        self._kept: Kept[Tensor] = Kept(most_bytes=max_bytes, num_bytes=attrgetter("nbytes"))

    def __len__(self) -> int:
        return len(self._kept)

    def recall(self, window: Window, settings: Mapping[str, Any]) -> tuple[list[tuple[int, Tensor]], Window]:
        """Places and vectors of inputs that are known, and the others."""
        known, others = [], []
        for place, item, length in window:
            vector = self._kept.find(self._key(item, settings))
            if vector is None:
                others.append((place, item, length))
            else:
                known.append((place, vector))
        return known, others

    def remember(self, items: Sequence[Item], vectors: Tensor, settings: Mapping[str, Any]) -> None:
        """Keep the vectors of some inputs."""
        for item, vector in zip(items, vectors, strict=True):
            self._kept.put(self._key(item, settings), vector.clone())

    def _key(self, item: Item, settings: Mapping[str, Any]) -> Any:
        size = (image_settings(settings) or {}).get("size")
        steps = settings.get("num_latent_steps", self._model.config.num_latent_steps)
        form = settings.get("truncate_dim"), settings.get("normalize_embeddings")
        return content.item_key(item, size), steps, *form, *content.revision(self._model)

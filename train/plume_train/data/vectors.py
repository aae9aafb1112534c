"""Vectors of what rows hold, kept in a folder by content, so that they serve other orders and parts of the same data.

    vectors.json                         what made them: model, K, length
    query.keys, target.keys              `Side.content_key` of each vector, int64
    query.vectors, target.vectors        unit vectors, float32, in the same order

Files only grow, so that writing goes on after an interruption. Hard negatives are among the targets.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from plume_train.data.rows import Side

SideName = Literal["query", "target"]
SIDES: tuple[SideName, ...] = ("query", "target")

_ABOUT = "vectors.json"


class VectorStore:
    """A folder of vectors, to read and to add to."""

    def __init__(self, folder: str | Path):
        """Open what has been written.

        Raises:
            ValueError: the folder holds no vectors.
        """
        self.folder = Path(folder)
        try:
            #: What made the vectors.
            self.about: dict[str, Any] = json.loads((self.folder / _ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ValueError(f"{folder} holds no vectors; expected a folder that `plume-train vectors` wrote") from None
        self.dim: int = self.about["dim"]

    @classmethod
    def create(cls, folder: str | Path, about: Mapping[str, Any]) -> VectorStore:
        """A new folder, or one that was begun in the same way.

        Args:
            folder: where.
            about: what makes the vectors; "dim" is their length.

        Raises:
            ValueError: the folder holds something else.
        """
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            store = cls(folder)
            if store.about != dict(about):
                name = next(name for name in {**store.about, **about} if store.about.get(name) != about.get(name))
                raise ValueError(
                    f"{folder} holds vectors whose {name} is {store.about.get(name)!r}; received {about.get(name)!r}; "
                    "choose another folder"
                )
            return store
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _ABOUT).write_text(json.dumps(dict(about), indent=1) + "\n", encoding="utf-8")
        return cls(folder)

    def __contains__(self, named: tuple[SideName, Side]) -> bool:
        name, side = named
        return side.content_key in self._places[name]

    def find(self, name: SideName, sides: Iterable[Side | None]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of some sides `[N, D]`, zero where there is none, and whether there is one `[N]`."""
        found = [-1 if side is None else self._places[name].get(side.content_key, -1) for side in sides]
        places = np.array(found, dtype=np.int64)
        vectors = np.zeros((len(places), self.dim), dtype=np.float32)
        if (places >= 0).any():
            vectors[places >= 0] = self._vectors[name][places[places >= 0]]
        return vectors, places >= 0

    def add(self, name: SideName, sides: Sequence[Side], vectors: np.ndarray) -> None:
        """Append vectors `[N, D]`; keys last, so that what was cut off is known by them."""
        keys = np.array([side.content_key for side in sides], dtype=np.int64)
        whole = self._count(name)
        for suffix, rows, width in (("vectors", vectors.astype(np.float32), 4 * self.dim), ("keys", keys, 8)):
            with (self.folder / f"{name}.{suffix}").open("ab") as file:
                file.truncate(whole * width)
                file.write(np.ascontiguousarray(rows).tobytes())
        self._places[name].update((key, place) for place, key in enumerate(keys.tolist(), start=whole))
        self.__dict__.pop("_vectors", None)

    def _count(self, name: SideName) -> int:
        file = self.folder / f"{name}.keys"
        return file.stat().st_size // 8 if file.exists() else 0

    @cached_property
    def _places(self) -> dict[SideName, dict[int, int]]:
        places: dict[SideName, dict[int, int]] = {}
        for name in SIDES:
            count = self._count(name)
            keys = np.fromfile(self.folder / f"{name}.keys", dtype=np.int64, count=count) if count else np.zeros(0)
            places[name] = {int(key): place for place, key in enumerate(keys)}
        return places

    @cached_property
    def _vectors(self) -> dict[SideName, Any]:
        return {
            name: np.memmap(self.folder / f"{name}.vectors", np.float32, "r", shape=(count, self.dim))
            for name in SIDES
            if (count := self._count(name))
        }

    def __getstate__(self) -> dict[str, Any]:
        # Workers of a data loader open the file themselves.
        return {name: value for name, value in self.__dict__.items() if name != "_vectors"}

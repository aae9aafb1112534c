"""Vectors on disk, a shard at a time, so that what is embedded once is never embedded again.

A shard is named by the digest of the keys of its inputs. What is cut into shards does not depend on what is there
already or on how many processes share the work, so that a run which was stopped ends with the vectors of one which was
not.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Places = dict[str, tuple[str, int]]
"""Where the vector of an input is, by its key: the name of a shard and a row."""


@dataclass
class EmbeddedShard:
    """Vectors of some inputs.

    vectors `[n, D]`: float32, of unit length; a row of NaN for an input that could not be embedded.
    errors: why not, by row. texts: what was written before the vector was read, if anything was.
    num_unfinished: rationales that reached their limit without a read-out.
    reasoning_steps: latent steps or tokens written, summed over the inputs. seconds: what it took.
    """

    vectors: np.ndarray
    errors: dict[int, str] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    num_unfinished: int = 0
    reasoning_steps: int = 0
    seconds: float = 0.0


class VectorStore:
    """The shards of one embedder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        """Open a folder, or make it.

        Args:
            folder: of the shards.
            settings: whatever changes vectors.

        Raises:
            ValueError: the folder holds vectors of other settings.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        noted, told = folder / "settings.json", json.dumps(settings, indent=1, sort_keys=True) + "\n"
        if noted.exists() and (before := noted.read_text(encoding="utf-8")) != told:
            known = json.loads(before)
            changed = sorted(name for name in {*known, *settings} if known.get(name) != settings.get(name))
            raise ValueError(
                f"{folder} holds vectors of other settings: {changed[0]} was {known.get(changed[0])!r} and is "
                f"{settings.get(changed[0])!r}; name another --out"
            )
        _write(noted, told.encode())

    def name(self, keys: Sequence[str]) -> str:
        """Of the shard with these inputs."""
        return hashlib.blake2b("\n".join(keys).encode(), digest_size=16).hexdigest()

    def holds(self, name: str) -> bool:
        """Whether a shard is there."""
        return (self.folder / f"{name}.npz").exists()

    def is_whole(self, name: str) -> bool:
        """Whether a shard is there, with a vector for each of its inputs."""
        if not self.holds(name):
            return False
        with np.load(self.folder / f"{name}.npz") as arrays:
            return not json.loads(str(arrays["facts"]))["errors"]

    def save(self, name: str, shard: EmbeddedShard) -> None:
        """Write a shard, whole or not at all."""
        facts = {
            "errors": {str(row): why for row, why in shard.errors.items()},
            "texts": shard.texts,
            "num_unfinished": shard.num_unfinished,
            "reasoning_steps": shard.reasoning_steps,
            "seconds": shard.seconds,
        }
        content = io.BytesIO()
        np.savez(content, vectors=shard.vectors, facts=np.array(json.dumps(facts)))
        _write(self.folder / f"{name}.npz", content.getvalue())

    def load(self, name: str) -> EmbeddedShard:
        """Read a shard."""
        with np.load(self.folder / f"{name}.npz") as arrays:
            facts = json.loads(str(arrays["facts"]))
            errors = {int(row): why for row, why in facts.pop("errors").items()}
            return EmbeddedShard(arrays["vectors"], errors, **facts)


def write_json(file: Path, value: Any) -> None:
    """Write a file of JSON, whole or not at all."""
    _write(file, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_lines(file: Path, rows: Sequence[Any]) -> None:
    """Write a file with a line of JSON for each row, whole or not at all."""
    _write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    unfinished.write_bytes(content)
    unfinished.replace(file)

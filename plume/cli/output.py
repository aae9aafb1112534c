"""What commands write: vectors as files, and lines of JSON."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from plume.cli.running import stop
from plume.terminal import is_printable

# What a number of a vector takes in a file, by its kind.
NUMBER_BYTES = {".npz": 4, ".npy": 4, ".jsonl": 24}


def check_writable(out: Path, num_bytes: int = 4096) -> None:
    """Stop before the work if its result, of so many bytes, could not be written."""
    try:
        if out.is_dir():
            stop(f"--out {out} is a folder; name a file")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        stop(f"--out {out} cannot be written ({error.strerror}); choose another place")


def write_vectors(out: Path, names: list[str], vectors: Any) -> None:
    """Write a file whole or not at all: beside its place, and renamed at the end."""
    import numpy as np

    beside = out.with_name(f".{out.name}.part{os.getpid()}")
    try:
        with beside.open("wb") as file:
            if out.suffix == ".npz":
                np.savez(file, embeddings=vectors, names=np.array(names))
            elif out.suffix == ".npy":
                np.save(file, vectors)
            else:
                for name, vector in zip(names, vectors, strict=True):
                    line = json.dumps({"name": name, "embedding": vector.tolist()}, ensure_ascii=False)
                    file.write(f"{line}\n".encode(errors="backslashreplace"))  # names need not be Unicode
            file.flush()
            os.fsync(file.fileno())
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)


def json_line(content: dict[str, Any]) -> str:
    """One line of JSON, in which what would steer a terminal is escaped."""
    line = json.dumps(content, ensure_ascii=False)
    return "".join(c if is_printable(c) else json.dumps(c)[1:-1] for c in line)

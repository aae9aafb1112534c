"""What a scan of a large JSONL file has found, kept between runs, so that the second start takes seconds.

It lies in `~/.cache/plume` (`XDG_CACHE_HOME`), and holds as long as the file has the size and the time of change that
it had, is read in the same way, and by the same version. Media are not looked at again; `plume-train check` does that.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from plume.version import __version__
from plume_train.data.rows import RecordFormat

#: Smaller files are scanned every time.
FROM_BYTES = 64 * 2**20


@dataclass
class Scan:
    """Of the usable rows of a file, in order.

    numbers, offsets: line, and byte that it begins at. tasks, groups: see `Record`. digests: 16 bytes each.
    has_target: by task. variety: of each task up to two keys of queries, and of targets.
    """

    numbers: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    groups: list[int | str | None] = field(default_factory=list)
    digests: bytearray = field(default_factory=bytearray)
    has_negatives: bool = False
    has_instructions: bool = False
    has_target: dict[str, bool] = field(default_factory=dict)
    variety: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)


def cache_file(file: Path, row_format: RecordFormat, on_bad_row: str) -> Path | None:
    """Where the scan of a file is kept; None for small ones."""
    found = file.stat()
    if found.st_size < FROM_BYTES:
        return None
    told = [str(file.resolve()), found.st_size, found.st_mtime_ns, on_bad_row, __version__]
    told += [str(value) for value in asdict(row_format).values()]
    key = blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # nobody's home is known, as in some containers
        return None
    return home / "plume" / f"rows-{key}.npz"


def read_scan(place: Path) -> Scan | None:
    """What was kept; None where nothing was, or it is damaged."""
    try:
        with np.load(place, allow_pickle=False) as found:
            rest: dict[str, Any] = json.loads(found["rest"].tobytes())
            names = rest.pop("task_names")
            groups = rest.pop("groups")
            numbers = found["numbers"].tolist()
            rest["variety"] = {task: tuple(keys) for task, keys in rest["variety"].items()}
            return Scan(
                numbers=numbers,
                offsets=found["offsets"].tolist(),
                tasks=[names[place] for place in found["tasks"].tolist()],
                groups=groups or [None] * len(numbers),
                digests=bytearray(found["digests"].tobytes()),
                **rest,
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile):
        return None


def write_scan(place: Path, scan: Scan) -> None:
    """Keep a scan, whole or not at all; where there is no room for it the next start is slow, and that is all."""
    names = {task: index for index, task in enumerate(dict.fromkeys(scan.tasks))}
    rest = {name: getattr(scan, name) for name in ("has_negatives", "has_instructions", "has_target", "bad_rows")}
    rest |= {"variety": scan.variety, "task_names": list(names)}
    rest["groups"] = scan.groups if any(group is not None for group in scan.groups) else []
    unfinished = place.with_suffix(f".{os.getpid()}.unfinished")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            np.savez(
                file,
                numbers=np.array(scan.numbers, dtype=np.int64),
                offsets=np.array(scan.offsets, dtype=np.int64),
                tasks=np.array([names[task] for task in scan.tasks], dtype=np.int32),
                digests=np.frombuffer(bytes(scan.digests), dtype=np.uint8),
                rest=np.frombuffer(json.dumps(rest).encode(), dtype=np.uint8),
            )
        unfinished.replace(place)
    except OSError:
        unfinished.unlink(missing_ok=True)

"""Rows of finished shards into an index, each once, whatever dies meanwhile.

The index is its own ledger: rows of a shard go in by one commit, and those that are there already are left out. So a
commit that was interrupted, at whatever point, is finished by the next. Only one process commits at a time.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from plume.corpus.plan import Job
from plume.search.index import IDENTITY, Index
from plume.search.rows import Splitter
from plume.search.store import TABLES
from plume.search.update import check_root, read_texts


@dataclass(frozen=True)
class Committed:
    """Rows that were added, and that were there already, of how many shards."""

    added: int
    present: int
    shards: int


def commit(job: Job, index: str | os.PathLike) -> Committed:
    """Bring what is done into an index, which is made if it is missing.

    Args:
        job: of the corpus.
        index: a folder.

    Raises:
        ValueError: the index is of another origin or holds a folder around one of these, or somebody else writes to it.
        IndexStorageError: it cannot be written; what is committed stays.
    """
    target = Index.create_as(Path(index), job.identity)
    added = present = 0
    with target.writing():
        name = _name(target.path)
        shards = job.to_commit(name)
        for shard in shards:
            rows = job.read_done(shard)
            for root in set(rows["root"].to_pylist()):
                if not root.startswith(TABLES):
                    check_root(target.store, Path(root))
            new = target.store.add_missing(rows)
            added, present = added + new, present + len(rows) - new
            job.mark_committed(name, shard)
        for (root,) in target.store.counts("root"):
            if not root.startswith(TABLES):
                read_texts(target.store, Path(root), Splitter())  # of shards of an older version, which has no passages
        target.store.compact(wipe=False)
    return Committed(added, present, len(shards))


def _name(index: Path) -> str:
    """Tells an index from others, and from one that was at its place before."""
    file = (index / IDENTITY).resolve()
    return hashlib.sha256(f"{file}\0{file.stat().st_mtime_ns}".encode()).hexdigest()[:16]

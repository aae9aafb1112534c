"""Rows of finished shards into an index, each once, whatever dies meanwhile.

The index is its own ledger: rows of a shard go in by one commit, and those that are there already are left out. So a
commit that was interrupted, at whatever point, is finished by the next, and two at once wait for one another.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from plume.corpus.plan import Job
from plume.search.index import Index


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
        ValueError: the index is of another origin, or somebody else writes to it.
        IndexStorageError: it cannot be written; what is committed stays.
    """
    target = Index.create_as(Path(index), job.identity)
    added = present = 0
    shards = job.to_commit()
    with target.store.locked():
        for shard in shards:
            rows = job.read_done(shard)
            new = target.store.add_missing(rows)
            added, present = added + new, present + len(rows) - new
            job.mark_committed(shard)
        target.store.compact(wipe=False)
    return Committed(added, present, len(shards))

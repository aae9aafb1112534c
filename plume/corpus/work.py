"""Embedding shards, on whatever runs workers: each is handed the names of shards, and needs the job's folder alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from filelock import Timeout

from plume.corpus.plan import Job, Refused
from plume.corpus.sources import Entry, load
from plume.embedder.encode import in_windows, limits_of, pixel_settings
from plume.embedder.plume import Plume
from plume.inputs.errors import InputError
from plume.inputs.item import Item
from plume.search.folder import stats_of
from plume.search.index import SETTINGS
from plume.search.rows import Document, about

# What is encoded in one call: at most so many rows or tokens.
_ROWS_PER_WINDOW, _TOKENS_PER_WINDOW = 512, 262_144
# Shards that a sample is taken from.
_SAMPLED_SHARDS = 8
_PAGES_PER_SAMPLE = 4


class _Loaded(NamedTuple):
    entries: list[Entry]
    document: Document
    item: Item
    num_tokens: int


@dataclass(frozen=True)
class Estimate:
    """What is left to do, by a sample of it.

    contents: that are left. tokens: of them all. seconds: on the device that the sample ran on. sampled: contents.
    """

    contents: int
    tokens: int
    seconds: float
    sampled: int


class ShardWorker:
    """Embeds shards of a job with one model; made once in each process.

    Example:
        >>> from plume.corpus.plan import Job
        >>> from plume.corpus.sources import entries
        >>> from plume.search.index import Identity
        >>> folder = getfixture("tmp_path")
        >>> (folder / "notes").mkdir()
        >>> _ = (folder / "notes" / "kite.txt").write_text("a red kite")
        >>> model = Plume(getfixture("plume_folder"), device="cpu")
        >>> job = Job.create(folder / "job", Identity.of(model))
        >>> (shard,) = job.plan(entries(str(folder / "notes")), shard_size=100).shards
        >>> ShardWorker(folder / "job", device="cpu")(shard)
        1
        >>> job.left()
        []
    """

    def __init__(self, job: str | os.PathLike, *, device: str | None = None, model: str | None = None):
        """Load the model.

        Args:
            job: the folder.
            device: None takes the best that there is.
            model: where the checkpoint is, if not where it was when the job was planned.

        Raises:
            ValueError: there is no such job, or the checkpoint is another.
        """
        self.job = Job.open(job)
        identity = self.job.identity
        self.plume = Plume(model or identity.model, device=device)
        if identity.dim < self.plume.get_embedding_dimension():
            self.plume.truncate_dim = identity.dim
        found = type(identity).of(self.plume, **{name: getattr(identity, name) for name in SETTINGS})
        identity.check_same(found, self.job.path, "job")
        self._settings = pixel_settings(self.plume.plume_model.processor, identity.max_pixels)

    def __call__(self, shard: str) -> int:
        """Embed a shard, unless somebody has; the number of rows that were embedded.

        What cannot be read is noted beside the rows, and is no error.
        """
        if self.job.is_done(shard):
            return 0
        skipped: list[Refused] = []
        return self.job.write_done(shard, self._rows(shard, skipped), skipped)

    def _rows(self, shard: str, skipped: list[Refused]) -> Iterator[list[dict[str, Any]]]:
        """Rows of a shard, a window at a time."""
        for window in in_windows(
            self._load(self.job.entries(shard), skipped),
            max_items=_ROWS_PER_WINDOW,
            max_tokens=_TOKENS_PER_WINDOW,
            num_tokens=lambda loaded: loaded.num_tokens,
        ):
            rows = []
            for loaded, vector in zip(window, self._encode([one.item for one in window]), strict=True):
                first = loaded.entries[0]
                same = about(loaded.item, first.kind, first.sha256, loaded.document, vector)
                for entry in loaded.entries:
                    place = {"root": entry.root, "name": entry.name, "path": entry.path}
                    rows.append({**place, "size": entry.size, "mtime_ns": entry.mtime_ns, **same})
            yield rows

    def estimate(self, sample: int) -> Estimate:
        """How much is left to do, by embedding some contents of the shards that are left.

        Args:
            sample: contents to embed; they are spread over what is left.
        """
        shards = self.job.left()
        some = shards[:: max(1, len(shards) // _SAMPLED_SHARDS)][:_SAMPLED_SHARDS]
        chosen, seen = [], 0
        for shard in some:
            contents = list(self.job.entries(shard))
            seen += len(contents)
            share = max(1, sample // len(some))
            chosen += contents[:: max(1, len(contents) // share)][:share]
        # Documents of many pages are not loaded to their end.
        loaded = list(islice(self._load(iter(chosen), []), _PAGES_PER_SAMPLE * sample))
        left = round(seen * len(shards) / max(1, len(some)))
        if not loaded:
            return Estimate(left, 0, 0.0, 0)
        items = [one.item for one in loaded]
        self._encode(items[:1])  # what is made lazily does not count
        began = time.perf_counter()
        self._encode(items)
        scale = left / len(chosen)
        seconds = (time.perf_counter() - began) * scale
        return Estimate(left, round(sum(one.num_tokens for one in loaded) * scale), seconds, len(chosen))

    def _encode(self, items: list[Item]) -> Any:
        identity = self.job.identity
        return self.plume.encode_document(
            items, num_latent_steps=identity.num_latent_steps, show_progress_bar=False, **self._settings
        )

    def _load(self, contents: Iterator[list[Entry]], skipped: list[Refused]) -> Iterator[_Loaded]:
        processor = self.plume.plume_model.processor
        assert processor is not None
        limits, instruction = limits_of(processor, self._settings), self.job.identity.instruction
        splitter = self.job.identity.splitter(self.plume)
        for entries in contents:
            before = {entry.path: _stats(entry) for entry in entries}  # before contents are looked at
            entries, raw = _readable(entries, skipped)
            if raw is None:
                continue
            first = entries[0]
            try:
                for document in splitter.documents(raw, first.name, first.kind):
                    try:
                        item = processor.fit(
                            Item.parse(document.raw, first.name, limits).instructed(instruction), first.name
                        )
                    except InputError as error:
                        skipped += [Refused(entry.key, document.page, error.reason) for entry in entries]
                        continue
                    if _stats(first) != before[first.path]:  # else its vector need not be that of its SHA-256
                        raise InputError(first.name, "was written to while it was read; plan again")
                    yield _Loaded(entries, document, item, processor.num_tokens(item))
            except InputError as error:
                skipped += [Refused(entry.key, 0, error.reason) for entry in entries]
            except OSError as error:
                skipped += [Refused(entry.key, 0, f"cannot be read ({error.strerror})") for entry in entries]


def _stats(entry: Entry) -> tuple[int, int, int] | None:
    """Of the file of an entry; None where there is none."""
    try:
        return None if entry.content is not None else stats_of(Path(entry.path))
    except OSError:
        return None


def _readable(entries: list[Entry], skipped: list[Refused]) -> tuple[list[Entry], Any]:
    """Of entries of equal content those that are as they were planned, and the content; None where none is."""
    raw, good = None, []
    for entry in entries:
        try:
            found = load(entry)
        except InputError as error:
            skipped.append(Refused(entry.key, 0, error.reason))
        else:
            good.append(entry)
            raw = found if raw is None else raw
    return good, raw


def run_here(worker: ShardWorker, done: Callable[[int], object]) -> None:
    """Embed what is left, in this process; several may do so at once, and share the shards.

    Args:
        worker: with its model.
        done: told of the rows of each shard.
    """
    for shard in worker.job.left():
        lock = worker.job.claim(shard)
        try:
            with lock.acquire(timeout=0):
                done(worker(shard))
        except Timeout:  # another process is about it
            continue

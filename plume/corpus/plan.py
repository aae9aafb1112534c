"""The plan of a corpus: shards of entries, each of which is embedded by one worker and is the same whoever does it.

A job is a folder:

    job.json                what makes the vectors
    plan/SHARD.parquet      what there is to embed; SHARD is made of what is in it and of what makes the vectors
    done/SHARD.parquet      rows of an index, written whole by whoever embedded the shard
    committed/INDEX/SHARD   an empty file, once its rows are in that index

Planning again, for example after a corpus has grown, leaves what is planned as it is and puts the rest into new shards:
what is new, and what a finished shard could not read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock

from plume.corpus.sources import Entry
from plume.inputs.file_kinds import Kind
from plume.search.folder import Skipped
from plume.search.index import Identity
from plume.search.store import schema_of

_FORMAT = 1
_LOCK = ".lock"
_KEY_COLUMNS = ("root", "name", "sha256")
_JOB, _PLAN, _DONE, _COMMITTED = "job.json", "plan", "done", "committed"
# Contents of tables that a shard holds at most, in bytes.
_SHARD_BYTES = 256 * 2**20


@dataclass
class Planned:
    """What planning did: entries that are new, that are planned already, and what was left out."""

    new: int = 0
    known: int = 0
    shards: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


@dataclass(frozen=True)
class Status:
    """Shards that are planned and done; rows of those that are done; what could not be embedded, and why."""

    planned: int
    done: int
    rows: int
    skipped: list[Refused]


@dataclass(frozen=True)
class Refused:
    """What a worker could not embed. key: of the entry. page: of a document; 0: all of it."""

    key: tuple[str, str, str]
    page: int
    reason: str

    @property
    def name(self) -> str:
        """How it is called."""
        return self.key[1] + (f", page {self.page}" if self.page else "")


class Job:
    """A folder that holds the plan of a corpus and what has been done of it."""

    def __init__(self, path: str | os.PathLike, identity: Identity):
        self.path, self.identity = Path(path), identity

    @classmethod
    def create(cls, path: str | os.PathLike, identity: Identity) -> Job:
        """Begin a job, or open one of the same origin.

        Raises:
            ValueError: there is a job of another origin, or something else.
        """
        path = Path(path)
        if not (path / _JOB).exists():
            if path.is_dir() and any(not one.name.startswith(".") for one in path.iterdir()):
                raise ValueError(f"{path} holds something that is no job; name a folder that is empty or new")
            path.mkdir(parents=True, exist_ok=True)
            with FileLock(path / _LOCK):
                if not (path / _JOB).exists():  # nobody else has made it meanwhile
                    said = json.dumps({"format": _FORMAT, **asdict(identity)}, indent=2) + "\n"
                    beside = _beside(path / _JOB)
                    beside.write_text(said, encoding="utf-8")
                    _replace(beside, path / _JOB)
        job = cls.open(path)
        job.identity.check_same(identity, path, "job")
        return job

    @classmethod
    def open(cls, path: str | os.PathLike) -> Job:
        """Open a job.

        Raises:
            ValueError: there is none, or it was written by another version.
        """
        file = Path(path) / _JOB
        if not file.is_file():
            raise ValueError(f"{path} is no job; make one with `plume corpus plan SOURCE --job {path}`")
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            version = fields.pop("format")
            identity = Identity(**fields).checked() if version == _FORMAT else None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged ({error}); plan the corpus again in another folder") from None
        if identity is None:
            raise ValueError(f"{path} has format {version!r}, this version reads {_FORMAT}; plan the corpus again")
        for folder in (_PLAN, _DONE, _COMMITTED):
            (Path(path) / folder).mkdir(exist_ok=True)
        return cls(path, identity)

    def plan(self, entries: Iterable[Entry | Skipped], shard_size: int) -> Planned:
        """Put entries that are not planned yet into shards; equal contents of a shard are embedded once.

        Args:
            entries: of a source.
            shard_size: entries of a shard; the last one may hold fewer.
        """
        report = Planned()
        with FileLock(self.path / _LOCK):
            known: set[tuple[str, ...]] = set()
            for shard in self.shards():
                refused = {one.key for one in self._refused(shard) if not one.page}
                known |= {self._key(row) for row in self._planned(shard, _KEY_COLUMNS)} - refused
            waiting: dict[tuple[str, str], list[Entry]] = {}
            size = num_bytes = 0
            for entry in entries:
                if isinstance(entry, Skipped):
                    report.skipped.append(entry)
                    continue
                if entry.key in known:
                    report.known += 1
                    continue
                known.add(entry.key)
                report.new += 1
                if size == shard_size or num_bytes > _SHARD_BYTES:
                    report.shards.append(self._write_plan(waiting.values()))
                    waiting, size, num_bytes = {}, 0, 0
                waiting.setdefault((entry.sha256, str(entry.kind)), []).append(entry)
                size, num_bytes = size + 1, num_bytes + len(entry.content or b"")
            if waiting:
                report.shards.append(self._write_plan(waiting.values()))
        return report

    def shards(self) -> list[str]:
        """Names of all shards."""
        return _names(self.path / _PLAN)

    def left(self) -> list[str]:
        """Names of the shards that have not been embedded."""
        return sorted(set(self.shards()) - set(_names(self.path / _DONE)))

    def to_commit(self, index: str) -> list[str]:
        """Names of the shards that are embedded, and not known to be in an index.

        Args:
            index: that tells it from others.
        """
        folder = self.path / _COMMITTED / index
        committed = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        return [name for name in _names(self.path / _DONE) if name not in committed]

    def entries(self, shard: str) -> Iterator[list[Entry]]:
        """What a shard holds; entries of equal content together."""
        together: list[Entry] = []
        for row in self._planned(shard, None):
            entry = Entry(**{**row, "kind": Kind(row["kind"])})
            if together and (entry.sha256, entry.kind) != (together[0].sha256, together[0].kind):
                yield together
                together = []
            together.append(entry)
        if together:
            yield together

    def is_done(self, shard: str) -> bool:
        """Whether a shard has been embedded."""
        return (self.path / _DONE / f"{shard}.parquet").exists()

    def claim(self, shard: str) -> FileLock:
        """A lock that keeps another process on this machine from embedding the same shard; it would do no harm."""
        return FileLock(self.path / _DONE / f".{shard}.lock")

    def write_done(self, shard: str, windows: Iterable[list[dict[str, Any]]], skipped: Sequence[Refused]) -> int:
        """Write the rows of a shard as they come, whole or not at all; their number.

        Args:
            shard: its name.
            windows: some rows at a time.
            skipped: what could not be embedded, once all rows have come.
        """
        import pyarrow as pa
        import pyarrow.parquet

        schema, count = schema_of(self.identity.dim), 0
        beside = _beside(self.path / _DONE / f"{shard}.parquet")
        try:
            with pyarrow.parquet.ParquetWriter(beside, schema) as writer:
                for rows in windows:
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                    count += len(rows)
                told = [[refused.key, refused.page, refused.reason] for refused in skipped]
                writer.add_key_value_metadata({"plume": json.dumps(told)})
            _replace(beside, self.path / _DONE / f"{shard}.parquet")
        finally:
            beside.unlink(missing_ok=True)
        return count

    def read_done(self, shard: str) -> Any:
        """The rows of a shard, as a table of Arrow."""
        import pyarrow.parquet

        return pyarrow.parquet.read_table(self.path / _DONE / f"{shard}.parquet").replace_schema_metadata(None)

    def mark_committed(self, index: str, shard: str) -> None:
        """Note that the rows of a shard are in an index."""
        (self.path / _COMMITTED / index).mkdir(exist_ok=True)
        (self.path / _COMMITTED / index / shard).touch()

    def status(self) -> Status:
        """What has been done."""
        import pyarrow.parquet

        done = _names(self.path / _DONE)
        files = [self.path / _DONE / f"{shard}.parquet" for shard in done]
        rows = sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
        return Status(len(self.shards()), len(done), rows, [one for shard in done for one in self._refused(shard)])

    def _refused(self, shard: str) -> list[Refused]:
        """What could not be embedded of a shard; nothing where it is not done."""
        import pyarrow.parquet

        if not self.is_done(shard):
            return []
        told = pyarrow.parquet.read_metadata(self.path / _DONE / f"{shard}.parquet").metadata[b"plume"]
        return [Refused(tuple(key), page, reason) for key, page, reason in json.loads(told)]

    def _planned(self, shard: str, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self.path / _PLAN / f"{shard}.parquet") as opened:
            for batch in opened.iter_batches(columns=None if columns is None else list(columns)):
                yield from batch.to_pylist()

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(row[name] for name in _KEY_COLUMNS)

    def _write_plan(self, contents: Iterable[Sequence[Entry]]) -> str:
        import pyarrow as pa
        import pyarrow.parquet

        rows = [{**asdict(entry), "kind": str(entry.kind)} for same in contents for entry in same]
        origin = {name: value for name, value in asdict(self.identity).items() if name != "model"}
        said = [origin, [[row[name] for name in (*_KEY_COLUMNS, "kind")] for row in rows], 0]
        while (name := hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]) in self.shards():
            said[-1] += 1  # the same once more, since it could not be read
        columns = {"size": pa.int64(), "mtime_ns": pa.int64(), "content": pa.binary()}
        names = ("root", "name", "kind", "sha256", "size", "mtime_ns", "path", "content")
        schema = pa.schema([(column, columns.get(column, pa.string())) for column in names])
        beside = _beside(self.path / _PLAN / f"{name}.parquet")
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=schema), beside)
        _replace(beside, self.path / _PLAN / f"{name}.parquet")
        return name


def _names(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("[!.]*.parquet"))


def _beside(file: Path) -> Path:
    """Where a file is written before it is whole; no other process, on whatever machine, writes there."""
    return file.with_name(f".{file.name}.{uuid4().hex}.part")


def _replace(beside: Path, file: Path) -> None:
    """Put a finished file into its place; what is there after a crash is whole."""
    descriptor = os.open(beside, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    beside.replace(file)

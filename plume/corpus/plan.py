"""The plan of a corpus: shards of entries, each of which is embedded by one worker and is the same whoever does it.

A job is a folder:

    job.json                what makes the vectors
    plan/SHARD.parquet      what there is to embed; SHARD is made of what is in it and of what makes the vectors
    done/SHARD.parquet      rows of an index, written whole by whoever embedded the shard
    committed/SHARD         an empty file, once its rows are in an index

Planning again, for example after a corpus has grown, leaves what is planned as it is and puts the rest into new shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from plume.corpus.sources import Entry
from plume.inputs.file_kinds import Kind
from plume.search.folder import Skipped
from plume.search.index import Identity

_FORMAT = 1
_JOB, _PLAN, _DONE, _COMMITTED = "job.json", "plan", "done", "committed"


@dataclass
class Planned:
    """What planning did: entries that are new, that are planned already, and what was left out."""

    new: int = 0
    known: int = 0
    shards: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


@dataclass(frozen=True)
class Status:
    """Shards that are planned, done and committed; rows of those that are done; what could not be embedded, and why."""

    planned: int
    done: int
    committed: int
    rows: int
    skipped: list[tuple[str, str]]


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
            for folder in (_PLAN, _DONE, _COMMITTED):
                (path / folder).mkdir(parents=True, exist_ok=True)
            _write_whole(path / _JOB, (json.dumps({"format": _FORMAT, **asdict(identity)}, indent=2) + "\n").encode())
        job = cls.open(path)
        job.identity.check_same(identity, path)
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
        return cls(path, identity)

    def plan(self, entries: Iterable[Entry | Skipped], shard_size: int) -> Planned:
        """Put entries that are not planned yet into shards; those of equal content into one place.

        Args:
            entries: of a source.
            shard_size: contents of a shard; the last one may hold fewer.
        """
        report = Planned()
        with FileLock(self.path / ".plan.lock"):
            known = {self._key(row) for shard in self.shards() for row in self._planned(shard, _KEY_COLUMNS)}
            waiting: dict[tuple[str, str], list[Entry]] = {}
            for entry in entries:
                if isinstance(entry, Skipped):
                    report.skipped.append(entry)
                    continue
                key = (entry.root, entry.name, entry.sha256)
                if key in known:
                    report.known += 1
                    continue
                known.add(key)
                report.new += 1
                content = entry.sha256, str(entry.kind)
                if content not in waiting and len(waiting) == shard_size:
                    report.shards.append(self._write_plan(waiting.values()))
                    waiting = {}
                waiting.setdefault(content, []).append(entry)
            if waiting:
                report.shards.append(self._write_plan(waiting.values()))
        return report

    def shards(self) -> list[str]:
        """Names of all shards."""
        return _names(self.path / _PLAN)

    def left(self) -> list[str]:
        """Names of the shards that have not been embedded."""
        return sorted(set(self.shards()) - set(_names(self.path / _DONE)))

    def to_commit(self) -> list[str]:
        """Names of the shards that are embedded, and not known to be in the index."""
        committed = {file.name for file in (self.path / _COMMITTED).iterdir()}
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

    def write_done(self, shard: str, rows: Sequence[dict[str, Any]], skipped: Sequence[tuple[str, str]]) -> None:
        """Write the rows of a shard, whole or not at all."""
        import pyarrow as pa
        import pyarrow.parquet

        from plume.search.store import schema_of

        metadata = {"plume": json.dumps(list(skipped))}
        table = pa.Table.from_pylist(list(rows), schema=schema_of(self.identity.dim).with_metadata(metadata))
        beside = self.path / _DONE / f".{shard}.{os.getpid()}.part"
        pyarrow.parquet.write_table(table, beside)
        _replace(beside, self.path / _DONE / f"{shard}.parquet")

    def read_done(self, shard: str) -> Any:
        """The rows of a shard, as a table of Arrow."""
        import pyarrow.parquet

        return pyarrow.parquet.read_table(self.path / _DONE / f"{shard}.parquet").replace_schema_metadata(None)

    def mark_committed(self, shard: str) -> None:
        """Note that the rows of a shard are in the index."""
        (self.path / _COMMITTED / shard).touch()

    def status(self) -> Status:
        """What has been done."""
        import pyarrow.parquet

        rows, skipped = 0, []
        done = _names(self.path / _DONE)
        for shard in done:
            found = pyarrow.parquet.read_metadata(self.path / _DONE / f"{shard}.parquet")
            rows += found.num_rows
            skipped += [(name, why) for name, why in json.loads(found.metadata[b"plume"])]
        committed = len(list((self.path / _COMMITTED).iterdir()))
        return Status(len(self.shards()), len(done), committed, rows, skipped)

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
        said = [origin, [[row[name] for name in (*_KEY_COLUMNS, "kind")] for row in rows]]
        name = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
        columns = {"size": pa.int64(), "mtime_ns": pa.int64(), "content": pa.binary()}
        names = ("root", "name", "kind", "sha256", "size", "mtime_ns", "path", "content")
        schema = pa.schema([(column, columns.get(column, pa.string())) for column in names])
        beside = self.path / _PLAN / f".{name}.{os.getpid()}.part"
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=schema), beside)
        _replace(beside, self.path / _PLAN / f"{name}.parquet")
        return name


_KEY_COLUMNS = ("root", "name", "sha256")


def _names(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("[!.]*.parquet"))


def _write_whole(file: Path, content: bytes) -> None:
    beside = file.with_name(f".{file.name}.{os.getpid()}.part")
    beside.write_bytes(content)
    _replace(beside, file)


def _replace(beside: Path, file: Path) -> None:
    """Put a finished file into its place; what is there after a crash is whole."""
    descriptor = os.open(beside, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    beside.replace(file)

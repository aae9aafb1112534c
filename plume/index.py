"""An index of folders: vectors, where they come from, and what made them.

Rows live in a LanceDB table, one per text file, image, video and PDF page. `index.json` beside it remembers the
checkpoint, its K and instructions, and refuses to be searched or extended with others. How a folder gets into it is
told in `plume/indexing.py`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from plume import checkpoint
from plume.images import InputError

if TYPE_CHECKING:
    from plume.embedder import Plume
    from plume.indexing import Report

_FORMAT = 1
_TABLE, _IDENTITY = "items", "index.json"
# What an interrupted creation leaves: it is made anew. A table beside no other of them is somebody's.
_LEFTOVERS = {f"{_IDENTITY}.part", f"{_TABLE}.lance", "lock"}
_VERSIONS = "_versions"
# How often a read is tried while another process takes files away.
_TRIES = 6
_IDS_PER_DELETION = 1024
# A row is there once for each of these.
_KEYS = ["root", "name", "page", "sha256"]

T = TypeVar("T")


class IndexStorageError(OSError):
    """An index that cannot be read or written: no space, no permission, a damaged file."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What made an index, and must be the same for every vector that meets it.

    model: name or path of the checkpoint; another place is fine as long as the fingerprint agrees.
    fingerprint: of the checkpoint (`plume.checkpoint.fingerprint`).
    dim: length of the vectors.
    num_latent_steps: K of documents.
    query_latent_steps: K of queries.
    instruction: for documents.
    query_instruction: for queries.
    """

    model: str
    fingerprint: str
    dim: int
    num_latent_steps: int
    query_latent_steps: int
    instruction: str = ""
    query_instruction: str = ""

    def checked(self) -> Identity:
        """The same, once every field is of its type.

        Raises:
            TypeError: names the field.
        """
        for name, value in asdict(self).items():
            expected = int if name in ("dim", "num_latent_steps", "query_latent_steps") else str
            if type(value) is not expected:
                raise TypeError(f"{name} is {value!r}; expected a {expected.__name__}")
        return self

    def check_same(self, other: Identity, where: Path) -> None:
        """Refuse another origin of vectors.

        Raises:
            ValueError: names the first field that differs.
        """
        for name, ours in asdict(self).items():
            theirs = getattr(other, name)
            if name != "model" and ours != theirs:
                made = f"checkpoint {self.model}" if name == "fingerprint" else f"{name}={ours!r}"
                asked = f"checkpoint {other.model}" if name == "fingerprint" else f"{name}={theirs!r}"
                raise ValueError(
                    f"the index {where} was made with {made}; this call uses {asked}, whose vectors do not compare. "
                    "Use the same, or make a new index"
                )


@dataclass(frozen=True)
class Hit:
    """One row that a search found, best first.

    score: cosine to the query, in [-1, 1].
    path: where the file was when it was indexed; see `is_there`.
    """

    score: float
    path: str
    kind: str
    page: int | None
    num_pages: int | None
    excerpt: str
    thumbnail: bytes = field(repr=False)

    @property
    def is_there(self) -> bool:
        """Whether a file still is at this path."""
        return os.path.isfile(self.path)

    def to_dict(self) -> dict[str, Any]:
        """All but the thumbnail."""
        return {name: value for name, value in asdict(self).items() if name != "thumbnail"}


class Index:
    """Vectors of one or several folders on disk, searched by text, images or any input.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> (folder / "notes").mkdir()
        >>> _ = (folder / "notes" / "kite.txt").write_text("a red kite")
        >>> from plume import Plume
        >>> plume = Plume(getfixture("plume_folder"), device="cpu")
        >>> index = Index.create(folder / "index", plume)
        >>> index.update(folder / "notes", plume, show_progress=False).embedded
        1
        >>> index.search("red kite", plume)[0].excerpt
        'a red kite'
    """

    def __init__(self, path: Path, identity: Identity, table: Any):
        self.path = path
        self.identity = identity
        self._table = table

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        plume: Plume,
        *,
        num_latent_steps: int | None = None,
        query_latent_steps: int | None = None,
        instruction: str = "",
        query_instruction: str = "",
    ) -> Index:
        """Make an empty index, or open one that was made with the same settings.

        Args:
            path: a folder; created if missing.
            plume: the embedder; its `truncate_dim` sets the length of the vectors.
            num_latent_steps: K of documents; None is the embedder's.
            query_latent_steps: K of queries; None is the embedder's.
            instruction: for documents.
            query_instruction: for queries.

        Raises:
            ValueError: there is an index made with other settings.
            IndexStorageError: it cannot be written.
        """
        path = Path(path)
        identity = Identity(
            model=plume.source,
            fingerprint=checkpoint.fingerprint(plume.plume_model),
            dim=plume.get_embedding_dimension(),
            num_latent_steps=plume.default_steps("document") if num_latent_steps is None else num_latent_steps,
            query_latent_steps=plume.default_steps("query") if query_latent_steps is None else query_latent_steps,
            instruction=instruction,
            query_instruction=query_instruction,
        )
        for steps in (identity.num_latent_steps, identity.query_latent_steps):
            plume.plume_config.check_num_latent_steps(steps)
        if not (path / _IDENTITY).exists():
            _check_free(path)  # before anything is made there
            try:
                path.mkdir(parents=True, exist_ok=True)
                with FileLock(path / "lock"):
                    if not (path / _IDENTITY).exists():  # nobody else has made it meanwhile
                        _check_free(path)
                        _begin(path, identity)
            except IndexStorageError:
                raise
            except OSError as error:
                raise IndexStorageError(
                    f"the index {path} cannot be written ({error.strerror or error}); choose another --out"
                ) from None
        index = cls.open(path)
        index.identity.check_same(identity, path)
        return index

    @classmethod
    def open(cls, path: str | os.PathLike) -> Index:
        """Open an index.

        Raises:
            ValueError: there is none, or it was written by another version.
        """
        path = Path(path)
        if not (path / _IDENTITY).is_file():
            raise ValueError(f"{path} is no index; make one with `plume index FOLDER --out {path}`")
        try:
            fields = json.loads((path / _IDENTITY).read_text(encoding="utf-8"))
            found = fields.pop("format")
            identity = Identity(**fields).checked() if found == _FORMAT else None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path / _IDENTITY} is damaged ({error}); remove {path} and index the folder again"
            ) from None
        if identity is None:
            raise ValueError(
                f"{path} has format {found!r}, this version reads {_FORMAT}; remove it and index the folder again"
            )
        database, schema = _connect(path), _schema(identity.dim)
        table = _trying(path, lambda: database.create_table(_TABLE, schema=schema, exist_ok=True))
        return cls(path, identity, table)

    def __len__(self) -> int:
        return self._read(lambda table: table.count_rows())

    def gone(self) -> dict[str, int]:
        """Folders in the index that are not there any more, and how many rows lead to them."""
        rows = Counter(row["root"] for row in self.rows(["root"]))
        return {root: count for root, count in sorted(rows.items()) if not os.path.isdir(root)}

    def check_embedder(self, plume: Plume) -> None:
        """Refuse an embedder whose vectors do not compare with those of this index.

        Raises:
            ValueError: another checkpoint, or vectors of another length.
        """
        seen = replace(
            self.identity,
            model=plume.source,
            fingerprint=checkpoint.fingerprint(plume.plume_model),
            dim=plume.get_embedding_dimension(),
        )
        self.identity.check_same(seen, self.path)

    def update(
        self, folder: str | os.PathLike, plume: Plume, *, batch_size: int = 32, show_progress: bool | None = None
    ) -> Report:
        """Bring the index up to date with a folder: add, replace and remove.

        A file whose size and time of change are those of its row counts as unchanged; otherwise its content decides.
        What cannot be read is listed, and does not stop the run.

        Args:
            folder: walked with its subfolders; see `plume.files.walk`.
            plume: the embedder that made the index.
            batch_size: inputs per pass.
            show_progress: None shows a bar in a terminal.

        Raises:
            ValueError: another embedder, or no such folder.
            IndexStorageError: the index cannot be written; what is committed stays.
        """
        from plume.indexing import update_index

        return update_index(self, Path(folder), plume, batch_size=batch_size, show_progress=show_progress)

    def remove(self, folder: str | os.PathLike) -> int:
        """Forget all rows of a folder that was indexed; the number of rows removed.

        Args:
            folder: as given to `update`; it need not exist any more.
        """
        where = f"root = {_quoted(str(Path(folder).resolve()))}"
        with self.locked():
            count = self._read(lambda table: table.count_rows(where))
            self._write(lambda table: table.delete(where))
            self.compact(wipe=True)
        return count

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other writers out.

        Raises:
            ValueError: another process is writing.
        """
        lock = FileLock(self.path / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another run is writing to the index {self.path}; wait until it is done") from None
        try:
            self._read(lambda table: table.checkout_latest())  # of who held the lock before
            yield
        finally:
            lock.release()

    def _read(self, work: Callable[[Any], T]) -> T:
        """Read from the newest version; again where another process has just taken files of the one before away."""
        return _trying(self.path, lambda: work(self._table), self._table.checkout_latest)

    def _write(self, work: Callable[[Any], Any]) -> None:
        """Write; `locked` keeps others out, so that a failure is one of storage."""
        _trying(self.path, lambda: work(self._table), tries=1)

    def rows(self, columns: Sequence[str], root: Path | None = None) -> list[dict[str, Any]]:
        """Some columns of all rows, or of those of one folder."""

        def select(table: Any) -> list[dict[str, Any]]:
            search = table.search().select(list(columns)).limit(None)
            return (search if root is None else search.where(f"root = {_quoted(str(root))}")).to_arrow().to_pylist()

        return self._read(select)

    def rows_with(self, contents: Sequence[str]) -> list[dict[str, Any]]:
        """All columns of the rows with one of these SHA-256."""
        where = f"sha256 IN ({', '.join(map(_quoted, contents))})"
        return self._read(lambda table: table.search().where(where).limit(None).to_arrow().to_pylist())

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Commit rows, all or none of them."""
        import pyarrow as pa

        table = pa.Table.from_pylist(list(rows), schema=_schema(self.identity.dim))
        self._write(lambda own: own.add(table))

    def delete(self, root: Path, files: Sequence[tuple[str, str]]) -> None:
        """Delete the rows of some files, given by name and SHA-256."""
        each = (f"(name = {_quoted(name)} AND sha256 = {_quoted(sha)})" for name, sha in files)
        where = f"root = {_quoted(str(root))} AND ({' OR '.join(each)})"
        self._write(lambda table: table.delete(where))

    def touch(self, root: Path, stats: dict[tuple[str, str], tuple[int, int]]) -> None:
        """Take note of the size and time of change of files whose content is as it was, by name and SHA-256."""
        import pyarrow as pa

        names = [name for name, _ in stats]
        for start in range(0, len(names), _IDS_PER_DELETION):
            part = names[start : start + _IDS_PER_DELETION]
            where = f"root = {_quoted(str(root))} AND name IN ({', '.join(map(_quoted, part))})"
            rows = self._read(lambda table, where=where: table.search().where(where).limit(None).to_arrow().to_pylist())
            known = [(row, stats.get((row["name"], row["sha256"]))) for row in rows]
            seen = [{**row, "size": stat[0], "mtime_ns": stat[1]} for row, stat in known if stat is not None]
            table = pa.Table.from_pylist(seen, schema=_schema(self.identity.dim))
            self._write(lambda own, new=table: own.merge_insert(_KEYS).when_matched_update_all().execute(new))

    def drop_doubled(self) -> int:
        """Delete rows that are there more than once; the number deleted."""
        found = self._read(
            lambda table: table.search().with_row_id(True).select(_KEYS).limit(None).to_arrow().to_pylist()
        )
        seen: set[tuple] = set()
        doubled = [
            row["_rowid"] for row in found if (key := tuple(row[name] for name in _KEYS)) in seen or seen.add(key)
        ]
        for start in range(0, len(doubled), _IDS_PER_DELETION):
            ids = ", ".join(map(str, doubled[start : start + _IDS_PER_DELETION]))
            self._write(lambda table, ids=ids: table.delete(f"_rowid IN ({ids})"))
        return len(doubled)

    def compact(self, wipe: bool) -> None:
        """Join the many small pieces that commits leave behind.

        Args:
            wipe: also take off the disk what was deleted. A search that runs at this moment reads again.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it says what is said above
            older = timedelta(0) if wipe else None
            self._write(lambda table: table.optimize(cleanup_older_than=older, delete_unverified=wipe))

    def search(
        self,
        query: Any,
        plume: Plume,
        *,
        top_k: int = 10,
        where: str | None = None,
        instruction: str | None = None,
        num_latent_steps: int | None = None,
    ) -> list[Hit]:
        """The rows whose vectors are nearest to a query, best first; exact, not approximate.

        Args:
            query: one input, as for `Plume.encode`.
            plume: the embedder that made the index.
            top_k: rows to return at most.
            where: a condition in SQL on path, kind, page, num_pages, excerpt, for example "kind = 'pdf'".
            instruction: must be the index's; None takes it.
            num_latent_steps: must be the index's K of queries; None takes it.

        Raises:
            ValueError: another embedder, K or instruction than the index was made with, or a condition that is not SQL.
        """
        self.check_embedder(plume)
        asked = replace(
            self.identity,
            query_instruction=self.identity.query_instruction if instruction is None else instruction,
            query_latent_steps=self.identity.query_latent_steps if num_latent_steps is None else num_latent_steps,
        )
        self.identity.check_same(asked, self.path)
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1; received {top_k}")
        if where is not None and not isinstance(where, str):
            raise ValueError(f"where is a {type(where).__name__}; expected a condition in SQL")
        condition = None if where is None else _condition(where)
        vector = plume.encode_query(
            query, instruction=asked.query_instruction, num_latent_steps=asked.query_latent_steps
        )
        if vector.ndim != 1:
            raise InputError(
                f"the query is {len(vector)} inputs; expected one: a string, an image, a dict of several media"
            )
        vector = vector / np.linalg.norm(vector)
        limit = top_k
        while True:
            found = self._nearest(vector, limit, condition, where)
            # While a folder is brought up to date a changed file has two rows, one of which is about to go.
            doubles: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
            for row in found:
                doubles[row["path"], row["page"]].append(row)
            if len(doubles) >= top_k or len(found) < limit:
                best = sorted(map(_true_row, doubles.values()), key=lambda row: row["_distance"])
                return [_hit(row) for row in best[:top_k]]
            limit *= 2

    def _nearest(
        self, vector: np.ndarray, limit: int, condition: str | None, where: str | None
    ) -> list[dict[str, Any]]:
        def select(table: Any) -> list[dict[str, Any]]:
            search = table.search(vector).distance_type("cosine").bypass_vector_index().limit(limit)
            return (search.where(condition, prefilter=True) if condition else search).to_list()

        try:
            return self._read(select)
        except ValueError as error:
            if not where:
                raise
            reason = str(error).splitlines()[0]
            raise ValueError(f"where={where!r} is not understood: {reason}; expected a condition in SQL") from None


def _check_free(path: Path) -> None:
    """Refuse a place for a new index that holds something already; hidden files do not count.

    Raises:
        ValueError: names what is there.
    """
    if not path.is_dir():
        return
    others = {one.name for one in path.iterdir() if not one.name.startswith(".")} - _LEFTOVERS
    versions, begun = path / f"{_TABLE}.lance" / _VERSIONS, path / f"{_IDENTITY}.part"
    if versions.is_dir() and any(versions.iterdir()) and not begun.exists():
        others.add(f"{_TABLE}.lance")
    if others:
        raise ValueError(
            f"{path} holds {min(others)} but no {_IDENTITY}; choose a folder that is empty or new for the index"
        )


def _begin(path: Path, identity: Identity) -> None:
    """Make the table of an index, then say who made it: where `index.json` is, there is a table."""
    temporary = path / f"{_IDENTITY}.part"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"format": _FORMAT, **asdict(identity)}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(path / f"{_TABLE}.lance", ignore_errors=True)
    database, schema = _connect(path), _schema(identity.dim)
    _trying(path, lambda: database.create_table(_TABLE, schema=schema))
    temporary.replace(path / _IDENTITY)


def _true_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the rows of one file, the one that its size and time on disk belong to; else the one changed last."""
    if len(rows) == 1:
        return rows[0]
    try:
        found = os.stat(rows[0]["path"])
        on_disk = found.st_size, found.st_mtime_ns
    except OSError:
        on_disk = None
    return max(rows, key=lambda row: ((row["size"], row["mtime_ns"]) == on_disk, row["mtime_ns"]))


def _trying(path: Path, work: Callable[[], T], refresh: Callable[[], Any] | None = None, tries: int = _TRIES) -> T:
    """Do something with LanceDB, several times if files go away meanwhile; its errors become ours."""
    for left in reversed(range(tries)):
        try:
            if refresh is not None and left < tries - 1:
                refresh()
            return work()
        except (RuntimeError, OSError) as error:
            if left and "not found" in str(error).lower():
                time.sleep(0.02 * 2 ** (tries - left))
                continue
            reason = _reason(error)
            raise IndexStorageError(
                f"the index {path} cannot be used ({reason}); what was committed before is safe: make sure that the "
                "disk has space and may be written to, and run it again"
            ) from error
    raise AssertionError


def _reason(error: Exception) -> str:
    """The innermost cause that LanceDB names."""
    text = " ".join(str(error).split())
    for sign in ("No space left on device", "Permission denied", "Read-only file system", "Disk quota exceeded"):
        if sign.lower() in text.lower():
            return sign
    return text[:300]


def _condition(where: str) -> str:
    r"""A condition that LanceDB reads to its end; it drops whatever follows a condition, without a word.

    Raises:
        ValueError: it is blank, or its parentheses do not pair.

    Example:
        >>> _condition("kind = ')'")
        "(kind = ')'\n)"
    """
    depth = 0
    for sign in re.sub(r"'(?:[^']|'')*'|\"[^\"]*\"", "", where):
        depth += (sign == "(") - (sign == ")")
        if depth < 0:
            break
    if depth or not where.strip():
        raise ValueError(f"where={where!r} is not understood: expected one condition in SQL, such as \"kind = 'pdf'\"")
    return f"({where}\n)"


def _hit(row: dict[str, Any]) -> Hit:
    is_page = row["page"] > 0
    return Hit(
        score=1 - row["_distance"],
        path=row["path"],
        kind=row["kind"],
        page=row["page"] if is_page else None,
        num_pages=row["num_pages"] if is_page else None,
        excerpt=row["excerpt"],
        thumbnail=row["thumbnail"],
    )


def _schema(dim: int) -> Any:
    import pyarrow as pa

    columns = {
        "root": pa.string(),
        "name": pa.string(),
        "path": pa.string(),
        "kind": pa.string(),
        "page": pa.int32(),
        "num_pages": pa.int32(),
        "sha256": pa.string(),
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
        "excerpt": pa.string(),
        "thumbnail": pa.binary(),
        "vector": pa.list_(pa.float32(), dim),
    }
    return pa.schema(list(columns.items()))


def _connect(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lancedb
    except ImportError:
        raise ValueError("an index needs LanceDB; pip install 'plume-embed[index]'") from None
    # Other processes may write meanwhile: every read takes the newest version.
    return lancedb.connect(str(path), read_consistency_interval=timedelta(0))


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"

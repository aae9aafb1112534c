"""An index of folders: vectors, where they come from, and what made them.

Rows live in a LanceDB table, one per text file, image, video and PDF page. `index.json` beside it remembers the
checkpoint, its K and instructions, and refuses to be searched or extended with others. How a folder gets into it is
told in `plume/indexing.py`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from plume import checkpoint

if TYPE_CHECKING:
    from plume.embedder import Plume
    from plume.indexing import Report

_FORMAT = 1
_TABLE, _IDENTITY = "items", "index.json"


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
    """

    score: float
    path: str
    kind: str
    page: int | None
    num_pages: int | None
    excerpt: str
    thumbnail: bytes = field(repr=False)

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
        """
        path = Path(path)
        identity = Identity(
            model=plume.source,
            fingerprint=checkpoint.fingerprint(plume.plume_model),
            dim=int(plume.get_embedding_dimension() or 0),
            num_latent_steps=plume.default_steps("document") if num_latent_steps is None else num_latent_steps,
            query_latent_steps=plume.default_steps("query") if query_latent_steps is None else query_latent_steps,
            instruction=instruction,
            query_instruction=query_instruction,
        )
        for steps in (identity.num_latent_steps, identity.query_latent_steps):
            plume.plume_config.check_num_latent_steps(steps)
        if (path / _IDENTITY).exists():
            index = cls.open(path)
            index.identity.check_same(identity, path)
            return index
        if path.exists() and any(path.iterdir()):
            raise ValueError(f"{path} holds files but no {_IDENTITY}; choose a folder that is empty or new")
        path.mkdir(parents=True, exist_ok=True)
        temporary = path / f"{_IDENTITY}.part"
        temporary.write_text(json.dumps({"format": _FORMAT, **asdict(identity)}, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path / _IDENTITY)
        return cls.open(path)

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
            identity = Identity(**fields) if found == _FORMAT else None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path / _IDENTITY} is damaged ({error}); index the folder again") from None
        if identity is None:
            raise ValueError(f"{path} has format {found}, this version reads {_FORMAT}; index the folder again")
        return cls(path, identity, _connect(path).create_table(_TABLE, schema=_schema(identity.dim), exist_ok=True))

    def __len__(self) -> int:
        return self._table.count_rows()

    def check_embedder(self, plume: Plume) -> None:
        """Refuse an embedder whose vectors do not compare with those of this index.

        Raises:
            ValueError: another checkpoint, or vectors of another length.
        """
        seen = replace(
            self.identity,
            model=plume.source,
            fingerprint=checkpoint.fingerprint(plume.plume_model),
            dim=int(plume.get_embedding_dimension() or 0),
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
            count = self._table.count_rows(where)
            self._table.delete(where)
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
            yield
        finally:
            lock.release()

    def rows(self, columns: Sequence[str], root: Path | None = None) -> list[dict[str, Any]]:
        """Some columns of all rows, or of those of one folder."""
        search = self._table.search().select(list(columns)).limit(None)
        return (search if root is None else search.where(f"root = {_quoted(str(root))}")).to_arrow().to_pylist()

    def rows_with(self, contents: Sequence[str]) -> list[dict[str, Any]]:
        """All columns of the rows with one of these SHA-256."""
        where = f"sha256 IN ({', '.join(map(_quoted, contents))})"
        return self._table.search().where(where).limit(None).to_arrow().to_pylist()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Commit rows, all or none of them."""
        import pyarrow as pa

        self._table.add(pa.Table.from_pylist(list(rows), schema=_schema(self.identity.dim)))

    def delete(self, root: Path, files: Sequence[tuple[str, str]]) -> None:
        """Delete the rows of some files, given by name and SHA-256."""
        each = (f"(name = {_quoted(name)} AND sha256 = {_quoted(sha)})" for name, sha in files)
        self._table.delete(f"root = {_quoted(str(root))} AND ({' OR '.join(each)})")

    def compact(self, wipe: bool) -> None:
        """Join the many small pieces that commits leave behind.

        Args:
            wipe: also take off the disk what was deleted; a search that runs at this moment may fail.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it says what is said above
            self._table.optimize(cleanup_older_than=timedelta(0) if wipe else None, delete_unverified=wipe)

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
        vector = plume.encode_query(
            query, instruction=asked.query_instruction, num_latent_steps=asked.query_latent_steps
        )
        if vector.ndim != 1:
            raise ValueError("search takes one query at a time")
        search = (
            self._table.search(vector / np.linalg.norm(vector))
            .distance_type("cosine")
            .bypass_vector_index()
            .limit(top_k)
        )
        try:
            found = (search.where(where, prefilter=True) if where else search).to_list()
        except (ValueError, RuntimeError) as error:
            if not where:
                raise
            raise ValueError(f"where={where!r} is not understood: {str(error).splitlines()[0]}") from None
        return [_hit(row) for row in found]


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
    return lancedb.connect(str(path))


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"

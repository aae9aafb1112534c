"""An index of folders: vectors, where they come from, and what made them.

`index.json` beside the rows (`plume.search.store`) remembers the checkpoint, its K and instructions, and an index
refuses to be searched or extended with others. `plume.search.update` brings a folder into it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from plume.checkpoints.fingerprint import fingerprint
from plume.embedder.encode import pixel_settings
from plume.embedder.plume import Plume
from plume.inputs.errors import InputError
from plume.inputs.item import Item
from plume.search.filter import Filter
from plume.search.rows import excerpt_of
from plume.search.store import TABLE, TABLES, IndexStorageError, RowStore, checked_condition
from plume.search.update import Report, update_store
from plume.space.fusion import fuse

#: Rows of format 1 have no texts; the next writer reads them.
_FORMAT, _READ = 2, (1, 2)
#: Candidates of each order of rows; as many for every page of results, whose orders must agree.
_CANDIDATES = 1_200
#: How often a search is done again where rows were compacted meanwhile, and have other numbers.
_TRIES = 3
#: What tells rows of one file apart, and whether they are of what is on disk.
_OF_FILES = ("path", "page", "size", "mtime_ns")
#: The weight of words, where they are given and their weight is not.
_EQUAL = 0.5
#: The file that says what made an index.
IDENTITY = "index.json"
#: Fields of `Identity` that whoever makes an index chooses, beside the checkpoint and the length of the vectors.
SETTINGS = ("num_latent_steps", "query_latent_steps", "instruction", "query_instruction", "max_pixels")
# What an interrupted creation leaves: it is made anew. A table beside no other of them is somebody's.
_LEFTOVERS = {f"{IDENTITY}.part", f"{TABLE}.lance", "lock"}
_VERSIONS = "_versions"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What made an index, and must be the same for every vector that meets it.

    model: name or path of the checkpoint; another place is fine as long as the fingerprint agrees.
    fingerprint: of the checkpoint (`plume.checkpoints.folder.fingerprint`).
    dim: length of the vectors.
    num_latent_steps: K of documents.
    query_latent_steps: K of queries; None: as the checkpoint's gate decides.
    instruction: for documents.
    query_instruction: for queries.
    max_pixels: larger images and pages, of documents and queries, are reduced to it; None: the checkpoint's own limit.
    """

    model: str
    fingerprint: str
    dim: int
    num_latent_steps: int
    query_latent_steps: int | None
    instruction: str = ""
    query_instruction: str = ""
    max_pixels: int | None = None

    @classmethod
    def of(
        cls,
        plume: Plume,
        *,
        num_latent_steps: int | None = None,
        query_latent_steps: int | None = None,
        instruction: str = "",
        query_instruction: str = "",
        max_pixels: int | None = None,
    ) -> Identity:
        """What vectors of an embedder come from; see `Index.create`.

        Raises:
            ValueError: the checkpoint does not take so many steps, or the limit is below what images are enlarged to.
        """
        documents = plume.default_steps("document")
        assert documents is not None  # a gate is for queries
        identity = cls(
            model=plume.source,
            fingerprint=fingerprint(plume.plume_model),
            dim=plume.get_embedding_dimension(),
            num_latent_steps=documents if num_latent_steps is None else num_latent_steps,
            query_latent_steps=plume.default_steps("query") if query_latent_steps is None else query_latent_steps,
            instruction=instruction,
            query_instruction=query_instruction,
            max_pixels=max_pixels,
        )
        pixel_settings(plume.plume_model.processor, max_pixels)
        for steps in (identity.num_latent_steps, identity.query_latent_steps):
            if steps is not None:
                plume.plume_config.check_num_latent_steps(steps)
        return identity

    def checked(self) -> Identity:
        """The same, once every field is of its type.

        Raises:
            TypeError: names the field.
        """
        for name, value in asdict(self).items():
            expected = int if name in ("dim", "num_latent_steps", "query_latent_steps", "max_pixels") else str
            if type(value) is not expected and (value is not None or name not in ("max_pixels", "query_latent_steps")):
                raise TypeError(f"{name} is {value!r}; expected a {expected.__name__}")
        return self

    def check_same(self, other: Identity, where: Path, what: str = "index") -> None:
        """Refuse another origin of vectors.

        Args:
            other: that is to be the same.
            where: this one is written.
            what: lies there.

        Raises:
            ValueError: names the first field that differs.
        """
        for name, ours in asdict(self).items():
            theirs = getattr(other, name)
            if name != "model" and ours != theirs:
                made = f"checkpoint {self.model}" if name == "fingerprint" else f"{name}={ours!r}"
                asked = f"checkpoint {other.model}" if name == "fingerprint" else f"{name}={theirs!r}"
                raise ValueError(
                    f"the {what} {where} was made with {made}; this call uses {asked}, whose vectors do not compare. "
                    f"Use the same, or make a new {what}"
                )


@dataclass(frozen=True)
class Hit:
    """One row that a search found, best first.

    score: cosine to the query, in [-1, 1].
    text_score: how well its words match (BM25, larger is better); None: not at all, or they were not looked for.
    fused: by what results are ordered, where words were looked for too (`plume.space.fusion`); None: by `score`.
    excerpt: the beginning of its text; of a file that is there, the place where words that were looked for stand.
    path: where the file was when it was indexed; see `is_there`. root: the folder that was indexed then.
    changed: when the file was written last, in seconds since 1970.
    row: number of the row, until the index is compacted. vector: `[dim]`.
    """

    score: float
    text_score: float | None
    fused: float | None
    path: str
    kind: str
    page: int | None
    num_pages: int | None
    excerpt: str
    thumbnail: bytes = field(repr=False)
    root: str = field(repr=False)
    changed: float = field(repr=False)
    row: int = field(repr=False, compare=False)
    vector: np.ndarray = field(repr=False, compare=False)

    @property
    def is_there(self) -> bool:
        """Whether a file still is at this path; rows of tables that have none are always there."""
        return self.path.startswith(TABLES) or os.path.isfile(self.path)

    def to_dict(self) -> dict[str, Any]:
        """What is said of a result, for JSON."""
        names = ("score", "text_score", "fused", "path", "kind", "page", "num_pages", "excerpt")
        return {name: getattr(self, name) for name in names}


class Index:
    """Vectors of one or several folders on disk, searched by text, images or any input.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> (folder / "notes").mkdir()
        >>> _ = (folder / "notes" / "kite.txt").write_text("a red kite")
        >>> from plume import Plume
        >>> model = Plume(getfixture("plume_folder"), device="cpu")
        >>> index = Index.create(folder / "index", model)
        >>> index.update(folder / "notes", model, show_progress=False).embedded
        1
        >>> index.search("red kite", model)[0].excerpt
        'a red kite'
    """

    def __init__(self, path: Path, identity: Identity, store: RowStore):
        self.path = path
        self.identity = identity
        self.store = store

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
        max_pixels: int | None = None,
    ) -> Index:
        """Make an empty index, or open one that was made with the same settings.

        Args:
            path: a folder; created if missing.
            plume: the embedder; its `truncate_dim` sets the length of the vectors.
            num_latent_steps: K of documents; None is the embedder's.
            query_latent_steps: K of queries; None is the embedder's.
            instruction: for documents.
            query_instruction: for queries.
            max_pixels: larger images and pages are reduced to it; None is the checkpoint's own limit.

        Raises:
            ValueError: there is an index made with other settings, or a limit below what images are enlarged to.
            IndexStorageError: it cannot be written.
        """
        identity = Identity.of(
            plume,
            num_latent_steps=num_latent_steps,
            query_latent_steps=query_latent_steps,
            instruction=instruction,
            query_instruction=query_instruction,
            max_pixels=max_pixels,
        )
        return cls.create_as(path, identity)

    @classmethod
    def create_as(cls, path: str | os.PathLike, identity: Identity) -> Index:
        """Make an empty index for vectors of a known origin, or open one of the same; see `create`."""
        path = Path(path)
        if not (path / IDENTITY).exists():
            _check_free(path)  # before anything is made there
            try:
                path.mkdir(parents=True, exist_ok=True)
                with FileLock(path / "lock"):
                    if not (path / IDENTITY).exists():  # nobody else has made it meanwhile
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
        if not (path / IDENTITY).is_file():
            raise ValueError(f"{path} is no index; make one with `plume index FOLDER --out {path}`")
        try:
            fields = json.loads((path / IDENTITY).read_text(encoding="utf-8"))
            version = fields.pop("format")
            identity = Identity(**fields).checked() if version in _READ else None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path / IDENTITY} is damaged ({error}); remove {path} and index the folder again"
            ) from None
        if identity is None:
            raise ValueError(
                f"{path} has format {version!r}, this version reads {_FORMAT}; remove it and index the folder again"
            )
        return cls(path, identity, RowStore(path, identity.dim))

    def __len__(self) -> int:
        return len(self.store)

    def gone(self) -> dict[str, int]:
        """Folders in the index that are not there any more, and how many rows lead to them."""
        counts = sorted((root, count) for (root,), count in self.store.counts("root").items())
        return {root: count for root, count in counts if not root.startswith(TABLES) and not os.path.isdir(root)}

    def check_embedder(self, plume: Plume) -> None:
        """Refuse an embedder whose vectors do not compare with those of this index.

        Raises:
            ValueError: another checkpoint, or vectors of another length.
        """
        found = replace(
            self.identity,
            model=plume.source,
            fingerprint=fingerprint(plume.plume_model),
            dim=plume.get_embedding_dimension(),
        )
        self.identity.check_same(found, self.path)

    def update(
        self, folder: str | os.PathLike, plume: Plume, *, batch_size: int = 32, show_progress: bool | None = None
    ) -> Report:
        """Bring the index up to date with a folder: add, replace and remove.

        A file whose size and time of change are those of its row counts as unchanged; otherwise its content decides.
        What cannot be read is listed, and does not stop the run.

        Args:
            folder: walked with its subfolders; see `plume.search.folder.walk`.
            plume: the embedder that made the index.
            batch_size: inputs per pass.
            show_progress: None shows a bar in a terminal.

        Raises:
            ValueError: another embedder, or no such folder.
            IndexStorageError: the index cannot be written; what is committed stays.
        """
        self.check_embedder(plume)
        root = Path(folder).resolve()
        if not root.is_dir():
            raise ValueError(f"{folder} is no folder; expected one with files to index")
        with self.writing():
            report = update_store(
                self.store,
                root,
                plume,
                instruction=self.identity.instruction,
                num_latent_steps=self.identity.num_latent_steps,
                image_settings=pixel_settings(plume.plume_model.processor, self.identity.max_pixels),
                batch_size=batch_size,
                hide_progress=None if show_progress is None else not show_progress,
            )
        report.gone = self.gone()
        return report

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other writers out, and bring an index of an older format up to this one; nothing is embedded for it.

        Raises:
            ValueError: another process is writing.
        """
        with self.store.locked():
            self.store.add_texts()
            file = self.path / IDENTITY
            if json.loads(file.read_text(encoding="utf-8"))["format"] != _FORMAT:
                new, stat = _write_identity(self.path, self.identity), file.stat()
                os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # by which jobs know it again
                new.replace(file)
            yield

    def remove(self, folder: str | os.PathLike) -> int:
        """Forget all rows of a folder that was indexed; the number of rows removed.

        Args:
            folder: as given to `update`, or the root of a table; it need not exist any more.
        """
        root = Path(folder)
        with self.store.locked():
            count = self.store.delete_root(root if str(folder).startswith(TABLES) else root.resolve())
            self.store.compact(wipe=True)
        return count

    def search(
        self,
        query: Any,
        plume: Plume,
        *,
        top_k: int = 10,
        where: str | None = None,
        filter: Filter | None = None,
        text: str | None = None,
        hybrid: float | None = None,
        exact: bool = False,
        instruction: str | None = None,
        num_latent_steps: int | None = None,
    ) -> list[Hit]:
        """The rows whose vectors are nearest to a query, best first; with `hybrid` also those that hold its words.

        From `plume.search.store.APPROXIMATE_FROM` rows on their vectors are indexed (IVF with RaBitQ), and the nearest
        are those of a sample that is compared exactly; scores are exact in any case.

        Args:
            query: one input, as for `Plume.encode`.
            plume: the embedder that made the index.
            top_k: rows to return at most.
            where: a condition in SQL on path, kind, page, num_pages, excerpt, text, for example "kind = 'pdf'".
            filter: the same by typed fields; both must be met.
            text: words to look for in texts, pages and names; None: those of the query.
            hybrid: the weight of words, from 0 to 1, beside that of vectors; orders are fused by rank. At 0.5 a row
                that alone holds a rare word, such as the number of an invoice, comes first. None: 0.5 where `text` is
                given, else 0.
            exact: compare with every row of a large index too.
            instruction: must be the index's; None takes it.
            num_latent_steps: must be the index's K of queries; None takes it.

        Raises:
            ValueError: another embedder, K or instruction than the index was made with, a condition that is not SQL,
                no such weight, or words in an index that keeps no texts.
        """
        self.check_embedder(plume)
        hybrid = (_EQUAL if text else 0.0) if hybrid is None else hybrid
        if not 0 <= hybrid <= 1:
            raise ValueError(f"hybrid is {hybrid}; expected the weight of words, from 0 to 1")
        request = replace(
            self.identity,
            query_instruction=self.identity.query_instruction if instruction is None else instruction,
            query_latent_steps=self.identity.query_latent_steps if num_latent_steps is None else num_latent_steps,
        )
        self.identity.check_same(request, self.path)
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1; received {top_k}")
        if where is not None and not isinstance(where, str):
            raise ValueError(f"where is a {type(where).__name__}; expected a condition in SQL")
        if hybrid and text is None:  # parsed once, for media may be far away
            query = Item.parse(query, "the query", plume.plume_model.processor.limits)  # type: ignore[union-attr]
            text = query.text
        vector = plume.encode_query(
            query,
            instruction=request.query_instruction,
            num_latent_steps=request.query_latent_steps,
            **pixel_settings(plume.plume_model.processor, request.max_pixels),
        )
        if vector.ndim != 1:
            raise InputError(
                "the query", f"it is {len(vector)} inputs; expected one: a string, an image, a dict of several media"
            )
        vector = vector / np.linalg.norm(vector)
        return self.nearest(
            vector, top_k=top_k, where=where, filter=filter, text=text or "", hybrid=hybrid, exact=exact
        )

    def nearest(
        self,
        vector: np.ndarray,
        *,
        top_k: int = 10,
        where: str | None = None,
        filter: Filter | None = None,
        text: str = "",
        hybrid: float = 0.0,
        exact: bool = False,
        offset: int = 0,
    ) -> list[Hit]:
        """The rows nearest to a vector, best first.

        Args:
            vector: `[dim]`, of unit length.
            top_k: rows to return at most.
            offset: better rows that are left out.
            where: see `search`.
            filter: see `search`.
            text: words to look for as well.
            hybrid: their weight, see `search`.
            exact: see `search`.

        Raises:
            ValueError: a condition that is not SQL, or words in an index that keeps no texts.
        """
        if filter is not None and filter.condition is not None:
            where = filter.condition if where is None else f"{checked_condition(where)} AND {filter.condition}"
        if hybrid and text.strip():
            for left in reversed(range(_TRIES)):
                order = self._fused(vector, text, hybrid, max(offset + top_k, _CANDIDATES), where, exact)
                best = order[offset : offset + top_k]
                whole = self.store.numbered([row["_rowid"] for row in best], with_texts=True)
                if len(whole) == len(best) or not left:
                    return [_told(row, whole[row["_rowid"]], text) for row in best if row["_rowid"] in whole]
        limit = count = offset + top_k
        while True:
            rows = self.store.nearest(vector, limit, where, exact=exact)
            true = _true_rows(rows)
            if len(true) >= count or len(rows) < limit:
                return [_hit(row) for row in sorted(true, key=lambda row: row["_distance"])[offset:count]]
            limit *= 2

    def _fused(
        self, vector: np.ndarray, text: str, hybrid: float, limit: int, where: str | None, exact: bool
    ) -> list[dict[str, Any]]:
        """Rows that are nearest to a vector and those that hold words, in one order, without most of their columns."""
        near = self.store.nearest(vector, limit, where, exact=exact, columns=_OF_FILES)
        rows = {row["_rowid"]: {**row, "cosine": 1 - row["_distance"]} for row in near}
        matching = self.store.matching(text, limit, where, columns=_OF_FILES)
        for number, own in self.store.vectors([row["_rowid"] for row in matching if row["_rowid"] not in rows]).items():
            rows[number] = {"cosine": float(own @ vector / np.linalg.norm(own))}
        for row in matching:
            if row["_rowid"] in rows:  # else it has gone meanwhile
                rows[row["_rowid"]] |= row
        true = _true_rows(list(rows.values()))
        cosines = np.array([row["cosine"] for row in true])
        fused = fuse([cosines, np.array([row.get("_score", np.nan) for row in true])], [1 - hybrid, hybrid])
        scored = [{**row, "fused": float(score)} for row, score in zip(true, fused, strict=True)]
        return sorted(scored, key=lambda row: (-row["fused"], -row["cosine"], row["path"], row["page"]))

    def row(self, number: int) -> Hit | None:
        """The row of a number, without a score; None where there is none any more."""
        found = self.store.numbered([number]).get(number)
        return None if found is None else _hit({**found, "_distance": np.nan})


def _check_free(path: Path) -> None:
    """Refuse a place for a new index that holds something already; hidden files do not count.

    Raises:
        ValueError: names what is there.
    """
    if not path.is_dir():
        return
    others = {one.name for one in path.iterdir() if not one.name.startswith(".")} - _LEFTOVERS
    versions, begun = path / f"{TABLE}.lance" / _VERSIONS, path / f"{IDENTITY}.part"
    if versions.is_dir() and any(versions.iterdir()) and not begun.exists():
        others.add(f"{TABLE}.lance")
    if others:
        raise ValueError(
            f"{path} holds {min(others)} but no {IDENTITY}; choose a folder that is empty or new for the index"
        )


def _write_identity(path: Path, identity: Identity) -> Path:
    """Write who made an index beside its place."""
    temporary = path / f"{IDENTITY}.part"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"format": _FORMAT, **asdict(identity)}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _begin(path: Path, identity: Identity) -> None:
    """Make the table of an index, then say who made it: where `index.json` is, there is a table."""
    temporary = _write_identity(path, identity)
    shutil.rmtree(path / f"{TABLE}.lance", ignore_errors=True)
    RowStore(path, identity.dim, must_be_new=True)
    temporary.replace(path / IDENTITY)


def _true_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of each file or page: in an index that is being brought up to date a changed one has two."""
    doubles: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        doubles[row["path"], row["page"]].append(row)
    return list(map(_true_row, doubles.values()))


def _true_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the rows of one file, the one that its size and time on disk belong to; else the one changed last."""
    if len(rows) == 1:
        return rows[0]
    try:
        stat = os.stat(rows[0]["path"])
        on_disk = stat.st_size, stat.st_mtime_ns
    except OSError:
        on_disk = None
    return max(rows, key=lambda row: ((row["size"], row["mtime_ns"]) == on_disk, row["mtime_ns"]))


def _told(row: dict[str, Any], whole: dict[str, Any], words: str) -> Hit:
    """A row of a fused order. Its excerpt is where words stand if who asks can open the file, else its beginning."""
    hit = _hit({**whole, "_distance": 1 - row["cosine"]})
    hit = replace(hit, text_score=row.get("_score"), fused=row["fused"])
    if hit.text_score is None or not whole["text"] or hit.root.startswith(TABLES) or not hit.is_there:
        return hit
    return replace(hit, excerpt=excerpt_of(whole["text"], words))


def _hit(row: dict[str, Any]) -> Hit:
    is_page = row["page"] > 0
    return Hit(
        score=1 - row["_distance"],
        text_score=None,
        fused=None,
        path=row["path"],
        kind=row["kind"],
        page=row["page"] if is_page else None,
        num_pages=row["num_pages"] if is_page else None,
        excerpt=row["excerpt"],
        thumbnail=row["thumbnail"],
        root=row["root"],
        changed=row["mtime_ns"] / 1e9,
        row=row["_rowid"],
        vector=np.asarray(row["vector"], dtype=np.float32),
    )

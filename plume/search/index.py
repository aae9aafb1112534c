"""An index of folders: vectors, where they come from, and what made them.

`index.json` beside the rows (`plume.search.store`) remembers the checkpoint, its K and instructions, and an index
refuses to be searched or extended with others. `plume.search.update` brings a folder into it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock

from plume.checkpoints.fingerprint import fingerprint
from plume.embedder.encode import pixel_settings
from plume.embedder.plume import Plume
from plume.inputs.errors import InputError
from plume.inputs.item import Item, list_inputs
from plume.search.corrections import Correct, Corrections, check_correct
from plume.search.filter import Filter, indexed_path
from plume.search.query import Compiled, Like, compiled, inputs_of
from plume.search.ranking import Cut, Hit, Ranking, hit_of, true_row
from plume.search.rerank import Reranker, reranked
from plume.search.rows import Splitter
from plume.search.store import TABLE, TABLES, IndexStorageError, RowStore, checked_condition, quoted
from plume.search.update import Report, update_store

#: Rows of format 1 have no texts; the next writer reads them.
_FORMAT, _READ = 2, (1, 2)
# Shorter passages and clips say nothing.
_FEWEST_TOKENS, _SHORTEST_S = 16, 1.0
# Rows over those that corrections were fitted to, from which on these are old.
_GROWN = 1.2
# Starts of clips that differ by less are the same.
_CLOSE = 0.01
#: The weight of words, where they are given and their weight is not.
_EQUAL = 0.5
#: The file that says what made an index.
IDENTITY = "index.json"
#: Fields of `Identity` that whoever makes an index chooses, beside the checkpoint and the length of the vectors.
SETTINGS = (
    "num_latent_steps",
    "query_latent_steps",
    "instruction",
    "query_instruction",
    "max_pixels",
    "passage_tokens",
    "clip_seconds",
)
# What an interrupted creation leaves: it is made anew. A table beside no other of them is somebody's.
_LEFTOVERS = {f"{IDENTITY}.part", f"{TABLE}.lance", "lock"}
_VERSIONS = "_versions"
# Fields of `Identity` that are whole numbers, and those that may be None.
_WHOLE = ("dim", "num_latent_steps", "query_latent_steps", "max_pixels", "passage_tokens")
_OPTIONAL = ("query_latent_steps", "max_pixels", "passage_tokens", "clip_seconds")


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
    passage_tokens: longer texts are rows of passages of so many tokens at most; None: a text is one row.
    clip_seconds: longer videos have rows of clips beside the whole; None: a video is one row.
    """

    model: str
    fingerprint: str
    dim: int
    num_latent_steps: int
    query_latent_steps: int | None
    instruction: str = ""
    query_instruction: str = ""
    max_pixels: int | None = None
    passage_tokens: int | None = None
    clip_seconds: float | None = None

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
        passage_tokens: int | None = None,
        clip_seconds: float | None = None,
    ) -> Identity:
        """What vectors of an embedder come from; see `Index.create`.

        Raises:
            ValueError: the checkpoint does not take so many steps, the limit is below what images are enlarged to, or
                passages or clips are too short.
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
            passage_tokens=passage_tokens,
            clip_seconds=None if clip_seconds is None else float(clip_seconds),
        )
        pixel_settings(plume.plume_model.processor, max_pixels)
        most = plume.plume_model.processor.max_tokens  # type: ignore[union-attr]
        if passage_tokens is not None and not _FEWEST_TOKENS <= passage_tokens <= most:
            raise ValueError(f"passage_tokens is {passage_tokens}; expected {_FEWEST_TOKENS} to {most:,}")
        if clip_seconds is not None and not _SHORTEST_S <= clip_seconds < math.inf:
            raise ValueError(f"clip_seconds is {clip_seconds}; expected at least {_SHORTEST_S} s")
        for steps in (identity.num_latent_steps, identity.query_latent_steps):
            if steps is not None:
                plume.plume_config.check_num_latent_steps(steps)
        return identity.checked()

    def checked(self) -> Identity:
        """The same, once every field is of its type.

        Raises:
            TypeError: names the field.
        """
        for name, value in asdict(self).items():
            expected = float if name == "clip_seconds" else int if name in _WHOLE else str
            if type(value) is not expected and (value is not None or name not in _OPTIONAL):
                raise TypeError(f"{name} is {value!r}; expected a {expected.__name__}")
        return self

    def splitter(self, plume: Plume) -> Splitter:
        """What cuts long texts and videos into parts."""
        processor = plume.plume_model.processor
        return Splitter(self.passage_tokens, self.clip_seconds, None if processor is None else processor.tokenizer)

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
        passage_tokens: int | None = None,
        clip_seconds: float | None = None,
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
            passage_tokens: longer texts become rows of passages, of so many tokens at most, which overlap by 15 %.
            clip_seconds: longer videos get rows of clips of so many seconds, one every half of that, beside the whole.

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
            passage_tokens=passage_tokens,
            clip_seconds=clip_seconds,
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
                splitter=self.identity.splitter(plume),
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
            self.store.add_columns()
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
        plume: Plume | None = None,
        *,
        top_k: int = 10,
        where: str | None = None,
        filter: Filter | None = None,
        text: str | None = None,
        hybrid: float | None = None,
        exact: bool = False,
        correct: Correct | None = None,
        group_by: Literal["file"] | None = None,
        collapse: float | None = None,
        min_score: float | None = None,
        cut: Cut | None = None,
        rerank: Reranker | None = None,
        rerank_k: int = 50,
        instruction: str | None = None,
        num_latent_steps: int | None = None,
    ) -> list[Hit]:
        """The rows whose vectors are nearest to a query, best first; with `hybrid` also those that hold its words.

        From `plume.search.store.APPROXIMATE_FROM` rows on their vectors are indexed (IVF with RaBitQ), and the nearest
        are those of a sample that is compared exactly; scores are exact in any case.

        Args:
            query: one input, as for `Plume.encode`, or several that are joined by the classes of `plume.search.query`,
                for example `All("a red kite", Not("night"))`, `Like(hit)`, `Mix((1, photo), (-0.5, "night"))`.
            plume: the embedder that made the index; not needed for what is like rows of it.
            top_k: rows to return at most.
            where: a condition in SQL on path, kind, page, num_pages, excerpt, text, for example "kind = 'pdf'".
            filter: the same by typed fields; both must be met.
            text: words to look for in texts, pages and names; None: those of the query.
            hybrid: the weight of words, from 0 to 1, beside that of vectors; orders are fused by rank. At 0.5 a row
                that alone holds a rare word, such as the number of an invoice, comes first. Queries without words are
                searched by vectors. None: 0.5 where `text` is
                given, else 0.
            exact: compare with every row of a large index too. Without it a query of several parts looks at the rows
                that are near to one of them.
            correct: order by corrected scores, as `correct` has fitted them: "centre", so that no kind of rows comes up
                more than another for being what it is; "hubs", so that no row does for being near to everything.
            group_by: "file" shows the best page, passage or clip of each file alone.
            collapse: rows whose cosine to a better one is at least this are left out, for example 0.98 for copies of a
                picture.
            min_score: rows whose cosine is smaller are left out. What is near differs from query to query, and most
                between words and pictures.
            cut: where results end. "auto": rows that do not stand out of the index, so that nothing may be left
                (`plume.space.cutoff`); those that hold the words stay. "drop": the largest drop within the first 50.
            rerank: orders the best `rerank_k` rows anew, by scores of query and hit; see `plume.search.rerank`.
            rerank_k: rows that are reranked.
            instruction: must be the index's; None takes it.
            num_latent_steps: must be the index's K of queries; None takes it.

        Raises:
            ValueError: another embedder, K or instruction than the index was made with, a condition that is not SQL,
                no such weight, words in an index that keeps no texts, parts that cannot be joined, or a cut that
                cannot be made.
        """
        hybrid = (_EQUAL if text else 0.0) if hybrid is None else hybrid
        if not 0 <= hybrid <= 1:
            raise ValueError(f"hybrid is {hybrid}; expected the weight of words, from 0 to 1")
        request = replace(
            self.identity,
            query_instruction=self.identity.query_instruction if instruction is None else instruction,
            query_latent_steps=self.identity.query_latent_steps if num_latent_steps is None else num_latent_steps,
        )
        self.identity.check_same(request, self.path)
        if rerank_k < 1:
            raise ValueError(f"rerank_k must be at least 1; received {rerank_k}")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1; received {top_k}")
        if where is not None and not isinstance(where, str):
            raise ValueError(f"where is a {type(where).__name__}; expected a condition in SQL")
        asked, words = self._compiled(query, plume, wants_words=bool(hybrid) and text is None)
        words = words if text is None else text
        if text and not hybrid:
            raise ValueError("text is given, and hybrid=0 leaves words out; give a weight above 0, or no text")
        hits = self.nearest(
            asked,
            top_k=top_k if rerank is None else max(top_k, rerank_k),
            where=where,
            filter=filter,
            text=words,
            hybrid=hybrid,
            exact=exact,
            correct=correct,
            group_by=group_by,
            collapse=collapse,
            min_score=min_score,
            cut=cut,
        )
        return hits if rerank is None else [*reranked(query, hits[:rerank_k], rerank), *hits[rerank_k:]][:top_k]

    def nearest(
        self,
        asked: Compiled,
        *,
        top_k: int = 10,
        offset: int = 0,
        where: str | None = None,
        filter: Filter | None = None,
        text: str = "",
        hybrid: float = 0.0,
        exact: bool = False,
        correct: Correct | None = None,
        group_by: Literal["file"] | None = None,
        collapse: float | None = None,
        min_score: float | None = None,
        cut: Cut | None = None,
    ) -> list[Hit]:
        """The rows that are best by what a query asks of them, best first.

        Args:
            asked: the query, whose parts have been embedded.
            top_k: rows to return at most.
            offset: better rows that are left out.
            where: see `search`.
            filter: see `search`.
            text: words to look for as well.
            hybrid: their weight, see `search`.
            exact: see `search`.
            correct: see `search`.
            group_by: see `search`.
            collapse: see `search`.
            min_score: see `search`.
            cut: see `search`.

        Raises:
            ValueError: a condition that is not SQL, words in an index that keeps no texts, or a cut that cannot be
                made.
        """
        check_correct(correct)
        conditions = [] if where is None else [where]
        if filter is not None and filter.condition is not None:
            conditions.append(filter.condition)
        if asked.contents:
            same = (f"(sha256 = {quoted(sha)} AND page = {page:d})" for sha, page in sorted(asked.contents))
            conditions.append(f"NOT ({' OR '.join(same)})")
        corrections = None if correct is None else Corrections.read(self.path, self.identity.dim)
        if corrections is not None and len(self) > _GROWN * corrections.num_rows:
            warnings.warn(
                f"plume: the corrections of {self.path} were fitted when it had {corrections.num_rows:,} of its "
                f"{len(self):,} rows; fit them again",
                stacklevel=3,
            )
        ranking = Ranking(
            store=self.store,
            asked=asked,
            where=" AND ".join(map(checked_condition, conditions)) if conditions[1:] else (conditions or [None])[0],
            text=text,
            hybrid=hybrid,
            exact=exact,
            correct=correct,
            corrections=corrections,
            group_by=group_by,
            collapse=collapse,
            min_score=min_score,
            cut=cut,
        )
        return ranking.hits(top_k, offset)

    def _compiled(self, query: Any, plume: Plume | None, *, wants_words: bool) -> tuple[Compiled, str]:
        """What a query asks of rows, and the words of what is wanted."""
        inputs = list(inputs_of(query))
        if not inputs:
            return compiled(query, [], self._row_of), ""
        parts, words = [], []
        for number, (part, is_wanted) in enumerate(inputs):
            name = "the query" if len(inputs) == 1 else f"part {number + 1} of the query"
            one, is_single = list_inputs(part)
            if not is_single:
                count = len(one)
                raise InputError(
                    name, f"it is {count} inputs; expected one: a string, an image, a dict of several media"
                )
            if wants_words:  # parsed once, for media may be far away
                limits = None if plume is None else plume.plume_model.processor.limits  # type: ignore[union-attr]
                part = Item.parse(part, name, limits)
                words += [part.text] if is_wanted else []
            parts.append(part)
        return compiled(query, list(self.query_vectors(parts, plume)), self._row_of), " ".join(words)

    def _row_of(self, like: Like) -> tuple[np.ndarray, tuple[str, int]]:
        """The unit vector of a row, and its content.

        Raises:
            ValueError: there is no such row, or its page is not said.
        """
        path, page = (like.of.path, like.of.content[1]) if isinstance(like.of, Hit) else (str(like.of), like.page)
        if isinstance(like.of, Hit) and len(like.of.vector) != self.identity.dim:
            raise ValueError(f"the hit is of another index, whose vectors have {len(like.of.vector)} numbers")
        rows = self.store.rows_at(path) if path.startswith(TABLES) else []
        for place in () if rows else (indexed_path(path), str(Path(path).resolve())):
            rows = rows or self.store.rows_at(place)
        if isinstance(like.of, Hit) and rows and not any(np.array_equal(row["vector"], like.of.vector) for row in rows):
            raise ValueError(f"the hit of {path} is of another index, or its file has changed since")
        if like.start is not None:
            rows = [row for row in rows if row.get("start") is not None and abs(row["start"] - like.start) < _CLOSE]
        pages = sorted({row["page"] for row in rows})
        page = page if page is not None or pages[:1] != [0] else 0  # the whole, where there are clips too
        if page is None and len(pages) > 1:
            raise ValueError(
                f"{path} has {len(pages)} pages or passages; say which one, as Like({path!r}, page=1), or {path}#page=1"
            )
        if not (rows := [row for row in rows if page is None or row["page"] == page]):
            what = path if not page else f"page {page} of {path}"
            raise ValueError(f"{what} is not in the index {self.path}; index it first, or search with it as an input")
        row = true_row(rows)
        vector = np.asarray(row["vector"], dtype=np.float32)
        return vector / np.linalg.norm(vector), (row["sha256"], row["page"])

    def correct(self, queries: Sequence[Any] | np.ndarray, plume: Plume | None = None) -> Corrections:
        """Fit corrections of scores, and keep them beside the index; searches use them where they are told to.

        Args:
            queries: like those that will be searched for, 100 at least: inputs, or their unit vectors `[Q, dim]`.
            plume: the embedder that made the index, for inputs.

        Raises:
            ValueError: too few queries, or rows.
        """
        vectors = queries if isinstance(queries, np.ndarray) else self.query_vectors(queries, plume)
        found = Corrections.fitted(self.store, vectors)
        found.write(self.path)
        return found

    def query_vectors(self, queries: Sequence[Any], plume: Plume | None) -> np.ndarray:
        """Unit vectors of queries, as searches embed them, `[Q, dim]`.

        Raises:
            ValueError: another embedder, or none.
        """
        if plume is None:
            raise ValueError("the query has to be embedded; pass the embedder that made the index")
        self.check_embedder(plume)
        vectors = plume.encode_query(
            list(queries),
            instruction=self.identity.query_instruction,
            num_latent_steps=self.identity.query_latent_steps,
            **pixel_settings(plume.plume_model.processor, self.identity.max_pixels),
        )
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def row(self, number: int) -> Hit | None:
        """The row of a number, without a score; None where there is none any more."""
        found = self.store.numbered([number]).get(number)
        return None if found is None else hit_of(found)


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

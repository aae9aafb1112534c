"""One search: from what a query asks of rows to the hits that are shown, best first.

In order, each where it is asked for: rows by their vectors (nearest, or by how well they meet several clauses), rows
by their words, both in one order, and the cut.

Letters: C clauses, N rows, M rows of the sample, D length of a vector.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from plume.inputs.file_kinds import Kind
from plume.search.corrections import Correct, Corrections
from plume.search.query import Compiled
from plume.search.rows import excerpt_of
from plume.search.store import APPROXIMATE_FROM, TABLES, IndexStorageError, RowStore, checked_condition, quoted
from plume.space.cutoff import LEAST_SAMPLE, before_largest_drop, least_score, relevance
from plume.space.fusion import fuse
from plume.space.logic import standardised

Cut = Literal["auto", "drop"]
"""Where results end: where rows do not stand out of the index any more, or at the largest drop of the first ones."""

#: Candidates of each order of rows; as many for every page of results, whose orders must agree.
_CANDIDATES = 1_200
#: Rows among which the largest drop is looked for.
_DROP_WITHIN = 50
#: Rows that say what cosines are usual.
_SAMPLE, _OF_EACH_KIND = 4_096, 256
#: Rows that are looked at for each result where some are left out for others.
_PER_RESULT = 10
#: Rows nearer to a part of an analogy than this hold the same.
_SAME = 0.999
# Cosines that differ by less are equal.
_ROUNDING = 1e-6
#: How often a search is done again where rows were compacted meanwhile, and have other numbers.
_TRIES = 3
#: What tells rows of one file apart, and whether they are of what is on disk.
_OF_FILES = ("path", "page", "size", "mtime_ns", "kind")


@dataclass(frozen=True)
class Hit:
    """One row that a search found, best first.

    score: cosine to the query, in [-1, 1]; of several parts, to the mean of those that are wanted.
    path: where the file was when it was indexed; see `is_there`. root: the folder that was indexed then.
    excerpt: the beginning of its text; of a file that is there, the place where words that were looked for stand.
    page: of a PDF. start, end: characters of a passage of a text, seconds of a clip of a video.
    changed: when the file was written last, in seconds since 1970.
    content: SHA-256 of the file, and which page, passage or clip of it; 0: the whole.
    row: number of the row, until the index is compacted.
    vector: `[D]`.

    Of stages that the search had, else None:
    parts: cosine to each part of `All`, `Any` and `Not`, in their order.
    logic: how well it meets them together, in standard deviations of the index (`plume.space.logic`).
    corrected: the score by which the means of kinds, or hubs, do not count (`plume.space.corrections`).
    relevance: how far it stands out of the index, in robust standard deviations (`plume.space.cutoff`).
    text_score: how well its words match (BM25, larger is better); None also where they do not at all.
    fused: by what results are ordered, where words were looked for too (`plume.space.fusion`).
    rerank_score: what a reranker said, by which results are ordered then; None also where it could not judge.
    """

    score: float
    path: str
    kind: str
    page: int | None
    num_pages: int | None
    start: float | None
    end: float | None
    excerpt: str
    thumbnail: bytes = field(repr=False)
    root: str = field(repr=False)
    changed: float = field(repr=False)
    content: tuple[str, int] = field(repr=False)
    row: int = field(repr=False, compare=False)
    vector: np.ndarray = field(repr=False, compare=False)
    parts: tuple[float, ...] | None = None
    logic: float | None = None
    corrected: float | None = None
    relevance: float | None = None
    text_score: float | None = None
    fused: float | None = None
    rerank_score: float | None = None

    @property
    def is_there(self) -> bool:
        """Whether a file still is at this path; rows of tables that have none are always there."""
        return self.path.startswith(TABLES) or os.path.isfile(self.path)

    def to_dict(self) -> dict[str, Any]:
        """What is said of a result, for JSON; places in a file and scores of stages where there are any."""
        names = ("score", "text_score", "fused", "path", "kind", "page", "num_pages", "excerpt")
        extras = {
            name: getattr(self, name)
            for name in ("start", "end", "parts", "logic", "corrected", "relevance", "rerank_score")
        }
        return {name: getattr(self, name) for name in names} | {
            name: value for name, value in extras.items() if value is not None
        }


class _RowsMovedError(Exception):
    """Rows have other numbers than a moment ago, or are gone."""


@dataclass(kw_only=True)
class Ranking:
    """Rows of an index in the order of a query; read `hits` first.

    where: a condition in SQL. text: words to look for as well. hybrid: their weight.
    correct, corrections: how scores are corrected, and by what.
    exact: compare with every row of a large index too. group_by: "file" keeps the best row of each.
    collapse: rows whose cosine to a better one is at least this are left out.
    min_score: rows of a smaller cosine are left out.
    """

    store: RowStore
    asked: Compiled
    where: str | None
    text: str
    hybrid: float
    exact: bool
    correct: Correct | None
    corrections: Corrections | None
    group_by: Literal["file"] | None
    collapse: float | None
    min_score: float | None
    cut: Cut | None
    _scan: tuple[np.ndarray, np.ndarray] | None = None

    def __post_init__(self):
        """Refuse what does not go together.

        Raises:
            ValueError: there is no such cut, or it needs one order of scores.
        """
        self.has_words = bool(self.hybrid and self.text.strip())
        if self.min_score is not None and not np.isfinite(self.min_score):
            raise ValueError(f"min_score is {self.min_score}; expected a cosine")
        if self.cut not in (None, "auto", "drop"):
            raise ValueError(f'cut is {self.cut!r}; expected "auto", "drop" or None')
        if self.group_by not in (None, "file"):
            raise ValueError(f'group_by is {self.group_by!r}; expected "file" or None')
        if self.collapse is not None and not 0 < self.collapse <= 1:
            raise ValueError(f"collapse is {self.collapse}; expected a cosine above 0 and at most 1")
        if self.correct is not None and self.asked.joined is not None:
            raise ValueError("correct is for one vector; All, Any and Not compare parts by what is usual for each")
        if self.correct is not None and self.cut == "auto":
            raise ValueError('cut="auto" tells by cosines what stands out; use it without correct')
        if self.cut == "drop" and self.has_words:
            raise ValueError('cut="drop" looks at one order of scores, and words give a second; use cut="auto"')

    def hits(self, top_k: int, offset: int = 0) -> list[Hit]:
        """The best rows that are left, after the first `offset`.

        Raises:
            ValueError: a condition that is not SQL, words in an index that keeps no texts, or a cut in an index that is
                too small for it.
            IndexStorageError: rows are compacted faster than they can be read.
        """
        for left in reversed(range(_TRIES)):
            self._scan = None
            try:
                rows = self._ranked(offset + top_k)[offset : offset + top_k]
                lacking = [row["_rowid"] for row in rows if "vector" not in row]
                whole = self._whole(lacking, with_texts=True)
                return [self._hit(row, row if "vector" in row else whole[row["_rowid"]]) for row in rows]
            except _RowsMovedError:
                if not left:
                    raise IndexStorageError(
                        f"the rows of {self.store.path} move while they are read, since it is compacted; search again"
                    ) from None
        raise AssertionError

    def _ranked(self, count: int) -> list[dict[str, Any]]:
        """Rows in their order, `count` of them where there are so many."""
        wanted = max(count, _DROP_WITHIN) if self.cut == "drop" else count
        limit = _PER_RESULT * wanted if self.group_by is not None or self.collapse is not None else wanted
        if self.has_words or self.correct is not None:  # by ranks, or among so many: the same for every page
            limit = max(wanted, _CANDIDATES)
        rows: dict[int, dict[str, Any]] = {}
        while True:
            more, are_all = self._fused(limit) if self.has_words else self._by_vectors(limit)
            if not (self.has_words or self.correct is not None):  # else a later round only adds to the first
                rows = {}
            for row in more:
                rows.setdefault(row["_rowid"], row)
            best = self._distinct([row for row in rows.values() if self._passes(row)])
            if len(best) >= wanted or are_all:
                return self._cut(best)[:count]
            limit *= 2

    @property
    def _least(self) -> float:
        return max(self.asked.least, -np.inf if self.min_score is None else self.min_score) - _ROUNDING

    @cached_property
    def _bounds(self) -> dict[str, float]:
        """What a row of each kind must reach where the cut is by relevance, and under "" that of the others."""
        kinds, cosines, num_even = self._usual
        values = self._values(cosines)
        of_kinds = {str(kind): values[kinds == kind] for kind in np.unique(kinds)}
        pooled = {"": values[:num_even]}
        large = {kind: some for kind, some in of_kinds.items() if len(some) >= LEAST_SAMPLE} | pooled
        return {kind: least_score(some, len(self.store)) for kind, some in large.items()}

    def _passes(self, row: dict[str, Any]) -> bool:
        """Whether a row is shown where rows are cut by a cosine, or by relevance; those that hold the words are."""
        if row["cosine"] < self._least:
            return False
        if self.cut != "auto" or "_score" in row:
            return True
        return _value(row) >= self._bounds.get(row["kind"], self._bounds[""])

    def _are_below(self, rows: list[dict[str, Any]]) -> bool:
        """Whether no row can pass that is further away than the last of these, which are in the order of cosines."""
        if self.asked.joined is not None or not rows:
            return False
        floor = max(self._least, min(self._bounds.values()) if self.cut == "auto" else -np.inf)
        return rows[-1]["cosine"] < floor

    def _by_vectors(self, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """Rows that are best by their vectors, and whether there are no others that could be shown."""
        is_plain = self.group_by is None and self.collapse is None
        rows = self._candidates(limit, columns=None if is_plain else _OF_FILES)
        true = self._without_avoided(_true_rows(rows))
        ordered = sorted(true, key=lambda row: (-_value(row), row["path"], row["page"]))
        return ordered, len(rows) < limit or (self.correct != "centre" and self._are_below(rows))

    def _candidates(self, limit: int, columns: Sequence[str] | None) -> list[dict[str, Any]]:
        """Rows that are best by their vectors, as many as there are up to a limit."""
        if self.asked.joined is not None:
            return self._meeting(limit)
        if self.correct is not None and self.corrections is not None:
            return self._corrected(max(limit, _CANDIDATES), self.correct, self.corrections)
        rows = self.store.nearest(self.asked.direction, limit, self.where, exact=self.exact, columns=columns)
        return [{**row, "cosine": 1 - row["_distance"]} for row in rows]

    def _meeting(self, limit: int) -> list[dict[str, Any]]:
        """Rows that meet several clauses best."""
        numbers, cosines = self._cosines()
        is_near = cosines[-1] >= self._least
        numbers, cosines = numbers[is_near], cosines[:, is_near]
        if not len(numbers):
            return []
        order = np.argsort(-self._values(cosines), kind="stable")[:limit]
        rows = self._whole([int(number) for number in numbers[order]], columns=_OF_FILES)
        told = self._scored(cosines[:, order])
        return [{**rows[int(number)], **scored} for number, scored in zip(numbers[order], told, strict=True)]

    def _corrected(self, limit: int, how: Correct, corrections: Corrections) -> list[dict[str, Any]]:
        """Rows by corrected scores; less hubs, and in a large index, of those that are nearest (of each kind)."""
        if how == "centre" and (self.exact or len(self.store) < APPROXIMATE_FROM):
            vectors = np.vstack([corrections.compared(self.asked.direction), self.asked.direction])
            numbers, kinds, products = self.store.products(vectors, self.where)
            scores = corrections.centred_by(products[:-1], kinds, self.asked.direction)
            scores[products[-1] < self._least] = -np.inf
            order = np.argsort(-scores, kind="stable")[: min(limit, int((scores > -np.inf).sum()))]
            best = [int(number) for number in numbers[order]]
            found = self._whole(best, columns=_OF_FILES)
            rows = [found[number] for number in best]
            return self._with_corrected(rows)
        vector, rows = corrections.looked_for(how, self.asked.direction), []
        for kind in Kind if how == "centre" else (None,):
            of_kind = [] if kind is None else [f"kind = {quoted(str(kind))}"]
            where = " AND ".join([*of_kind, *([] if self.where is None else [checked_condition(self.where)])]) or None
            rows += self.store.nearest(vector, limit, where, exact=self.exact, columns=_OF_FILES)
        return self._with_corrected(rows)

    def _with_corrected(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not rows:
            return []
        vectors = self._vectors_of([row["_rowid"] for row in rows])
        return [{**row, **scored} for row, scored in zip(rows, self._scored_corrected(rows, vectors), strict=True)]

    def _scored_corrected(self, rows: Sequence[dict[str, Any]], vectors: np.ndarray) -> list[dict[str, Any]]:
        """What is said of rows by their vectors `[N, D]`, where scores are corrected."""
        assert self.correct is not None
        assert self.corrections is not None
        units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        kinds = [row["kind"] for row in rows]
        (scores,) = self.corrections.scores(self.correct, self.asked.direction[None], units, kinds)
        cosines = units @ self.asked.direction
        return [{"cosine": float(one), "corrected": float(score)} for one, score in zip(cosines, scores, strict=True)]

    @property
    def _vectors(self) -> np.ndarray:
        """What rows are compared with: the clauses and, where they are joined, their direction behind them."""
        is_joined = self.asked.joined is not None
        return np.vstack([self.asked.clauses, self.asked.direction]) if is_joined else self.asked.clauses

    def _cosines(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of rows `[N]`, and the cosines of `_vectors` to them.

        In a large index rows are those that are near to one of the vectors.
        """
        if self._scan is not None:
            return self._scan
        vectors = self._vectors
        if self.exact or len(self.store) < APPROXIMATE_FROM:
            numbers, _, cosines = self.store.products(vectors, self.where)
            self._scan = numbers, cosines
            return self._scan
        near: set[int] = set()
        for vector in vectors:
            near |= {row["_rowid"] for row in self.store.nearest(vector, _CANDIDATES, self.where, columns=("page",))}
        numbers = sorted(near)
        self._scan = np.array(numbers, dtype=np.int64), cosines_of(vectors, self._vectors_of(numbers))
        return self._scan

    @cached_property
    def _usual(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Kinds of a sample of rows `[M]`, the cosines of `_vectors` to them, and how many were drawn from all."""
        kinds, rows, num_even = self.store.sample(_SAMPLE, _OF_EACH_KIND)
        return kinds, self._vectors @ rows.T, num_even

    def _values(self, cosines: np.ndarray) -> np.ndarray:
        """By what rows are ordered, from the cosines of `_vectors` to them, `[N]`."""
        if self.asked.joined is None:
            return cosines[0]
        _, usual, num_even = self._usual
        return self.asked.joined(standardised(cosines[:-1], usual[:-1, :num_even]))

    def _scored(self, cosines: np.ndarray) -> list[dict[str, Any]]:
        """What is said of rows by the cosines of `_vectors` to them."""
        if self.asked.joined is None:
            return [{"cosine": float(cosine)} for cosine in cosines[0]]
        return [
            {"cosine": float(cosine), "parts": tuple(map(float, parts)), "logic": float(value)}
            for cosine, parts, value in zip(cosines[-1], cosines[:-1].T, self._values(cosines), strict=True)
        ]

    def _fused(self, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """Rows that are best by their vectors and those that hold words, in one order; and whether these are all."""
        near = self._candidates(limit, columns=_OF_FILES)
        rows = {row["_rowid"]: row for row in near}
        matching = self.store.matching(self.text, limit, self.where, columns=_OF_FILES)
        if new := [row for row in matching if row["_rowid"] not in rows]:
            vectors = self._vectors_of([row["_rowid"] for row in new])
            scored = self._scored(cosines_of(self._vectors, vectors))
            if self.correct is not None:
                scored = self._scored_corrected(new, vectors)
            rows |= {row["_rowid"]: one for row, one in zip(new, scored, strict=True)}
        for row in matching:
            rows[row["_rowid"]] |= row
        true = self._without_avoided(_true_rows(list(rows.values())))
        by_vectors = np.array([_value(row) for row in true])
        by_words = np.array([row.get("_score", np.nan) for row in true])
        fused = fuse([by_vectors, by_words], [1 - self.hybrid, self.hybrid])
        scored = [{**row, "fused": float(score)} for row, score in zip(true, fused, strict=True)]
        ordered = sorted(scored, key=lambda row: (-row["fused"], -_value(row), row["path"], row["page"]))
        are_all_near = len(near) < limit or (self.correct != "centre" and self._are_below(near))
        return ordered, are_all_near and len(matching) < limit

    def _without_avoided(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows that do not hold nearly what a part of an analogy holds."""
        if not len(self.asked.avoided) or not rows:
            return rows
        near = cosines_of(self.asked.avoided, self._vectors_of([row["_rowid"] for row in rows])).max(axis=0)
        return [row for row, cosine in zip(rows, near, strict=True) if cosine <= _SAME]

    def _distinct(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The best row of each file, and of those that are nearly the same, where that is asked for."""
        if self.group_by is not None:
            best: dict[str, dict[str, Any]] = {}
            for row in rows:
                best.setdefault(row["path"], row)
            rows = list(best.values())
        if self.collapse is None or not rows:
            return rows
        units = self._vectors_of([row["_rowid"] for row in rows])
        units = units / np.linalg.norm(units, axis=1, keepdims=True)
        kept, places = np.empty_like(units), []
        for at, unit in enumerate(units):
            if not places or (kept[: len(places)] @ unit).max() < self.collapse - _ROUNDING:
                kept[len(places)] = unit
                places.append(at)
        return [rows[at] for at in places]

    def _cut(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows before the largest drop; or with their relevance, by which they have passed."""
        if self.cut == "drop":
            return rows[: before_largest_drop(np.array([_value(row) for row in rows[:_DROP_WITHIN]]))]
        if self.cut is None or not rows:
            return rows
        kinds, cosines, num_even = self._usual
        values, told = self._values(cosines), []
        for row in rows:
            is_kind = kinds == row["kind"]  # kinds lie apart from each other, however little they match
            usual = values[is_kind] if is_kind.sum() >= LEAST_SAMPLE else values[:num_even]
            told.append({**row, "relevance": float(relevance(np.array([_value(row)]), usual)[0])})
        return told

    def _whole(
        self, numbers: Sequence[int], *, with_texts: bool = False, columns: Sequence[str] | None = None
    ) -> dict[int, dict[str, Any]]:
        found = self.store.numbered(numbers, with_texts=with_texts, columns=columns) if numbers else {}
        if len(found) < len(numbers):
            raise _RowsMovedError
        return found

    def _vectors_of(self, numbers: Sequence[int]) -> np.ndarray:
        """Vectors of rows in their order, `[N, D]`."""
        found = self.store.vectors(numbers) if numbers else {}
        if len(found) < len(numbers):
            raise _RowsMovedError
        return np.stack([found[number] for number in numbers]) if numbers else np.empty((0, self.store.dim), np.float32)

    def _hit(self, row: dict[str, Any], whole: dict[str, Any]) -> Hit:
        """A hit. Its excerpt is where words stand if who asks can open the file, else its beginning."""
        hit = replace(
            hit_of(whole),
            score=row["cosine"],
            parts=row.get("parts"),
            logic=row.get("logic"),
            corrected=row.get("corrected"),
            relevance=row.get("relevance"),
            text_score=row.get("_score"),
            fused=row.get("fused"),
        )
        if hit.text_score is None or not whole["text"] or hit.root.startswith(TABLES) or not hit.is_there:
            return hit
        return replace(hit, excerpt=excerpt_of(whole["text"], self.text))


def cosines_of(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Cosines of unit vectors `[C, D]` to rows of any length `[N, D]`, `[C, N]`."""
    return vectors @ rows.T / np.linalg.norm(rows, axis=1)


def hit_of(row: dict[str, Any]) -> Hit:
    """A row as it is in the index, without a score."""
    is_page = row["kind"] == Kind.PDF and row["page"] > 0
    return Hit(
        score=np.nan,
        path=row["path"],
        kind=row["kind"],
        page=row["page"] if is_page else None,
        num_pages=row["num_pages"] if is_page else None,
        start=row.get("start"),
        end=row.get("end"),
        excerpt=row["excerpt"],
        thumbnail=row["thumbnail"],
        root=row["root"],
        changed=row["mtime_ns"] / 1e9,
        content=(row["sha256"], row["page"]),
        row=row["_rowid"],
        vector=np.asarray(row["vector"], dtype=np.float32),
    )


def _value(row: dict[str, Any]) -> float:
    """By what a row is ordered without words."""
    return row.get("corrected", row.get("logic", row["cosine"]))


def _true_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of each file or page: in an index that is being brought up to date a changed one has two."""
    doubles: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        doubles[row["path"], row["page"]].append(row)
    return list(map(true_row, doubles.values()))


def true_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the rows of one file, the one that its size and time on disk belong to; else the one changed last."""
    if len(rows) == 1:
        return rows[0]
    try:
        stat = os.stat(rows[0]["path"])
        on_disk = stat.st_size, stat.st_mtime_ns
    except OSError:
        on_disk = None
    return max(rows, key=lambda row: ((row["size"], row["mtime_ns"]) == on_disk, row["mtime_ns"]))

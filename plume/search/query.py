"""Queries of several parts: sums, examples, what is like a row, and, or, not.

A part is an input, as for `Plume.encode`, or one of the classes here. `compiled` turns a query into clauses, whose
cosines to rows are compared, and into how these are joined (`plume.space.logic`).

Letters: C clauses, N rows, D length of a vector.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any as Part  # whatever `Item.parse` takes, or a class of this module, one of which is called Any

import numpy as np

from plume.space.arithmetic import cone_around, mix
from plume.space.logic import but_not, every, opposite, some


@dataclass(frozen=True)
class Like:
    """What a row of the index is like; nothing is embedded for it, and rows of the same content are left out.

    of: a hit of a search, or the path of a file that is indexed. page: of a PDF, or which passage or clip; of a video
    without it the whole. start: seconds where a clip begins, instead.
    """

    of: Part
    page: int | None = None
    start: float | None = None


class Mix:
    """A sum of parts as one vector; a part whose weight is below 0 counts against what it is near to.

    Args:
        parts: pairs of weight and part, for example `Mix((1, "a red kite"), (-0.5, "night"))`.
    """

    def __init__(self, *parts: tuple[float, Part]):
        if not parts or not all(isinstance(one, tuple) and len(one) == 2 and _is_weight(one[0]) for one in parts):
            raise ValueError('Mix takes pairs of weight and part, for example Mix((1, "a kite"), (-0.5, "night"))')
        self.weights = [float(weight) for weight, _ in parts]
        self.parts = [part for _, part in parts]


class Analogy(Mix):
    """What is to `c` as `b` is to `a`: the vector of b - a + c, without rows that hold what a, b or c hold.

    Args:
        a, b, c: parts, for example `Analogy("day", "night", photo)`. A toy: without leaving out its parts the answer
            is mostly b or c themselves (arXiv 1606.07736), and nothing trains a model for it.
    """

    def __init__(self, a: Part, b: Part, c: Part):
        super().__init__((-1, a), (1, b), (1, c))


class Examples:
    """What is as near to the mean of some examples as these are to the mean of the others; all else is left out.

    Args:
        parts: two or more.
        share: of the examples that must be as near; below 1 where some may be odd ones.
    """

    def __init__(self, *parts: Part, share: float = 1.0):
        if len(parts) < 2:
            raise ValueError(f"Examples takes at least two examples; received {len(parts)}")
        self.parts, self.share = list(parts), share


def _is_weight(value: Part) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


class _Joined:
    """Parts that are joined by how well rows meet each."""

    def __init__(self, *parts: Part):
        if not parts:
            raise ValueError(f"{type(self).__name__} takes at least one part")
        self.parts = list(parts)


class All(_Joined):
    """And: as good as the part that is met worst. A `Not` among the parts takes from rows that clearly are that."""


class Any(_Joined):
    """Or: as good as the part that is met best."""


class Not(_Joined):
    """Not: what is no match for a part. Words such as "without" in a text do not do that."""

    def __init__(self, part: Part):
        super().__init__(part)


@dataclass(frozen=True)
class Compiled:
    """What a query asks of rows.

    clauses: `[C, D]`, unit vectors. direction: `[D]`, to which `Hit.score` is the cosine.
    joined: from standardised cosines `[C, N]` to `[N]`; None where there is one clause, whose cosine decides.
    contents: SHA-256 and page of rows that are left out. avoided: `[n, D]`; rows that hold nearly that are left out.
    least: rows of a smaller cosine are left out.
    """

    clauses: np.ndarray
    direction: np.ndarray
    joined: Callable[[np.ndarray], np.ndarray] | None = None
    contents: frozenset[tuple[str, int]] = frozenset()
    avoided: np.ndarray = field(default_factory=lambda: np.empty((0, 0), dtype=np.float32))
    least: float = -np.inf

    @classmethod
    def of(cls, vector: np.ndarray) -> Compiled:
        """The query that one unit vector `[D]` is."""
        return cls(vector[None], vector)


def is_composed(query: Part) -> bool:
    """Whether a query is one of the classes here; else it is an input."""
    return isinstance(query, (Like, Mix, Examples, _Joined))


def inputs_of(query: Part, is_wanted: bool = True) -> Iterator[tuple[Part, bool]]:
    """Inputs of a query in their order, and whether what is near to them is wanted."""
    if isinstance(query, Like):
        return
    if not is_composed(query):
        yield query, is_wanted
        return
    weights = query.weights if isinstance(query, Mix) else [1.0] * len(query.parts)
    for part, weight in zip(query.parts, weights, strict=True):
        yield from inputs_of(part, is_wanted != (weight < 0 or isinstance(query, Not)))


RowOf = Callable[[Like], tuple[np.ndarray, tuple[str, int]]]
"""The unit vector of a row, and its SHA-256 and page."""


def compiled(query: Part, embedded: Sequence[np.ndarray], row_of: RowOf) -> Compiled:
    """What a query asks of rows.

    Args:
        query: one of the classes here, or an input.
        embedded: unit vectors of `inputs_of(query)`, `[D]` each.
        row_of: looks up a row.

    Raises:
        ValueError: parts that cancel, too few examples, or parts within a sum that have no vector.
    """
    return _Compiler(iter(embedded), row_of).compiled(query)


class _Compiler:
    def __init__(self, vectors: Iterator[np.ndarray], row_of: RowOf):
        self._vectors, self._row_of = vectors, row_of
        self._clauses: list[np.ndarray] = []
        self._is_wanted: list[bool] = []
        self._contents: set[tuple[str, int]] = set()
        self._avoided: list[np.ndarray] = []
        self._least = -np.inf

    def compiled(self, query: Part) -> Compiled:
        if isinstance(query, _Joined):
            joined = self._joined(query, is_wanted=True)
            signs = np.where(self._is_wanted, 1.0, -1.0) if not any(self._is_wanted) else np.array(self._is_wanted)
            total = signs @ np.stack(self._clauses)
            length = np.linalg.norm(total)
            direction = total / length if length > np.finfo(np.float32).eps else self._clauses[0]
        else:
            joined, direction = None, self._vector(query, is_outermost=True)
            self._clauses.append(direction)
        return Compiled(
            clauses=np.stack(self._clauses),
            direction=direction.astype(np.float32),
            joined=joined,
            contents=frozenset(self._contents),
            avoided=np.stack(self._avoided) if self._avoided else np.empty((0, len(direction)), dtype=np.float32),
            least=self._least,
        )

    def _joined(self, query: Part, is_wanted: bool) -> Callable[[np.ndarray], np.ndarray]:
        """How well rows meet a part, from the standardised cosines of all clauses."""
        if isinstance(query, Not):
            inner = self._joined(query.parts[0], not is_wanted)
            return lambda z: opposite(inner(z))
        if isinstance(query, Any):
            each = [self._joined(part, is_wanted) for part in query.parts]
            return lambda z: some(np.stack([one(z) for one in each]))
        if isinstance(query, All):
            unwanted = [part for part in query.parts if isinstance(part, Not)]
            if len(unwanted) in (0, len(query.parts)):  # not only what is left out: there must be something to find
                each = [self._joined(part, is_wanted) for part in query.parts]
                return lambda z: every(np.stack([one(z) for one in each]))
            signs = [isinstance(part, Not) for part in query.parts]
            inner = [
                self._joined(part.parts[0] if is_not else part, is_wanted != is_not)
                for part, is_not in zip(query.parts, signs, strict=True)
            ]
            return lambda z: _all_but(
                [one(z) for one, is_not in zip(inner, signs, strict=True) if not is_not],
                [one(z) for one, is_not in zip(inner, signs, strict=True) if is_not],
            )
        number = len(self._clauses)
        self._clauses.append(self._vector(query))
        self._is_wanted.append(is_wanted)
        return lambda z: z[number]

    def _vector(self, query: Part, is_outermost: bool = False) -> np.ndarray:
        if isinstance(query, _Joined):
            raise ValueError(
                f"{type(query).__name__} stands within a sum or examples, which are of vectors; put these inside of it"
            )
        if isinstance(query, Like):
            vector, content = self._row_of(query)
            self._contents.add(content)
            return vector
        if isinstance(query, Examples):
            if not is_outermost:
                raise ValueError("Examples have a bound of their own, and stand alone; name the parts in a Mix instead")
            cone = cone_around(np.stack([self._vector(part) for part in query.parts]), query.share)
            self._least = cone.cosine
            return cone.centre
        if isinstance(query, Mix):
            vectors = np.stack([self._vector(part) for part in query.parts])
            if isinstance(query, Analogy):
                self._avoided += list(vectors)
            return mix(vectors, query.weights)
        return next(self._vectors)


def _all_but(wanted: list[np.ndarray], unwanted: list[np.ndarray]) -> np.ndarray:
    z = every(np.stack(wanted))
    for one in unwanted:
        z = but_not(z, one)
    return z


def row_like(text: str) -> Like:
    """A row by the path of its file as results show it, with "#page=3" for a page, "#t=20,30" for a clip behind it.

    Example:
        >>> row_like("/data/bills.pdf#page=3"), row_like("/data/clip.mp4#t=20,30")
        (Like(of='/data/bills.pdf', page=3, start=None), Like(of='/data/clip.mp4', page=None, start=20.0))
    """
    if found := re.fullmatch(r"(.+)#page=(\d+)", text, re.ASCII):
        return Like(found[1], int(found[2]))
    if found := re.fullmatch(r"(.+)#t=([\d.]+)(?:,[\d.]+)?", text, re.ASCII):
        return Like(found[1], start=float(found[2]))
    return Like(text)


def joined_query(
    query: Part,
    *,
    like: str | None = None,
    minus: Sequence[str] | None = None,
    also: Sequence[str] | None = None,
    either: Sequence[str] | None = None,
    none: Sequence[str] | None = None,
) -> Part:
    """A query by what a form asks: (query or others) and all of these and none of those.

    Args:
        query: an input; empty: there is none.
        like: a row that results are like; with an input, both count alike.
        minus: texts to go away from, with half of the weight.
        also: texts that must fit too.
        either: texts that may fit instead.
        none: texts that must not fit.

    Example:
        >>> query = joined_query("a kite", either=["a bird"], none=["night"])
        >>> [(part, is_wanted) for part, is_wanted in inputs_of(query)]
        [('a kite', True), ('a bird', True), ('night', False)]
    """
    rows = [] if like is None else [row_like(like)]
    parts = [*([query] if query else []), *rows]
    whole = parts[0] if len(parts) == 1 and not minus else Mix(*((1, part) for part in parts), *_away(minus))
    if either:
        whole = Any(whole, *either)
    return All(whole, *(also or ()), *map(Not, none or ())) if also or none else whole


def _away(texts: Sequence[str] | None) -> list[tuple[float, str]]:
    return [(-0.5, text) for text in texts or ()]

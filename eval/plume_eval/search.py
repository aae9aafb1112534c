"""What each stage of a search finds and costs, on a made collection whose answers are known.

Things have a vector each. A text, a picture and a page show a thing: its vector with noise, moved by an offset of their
kind (the gap). Some rows lie in the middle of all things (hubs), some are near-copies of others, and each text and page
holds a code of its own beside words that many hold. No model is asked, so that the figures are those of the search
alone: how much a model's own gap and hubs matter must be measured on its index (`plume report`).

Queries by meaning are the thing's vector with other noise, moved as texts are; what is wanted is the thing's picture.
Queries by code hold the code of a text, and a vector of what they mean, which is noise. Queries are of two halves: what
is fitted to one is measured on the other.

Letters: D length of a vector.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plume.search.index import Identity, Index
from plume.search.query import All, Compiled, Not, compiled
from plume.search.ranking import Hit
from plume_eval.metrics import bootstrap

KINDS = ("text", "image", "pdf")
#: Hits among which the answer must be.
K = 10
#: Numbers of a vector of the collection, and of the larger one, where they are those of a model of 2B.
_DIM, _TIMED_DIM = 256, 1_536
_BANK = 2_000
#: Rows of a file of the larger one.
_PAGES = 20
_HUBS, _COPIES = 10, 30
_WORDS = (
    "report",
    "meeting",
    "plan",
    "budget",
    "summer",
    "harbour",
    "letter",
    "notes",
    "draft",
    "list",
    "team",
    "order",
)
#: Lengths, of a thing 1: what all things share, the offset of a kind, the noise of what shows a thing.
_SHARED, _OFFSET, _NOISE = 0.7, 0.8, 1.6
_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Collection:
    """A made index, and queries whose answers are known.

    codes: of each thing. queries: unit vectors by meaning, one for each thing, `[N, D]`.
    """

    index: Index
    codes: list[str]
    queries: np.ndarray


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of unit length, float32."""
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def make_collection(index: Index, num_things: int, seed: int = 0, rows_per_file: int = 1) -> Collection:
    """Fill an empty index: a text, a picture and a page of each thing, hubs, near-copies of pictures.

    Args:
        index: is filled.
        num_things: three rows each.
        seed: of everything.
        rows_per_file: that have one path.
    """
    rng = np.random.default_rng(seed)
    dim = index.identity.dim
    scale = dim**0.5
    things = rng.normal(size=(num_things, dim))
    middle = rng.normal(size=dim)
    things += _SHARED * middle  # all things have something in common, in which hubs lie
    offsets = {kind: _OFFSET * scale * unit(rng.normal(size=dim)) for kind in KINDS}
    codes = [f"INV-{seed:02}{at:06}" for at in range(num_things)]

    def rows() -> Iterator[dict[str, Any]]:
        for kind in KINDS:
            shown = unit(things + _NOISE * rng.normal(size=things.shape) + offsets[kind])
            for at, vector in enumerate(shown):
                words = " ".join(rng.choice(_WORDS, 12))
                text = "" if kind == "image" else f"{words} {codes[at]}"
                yield _row(kind, f"{kind}/{at:06}", vector, text)
            for at, vector in enumerate(unit(_SHARED * middle + offsets[kind] + 0.1 * rng.normal(size=(_HUBS, dim)))):
                yield _row(kind, f"{kind}/hub{at}", vector, "")
            if kind == "image":
                copied = rng.choice(num_things, min(_COPIES, num_things), replace=False)
                near = unit(shown[copied] + 0.003 * rng.normal(size=(len(copied), dim)))
                for at, vector in zip(copied, near, strict=True):
                    yield _row(kind, f"{kind}/copy of {at:06}", vector, "")

    batch: list[dict[str, Any]] = []
    for number, row in enumerate(rows()):
        if rows_per_file > 1:
            row |= {"path": f"table:made/{row['kind']}/{number // rows_per_file}", "page": number % rows_per_file + 1}
        batch.append(row)
        if len(batch) == _ROWS_AT_ONCE:
            index.store.add(batch)
            batch = []
    if batch:
        index.store.add(batch)
    index.store.compact(wipe=True)
    return Collection(index, codes, unit(things + _NOISE * rng.normal(size=things.shape) + offsets["text"]))


def _row(kind: str, name: str, vector: np.ndarray, text: str) -> dict[str, Any]:
    return {
        "root": "table:made",
        "name": name,
        "path": f"table:made/{name}",
        "kind": kind,
        "page": 0,
        "num_pages": 1,
        "sha256": hashlib.sha256(name.encode()).hexdigest(),
        "size": 0,
        "mtime_ns": 0,
        "excerpt": text[:200],
        "text": text,
        "thumbnail": b"",
        "vector": vector,
    }


def measure(collection: Collection, num_queries: int = 150, seed: int = 1) -> dict[str, dict[str, Any]]:
    """recall@10 of each way to search, with bootstrap intervals: for pictures by meaning, and for texts by code.

    The reranker is a made one too: it compares a row with the thing's own text and picture together.
    """
    index, rng = collection.index, np.random.default_rng(seed)
    order = rng.permutation(len(collection.codes))
    fitted, asked = order[: len(order) // 2], order[len(order) // 2 :][:num_queries]
    index.correct(collection.queries[fitted])
    noise = unit(rng.normal(size=(len(asked), index.identity.dim)))
    places = {row["path"]: at for at, row in enumerate(index.store.rows(["path"]))}
    vectors = unit(np.array([row["vector"] for row in index.store.rows(["vector"])]))

    def by_meaning(**settings: Any) -> list[list[Hit]]:
        return [index.nearest(Compiled.of(collection.queries[at]), top_k=K, **settings) for at in asked]

    def by_code(**settings: Any) -> list[list[Hit]]:
        pairs = zip(asked, noise, strict=True)
        return [index.nearest(Compiled.of(one), top_k=K, text=collection.codes[at], **settings) for at, one in pairs]

    def reranked() -> list[list[Hit]]:
        found = []
        for at in asked:
            hits = index.nearest(Compiled.of(collection.queries[at]), top_k=100, correct="centre")
            sharper = unit(vectors[places[f"table:made/text/{at:06}"]] + vectors[places[f"table:made/image/{at:06}"]])
            found.append(sorted(hits, key=lambda hit: -float(hit.vector @ sharper))[:K])
        return found

    ways: dict[str, tuple[Callable[[], list[list[Hit]]], Callable[[], list[list[Hit]]]]] = {
        "vectors alone": (by_meaning, lambda: by_code(hybrid=0.0)),
        "hybrid 0.5": (by_meaning, lambda: by_code(hybrid=0.5)),
        "correct=centre": (lambda: by_meaning(correct="centre"), lambda: by_code(hybrid=0.0, correct="centre")),
        "correct=hubs": (lambda: by_meaning(correct="hubs"), lambda: by_code(hybrid=0.0, correct="hubs")),
        "centre, hybrid 0.5": (
            lambda: by_meaning(correct="centre"),
            lambda: by_code(hybrid=0.5, correct="centre"),
        ),
        "centre, copies left out": (
            lambda: by_meaning(correct="centre", collapse=0.98),
            lambda: by_code(hybrid=0.5, correct="centre", collapse=0.98),
        ),
    }
    found = {}
    for name, (meaning, code) in ways.items():
        found[name] = {
            "pictures by meaning": _recall(meaning(), [f"table:made/image/{at:06}" for at in asked]),
            "texts by code": _recall(code(), [f"table:made/text/{at:06}" for at in asked]),
        }
    found["centre, made reranker"] = {
        "pictures by meaning": _recall(reranked(), [f"table:made/image/{at:06}" for at in asked]),
        "texts by code": None,
    }
    return found


def _recall(hits: Sequence[Sequence[Hit]], wanted: Sequence[str]) -> dict[str, Any]:
    """The share of queries whose answer, or a copy of it, is among the hits."""
    is_found = np.array(
        [
            any(hit.path == path or hit.path.endswith(f"copy of {path.rpartition('/')[2]}") for hit in some)
            for some, path in zip(hits, wanted, strict=True)
        ],
        dtype=float,
    )
    found = bootstrap(is_found)
    return {"recall": found.mean, "interval": [found.low, found.high]}


def latencies(collection: Collection, num_runs: int = 15) -> dict[str, float]:
    """Milliseconds of a search with each stage, medians; stages take turns, so that a noisy machine disturbs all."""
    index, queries = collection.index, collection.queries
    two = lambda at: [queries[at], queries[-1 - at]]  # noqa: E731
    stages: dict[str, Callable[[int], Any]] = {
        "vectors alone": lambda at: index.nearest(Compiled.of(queries[at])),
        "hybrid 0.5": lambda at: index.nearest(Compiled.of(queries[at]), text=collection.codes[at], hybrid=0.5),
        "All of two, Not a third": lambda at: index.nearest(
            compiled(All("a", "b", Not("c")), [*two(at), queries[at // 2]], _no_row)
        ),
        "cut=auto": lambda at: index.nearest(Compiled.of(queries[at]), cut="auto"),
        "correct=centre": lambda at: index.nearest(Compiled.of(queries[at]), correct="centre"),
        "correct=hubs": lambda at: index.nearest(Compiled.of(queries[at]), correct="hubs"),
        "group_by=file": lambda at: index.nearest(Compiled.of(queries[at]), group_by="file"),
        "collapse=0.98": lambda at: index.nearest(Compiled.of(queries[at]), collapse=0.98),
    }
    taken: dict[str, list[float]] = {name: [] for name in stages}
    for at in range(num_runs + 1):
        for name, search in stages.items():
            began = time.perf_counter()
            search(at)
            if at:  # the first search reads what the others find in memory
                taken[name].append(1000 * (time.perf_counter() - began))
    return {name: float(np.median(some)) for name, some in taken.items()}


def _no_row(like: Any) -> Any:
    raise AssertionError


def run_search(num_things: int, num_rows: int) -> dict[str, Any]:
    """Both measurements, in a folder that is gone afterwards.

    Args:
        num_things: of the collection; three rows each.
        num_rows: of the larger one that is timed, about.
    """
    with tempfile.TemporaryDirectory() as place:
        small = make_collection(_empty(Path(place) / "small", _DIM), num_things)
        recall = measure(small)
        large = make_collection(_empty(Path(place) / "large", _TIMED_DIM), num_rows // len(KINDS), rows_per_file=_PAGES)
        large.index.correct(large.queries[:_BANK])
        return {
            "things": num_things,
            "collection_rows": len(small.index),
            "recall": recall,
            "rows": len(large.index),
            "milliseconds": latencies(large),
        }


def _empty(path: Path, dim: int) -> Index:
    """An index that no model made."""
    made = Identity(model="made", fingerprint="made", dim=dim, num_latent_steps=0, query_latent_steps=0)
    return Index.create_as(path, made)


def tables(found: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    from plume_eval.report import markdown_table

    first = next(iter(found["recall"].values()))
    rows = [[name, *(_told(measured[column]) for column in first)] for name, measured in found["recall"].items()]
    plain = found["milliseconds"]["vectors alone"]
    times = [[name, f"{taken:.0f}", f"{taken / plain:.1f}"] for name, taken in found["milliseconds"].items()]
    return (
        f"recall@{K} on the made collection ({found['things']} things, {found['collection_rows']} rows, vectors of "
        f"{_DIM} numbers, bootstrap intervals of 95 %):\n\n{markdown_table(['search', *first], rows)}\n\n"
        f"A search of {found['rows']:,} rows of {_TIMED_DIM:,} numbers, without embedding the query, medians:\n\n"
        f"{markdown_table(['search', 'ms', 'times vectors alone'], times)}"
    )


def _told(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return ""
    low, high = measured["interval"]
    return f"{measured['recall']:.2f} [{low:.2f}, {high:.2f}]"

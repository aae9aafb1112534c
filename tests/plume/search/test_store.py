"""Many rows: approximate search with exact scores, compaction, keys, and rows in the order of a walk."""

from __future__ import annotations

import random
import unicodedata
from datetime import timedelta
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pytest

from plume import Plume
from plume.search import store as storing
from plume.search.folder import Found, walk, walk_key
from plume.search.index import Index
from plume.search.store import RowStore

_DIM = 32


@pytest.fixture(scope="module")
def plume(plume_folder) -> Plume:
    return Plume(plume_folder, device="cpu")


def rows_of(vectors: np.ndarray, start: int = 0) -> list[dict]:
    return [
        {
            "root": "/r",
            "name": f"{number}.txt",
            "path": f"/r/{number}.txt",
            "kind": "text" if number % 10 else "pdf",
            "page": 0,
            "num_pages": 1,
            "sha256": f"{number:064x}",
            "size": 1,
            "mtime_ns": number,
            "excerpt": "",
            "thumbnail": b"",
            "vector": vector,
        }
        for number, vector in enumerate(vectors, start)
    ]


def clusters(count: int, seed: int) -> np.ndarray:
    """Unit vectors around 100 centres, `[count, _DIM]`."""
    rng, centres = np.random.default_rng(seed), np.random.default_rng(0).standard_normal((100, _DIM))
    vectors = centres[rng.integers(100, size=count)] + 0.5 * rng.standard_normal((count, _DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_a_large_index_finds_nearly_what_an_exact_search_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(storing, "APPROXIMATE_FROM", 3_000)
    store = RowStore(tmp_path, _DIM)
    vectors, queries = clusters(6_000, seed=1), clusters(50, seed=2)
    store.add(rows_of(vectors[:2_900]))
    store.compact(wipe=False)
    assert store._indexed_rows() == []  # small enough to be exact

    store.add(rows_of(vectors[2_900:5_000], 2_900))
    store.compact(wipe=False)
    assert store._indexed_rows() == [5_000]
    store.add(rows_of(vectors[5_000:], 5_000))  # not in the index of vectors yet, and found all the same

    for where in (None, "kind = 'pdf'"):
        shared = 0
        for query in queries:
            near = store.nearest(query, 10, where)
            exact = store.nearest(query, 10, where, exact=True)
            cosines = vectors @ query
            allowed = np.arange(6_000) % 10 == 0 if where else np.ones(6_000, bool)
            best = np.argsort(np.where(allowed, -cosines, 2))[:10]
            assert {row["mtime_ns"] for row in exact} == set(best.tolist())
            told = np.array([[1 - row["_distance"], cosines[row["mtime_ns"]]] for row in near])
            assert np.abs(told[:, 0] - told[:, 1]).max() < 1e-5  # scores are exact, whichever rows are found
            shared += len({row["mtime_ns"] for row in near} & set(best.tolist()))
        assert shared >= 0.97 * 500, where

    (own,) = store.nearest(vectors[5_999], 1)
    assert own["mtime_ns"] == 5_999
    store.add(rows_of(clusters(4_500, seed=3), 6_000))
    store.compact(wipe=True)
    assert store._indexed_rows() == [10_500]  # made anew for twice as many
    (own,) = store.nearest(vectors[17], 1)
    assert own["mtime_ns"] == 17


def test_pieces_are_joined_while_rows_come(tmp_path, monkeypatch):
    monkeypatch.setattr(storing, "_COMPACT_FROM", 40)
    store = RowStore(tmp_path, _DIM)
    vectors = clusters(400, seed=1)
    most = 0
    for start in range(0, 400, 4):
        store.add(rows_of(vectors[start : start + 4], start))
        most = max(most, store._table.stats()["fragment_stats"]["num_fragments"])
    assert len(store) == 400
    assert most < 40  # of 100 commits
    assert [row["mtime_ns"] for row in store.nearest(vectors[7], 1)] == [7]


def test_the_key_is_declared_and_older_tables_go_on(tmp_path):
    store = RowStore(tmp_path / "new", _DIM)
    declared = {field.name for field in store._schema if field.metadata}
    assert declared == set(storing._KEYS)
    assert not any(store._schema.field(name).nullable for name in declared)

    older = pa.schema([pa.field(field.name, field.type) for field in store._schema])
    lancedb.connect(str(tmp_path / "old"), read_consistency_interval=timedelta(0)).create_table("items", schema=older)
    old = RowStore(tmp_path / "old", _DIM)
    vectors = clusters(20, seed=1)
    old.add(rows_of(vectors))
    old.touch(Path("/r"), {("3.txt", f"{3:064x}"): (9, 77)})
    assert [row["mtime_ns"] for row in old.nearest(vectors[3], 1)] == [77]
    old.add(rows_of(vectors[:2]))
    assert old.drop_doubled() == 2
    assert sorted(row["name"] for row in old.rows(["name"])) == sorted(f"{number}.txt" for number in range(20))


def test_rows_come_in_the_order_of_a_walk(tmp_path):
    """Whatever names look like: rows of a file that would be passed over would be deleted."""
    rng = random.Random(0)
    parts = ["a", "a b", "a-b", "a.b", "a!", "A", "b", "é", unicodedata.normalize("NFD", "é"), "z\x01", "\U0001f600"]
    parts += ["\uffee", "ä", "10", "9", "a\x02", "~"]
    root = tmp_path / "root"
    names = set()
    for number in range(180):
        *folders, file = rng.choices(parts, k=1 + number % 3)
        names.add("/".join([*(folder + rng.choice(["", "-"]) for folder in folders), f"{file}.txt"]))
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    walked = [found.name for found in walk(root) if isinstance(found, Found)]
    assert set(walked) == names
    assert walked == sorted(walked, key=walk_key)
    store = RowStore(tmp_path / "index", _DIM)
    rows = rows_of(clusters(len(names), seed=1))
    for row, name in zip(rows, names, strict=True):
        row |= {"name": name, "root": str(root)}
    store.add(rows)
    assert [row["name"] for row in store.by_name(root)] == walked


def test_an_update_of_hostile_names_deletes_what_is_gone_alone(plume, tmp_path, monkeypatch):
    from plume.search import update

    monkeypatch.setattr(update, "_FILES_PER_LOOK", 3)
    root = tmp_path / "root"
    names = ["a.txt", "a/b.txt", "a/b/c.txt", "a b.txt", "a-b/x.txt", "é.txt", "z/\U0001f600.txt", "a!.txt"]
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"kite {number}")
    index = Index.create(tmp_path / "index", plume)
    assert index.update(root, plume, show_progress=False).embedded == 8
    again = index.update(root, plume, show_progress=False)
    assert (again.embedded, again.removed, again.unchanged) == (0, 0, 8)
    (root / "a/b.txt").unlink()
    (root / "z/\U0001f600.txt").write_text("a table")
    (root / "a b.txt").rename(root / "b a.txt")
    (root / "c.txt").write_text("kite 0")  # what another file holds
    third = index.update(root, plume, show_progress=False)
    assert (third.embedded, third.reused, third.removed, third.unchanged) == (1, 2, 3, 5)
    left = sorted(row["name"] for row in index.store.rows(["name"]))
    assert left == sorted((set(names) | {"b a.txt", "c.txt"}) - {"a/b.txt", "a b.txt"})

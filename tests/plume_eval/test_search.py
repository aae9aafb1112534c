"""`plume-eval search`: the made collection is as it is said, and each stage does what it is for."""

from __future__ import annotations

import numpy as np
import pytest

from plume_eval import search


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return search.make_collection(search._empty(tmp_path_factory.mktemp("made") / "index", 256), 210)


def test_the_collection_holds_what_it_is_said_to(collection):
    counts = {kind: count for (kind,), count in collection.index.store.counts("kind").items()}
    assert counts == {"text": 220, "pdf": 220, "image": 220 + 30}
    rows = collection.index.store.rows(["path", "text"])
    for code in collection.codes[::20]:
        assert sum(code in row["text"] for row in rows) == 2  # a text and a page


def test_each_stage_does_what_it_is_for(collection):
    found = search.measure(collection, num_queries=14)
    recall = {
        name: {column: one["recall"] for column, one in of.items() if one is not None} for name, of in found.items()
    }
    assert recall["vectors alone"]["texts by code"] < 0.3 < 0.9 < recall["hybrid 0.5"]["texts by code"]
    assert recall["vectors alone"]["pictures by meaning"] + 0.3 < recall["correct=centre"]["pictures by meaning"]
    for of in found.values():
        for one in of.values():
            assert one is None or one["interval"][0] <= one["recall"] <= one["interval"][1]


def test_every_stage_is_timed_and_both_tables_are_written(collection):
    collection.index.correct(collection.queries)
    taken = search.latencies(collection, num_runs=2)
    assert set(taken) >= {"vectors alone", "hybrid 0.5", "cut=auto", "correct=centre", "correct=hubs"}
    assert all(np.isfinite(one) and one > 0 for one in taken.values())
    measured = {"pictures by meaning": {"recall": 0.5, "interval": [0.4, 0.6]}, "texts by code": None}
    found = {
        "things": 120,
        "collection_rows": 420,
        "recall": {"vectors alone": measured},
        "rows": 1,
        "milliseconds": taken,
    }
    text = search.tables(found)
    assert "| vectors alone | 0.50 [0.40, 0.60] |  |" in text
    assert "| vectors alone |" in text.split("medians")[1]

"""Rankings against a sort by hand, metrics against their formulas written out."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from plume_eval.mmeb.ranking import measure, rank


def vectors_with_ties(count: int, seed: int) -> torch.Tensor:
    """Vectors of few different numbers, many of them alike."""
    return torch.randint(-1, 2, (count, 4), generator=torch.Generator().manual_seed(seed)).float()


def graded(num_queries: int, num_candidates: int, seed: int) -> list[dict[int, int]]:
    rng = random.Random(seed)
    return [
        {place: rng.randint(1, 4) for place in rng.sample(range(num_candidates), rng.randint(1, 5))}
        for _ in range(num_queries)
    ]


def by_hand(scores, labels, pool, count):
    """Better scores first; among equals the lower grade, then the earlier in the pool."""
    order = sorted(range(len(pool)), key=lambda place: (-scores[pool[place]], labels.get(pool[place], 0), place))
    return [pool[place] for place in order[:count]]


@pytest.mark.parametrize("block", [1, 100, 10**6])
def test_a_global_pool_is_ranked_as_a_full_sort_does(block):
    queries, candidates, labels = vectors_with_ties(200, 0), vectors_with_ties(50, 1), graded(200, 50, 2)
    ranking = rank(queries, candidates, labels, num_kept=10, block=block)
    scores = (queries @ candidates.T).numpy()
    for row in range(200):
        assert ranking.candidates[row].tolist() == by_hand(scores[row], labels[row], range(50), 10)
        best = max(scores[row][label] for label in labels[row])
        assert ranking.is_tied[row] == any(scores[row][c] == best for c in range(50) if c not in labels[row])
    np.testing.assert_array_equal(ranking.scores, np.take_along_axis(scores, ranking.candidates, 1))


def test_local_pools_are_ranked_each_for_itself():
    queries, candidates, rng = vectors_with_ties(100, 0), vectors_with_ties(40, 1), random.Random(2)
    pools = [rng.sample(range(40), rng.randint(1, 20)) for _ in range(100)]
    labels = [{pool[0]: 1} for pool in pools]
    ranking = rank(queries, candidates, labels, pools, num_kept=10)
    scores = (queries @ candidates.T).numpy()
    for row, pool in enumerate(pools):
        expected = by_hand(scores[row], labels[row], pool, 10)
        assert ranking.candidates[row].tolist() == expected + [-1] * (10 - len(expected))


@pytest.mark.parametrize("count", [2, 3, 10, 1000])
def test_equal_vectors_get_equal_scores_wherever_they_stand(count):
    """A sum of 1536 products in float32 differs in its last bits from column to column."""
    for seed in range(5):
        vector = torch.nn.functional.normalize(
            torch.randn(1, 1536, generator=torch.Generator().manual_seed(seed)), dim=1
        )
        same = vector.expand(count, -1).contiguous()
        whole = rank(same[:2], same, [{0: 1}, {count - 1: 1}])
        local = rank(same[:1], same, [{0: 1}], [list(range(count))])
        assert whole.is_tied.all()
        assert local.is_tied.all()
        assert whole.candidates[0, 0] == local.candidates[0, 0] == 1


def test_a_model_that_gives_every_input_one_vector_scores_nothing():
    same, pools = torch.ones(3, 2), [[0, 1, 2], [2, 1, 0], [1, 0, 2]]
    ranking = rank(same, same, [{pool[0]: 1} for pool in pools], pools)
    metrics = measure(ranking.candidates, [{pool[0]: 1} for pool in pools])
    assert metrics["hit@1"].sum() == 0
    assert ranking.is_tied.all()
    assert rank(same, same, [{0: 1}] * 3).candidates[:, 2].tolist() == [0, 0, 0]


def gain(grades, k, kind):
    values = [grade if kind == "linear" else 2**grade - 1 for grade in grades[:k]]
    return sum(value / math.log2(place + 2) for place, value in enumerate(values))


def test_metrics_equal_their_formulas_on_random_rankings_with_ties():
    queries, candidates, labels = vectors_with_ties(1000, 3), vectors_with_ties(60, 4), graded(1000, 60, 5)
    ranking = rank(queries, candidates, labels)
    metrics = measure(ranking.candidates, labels)
    assert set(metrics) == {
        *(f"{name}@{k}" for name in ("hit", "recall", "ndcg_linear", "ndcg_exponential") for k in (1, 5, 10)),
        "mrr@10",
    }
    scores = (queries @ candidates.T).numpy()
    for row, wanted in enumerate(labels):
        order = by_hand(scores[row], wanted, range(60), 10)
        grades = [wanted.get(candidate, 0) for candidate in order]
        ideal = sorted(wanted.values(), reverse=True)
        for k in (1, 5, 10):
            found = sum(grade > 0 for grade in grades[:k])
            assert metrics[f"hit@{k}"][row] == (found > 0)
            assert metrics[f"recall@{k}"][row] == pytest.approx(found / len(wanted))
            for kind in ("linear", "exponential"):
                expected = gain(grades, k, kind) / gain(ideal, k, kind)
                assert metrics[f"ndcg_{kind}@{k}"][row] == pytest.approx(expected, abs=1e-6)
        first = next((place + 1 for place, grade in enumerate(grades) if grade), math.inf)
        assert metrics["mrr@10"][row] == pytest.approx(1 / first)


def test_graded_metrics_do_not_depend_on_the_hash_seed():
    script = """
import numpy as np
from plume_eval.mmeb.ranking import measure
labels = [{7: 1, 3: 3, 11: 2}, {2: 4, 9: 1}]
found = measure(np.array([[3, 0, 7, 1, 11], [9, 2, 0, 1, 3]]), labels)
print({name: values.tolist() for name, values in found.items()})
"""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    printed = {process.communicate()[0] for process in started}
    assert all(process.returncode == 0 for process in started)
    assert len(printed) == 1


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"labels": [{0: 1}, {}]}, "query 1 has no label"),
        ({"labels": [{0: 0}, {1: 1}]}, "query 0 has a label of grade 0"),
        ({"pools": [[1, 2], [1]]}, "query 0 has a label that its pool does not hold"),
        ({"queries": torch.tensor([[1.0, 0], [torch.nan, 0]])}, "the vector of query 1 is not finite"),
    ],
)
def test_what_cannot_be_ranked_is_refused(changed, expected):
    given = {"queries": torch.eye(2), "candidates": torch.ones(3, 2), "labels": [{0: 1}, {1: 1}], **changed}
    with pytest.raises(ValueError, match=expected):
        rank(given["queries"], given["candidates"], given["labels"], given.get("pools"))

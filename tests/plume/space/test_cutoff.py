"""Where results end: noise is told from matches, whatever the index and the query."""

from __future__ import annotations

import numpy as np
import pytest

from plume.space.cutoff import before_largest_drop, least_relevance, relevance


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("num_rows", [300, 3_000, 30_000])
@pytest.mark.parametrize("shift", [0.0, 1.5], ids=["centred", "in a narrow cone"])
def test_queries_of_noise_find_nothing_and_true_pairs_are_found(num_rows, shift):
    rng = np.random.default_rng(num_rows)
    rows = unit(rng.normal(size=(num_rows, 64)) + shift)
    sample, bound, queries = rows[:: max(num_rows // 4096, 1)], least_relevance(num_rows), 200
    noise = unit(rng.normal(size=(queries, 64)) + shift)
    empty = [not (relevance(rows @ query, sample @ query) >= bound).any() for query in noise]
    assert np.mean(empty) >= 0.93
    matches = rng.integers(0, num_rows, queries)
    pairs = unit(rows[matches] + 0.05 * rng.normal(size=(queries, 64)))
    kept = [relevance(rows[[at]] @ query, sample @ query)[0] >= bound for at, query in zip(matches, pairs, strict=True)]
    assert np.mean(kept) >= 0.95


def test_relevance_is_in_robust_deviations_and_outliers_do_not_move_it():
    rng = np.random.default_rng(0)
    sample = rng.normal(0.2, 0.05, 4000)
    found = relevance(np.array([0.2, 0.4]), sample)
    np.testing.assert_allclose(found, [0, 4], atol=0.2)
    np.testing.assert_allclose(relevance(np.array([0.2, 0.4]), np.append(sample, np.full(200, 0.95))), found, atol=0.4)
    mostly_equal = np.append(np.full(4500, 0.2), rng.normal(0.2, 0.05, 500))  # their deviation counts instead
    assert relevance(np.array([0.4]), mostly_equal)[0] == pytest.approx(0.2 / mostly_equal.std(), rel=1e-3)
    np.testing.assert_allclose(relevance(3 * np.array([0.2, 0.4]) - 1, 3 * sample - 1), found)
    assert np.isfinite(relevance(np.array([0.5]), np.full(100, 0.5))).all()
    with pytest.raises(ValueError, match="cannot be told from 31 rows"):
        relevance(np.zeros(1), np.zeros(31))


def test_the_bound_grows_with_the_index():
    bounds = [least_relevance(rows) for rows in (1, 100, 10_000, 10_000_000)]
    assert bounds == sorted(bounds)
    assert bounds[0] == 3
    assert np.isfinite(bounds[-1])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([0.9, 0.8, 0.3, 0.2], 2), ([0.9, 0.1], 1), ([0.5], 1), ([], 0), ([0.4, 0.4, 0.4], 3), ([0.9, 0.7, 0.5], 1)],
)
def test_results_end_before_the_largest_drop(scores, expected):
    assert before_largest_drop(np.array(scores)) == expected

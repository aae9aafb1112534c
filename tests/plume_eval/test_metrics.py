"""Metrics against hand counts."""

from __future__ import annotations

import numpy as np
import pytest

from plume_eval.metrics import bootstrap, mean_reciprocal_rank, ranks, recall_at_1

SCORES = [[0.9, 0.1, 0.2], [0.3, 0.2, 0.1], [0.1, 0.3, 0.3]]


def test_ranks_count_ties_against_the_label():
    assert ranks(SCORES, [0, 1, 2]).tolist() == [1, 2, 2]


def test_scores_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match="gave NaN"):
        ranks([[np.nan, 0.1]], [0])


def test_recall_and_reciprocal_rank_are_means_over_queries():
    rank = np.array([1, 2, 4])
    assert recall_at_1(rank).mean == pytest.approx(1 / 3)
    assert mean_reciprocal_rank(rank).mean == pytest.approx((1 + 1 / 2 + 1 / 4) / 3)


def test_the_interval_covers_a_known_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        estimate = bootstrap(rng.random(100) < 0.7, num_resamples=400, seed=trial)
        covered += estimate.low <= 0.7 <= estimate.high
    assert 0.9 <= covered / 200 <= 0.985
    assert bootstrap([1, 1, 1]).low == 1


def test_no_query_is_an_error_and_no_zero():
    with pytest.raises(ValueError, match="no query"):
        bootstrap([])

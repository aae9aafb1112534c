"""Orders of the same rows as one, against the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plume.space.fusion import fuse


def by_definition(scores, weights, k):
    """A dictionary per list, filled rank by rank."""
    fused = dict.fromkeys(range(len(scores[0])), 0.0)
    for one, weight in zip(scores, weights, strict=True):
        listed = [row for row in range(len(one)) if not math.isnan(one[row])]
        for row in listed:
            rank = 1 + sum(one[other] > one[row] for other in listed)
            fused[row] += weight / (k + rank)
    return [fused[row] for row in range(len(scores[0]))]


@pytest.mark.parametrize("seed", range(20))
def test_ranks_are_fused_as_defined(seed):
    rng = np.random.default_rng(seed)
    scores = [rng.integers(0, 8, 30).astype(np.float64) for _ in range(3)]
    for one in scores:
        one[rng.random(30) < 0.3] = np.nan
    weights, k = rng.random(3), int(rng.integers(1, 100))
    np.testing.assert_allclose(fuse(scores, weights, k), by_definition(scores, weights, k), rtol=1e-14)


def test_only_the_order_of_a_list_counts():
    scores = np.array([0.3, 0.9, -0.2, np.nan])
    np.testing.assert_array_equal(fuse([scores], [1.0]), fuse([np.exp(5 * scores)], [1.0]))


def test_a_list_that_tells_nothing_apart_changes_no_order():
    scores = np.array([0.3, 0.9, -0.2, 0.5])
    fused = fuse([scores, np.full(4, 7.0)], [0.2, 0.8])
    np.testing.assert_array_equal(np.argsort(-fused), np.argsort(-scores))


def test_weights_choose_between_lists():
    one, other = np.array([3.0, 2.0, 1.0]), np.array([1.0, 2.0, 3.0])
    assert fuse([one, other], [0.9, 0.1]).argmax() == 0
    assert fuse([one, other], [0.1, 0.9]).argmax() == 2
    np.testing.assert_array_equal(fuse([one, other], [1.0, 0.0]), fuse([one], [1.0]))


def test_nothing_is_fused_to_nothing_and_lists_must_agree():
    assert fuse([], []).shape == (0,)
    assert fuse([np.empty(0), np.empty(0)], [1, 1]).shape == (0,)
    with pytest.raises(ValueError, match="2 weights and lists of 3 scores"):
        fuse([np.ones(3)], [1, 2])
    with pytest.raises(ValueError, match="lists of 3, 2 scores"):
        fuse([np.ones(3), np.ones(2)], [1, 2])

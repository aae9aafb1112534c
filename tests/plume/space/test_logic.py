"""The laws of and, or, not, on how far rows belong to clauses."""

from __future__ import annotations

import numpy as np
import pytest

from plume.space.logic import THRESHOLD, but_not, every, membership, opposite, some, standardised

Z = np.random.default_rng(0).normal(1, 3, size=(3, 200))


@pytest.mark.parametrize("join", [every, some])
def test_and_and_or_know_no_order_no_brackets_and_no_repetition(join):
    a, b, c = Z
    np.testing.assert_array_equal(join(np.stack([a, b])), join(np.stack([b, a])))
    np.testing.assert_array_equal(
        join(np.stack([join(np.stack([a, b])), c])), join(np.stack([a, join(np.stack([b, c]))]))
    )
    np.testing.assert_array_equal(join(np.stack([a, a])), a)


def test_de_morgan_and_double_negation():
    a, b, _ = Z
    left = membership(opposite(every(np.stack([a, b]))))
    right = membership(some(np.stack([opposite(a), opposite(b)])))
    np.testing.assert_allclose(left, right, atol=1e-12)
    np.testing.assert_allclose(membership(opposite(opposite(a))), membership(a), atol=1e-12)
    np.testing.assert_allclose(membership(opposite(a)), 1 - membership(a), atol=1e-12)


def test_what_is_not_wanted_takes_from_rows_that_clearly_are_that_alone():
    z, unwanted = Z[0], Z[1]
    found, is_that = but_not(z, unwanted), unwanted > THRESHOLD
    np.testing.assert_array_equal(found[~is_that], z[~is_that])
    np.testing.assert_allclose(found[is_that], (z - unwanted + THRESHOLD)[is_that])
    assert 0 < is_that.sum() < len(z)


def test_standardised_cosines_know_no_scale_and_no_shift():
    rng = np.random.default_rng(1)
    scores, sample = rng.normal(size=(2, 50)), rng.normal(size=(2, 400))
    found = standardised(scores, sample)
    middle = np.median(sample, axis=1, keepdims=True)
    np.testing.assert_allclose(found, (scores - middle) / (middle - np.quantile(sample, [0.1587], axis=1).T))
    np.testing.assert_allclose(standardised(scores, rng.normal(3, 2, (2, 200_000))), (scores - 3) / 2, atol=0.05)
    np.testing.assert_allclose(standardised(3 * scores + 5, 3 * sample + 5), found)
    assert np.isfinite(standardised(scores, np.full((2, 9), 0.3))).all()


@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.35])
def test_what_many_rows_are_is_still_told_from_the_others(share):
    """By mean and deviation none of a quarter of all rows would be above the threshold, however clear it is."""
    rng = np.random.default_rng(2)
    is_that = rng.uniform(size=4000) < share
    scores = rng.normal(0.1, 0.05, 4000) + 0.4 * is_that
    z = standardised(scores[None], scores[None])[0]
    assert (z[is_that] > THRESHOLD).mean() > 0.99
    assert (z[~is_that] > THRESHOLD).mean() < 0.05

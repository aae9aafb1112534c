"""Sums of vectors and cones around examples, against float64 and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from plume.space.arithmetic import Cone, cone_around, mix


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_a_mix_is_the_unit_vector_of_the_weighted_sum():
    rng = np.random.default_rng(0)
    vectors, weights = unit(rng.normal(size=(4, 33))), [1.0, 0.5, -0.7, 0.0]
    expected = sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))
    np.testing.assert_allclose(mix(vectors, weights), expected / np.linalg.norm(expected), atol=1e-6)
    np.testing.assert_allclose(mix(vectors, np.multiply(weights, 1e-9)), mix(vectors, weights), atol=1e-6)


def test_the_order_of_parts_and_a_weight_of_0_change_nothing():
    vectors = unit(np.random.default_rng(1).normal(size=(3, 8)))
    np.testing.assert_allclose(mix(vectors[::-1], [3, 2, 1]), mix(vectors, [1, 2, 3]), atol=1e-7)
    np.testing.assert_allclose(mix(vectors, [1, 0, 0]), vectors[0], atol=1e-6)


@pytest.mark.parametrize(
    ("vectors", "weights"), [([[1, 0], [-1, 0]], [1, 1]), ([[1, 0], [1, 0]], [1, -0.96]), ([[1, 0]], [0.0])]
)
def test_parts_that_cancel_are_refused(vectors, weights):
    with pytest.raises(ValueError, match="the parts cancel"):
        mix(np.array(vectors, dtype=float), weights)


def test_another_number_of_weights_is_refused():
    with pytest.raises(ValueError, match="1 weights for 2 vectors"):
        mix(np.eye(2), [1.0])


def test_a_cone_leaves_each_example_out_of_its_own_centre():
    examples = unit(np.random.default_rng(2).normal(size=(6, 12)) + 1)
    cone = cone_around(examples)
    cosines = [unit(np.delete(examples, at, axis=0).sum(axis=0)) @ example for at, example in enumerate(examples)]
    assert cone.cosine == pytest.approx(min(cosines))
    np.testing.assert_allclose(cone.centre, unit(examples.sum(axis=0)), atol=1e-6)
    half = cone_around(examples, share=0.5)
    assert cone.cosine < half.cosine <= np.median(cosines)


def test_a_cone_holds_others_of_the_same_kind():
    """Twenty made kinds, five examples of each: what a cone by its own cosines would hold is nearly nothing."""
    rng = np.random.default_rng(3)
    inside, within_own, outside = [], [], []
    for _ in range(20):
        kind = unit(rng.normal(size=64))
        rows = unit(kind + 0.12 * rng.normal(size=(105, 64)))
        cone = cone_around(rows[:5])
        own = Cone(cone.centre, float((rows[:5] @ cone.centre).min()))
        inside.append(cone.contains(rows[5:]).mean())
        within_own.append(own.contains(rows[5:]).mean())
        outside.append(cone.contains(unit(rng.normal(size=(500, 64)))).mean())
    assert np.mean(inside) > 0.7
    assert np.mean(within_own) < 0.2
    assert max(outside) < 0.02


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(1, 1.0, "at least two"), (3, 0.0, "share"), (3, 1.2, "share")]
)
def test_what_makes_no_cone_is_refused(count, share, expected):
    with pytest.raises(ValueError, match=expected):
        cone_around(np.eye(4)[:count], share)

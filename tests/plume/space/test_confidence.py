"""Measures of confidence, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from plume.space.confidence import area_under_risk, certainty, chain_of_embedding, margin, risks


@pytest.mark.parametrize(("steps", "angle"), [(2, 0.3), (5, 0.2), (8, 0.35)])
def test_an_arc_of_equal_steps_has_a_closed_form(steps, angle):
    at = angle * np.arange(steps + 1)
    states = np.stack([np.cos(at), np.sin(at), np.zeros_like(at)], axis=1)
    length = np.sin(angle / 2) / np.sin(steps * angle / 2)
    real, complex_ = chain_of_embedding(states)
    assert real == pytest.approx(length - 1 / steps)
    assert complex_ == pytest.approx(length)  # equal terms: the mean is any of them


def test_scale_and_rotation_change_nothing_and_no_way_has_no_shape():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(6, 16))
    turn = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    np.testing.assert_allclose(chain_of_embedding(7 * states @ turn), chain_of_embedding(states))
    states[-1] = states[0]
    assert np.isnan(chain_of_embedding(states)).all()
    with pytest.raises(ValueError, match="a chain of 2 states"):
        chain_of_embedding(states[:2])


def test_risks_by_hand_and_for_perfect_and_random_confidence():
    rng = np.random.default_rng(1)
    is_right = rng.uniform(size=4000) < 0.7
    error = 1 - is_right.mean()
    area, excess = area_under_risk(is_right.astype(float) + 1e-6 * rng.uniform(size=4000), is_right)
    assert excess == pytest.approx(0, abs=1e-9)
    assert area == pytest.approx(error + (1 - error) * np.log(1 - error), abs=2e-3)
    area, excess = area_under_risk(rng.uniform(size=4000), is_right)
    assert area == pytest.approx(error, abs=0.03)
    assert area_under_risk(np.zeros(4000), is_right)[0] == pytest.approx(error)  # equals have no order to profit from
    confidence, right = rng.permutation(50), rng.uniform(size=50) < 0.5
    order = np.argsort(-confidence)
    by_hand = np.cumsum(~right[order]) / np.arange(1, 51)
    np.testing.assert_allclose(risks(confidence, right), by_hand)


def test_margin_and_certainty_by_hand():
    scores = np.array([[0.1, 0.9, 0.7], [0.2, 0.2, 0.2]])
    np.testing.assert_allclose(margin(scores), [0.2, 0])
    chances = np.exp(scores / 0.1) / np.exp(scores / 0.1).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(certainty(scores, 0.1), (chances * np.log(chances)).sum(axis=1))
    np.testing.assert_allclose(certainty(np.hstack([scores, scores - 9]), 0.1, 3), certainty(scores, 0.1))

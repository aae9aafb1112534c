"""Gaps, spread and hubs, against brute force and made spaces whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from plume.space.corrections import centred, hub_bias, less_hubs
from plume.space.measures import centroid_distance, hit_counts, mixing, separability, skewness, uniformity


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def gap():
    """Texts and images of the same things, each kind around a mean of its own, far apart."""
    rng = np.random.default_rng(0)
    things = rng.normal(size=(400, 64))
    offset = 8 * unit(rng.normal(size=64))
    texts = unit(things + 0.3 * rng.normal(size=things.shape) + offset)
    images = unit(things + 0.3 * rng.normal(size=things.shape) - offset)
    return texts, images


def test_a_gap_is_seen_and_a_cloud_has_none(gap):
    texts, images = gap
    assert centroid_distance(texts, images) > 0.8
    assert separability(texts, images) > 0.99
    assert centroid_distance(texts[::2], texts[1::2]) < 0.15
    assert separability(texts[::2], texts[1::2]) < 0.7
    few = np.concatenate([texts[:200], images[:20]])
    assert separability(few[:200], few[200:]) > 0.95  # the larger kind does not win by its numbers


def test_centring_brings_a_query_to_its_image_across_the_gap(gap):
    """The corpus holds half texts of other things; a query is a text, whose image is wanted."""
    texts, images = gap
    queries, corpus = texts[:100], np.concatenate([texts[200:], images[:200]])
    means = np.concatenate([np.tile(texts[200:].mean(0), (200, 1)), np.tile(images[:200].mean(0), (200, 1))])
    wanted = 200 + np.arange(100)
    plain = corpus @ queries.T
    recall = np.mean([(plain[:, at] > plain[want, at]).sum() < 10 for at, want in enumerate(wanted)])
    corrected = centred(queries, corpus, texts[100:200].mean(0), means).T
    after = np.mean([(corrected[:, at] > corrected[want, at]).sum() < 10 for at, want in enumerate(wanted)])
    assert recall < 0.1
    assert after > 0.95


def test_centring_by_hand_and_without_means_is_the_cosine(gap):
    texts, images = gap
    m, n = texts.mean(0), images.mean(0)
    expected = [unit(texts[0] - m) @ unit(image - n) for image in images]
    np.testing.assert_allclose(centred(texts[:1], images, m, n)[0], expected, atol=1e-6)
    np.testing.assert_allclose(centred(texts[:1], images, 0 * m, 0 * n)[0], images @ texts[0], atol=1e-6)
    # identity 1: without renormalising, one number for each kind
    np.testing.assert_allclose((images - n) @ (texts[0] - m), images @ (texts[0] - m) - n @ (texts[0] - m), atol=1e-6)
    # identity 2: the length of what is left, from one product for each row
    lengths = np.sqrt(1 - 2 * images @ n + n @ n)
    np.testing.assert_allclose(np.linalg.norm(images - n, axis=1), lengths, atol=1e-6)


@pytest.fixture(scope="module")
def hubs():
    """Things with a query each, and twenty rows that lie in the middle of everything."""
    rng = np.random.default_rng(1)
    middle = unit(rng.normal(size=48))
    things = unit(rng.normal(size=(600, 48)) + 4 * middle)
    rows = np.concatenate([things, unit(middle + 0.02 * rng.normal(size=(20, 48)))])
    queries, bank = (unit(things + 0.09 * rng.normal(size=things.shape)) for _ in range(2))
    return queries, unit(bank + 0.1 * rng.normal(size=bank.shape)), rows


def test_hubs_lose_their_place_and_true_rows_do_not(hubs):
    queries, bank, rows = hubs
    plain = queries @ rows.T
    bias = hub_bias(rows, bank)
    corrected = np.stack([less_hubs(one, bias) for one in plain])
    before, after = (
        np.bincount(np.argpartition(-s, 9, 1)[:, :10].ravel(), minlength=len(rows)) for s in (plain, corrected)
    )
    assert skewness(before) > 3
    assert skewness(after) < skewness(before) / 2
    own = np.arange(600)
    assert (corrected.argmax(1) == own).mean() >= (plain.argmax(1) == own).mean()
    np.testing.assert_array_equal(before, hit_counts(queries, rows))


def test_the_bias_is_the_mean_of_the_nearest_and_shifts_scores_alone(hubs):
    _, bank, rows = hubs
    expected = np.sort(rows @ bank.T, axis=1)[:, -7:].mean(axis=1)
    np.testing.assert_allclose(hub_bias(rows, bank, 7), expected, atol=1e-6)
    own = rows @ rows.T
    np.fill_diagonal(own, -1)
    np.testing.assert_allclose(hub_bias(rows, rows, 5)[:600], np.sort(own, axis=1)[:600, -5:].mean(axis=1), atol=1e-3)
    scores = rows @ bank[0]
    np.testing.assert_array_equal(less_hubs(scores, expected, 0.0), scores)
    np.testing.assert_allclose(less_hubs(scores, expected + 1) + 0.75, less_hubs(scores, expected))
    # the bias as one more number of the vectors, as an index for inner products would hold it
    longer, query = np.column_stack([rows, expected]), np.append(bank[0], -0.75)
    np.testing.assert_allclose(longer @ query, less_hubs(scores, expected), atol=1e-6)


def test_counts_skewness_mixing_and_uniformity_by_hand():
    rng = np.random.default_rng(2)
    rows, queries = unit(rng.normal(size=(50, 8))), unit(rng.normal(size=(5000, 8)))
    counts = hit_counts(queries, rows, 3)
    by_hand = np.zeros(50, dtype=int)
    for query in queries:
        by_hand[np.argsort(-rows @ query)[:3]] += 1
    np.testing.assert_array_equal(counts, by_hand)
    assert hit_counts(queries, rows[:2], 10).tolist() == [5000, 5000]
    assert skewness(np.ones(9)) == 0
    assert mixing(np.array([3, 1, 0, 0]), ["a", "a", "b", "b"]) == {"a": 2.0, "b": 0.0}
    pairs = [np.exp(-2 * ((a - b) ** 2).sum()) for at, a in enumerate(rows) for b in rows[:at]]
    assert uniformity(rows) == pytest.approx(np.log(np.mean(pairs)))

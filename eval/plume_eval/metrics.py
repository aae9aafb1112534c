"""Retrieval metrics. Arrays only, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


def ranks(scores: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Rank of the label of each query, counted from 1.

    A candidate with the same score counts as ranked before the label, so that a model which gives every input the
    same vector gets the worst rank, not the best.

    Args:
        scores: similarity of each query to each candidate, `[Q, N]`.
        labels: index of the right candidate, `[Q]`.

    Example:
        >>> ranks([[0.1, 0.9, 0.3], [0.5, 0.5, 0.5]], [2, 0]).tolist()
        [2, 3]
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if not np.isfinite(scores).all():
        raise ValueError("some similarities are not finite; the model gave NaN for some input")
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    return (scores >= own).sum(axis=1)


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: ArrayLike, num_resamples: int = 2000, seed: int = 0) -> Estimate:
    """Mean of per-query values and its percentile bootstrap interval.

    Args:
        values: one number per query, `[Q]`.
        num_resamples: drawn with replacement.
        seed: of the resampling.

    Raises:
        ValueError: no values.
    """
    values = np.asarray(values, dtype=float)
    if values.size == 0:
        raise ValueError("no query to take the mean of; expected at least one")
    drawn = np.random.default_rng(seed).integers(0, values.size, (num_resamples, values.size))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


def recall_at_1(rank: np.ndarray) -> Estimate:
    """Share of the queries whose label is first, with its interval."""
    return bootstrap(rank == 1)


def mean_reciprocal_rank(rank: np.ndarray) -> Estimate:
    """Mean of 1 / rank, with its interval."""
    return bootstrap(1 / rank)

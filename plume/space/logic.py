"""And, or, not over how well rows meet clauses.

Cosines to different clauses do not compare: those to a picture are others than those to a sentence, and some rows are
near to everything. So each clause's cosines are standardised by those of a sample of all rows,

    z = (s - m) / d              m: median of the sample; d: from there down to the 16 % below
    p = 1 / (1 + exp(t - z))     how far a row belongs to the clause, t = 2

and clauses are joined as in Goedel's fuzzy logic, by which none can make up for another:

    and: min    or: max    not: 1 - p, that is 2 t - z
    but not: z - max(0, z_unwanted - t)

On a normal sample m and d are mean and standard deviation. Where a quarter of all rows meets a clause these would leave
none of them above t; what lies below the median does not know of those.

The last one takes from rows that clearly are what is not wanted, and leaves the order of all others.

Letters: C clauses, N rows, M rows of the sample.
"""

from __future__ import annotations

import numpy as np

#: t: standard deviations from which on a row belongs to a clause rather than not.
THRESHOLD = 2.0
# Share of a normal distribution that is more than a deviation below its middle.
_BELOW = 0.1587
# Cosines that differ by less are the same.
_LEAST_DEVIATION = 1e-6


def standardised(scores: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Scores in deviations from the middle of a sample.

    Args:
        scores: `[C, N]`.
        sample: of the same clauses, `[C, M]`, M at least 1.

    Returns:
        `[C, N]`.

    Example:
        >>> standardised(np.array([[0.5, 0.66]]), np.linspace(0, 1, 101)[None]).round(2).tolist()
        [[0.0, 0.47]]
    """
    middle, below = usual(sample)
    return (scores - middle) / below


def usual(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The median of each row of `[C, M]`, and its distance to the quantile that is one deviation below, `[C, 1]` each.

    Where half of a sample is equal, that is its standard deviation.
    """
    middle = np.median(sample, axis=1, keepdims=True)
    below = middle - np.quantile(sample, _BELOW, axis=1, keepdims=True)
    below = np.where(below > _LEAST_DEVIATION, below, sample.std(axis=1, keepdims=True))
    return middle, np.maximum(below, _LEAST_DEVIATION)


def membership(z: np.ndarray) -> np.ndarray:
    """How far rows belong, from 0 to 1.

    Example:
        >>> membership(np.array([THRESHOLD, -50.0, 50.0])).round(3).tolist()
        [0.5, 0.0, 1.0]
    """
    return 1 / (1 + np.exp(THRESHOLD - z))


def every(z: np.ndarray) -> np.ndarray:
    """And: `[C, N]` to `[N]`."""
    return z.min(axis=0)


def some(z: np.ndarray) -> np.ndarray:
    """Or: `[C, N]` to `[N]`."""
    return z.max(axis=0)


def opposite(z: np.ndarray) -> np.ndarray:
    """Not: who belongs does not, and the other way round.

    Example:
        >>> z = np.array([3.0])
        >>> membership(opposite(z)) + membership(z)
        array([1.])
    """
    return 2 * THRESHOLD - z


def but_not(z: np.ndarray, unwanted: np.ndarray) -> np.ndarray:
    """What is wanted, less what clearly belongs to something that is not.

    Example:
        >>> but_not(np.array([4.0, 4.0]), np.array([1.0, 5.0])).tolist()
        [4.0, 1.0]
    """
    return z - np.maximum(0, unwanted - THRESHOLD)

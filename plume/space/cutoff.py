"""Where the results that mean something end.

A cosine means another thing in each query: 0.4 may be a match for one and noise for the next. What tells is how far a
row stands out of the others,

    relevance = (s - m) / d

with the middle and the deviation of a sample of all rows (`plume.space.logic.usual`), most of which have nothing to do
with the query. Of N rows the best of noise stands out the further the larger N is; the bound is where a normal
distribution would have `FALSE_ROWS` of N rows, and 3 at least.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from plume.space.logic import usual

#: Rows of noise above the bound, on average over queries.
FALSE_ROWS = 0.05
#: Rows that a sample needs to say what is usual.
LEAST_SAMPLE = 32
_LEAST_BOUND = 3.0


def relevance(scores: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """How far scores stand out of a sample.

    Args:
        scores: `[N]`.
        sample: scores of rows of all kinds for the same query, `[M]`.

    Raises:
        ValueError: the sample is too small.

    Example:
        >>> sample = np.linspace(-1, 1, 101)
        >>> relevance(np.array([0.0, 1.3652]), sample).round(2).tolist()
        [0.0, 2.0]
    """
    if len(sample) < LEAST_SAMPLE:
        raise ValueError(f"what is usual cannot be told from {len(sample)} rows; expected at least {LEAST_SAMPLE}")
    middle, below = usual(sample[None])
    return (scores - middle[0]) / below[0]


def least_score(sample: np.ndarray, num_rows: int) -> float:
    """The score whose relevance is `least_relevance`.

    Raises:
        ValueError: the sample is too small.
    """
    spread = relevance(np.array([0.0, 1.0]), sample)
    return float((least_relevance(num_rows) - spread[0]) / (spread[1] - spread[0]))


def least_relevance(num_rows: int) -> float:
    """What a row of so many must reach.

    Example:
        >>> [round(least_relevance(rows), 2) for rows in (10, 1_000, 1_000_000)]
        [3.0, 3.89, 5.33]
    """
    return max(_LEAST_BOUND, NormalDist().inv_cdf(1 - FALSE_ROWS / max(num_rows, 1)))


def before_largest_drop(scores: np.ndarray) -> int:
    """How many of the first scores stand before the largest drop; all of them where there is none.

    Args:
        scores: falling, `[N]`.

    Example:
        >>> before_largest_drop(np.array([0.82, 0.80, 0.79, 0.41, 0.40])), before_largest_drop(np.array([0.5, 0.5]))
        (3, 2)
    """
    drops = -np.diff(scores)
    return int(drops.argmax()) + 1 if len(drops) and drops.max() > 0 else len(scores)

"""Several orders of the same rows as one, by reciprocal ranks.

Source: Cormack, Clarke and Buettcher, "Reciprocal rank fusion outperforms Condorcet and individual rank learning
methods" (SIGIR 2009), with weights, and with ranks that rows of equal score share.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def fuse(scores: Sequence[np.ndarray], weights: Sequence[float], k: int = 60) -> np.ndarray:
    """The sum of `weight / (k + rank)` over lists, `[N]`, larger is better.

    Scores of different lists need not compare, since only their order counts. Rows of equal score share a rank, so that
    a list in which all are equal changes no order.

    Args:
        scores: of each list, `[N]`, larger is better; NaN: the row is not in the list, which adds nothing to it.
        weights: of the lists.
        k: how little the first ranks stand out.

    Raises:
        ValueError: lists of different lengths, or another number of weights.

    Example:
        >>> int(fuse([np.array([0.9, 0.8, 0.1]), np.array([np.nan, np.nan, 4.0])], [0.5, 0.5]).argmax())
        2
    """
    if len(scores) != len(weights) or len({len(one) for one in scores}) > 1:
        lengths = ", ".join(str(len(one)) for one in scores)
        raise ValueError(
            f"there are {len(weights)} weights and lists of {lengths} scores; expected lists of one length"
        )
    fused = np.zeros(len(scores[0]) if scores else 0)
    for one, weight in zip(scores, weights, strict=True):
        is_listed = ~np.isnan(one)
        listed = np.asarray(one)[is_listed]
        rank = 1 + len(listed) - np.searchsorted(np.sort(listed), listed, side="right")
        fused[is_listed] += weight / (k + rank)
    return fused

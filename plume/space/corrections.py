"""Scores corrected for what has nothing to do with a query: the kind of a row, and that it is near to everything.

    centred:  unit(q - m_q) . unit(x - m_kind)       means of queries, and of the rows of each kind
    less hubs: q . x - a mean of the k largest b . x  over a bank of other queries b

Sources: Li et al., "Closing the Modality Gap for Mixed Modality Search" (arXiv 2507.19054), with its three means;
nearest neighbour normalisation, Chowdhury et al. (arXiv 2410.24114), with its k = 128 and a = 0.75. Vectors stay as
they are.

Letters: Q queries, N rows, B vectors of the bank, D length of a vector.
"""

from __future__ import annotations

import numpy as np

#: k and a of nearest neighbour normalisation.
NEAREST, WEIGHT = 128, 0.75
# A vector of a bank that is nearer to a row than this is the row itself.
_SAME = 0.9999
_TINY = 1e-12
# Rows whose products with the bank are held at once.
_AT_ONCE = 4_096


def centred(queries: np.ndarray, rows: np.ndarray, query_mean: np.ndarray, row_means: np.ndarray) -> np.ndarray:
    """Cosines after the mean of queries and those of the rows' kinds are taken away, `[Q, N]`.

    Args:
        queries: `[Q, D]`.
        rows: `[N, D]`.
        query_mean: `[D]`.
        row_means: of the kind of each row, `[N, D]`; or one for all, `[D]`.

    Example:
        >>> centred(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]), np.zeros(2), np.array([-1.0, 1.0])).tolist()
        [[1.0]]
    """
    own, others = queries - query_mean, rows - row_means
    own = own / np.maximum(np.linalg.norm(own, axis=1, keepdims=True), _TINY)
    return own @ (others / np.maximum(np.linalg.norm(others, axis=1, keepdims=True), _TINY)).T


def hub_bias(rows: np.ndarray, bank: np.ndarray, nearest: int = NEAREST) -> np.ndarray:
    """How near rows are to what is nearest to them of a bank, `[N]`; large for rows that come up for everything.

    Args:
        rows: `[N, D]`.
        bank: `[B, D]`, queries, or rows; a row that is in it does not count for itself.
        nearest: k, of all of the bank where that has fewer.

    Example:
        >>> hub_bias(np.array([[1.0, 0.0]]), np.array([[0.6, 0.8], [0.8, -0.6], [0.0, 1.0], [1.0, 0.0]]), 2).round(2)
        array([0.7])
    """
    k, found = min(nearest, len(bank)), np.empty(len(rows), dtype=rows.dtype)
    for start in range(0, len(rows), _AT_ONCE):
        cosines = rows[start : start + _AT_ONCE] @ bank.T
        cosines = np.where(cosines > _SAME, -np.inf, cosines)
        best = np.partition(cosines, len(bank) - k, axis=1)[:, len(bank) - k :]
        is_there = np.isfinite(best)
        found[start : start + _AT_ONCE] = np.where(is_there, best, 0).sum(axis=1) / np.maximum(is_there.sum(axis=1), 1)
    return found


def less_hubs(scores: np.ndarray, bias: np.ndarray, weight: float = WEIGHT) -> np.ndarray:
    """Scores `[..., N]` less a share of the rows' bias `[N]`; a weight of 0 changes nothing."""
    return scores - weight * bias

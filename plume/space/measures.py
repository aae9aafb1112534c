"""How vectors of several kinds lie in one space: gaps between kinds, and rows that come up for everything.

Gap: distance of the kinds' means (Liang et al., arXiv 2203.02053) and how well a plane tells them apart. Alone neither
is harm; what a user notices is `mixing`. Spread: uniformity (Wang and Isola, arXiv 2005.10242). Hubs: how often each
row is among the nearest k of a query, and how skewed that is (Radovanovic et al., JMLR 11, 2010).

Letters: N rows, Q queries, D length of a vector. Rows are of unit length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Rows whose products are held at once.
_AT_ONCE = 2_048


def centroid_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The distance of two means; 0 to 2.

    Example:
        >>> round(centroid_distance(np.array([[1.0, 0.0]]), np.array([[0.6, 0.8]])), 3)
        0.894
    """
    return float(np.linalg.norm(a.mean(axis=0) - b.mean(axis=0)))


def separability(a: np.ndarray, b: np.ndarray) -> float:
    """How often a logistic regression that has seen four fifths tells the kinds of the others apart; 0.5: not at all.

    Both count alike, whatever their numbers.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    classifier = LogisticRegression(class_weight="balanced", max_iter=500)
    kinds = np.repeat([0, 1], [len(a), len(b)])
    return float(cross_val_score(classifier, np.concatenate([a, b]), kinds, cv=5, scoring="balanced_accuracy").mean())


def uniformity(rows: np.ndarray) -> float:
    """The logarithm of the mean of exp(-2 d^2) over all pairs; lower: more spread out.

    Example:
        >>> round(uniformity(np.array([[1.0, 0.0], [-1.0, 0.0]])), 3)
        -8.0
    """
    cosines = (rows @ rows.T)[np.triu_indices(len(rows), 1)]
    return float(np.log(np.mean(np.exp(-2 * (2 - 2 * cosines)))))


def hit_counts(queries: np.ndarray, rows: np.ndarray, k: int = 10) -> np.ndarray:
    """In how many queries' nearest k each row is, `[N]`.

    Example:
        >>> hit_counts(np.array([[1.0, 0.0], [0.8, 0.6]]), np.array([[1.0, 0.1], [0.0, 1.0]]), k=1).tolist()
        [2, 0]
    """
    k, counts = min(k, len(rows)), np.zeros(len(rows), dtype=np.int64)
    for start in range(0, len(queries), _AT_ONCE):
        scores = queries[start : start + _AT_ONCE] @ rows.T
        counts += np.bincount(np.argpartition(-scores, k - 1, axis=1)[:, :k].ravel(), minlength=len(rows))
    return counts


def skewness(counts: np.ndarray) -> float:
    """The third moment over the third power of the deviation; above about 1.4 there are hubs.

    Example:
        >>> skewness(np.array([1, 2, 3])), round(skewness(np.array([0, 0, 0, 8])), 2)
        (0.0, 1.15)
    """
    centred = counts - counts.mean()
    deviation = centred.std()
    return float((centred**3).mean() / deviation**3) if deviation else 0.0


def mixing(counts: np.ndarray, kinds: Sequence[str]) -> dict[str, float]:
    """For each kind its share of what was found, over its share of rows; 0: it never comes up, 1: as often as others.

    Args:
        counts: how often each row was found, `[N]`, as of `hit_counts`.
        kinds: of each row.

    Example:
        >>> mixing(np.array([2, 0]), ["text", "image"])
        {'image': 0.0, 'text': 2.0}
    """
    labels = np.asarray(kinds)
    return {
        str(kind): float(counts[labels == kind].sum() / max(counts.sum(), 1) / (labels == kind).mean())
        for kind in np.unique(labels)
    }

"""Sums of vectors as vectors, and the cone around examples.

    mix(v, w) = unit(sum_i w_i v_i)                  several vectors as one, of which some may count against it
    cone(v) = {x : x . c >= cos a},  c = unit(mean_i v_i)

Sums of word vectors go back to Mikolov et al. (arXiv 1301.3781). A cone is what remains of the boxes of Query2Box
(arXiv 2002.05969) where nothing has been trained for them: what is near to the mean of examples.

Letters: n vectors, D length of a vector. Rows are of unit length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Sums shorter than this have no direction to speak of: what was added has cancelled.
LEAST_NORM = 0.05


def mix(vectors: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The unit vector of a weighted sum.

    Args:
        vectors: `[n, D]`.
        weights: `[n]`; below 0 for what is not wanted.

    Returns:
        `[D]`, float32.

    Raises:
        ValueError: another number of weights, or vectors that cancel.

    Example:
        >>> mix(np.eye(3), [1.0, 1.0, 0.0]).round(3).tolist()
        [0.7070000171661377, 0.7070000171661377, 0.0]
    """
    if len(vectors) != len(weights):
        raise ValueError(f"there are {len(weights)} weights for {len(vectors)} vectors; expected one for each")
    total = np.asarray(weights, dtype=np.float64) @ np.asarray(vectors, dtype=np.float64)
    norm, scale = np.linalg.norm(total), np.abs(weights).max(initial=0.0)
    if not norm >= LEAST_NORM * scale or not scale:
        raise ValueError(
            f"the parts cancel: their sum has a length of {norm:.3f}, and no direction; change the weights"
        )
    return (total / norm).astype(np.float32)


@dataclass(frozen=True)
class Cone:
    """All vectors whose cosine to a centre is large enough.

    centre: `[D]`. cosine: the smallest that is inside.
    """

    centre: np.ndarray
    cosine: float

    def contains(self, vectors: np.ndarray) -> np.ndarray:
        """Whether each of `[N, D]` is inside, `[N]`."""
        return vectors @ self.centre >= self.cosine


def cone_around(examples: np.ndarray, share: float = 1.0) -> Cone:
    """The cone that this share of the examples would be in if each had been left out of the centre.

    An example pulls the centre to itself, the more so the fewer there are, so that a cone that holds all of them by
    their cosines to a centre of theirs would hold nearly nothing else.

    Args:
        examples: `[n, D]`, two at least.
        share: of the examples that are inside, above 0 and at most 1.

    Raises:
        ValueError: fewer than two examples, or no such share.

    Example:
        >>> cone = cone_around(np.array([[1.0, 0.0], [0.8, 0.6]]))
        >>> round(cone.cosine, 3), cone.contains(np.array([[0.9, 0.43], [0.0, 1.0]])).tolist()
        (0.8, [True, False])
    """
    if len(examples) < 2:
        raise ValueError(f"a cone needs at least two examples; received {len(examples)}")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; expected a number above 0 and at most 1")
    total = examples.sum(axis=0, dtype=np.float64)
    others = total - examples
    norms = np.linalg.norm(others, axis=1)
    cosines = np.einsum("nd,nd->n", others, examples) / np.maximum(norms, np.finfo(np.float64).tiny)
    return Cone(mix(examples, [1.0] * len(examples)), float(np.quantile(cosines, 1 - share, method="lower")))

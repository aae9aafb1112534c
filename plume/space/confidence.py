"""How sure a search may be of its first result, and how good a measure of that is.

From scores alone: how far the first stands before the second, how flat the first ten are. From the latent steps:
Chain-of-Embedding (arXiv 2410.13640), which asks how far and how crooked the states h_0 .. h_K go,

    m_k = |h_(k+1) - h_k| / |h_K - h_0|      a_k = angle(h_(k+1), h_k) / angle(h_K, h_0)
    CoE-R = mean m - mean a                   CoE-C = sqrt((mean m cos a)^2 + (mean m sin a)^2)

Its evidence is of the layers of language models that answer in text; whether it holds for the steps of an embedder is
for `plume-eval confidence` to say. A measure is judged by risk and coverage (arXiv 1805.08206): the mean error of the
surest, for every share of them.

Letters: Q queries, N results, K latent steps, D hidden size.
"""

from __future__ import annotations

import numpy as np

_TINY = 1e-12


def margin(scores: np.ndarray) -> np.ndarray:
    """The best score less the second, `[Q, N]` to `[Q]`.

    Example:
        >>> margin(np.array([[0.2, 0.9, 0.5]])).tolist()
        [0.4]
    """
    two = np.partition(scores, -2, axis=1)[:, -2:]
    return two[:, 1] - two[:, 0]


def certainty(scores: np.ndarray, temperature: float = 0.02, num_best: int = 10) -> np.ndarray:
    """Minus the entropy of the softmax over the best scores, `[Q, N]` to `[Q]`; 0 where one is all there is.

    Example:
        >>> certainty(np.array([[0.5, 0.5], [0.9, 0.1]])).round(3).tolist()
        [-0.693, -0.0]
    """
    best = -np.sort(-scores, axis=1)[:, :num_best] / temperature
    logs = best - np.logaddexp.reduce(best, axis=1, keepdims=True)
    return (np.exp(logs) * logs).sum(axis=1)


def chain_of_embedding(states: np.ndarray) -> tuple[float, float]:
    """CoE-R and CoE-C of the states of one input, `[K + 1, D]`, K at least 2; larger: more likely right.

    NaN where the last state is the first, or points the same way: no share of nothing can be taken.

    Example:
        >>> quarter = np.array([[1.0, 0.0], [0.5**0.5, 0.5**0.5], [0.0, 1.0]])
        >>> [round(one, 3) for one in chain_of_embedding(quarter)]
        [0.041, 0.541]

    Raises:
        ValueError: fewer than three states.
    """
    if len(states) < 3:
        raise ValueError(f"a chain of {len(states)} states has no shape; expected at least 3, of two latent steps")
    states = np.asarray(states, dtype=np.float64)
    whole_length, whole_angle = np.linalg.norm(states[-1] - states[0]), _angles(states[:1], states[-1:])[0]
    if whole_length < _TINY or whole_angle < _TINY:
        return np.nan, np.nan
    lengths = np.linalg.norm(np.diff(states, axis=0), axis=1) / whole_length
    angles = _angles(states[:-1], states[1:]) / whole_angle
    complex_mean = (lengths * np.exp(1j * angles)).mean()
    return float(lengths.mean() - angles.mean()), float(np.abs(complex_mean))


def _angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    cosines = (a * b).sum(axis=1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), _TINY)
    return np.arccos(np.clip(cosines, -1, 1))


def risks(confidence: np.ndarray, is_right: np.ndarray) -> np.ndarray:
    """The mean error of the surest n, for n from 1 to Q, `[Q]`; equals count as one, in their mean.

    Example:
        >>> risks(np.array([0.9, 0.1, 0.5]), np.array([True, False, True])).round(3).tolist()
        [0.0, 0.0, 0.333]
    """
    values, groups = np.unique(-np.asarray(confidence, dtype=np.float64), return_inverse=True)
    counts = np.bincount(groups, minlength=len(values))
    errors = np.bincount(groups, weights=~np.asarray(is_right, dtype=bool), minlength=len(values)) / counts
    return np.cumsum(np.repeat(errors, counts)) / np.arange(1, len(groups) + 1)


def area_under_risk(confidence: np.ndarray, is_right: np.ndarray) -> tuple[float, float]:
    """The mean of `risks` (AURC), and how much of it a perfect order would not have (E-AURC); both 0 at best.

    Example:
        >>> area_under_risk(np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, True, False, False]))[1]
        0.0
    """
    is_right = np.asarray(is_right, dtype=bool)
    area = float(risks(confidence, is_right).mean())
    errors = np.sort(~is_right)  # of a perfect order
    return area, area - float((np.cumsum(errors) / np.arange(1, len(errors) + 1)).mean())

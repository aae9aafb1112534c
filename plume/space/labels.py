"""Labels without training: an input gets the label whose vector is nearest.

    w_c = unit(mean_t v_ct)            the vector of label c, over sentences about it or examples of it
    p_c = softmax_c(x . w_c / T)       its probability for an input x, where exactly one label is right
    p_c = sigmoid((x . w_c - b) / T)   the same where any number of labels may be right

as in CLIP (arXiv 2103.00020, section 3.1.4), open_clip and SigLIP (arXiv 2303.15343). T and b are fitted to labelled
inputs by the largest likelihood (arXiv 1706.04599).

Letters: N inputs, C labels, t sentences or examples, D length of a vector, T temperature, b bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Template = str | Callable[[str], str]
"""A sentence with a place for the name of a label, or a function that writes it."""

#: Where a template has the name of a label.
SLOT = "{}"
#: Of equal numbers of inputs, over which the calibration error is a mean.
_BINS = 15
_TINY = 1e-12
# The logarithm of the temperature over the spread of similarities.
_LOG_BOUNDS = (-np.log(100), np.log(1_000))


@dataclass(frozen=True)
class Calibration:
    """From similarities to probabilities.

    temperature: similarities are divided by it. bias: is taken from them before, and each label is judged on its own;
    None: exactly one label is right.
    quality: of labelled inputs that had no part in the fit: "accuracy", and "nll" and "error" (`calibration_error`),
    with the same at the temperature and bias before it, "nll_before" and "error_before"; None: nothing was fitted.
    """

    temperature: float = 0.02
    bias: float | None = None
    quality: dict[str, float] | None = None

    def __post_init__(self):
        """Refuse a temperature that nothing can be divided by.

        Raises:
            ValueError: it is not above 0.
        """
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0; received {self.temperature}")


def label_vectors(vectors: np.ndarray) -> np.ndarray:
    """The unit vector of each label's mean.

    Args:
        vectors: unit vectors `[C, t, D]`.

    Example:
        >>> label_vectors(np.array([[[1.0, 0.0], [0.0, 1.0]]])).round(3).tolist()
        [[0.707, 0.707]]
    """
    means = vectors.mean(axis=1)
    return means / np.maximum(np.linalg.norm(means, axis=-1, keepdims=True), _TINY)


def probabilities(scores: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Probabilities of labels by similarities, both `[N, C]`; rows sum to 1 unless there is a bias.

    Example:
        >>> probabilities(np.array([[0.5, 0.5]]), Calibration()).tolist()
        [[0.5, 0.5]]
        >>> probabilities(np.array([[0.5, 0.4]]), Calibration(0.1, bias=0.5)).round(3)
        array([[0.5  , 0.269]], dtype=float32)
    """
    return np.exp(_log_probabilities(np.asarray(scores, dtype=np.float64), calibration)).astype(np.float32)


def _log_probabilities(scores: np.ndarray, calibration: Calibration) -> np.ndarray:
    if calibration.bias is not None:
        return -np.logaddexp(0, -(scores - calibration.bias) / calibration.temperature)
    logits = scores / calibration.temperature
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def calibrate(scores: np.ndarray, answers: np.ndarray) -> Calibration:
    """The temperature, and where answers say so the bias, that make the right labels the likeliest.

    Quality is measured by halves, each with its share of every label: what is fitted to one is measured on the other.
    Where labels are never wrong nothing bounds how sure one may be; the temperature stays above a hundredth of how far
    similarities spread.

    Args:
        scores: similarities `[N, C]`.
        answers: the right label of each input, `[N]`, integers; or whether each label is right, `[N, C]`, booleans.

    Raises:
        ValueError: other shapes, fewer than four inputs, or labels that are right for all inputs or for none.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> scores = rng.uniform(0.2, 0.6, (2000, 5))
        >>> drawn = (scores / 0.05 + rng.gumbel(size=scores.shape)).argmax(axis=1)
        >>> round(calibrate(scores, drawn).temperature, 2)
        0.05
    """
    scores, answers = np.asarray(scores, dtype=np.float64), np.asarray(answers)
    is_each = answers.dtype == bool
    if scores.ndim != 2 or answers.shape != (scores.shape if is_each else scores.shape[:1]):
        raise ValueError(
            f"scores are {list(scores.shape)} and answers {list(answers.shape)}; expected [N, C] and integers [N] "
            "or booleans [N, C]"
        )
    if len(scores) < 4:
        raise ValueError(f"{len(scores)} labelled inputs say nothing about probabilities; give some 200")
    if is_each and (answers.all() or not answers.any()):
        raise ValueError("every label is right for every input, or none is; give inputs of both kinds")
    before = Calibration(bias=float(scores.mean()) if is_each else None)
    measured = []
    halves = _halves(answers)
    for fitted_to, others in (halves, halves[::-1]):
        fitted = _fit(scores[fitted_to], answers[fitted_to])
        now, then = (_quality(scores[others], answers[others], one) for one in (fitted, before))
        measured.append({**now, "nll_before": then["nll"], "error_before": then["error"]})
    quality = {name: float(np.mean([one[name] for one in measured])) for name in measured[0]}
    whole = _fit(scores, answers)
    return Calibration(whole.temperature, whole.bias, quality)


def _halves(answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of the inputs, drawn so that each has about half of those with the same answer."""
    drawn = np.random.default_rng(0).permutation(len(answers))
    _, groups = np.unique(answers[drawn], axis=0, return_inverse=True)
    order = drawn[np.argsort(groups.ravel(), kind="stable")]
    return order[::2], order[1::2]


def _fit(scores: np.ndarray, answers: np.ndarray) -> Calibration:
    from scipy.optimize import minimize  # type: ignore[import-untyped]

    is_each = answers.dtype == bool
    middle, spread = float(scores.mean()), max(float(scores.std()), _TINY)
    # The logarithm of T and b are looked for in units of the spread, in which both are of the order of 1.
    start = np.array([0.0, 0.0]) if is_each else np.array([0.0])

    def of(found: np.ndarray) -> Calibration:
        temperature = spread * float(np.exp(np.clip(found[0], *_LOG_BOUNDS)))
        return Calibration(temperature, middle + spread * float(found[1]) if is_each else None)

    best = minimize(
        lambda found: _nll(scores, answers, of(found)), start, method="Nelder-Mead", options={"xatol": 1e-4}
    )
    return of(best.x)


def _nll(scores: np.ndarray, answers: np.ndarray, calibration: Calibration) -> float:
    """The mean of minus the logarithm of what the truth is given."""
    if answers.dtype != bool:
        return -float(_log_probabilities(scores, calibration)[np.arange(len(scores)), answers].mean())
    assert calibration.bias is not None
    logits = (scores - calibration.bias) / calibration.temperature
    return float(np.logaddexp(0, np.where(answers, -logits, logits)).mean())


def _quality(scores: np.ndarray, answers: np.ndarray, calibration: Calibration) -> dict[str, float]:
    chances = np.exp(_log_probabilities(scores, calibration))
    if answers.dtype == bool:
        sure, is_right = chances.ravel(), answers.ravel()
        accuracy = float(((chances > 0.5) == answers).mean())
    else:
        sure, is_right = chances.max(axis=1), chances.argmax(axis=1) == answers
        accuracy = float(is_right.mean())
    return {"accuracy": accuracy, "nll": _nll(scores, answers, calibration), "error": calibration_error(sure, is_right)}


def calibration_error(sure: np.ndarray, is_right: np.ndarray) -> float:
    """How far probabilities are from how often they come true, on average over bins of equal numbers (ECE).

    Args:
        sure: probabilities `[n]`.
        is_right: whether each came true, `[n]`.

    Example:
        >>> calibration_error(np.array([0.8] * 10), np.array([True] * 8 + [False] * 2)) < 1e-9
        True
    """
    values, groups = np.unique(np.asarray(sure, dtype=np.float64), return_inverse=True)
    counts = np.bincount(groups)
    right = np.bincount(groups, weights=np.asarray(is_right, dtype=np.float64)) / counts
    sure, is_right = np.repeat(values, counts), np.repeat(right, counts)  # equals count alike, in whatever order
    bins = [one for one in np.array_split(np.arange(len(sure)), _BINS) if len(one)]
    return float(sum(len(one) * abs(sure[one].mean() - is_right[one].mean()) for one in bins) / len(sure))


def sentence(template: Template, label: str) -> str:
    """A sentence about a label.

    Example:
        >>> sentence("a photo of a {}.", "kite"), sentence(lambda label: f"the {label}", "kite")
        ('a photo of a kite.', 'the kite')
    """
    return template(label) if callable(template) else template.replace(SLOT, label)


def check_templates(templates: Sequence[Template]) -> None:
    """Refuse templates without exactly one place for the name of a label.

    Raises:
        ValueError: there are none, or one has no such place.
    """
    if isinstance(templates, str) or not templates:
        raise ValueError(f"templates must be a list of sentences; received {templates!r:.80}")
    for template in templates:
        if not callable(template) and template.count(SLOT) != 1:
            raise ValueError(f'a template must hold "{SLOT}" once, for the name of the label; received {template!r}')

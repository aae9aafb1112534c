"""What inputs are, by labels or by examples, without training; the formulas are in `plume.space.labels`.

Letters: N inputs, C labels, t sentences or examples, D length of a vector.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from plume.inputs.errors import InputError
from plume.inputs.item import list_inputs
from plume.space.labels import SLOT, Calibration, Template, calibrate, check_templates, label_vectors, sentence

#: Labelled inputs below which a fitted temperature is rough.
_FEW = 200

# Of `Plume.encode`; others would change what similarities mean.
_OPTIONS = (
    "batch_size",
    "show_progress_bar",
    "max_tokens_per_batch",
    "truncate_dim",
    "device",
    "pool",
    "chunk_size",
    "processing_kwargs",
)

Labels = Sequence[str] | Mapping[str, Sequence[Any]]
"""Names of labels, or examples of each."""


def similarities(
    model: Any,
    inputs: Any,
    labels: Labels,
    *,
    templates: Sequence[Template],
    instruction: str | None,
    num_latent_steps: Any,
    **options: Any,
) -> np.ndarray:
    """Cosines of inputs to labels, `[N, C]`; `[C]` for a single input. See `Plume.classify`; `model` is one."""
    if isinstance(labels, str) or len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"labels must be at least two different names; received {labels!r:.80}")
    check_templates(templates)
    if isinstance(labels, Mapping) and list(templates) != [SLOT]:
        raise ValueError("templates are for names of labels; these labels are given by examples")
    if unknown := set(options) - set(_OPTIONS):
        raise TypeError(f"classify does not take {min(unknown)!r}; of encode's options it takes {', '.join(_OPTIONS)}")
    shared = {**options, "num_latent_steps": num_latent_steps, "convert_to_numpy": True}
    preset = {"prompt_name": "classify"} if instruction is None and "classify" in model.prompts else {}
    as_inputs = {"task": "query", "instruction": instruction, **preset, **shared}
    if isinstance(labels, Mapping):
        vectors = _by_examples(model, labels, as_inputs)
    else:
        sentences = [sentence(template, label) for label in labels for template in templates]
        with _naming([f"the sentence {one!r}" for one in sentences]):
            told = model.encode(sentences, task="document", **shared)
        vectors = label_vectors(told.reshape(len(labels), len(templates), told.shape[-1]))
    return model.encode(inputs, **as_inputs) @ vectors.T


def _by_examples(model: Any, labels: Mapping[str, Sequence[Any]], settings: Mapping[str, Any]) -> np.ndarray:
    """The mean direction of each label's examples, `[C, D]`."""
    groups: list[Sequence[Any]] = []
    for name, examples in labels.items():
        try:
            group, is_single = list_inputs(examples)
        except InputError as error:
            raise ValueError(f"label {name!r}: {error}") from None
        if is_single or not len(group):
            raise ValueError(f"label {name!r} has no list of examples; give at least one, in a list")
        groups.append(group)
    pairs = zip(labels, groups, strict=True)
    places = [f"label {name!r}, example {at}" for name, some in pairs for at in range(len(some))]
    with _naming(places):
        vectors = model.encode([one for some in groups for one in some], **settings)
    ends = np.cumsum([len(some) for some in groups])
    return np.concatenate([label_vectors(some[None]) for some in np.split(vectors, ends[:-1])])


@contextmanager
def _naming(names: Sequence[str]) -> Iterator[None]:
    """Errors of inputs that belong to labels, by these names: who classifies knows them by no place in a list."""
    try:
        yield
    except InputError as error:
        raise ValueError(f"{names[error.index]}: {error.reason}" if error.index is not None else str(error)) from None


def calibrated(scores: np.ndarray, labels: Labels, answers: Sequence[str | Sequence[str]]) -> Calibration:
    """From similarities `[N, C]` and the right label of each input, or its right labels; see `Plume.calibrate`."""
    numbers = {name: number for number, name in enumerate(labels)}
    rows = [[one] if isinstance(one, str) else list(one) for one in answers]
    if unknown := {name for row in rows for name in row} - set(numbers):
        raise ValueError(f"{min(unknown)!r} is an answer and no label; labels are {', '.join(numbers)}")
    if len(rows) != len(scores):
        raise ValueError(f"there are {len(rows)} answers for {len(scores)} inputs; expected one for each")
    if len(rows) < _FEW:
        warnings.warn(
            f"plume: {len(rows)} labelled inputs; probabilities that are fitted to fewer than {_FEW} are rough",
            stacklevel=4,
        )
    if all(isinstance(one, str) for one in answers):
        return calibrate(scores, np.array([numbers[row[0]] for row in rows]))
    is_right = np.zeros((len(rows), len(numbers)), dtype=bool)
    for row, names in enumerate(rows):
        is_right[row, [numbers[name] for name in names]] = True
    return calibrate(scores, is_right)

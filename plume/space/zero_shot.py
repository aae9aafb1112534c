"""Zero-shot classification: an input gets the label whose vector is nearest.

    w_c = unit(mean_t unit(f(template_t(c))))      the vector of label c, over templates t
    p_c = softmax_c(x . w_c / T)                   its probability for an input x

as in CLIP (arXiv 2103.00020, section 3.1.4) and open_clip: sentences are normalised, averaged and normalised again.

Letters: N inputs, C labels, t templates, D length of a vector, T temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from plume.embedder.plume import Inputs, LatentSteps, Plume

Template = str | Callable[[str], str]
"""A sentence with a place for the name of a label, or a function that writes it."""

#: Where a template has the name of a label.
SLOT = "{}"


def classify(
    model: Plume,
    inputs: Inputs,
    labels: Sequence[str],
    *,
    templates: Sequence[Template] = (SLOT,),
    instruction: str | None = None,
    temperature: float = 0.02,
    num_latent_steps: LatentSteps | None = None,
    **options: Any,
) -> np.ndarray:
    """Probability of each label for each input; exactly one label is taken to be right.

    Args:
        model: embeds both.
        inputs: as for `Plume.encode`.
        labels: what inputs may be, at least two different ones.
        templates: sentences about a label, in which "{}" is its name, or functions that write one; open_clip has both.
            Several are averaged.
        instruction: for the inputs; None takes the checkpoint's preset "classify", if it has one.
        temperature: similarities are divided by it, above 0; the one that the checkpoint was trained with, 0.02 for
            PLUME. Probabilities are calibrated only as far as that one is.
        num_latent_steps: K, as for `Plume.encode`; of a mapping, inputs take that of queries.
        options: as for `Plume.encode`, for example `batch_size`.

    Returns:
        `[N, C]`, float32, rows summing to 1, columns in the order of the labels; `[C]` for a single input.

    Raises:
        InputError: an input that cannot be embedded.
        ValueError: labels, templates or a temperature that cannot be used.

    Example:
        >>> model = Plume(getfixture("plume_folder"), device="cpu")
        >>> found = classify(model, ["a red kite", "tea"], ["bird", "drink"], templates=["a photo of a {}.", "{}"])
        >>> found.shape, found.sum(axis=1).round(4).tolist()
        ((2, 2), [1.0, 1.0])
    """
    if isinstance(labels, str) or len(labels) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"labels must be at least two different names; received {labels!r:.80}")
    check_templates(templates)
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0; received {temperature}")
    sentences = [sentence(template, label) for label in labels for template in templates]
    shared = {**options, "num_latent_steps": num_latent_steps, "convert_to_tensor": True}
    of_labels = model.encode(sentences, task="document", **shared).float()
    vectors = mean_directions(rearrange(of_labels, "(c t) d -> c t d", c=len(labels)))
    preset = {"prompt_name": "classify"} if instruction is None and "classify" in model.prompts else {}
    found = model.encode(inputs, task="query", instruction=instruction, **preset, **shared).float()
    return (found @ vectors.T / temperature).softmax(dim=-1).cpu().numpy()


def mean_directions(vectors: Tensor) -> Tensor:
    """The unit vector of each group's mean.

    Args:
        vectors: unit vectors `[C, t, D]`.

    Example:
        >>> import torch
        >>> mean_directions(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])).tolist()
        [[0.7071067690849304, 0.7071067690849304]]
    """
    return F.normalize(vectors.mean(dim=1), dim=-1)


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

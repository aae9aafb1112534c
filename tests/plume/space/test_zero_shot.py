"""Labels without training, against the formula by hand."""

from __future__ import annotations

import numpy as np
import pytest

from plume import Plume
from plume.space.zero_shot import classify, sentence

LABELS = ["red", "blue", "kite"]
INPUTS = ["a red kite", {"text": "blue table"}, "kite"]


@pytest.fixture(scope="module")
def model(plume_folder):
    return Plume(plume_folder, device="cpu")


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize("templates", [["{}"], ["a photo of a {}.", "{}", "the {} one"], [lambda label: f"a {label}"]])
def test_probabilities_are_the_softmax_of_similarities_to_mean_sentences(model, templates):
    found = classify(model, INPUTS, LABELS, templates=templates, instruction="Say what it is:", temperature=0.1)
    vectors = unit(
        np.stack([model.encode([sentence(one, label) for one in templates]).mean(axis=0) for label in LABELS])
    )
    expected = softmax(model.encode(INPUTS, instruction="Say what it is:") @ vectors.T / 0.1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_repeated_templates_and_the_order_of_labels_change_nothing(model):
    found = classify(model, INPUTS, LABELS)
    np.testing.assert_allclose(classify(model, INPUTS, LABELS, templates=["{}", "{}"]), found, atol=1e-5)
    np.testing.assert_allclose(classify(model, INPUTS, LABELS[::-1])[:, ::-1], found, atol=1e-5)


def test_temperature_sharpens_and_never_changes_the_best_label(model):
    best = classify(model, INPUTS, LABELS).argmax(axis=1)
    sharp, flat = (classify(model, INPUTS, LABELS, temperature=value) for value in (1e-4, 1e4))
    assert (sharp.argmax(axis=1) == best).all()
    np.testing.assert_allclose(flat, 1 / 3, atol=1e-3)
    np.testing.assert_allclose(sharp.max(axis=1), 1, atol=1e-3)


def test_one_input_gets_one_row_and_the_preset_instructs(model):
    assert classify(model, "a red kite", LABELS).shape == (3,)
    told = classify(model, INPUTS, LABELS, instruction=model.prompts["classify"])
    np.testing.assert_allclose(classify(model, INPUTS, LABELS), told, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"labels": "red"}, "at least two different names"),
        ({"labels": ["red", "red"]}, "at least two different names"),
        ({"templates": ["a photo"]}, 'must hold "{}" once'),
        ({"templates": "{}"}, "must be a list of sentences"),
        ({"temperature": 0}, "temperature must be above 0"),
    ],
)
def test_what_cannot_be_used_is_refused(model, changed, expected):
    given = {"labels": LABELS, **changed}
    with pytest.raises(ValueError, match=expected):
        classify(model, INPUTS, **given)

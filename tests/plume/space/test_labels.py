"""Labels without training, against the formulas by hand."""

from __future__ import annotations

import numpy as np
import pytest

from plume import Plume
from plume.space.labels import Calibration, calibrate, calibration_error, label_vectors, probabilities, sentence

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
    settings = {"templates": templates, "instruction": "Say what it is:", "calibration": Calibration(0.1)}
    vectors = unit(
        np.stack([model.encode([sentence(one, label) for one in templates]).mean(axis=0) for label in LABELS])
    )
    expected = softmax(model.encode(INPUTS, instruction="Say what it is:") @ vectors.T / 0.1)
    np.testing.assert_allclose(model.classify(INPUTS, LABELS, **settings), expected, atol=1e-5)


def test_repeated_templates_and_the_order_of_labels_change_nothing(model):
    found = model.classify(INPUTS, LABELS)
    np.testing.assert_allclose(model.classify(INPUTS, LABELS, templates=["{}", "{}"]), found, atol=1e-5)
    np.testing.assert_allclose(model.classify(INPUTS, LABELS[::-1])[:, ::-1], found, atol=1e-5)


def test_temperature_sharpens_and_never_changes_the_best_label(model):
    best = model.classify(INPUTS, LABELS).argmax(axis=1)
    sharp, flat = (model.classify(INPUTS, LABELS, calibration=Calibration(value)) for value in (1e-4, 1e4))
    assert (sharp.argmax(axis=1) == best).all()
    np.testing.assert_allclose(flat, 1 / 3, atol=1e-3)
    np.testing.assert_allclose(sharp.max(axis=1), 1, atol=1e-3)


def test_one_input_gets_one_row_and_the_preset_instructs(model):
    assert model.classify("a red kite", LABELS).shape == (3,)
    told = model.classify(INPUTS, LABELS, instruction=model.prompts["classify"])
    np.testing.assert_allclose(model.classify(INPUTS, LABELS), told, atol=1e-5)


def test_examples_are_means_of_inputs_of_their_own_kind(model):
    """Nearest class mean: examples are embedded as inputs are, with the instruction."""
    examples = {"sky": ["a kite", "blue"], "room": ["a table", {"text": "red table"}, "a chair"]}
    told = {"instruction": "Say what it is:"}
    means = np.stack([unit(model.encode(group, **told).mean(axis=0)) for group in examples.values()])
    expected = softmax(model.encode(INPUTS, **told) @ means.T / 0.02)
    np.testing.assert_allclose(model.classify(INPUTS, examples, **told), expected, atol=1e-4)
    with pytest.raises(ValueError, match="label 'room' has no list of examples"):
        model.classify(INPUTS, {"sky": ["a kite"], "room": []})
    with pytest.raises(ValueError, match="label 'red' has no list of examples"):
        model.classify(INPUTS, {"red": {"text": "red"}, "blue": ["blue"]})
    with pytest.raises(ValueError, match="label 'room', example 1: it is empty"):
        model.classify(INPUTS, {"sky": ["a kite"], "room": ["a table", " "]})
    with pytest.raises(TypeError, match="does not take 'precision'"):
        model.classify(INPUTS, LABELS, precision="int8")
    with pytest.raises(ValueError, match="templates are for names"):
        model.classify(INPUTS, examples, templates=["a {}"])


def test_one_example_of_a_label_is_its_vector():
    rows = unit(np.random.default_rng(0).normal(size=(3, 1, 16)))
    np.testing.assert_allclose(label_vectors(rows), rows[:, 0])


def drawn_from_softmax(rng, temperature, count=4000, labels=6):
    scores = rng.uniform(-0.2, 0.7, (count, labels))
    return scores, (scores / temperature + rng.gumbel(size=scores.shape)).argmax(axis=1)


@pytest.mark.parametrize("temperature", [0.02, 0.07, 0.5])
def test_the_temperature_of_a_known_softmax_is_found_again(temperature):
    scores, answers = drawn_from_softmax(np.random.default_rng(1), temperature)
    found = calibrate(scores, answers)
    assert found.temperature == pytest.approx(temperature, rel=0.06)
    assert found.bias is None
    assert found.quality["nll"] <= found.quality["nll_before"] + 1e-3
    assert found.quality["error"] < 0.06  # of 2,000 inputs in 15 bins, chance alone gives some 0.035
    if temperature > 0.3:
        assert found.quality["error_before"] > 0.2  # 0.02 is much too sure of itself


@pytest.mark.parametrize("bias", [-0.1, 0.45])
def test_temperature_and_bias_of_a_known_sigmoid_are_found_again(bias):
    rng = np.random.default_rng(2)
    scores = rng.uniform(-0.2, 0.7, (3000, 4))
    is_right = rng.uniform(size=scores.shape) < 1 / (1 + np.exp(-(scores - bias) / 0.1))
    found = calibrate(scores, is_right)
    assert found.temperature == pytest.approx(0.1, rel=0.08)
    assert found.bias == pytest.approx(bias, abs=0.02)
    assert found.quality["error"] < 0.03
    chances = probabilities(scores, found)
    np.testing.assert_allclose(chances, 1 / (1 + np.exp(-(scores - found.bias) / found.temperature)), atol=1e-5)


def test_quality_is_of_inputs_that_had_no_part_in_the_fit():
    """Answers that depend on nothing: what is fitted to a half cannot make the other half likelier than chance."""
    rng = np.random.default_rng(3)
    scores, answers = rng.uniform(0, 1, (400, 4)), rng.integers(0, 4, 400)
    quality = calibrate(scores, answers).quality
    assert quality["nll"] > np.log(4) - 0.02
    assert quality["accuracy"] == pytest.approx((scores.argmax(axis=1) == answers).mean())


@pytest.mark.parametrize("order", ["mixed", "in turns", "one after the other"])
def test_quality_does_not_depend_on_the_order_of_inputs(order):
    rng = np.random.default_rng(4)
    answers = {
        "mixed": rng.permutation(200) % 2,
        "in turns": np.arange(200) % 2,
        "one after the other": np.arange(200) // 100,
    }
    right = answers[order]
    scores = rng.normal(0.3, 0.05, (200, 2))
    scores[np.arange(200), right] += 0.06
    scores[:, 0] += 0.06  # so that of one label nearly all are right, of the other few: each half must have both
    quality = calibrate(scores, right).quality
    assert quality["accuracy"] > 0.6
    assert quality["nll"] < 0.75


def test_answers_that_are_never_wrong_do_not_make_it_sure_without_bound():
    scores = np.tile([[0.30, 0.29], [0.29, 0.30]], (50, 1))
    found = calibrate(scores, np.tile([0, 1], 50))
    assert found.temperature >= scores.std() / 101


def test_calibration_error_by_hand():
    sure = np.repeat(np.linspace(0.1, 0.9, 15), 4)
    is_right = np.tile([True, False], 30)
    assert calibration_error(sure, is_right) == pytest.approx(np.abs(np.linspace(0.1, 0.9, 15) - 0.5).mean())
    tied, right = np.repeat([0.5, 0.8], 150), np.concatenate([np.arange(150) % 2 == 0, np.arange(150) % 5 > 0])
    assert calibration_error(tied, right) == pytest.approx(0, abs=1e-9)
    assert calibration_error(tied, np.sort(right[:150]).tolist() + np.sort(right[150:]).tolist()) == pytest.approx(
        0, abs=1e-9
    )
    shuffled = np.random.default_rng(0).permutation(60)
    assert calibration_error(sure[shuffled], is_right[shuffled]) == pytest.approx(calibration_error(sure, is_right))


def test_a_model_is_calibrated_and_then_used(model):
    texts = ["a red kite", "blue", "kite", "a blue table", "red", "table"] * 4
    answers = ["red", "blue", "kite", "blue", "red", "kite"] * 4
    with pytest.warns(UserWarning, match="24 labelled inputs"):
        one = model.calibrate(texts, LABELS, answers)
    np.testing.assert_allclose(model.classify(texts, LABELS, calibration=one).sum(axis=1), 1, atol=1e-5)
    several = [["red", "kite"], ["blue"], ["kite"], ["blue"], ["red"], []] * 4
    with pytest.warns(UserWarning, match="24 labelled inputs"):
        each = model.calibrate(texts, LABELS, several)
    assert each.bias is not None
    found = model.classify(texts, LABELS, calibration=each)
    scores = model.encode(texts, prompt_name="classify") @ model.encode_document(LABELS).T
    expected = 1 / (1 + np.exp(-(scores - each.bias) / each.temperature))
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"labels": "red"}, "at least two different names"),
        ({"labels": ["red", "red"]}, "at least two different names"),
        ({"templates": ["a photo"]}, 'must hold "{}" once'),
        ({"templates": "{}"}, "must be a list of sentences"),
    ],
)
def test_what_cannot_be_used_is_refused(model, changed, expected):
    given = {"labels": LABELS, **changed}
    with pytest.raises(ValueError, match=expected):
        model.classify(INPUTS, **given)


@pytest.mark.parametrize(
    ("scores", "answers", "expected"),
    [
        (np.ones((8, 3)), np.zeros(7, dtype=int), r"scores are \[8, 3\] and answers \[7\]"),
        (np.ones((8, 3)), np.zeros((8, 2), dtype=bool), r"\[8, 3\] and answers \[8, 2\]"),
        (np.ones((2, 3)), np.zeros(2, dtype=int), "2 labelled inputs say nothing"),
        (np.ones((8, 3)), np.ones((8, 3), dtype=bool), "every label is right for every input"),
    ],
)
def test_answers_that_nothing_can_be_fitted_to_are_refused(scores, answers, expected):
    with pytest.raises(ValueError, match=expected):
        calibrate(scores, answers)


def test_answers_that_are_no_labels_and_temperatures_below_0_are_refused(model):
    with pytest.raises(ValueError, match="'green' is an answer and no label"):
        model.calibrate(INPUTS, LABELS, ["red", "green", "kite"])
    with pytest.raises(ValueError, match="2 answers for 3 inputs"):
        model.calibrate(INPUTS, LABELS, ["red", "kite"])
    with pytest.raises(ValueError, match="temperature must be above 0"):
        Calibration(0)

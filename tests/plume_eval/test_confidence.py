"""`plume-eval confidence`: every measure is judged, and the judgement is that of the formulas."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from plume import Plume
from plume_eval import confidence
from plume_eval.__main__ import app


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(confidence, "_RESAMPLES", 60)


def test_auroc_is_that_of_scikit_learn_with_equals():
    rng = np.random.default_rng(0)
    values, is_right = rng.integers(0, 8, 300).astype(float), rng.uniform(size=300) < 0.4
    judged = confidence._judged(values, is_right)
    assert judged["auroc"] == pytest.approx(roc_auc_score(is_right, values))
    low, high = judged["auroc_interval"]
    assert low < judged["auroc"] < high
    perfect = confidence._judged(is_right.astype(float), is_right)
    assert (perfect["auroc"], perfect["e_aurc"]) == (1.0, pytest.approx(0))


def test_every_measure_is_judged_on_questions_that_nothing_was_fitted_to(plume_folder, hops_folder, monkeypatch):
    plume = Plume(plume_folder, device="cpu")
    seen = []
    measures_of = confidence.measures_of

    def noted(plume, task, steps):
        seen.append(len(task.rows))
        found, is_right = measures_of(plume, task, steps)
        is_right[::2] = ~is_right[::2]  # an untrained model is nearly never right
        return found, is_right

    monkeypatch.setattr(confidence, "measures_of", noted)
    found = confidence.confidence(plume, hops_folder)
    assert found["questions"] == seen[1]
    assert found["fitted_to"] == seen[0]
    assert len(found["measures"]) == 9
    assert "regression on the sorted scores" in found["measures"]
    text = confidence.table(found)
    assert "| CoE-R of the latent steps |" in text
    assert "chance: AURC" in text


def test_a_model_that_is_never_right_is_told(plume_folder, hops_folder, monkeypatch):
    measures_of = confidence.measures_of

    def never(plume, task, steps):
        found, is_right = measures_of(plume, task, steps)
        return found, np.zeros_like(is_right)

    monkeypatch.setattr(confidence, "measures_of", never)
    result = CliRunner().invoke(app, ["confidence", "--model", str(plume_folder), "--data", str(hops_folder)])
    assert result.exit_code == 1
    assert "no measure can tell right from wrong" in result.output

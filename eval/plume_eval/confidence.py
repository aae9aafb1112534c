"""Which measure tells right first results from wrong ones: of a search's scores, or of its latent steps.

Questions of hops among all their answers. Each measure is judged by AUROC (0.5: no better than chance), AURC and E-AURC
(`plume.space.confidence`); one, a regression on the sorted scores, is fitted to the validation split and judged, like
all others, on the test split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from plume.embedder.plume import Plume
from plume.space.confidence import area_under_risk, certainty, chain_of_embedding, margin, risks
from plume.tracing.trace import trace
from plume_eval.hops.run import HopsTask

#: Scores that the regression sees.
_BEST = 10
_RESAMPLES = 1_000


def measures_of(plume: Plume, task: HopsTask, num_latent_steps: int | None) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Each measure for each question, `[Q]`, with the sorted best scores `[Q, 10]`; and whether the first is right."""
    steps = plume.plume_config.num_latent_steps if num_latent_steps is None else num_latent_steps
    queries = task.queries()
    candidates = plume.encode_document(task.candidates("name"), show_progress_bar=False)
    scores = {
        k: plume.encode_query(queries, num_latent_steps=k, show_progress_bar=False) @ candidates.T
        for k in sorted({0, steps // 2, steps})
    }
    own = scores[steps]
    first = own.argmax(axis=1)
    traces = trace(plume.plume_model, queries, num_latent_steps=steps, num_words=1)
    chains = np.array([chain_of_embedding(one.states.numpy()) for one in traces])
    found = {
        "cosine of the first": own.max(axis=1),
        "first less second": margin(own),
        "certainty of the first ten": certainty(own),
        "same first at K / 2": (scores[steps // 2].argmax(axis=1) == first).astype(float),
        "same first at K = 0": (scores[0].argmax(axis=1) == first).astype(float),
        "cosine of the last two states": np.array([float(one.step_cosine[-1]) for one in traces]),
        "CoE-R of the latent steps": chains[:, 0],
        "CoE-C of the latent steps": chains[:, 1],
        "sorted": -np.sort(-own, axis=1)[:, :_BEST],
    }
    return found, first == task.answers


def confidence(plume: Plume, data: str | Path, num_latent_steps: int | None = None) -> dict[str, Any]:
    """Judge every measure on the test split of hops.

    Raises:
        ValueError: the model is right always, or never, or takes fewer than two steps.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    fitted_to, fitted_right = measures_of(plume, HopsTask(data, split="validation"), num_latent_steps)
    found, is_right = measures_of(plume, HopsTask(data), num_latent_steps)
    for where, right in (("validation", fitted_right), ("test", is_right)):
        if right.all() or not right.any():
            raise ValueError(f"of {where}, {right.mean():.0%} are right: no measure can tell right from wrong there")
    scaler = StandardScaler().fit(fitted_to["sorted"])
    regression = LogisticRegression().fit(scaler.transform(fitted_to["sorted"]), fitted_right)
    found["regression on the sorted scores"] = regression.decision_function(scaler.transform(found.pop("sorted")))
    return {
        "questions": len(is_right),
        "right": float(is_right.mean()),
        "fitted_to": len(fitted_right),
        "measures": {name: _judged(values, is_right) for name, values in found.items()},
    }


def _judged(values: np.ndarray, is_right: np.ndarray) -> dict[str, Any]:
    """AUROC with its bootstrap interval, AURC, E-AURC, and the error of the surer half."""
    from sklearn.metrics import roc_auc_score

    values = np.where(
        np.isnan(values), values[~np.isnan(values)].min(initial=0) - 1, values
    )  # of states that stand still
    rng = np.random.default_rng(0)
    drawn = (rng.integers(0, len(values), len(values)) for _ in range(_RESAMPLES))
    areas = [roc_auc_score(is_right[rows], values[rows]) for rows in drawn if 0 < is_right[rows].sum() < len(rows)]
    area, excess = area_under_risk(values, is_right)
    return {
        "auroc": float(roc_auc_score(is_right, values)),
        "auroc_interval": np.percentile(areas, [2.5, 97.5]).tolist(),
        "aurc": area,
        "e_aurc": excess,
        "error_of_surer_half": float(risks(values, is_right)[(len(values) - 1) // 2]),
    }


def table(found: dict[str, Any]) -> str:
    """As Markdown, the best first."""
    from plume_eval.report import markdown_table

    rows = [
        [
            name,
            f"{one['auroc']:.2f} [{one['auroc_interval'][0]:.2f}, {one['auroc_interval'][1]:.2f}]",
            f"{one['aurc']:.3f}",
            f"{one['e_aurc']:.3f}",
            f"{one['error_of_surer_half']:.1%}",
        ]
        for name, one in sorted(found["measures"].items(), key=lambda pair: -pair[1]["auroc"])
    ]
    return (
        f"{found['questions']} questions, {found['right']:.1%} right (chance: AURC {1 - found['right']:.3f}); the "
        f"regression is fitted to {found['fitted_to']} others.\n\n"
        + markdown_table(["measure", "AUROC", "AURC", "E-AURC", "errors of the surer half"], rows)
    )

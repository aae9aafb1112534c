"""Pictures of a hops experiment; needs the extra `plot`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image

from plume_eval.hops.inside import Inside
from plume_eval.hops.symbols import TILE

mpl.use("Agg")
import matplotlib.pyplot as plt

Curve = Sequence[tuple[int, float]]
"""Steps and values."""

_COLOURS = ("#1b6ca8", "#e08e0b", "#c0392b", "#8e8e8e", "#27ae60", "#8e44ad")


def draw_training(file: Path, curves: Mapping[str, Curve], stages: Sequence[tuple[int, str]], chance: float) -> None:
    """Recall over training steps, with the stages of the curriculum marked.

    Args:
        file: a PNG to write.
        curves: by name.
        stages: first step and label of each stage.
        chance: recall of guessing.
    """
    figure, axes = plt.subplots(figsize=(8, 4))
    for (name, curve), colour in zip(curves.items(), _COLOURS, strict=False):
        steps, values = zip(*curve, strict=True)
        axes.plot(steps, values, label=name, color=colour, linewidth=2)
    for step, label in stages:
        axes.axvline(step, color="#bbbbbb", linewidth=1, zorder=0)
        axes.text(step + 3, 1.04, label, fontsize=8, color="#555555")
    axes.axhline(chance, color="#bbbbbb", linestyle=":", linewidth=1)
    axes.text(
        1,
        chance - 0.012,
        "chance",
        fontsize=8,
        color="#777777",
        ha="right",
        va="top",
        transform=axes.get_yaxis_transform(),
    )
    axes.set(xlabel="contrastive training step", ylabel="recall@1, held-out pages", ylim=(0, 1.1))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, file)


def draw_inside(file: Path, inside: Inside) -> None:
    """Which hop each latent state holds, and which experts each latent step uses.

    Args:
        file: a PNG to write.
        inside: from `look_inside`.
    """
    has_gates = inside.gates is not None
    size = (5.2 + 4.2 * has_gates, 4)
    figure, axes = plt.subplots(1, 1 + has_gates, figsize=size, squeeze=False, layout="constrained")
    hops = ["start", *(f"hop {hop}" for hop in range(1, inside.held.shape[1]))]
    states = [f"h{state}" for state in range(len(inside.held))]
    _matrix(axes[0, 0], inside.held, hops, states, "Probability of each symbol, read from a state", "Blues")
    axes[0, 0].set(xlabel="symbol on the way", ylabel="latent state")
    if inside.gates is not None:
        experts = [f"expert {expert}" for expert in range(inside.gates.shape[1])]
        steps = [f"step {step}" for step in range(len(inside.gates))]
        _matrix(axes[0, 1], inside.gates, experts, steps, "Gates of the router, mean over questions", "Greens")
        axes[0, 1].set(xlabel="routed expert", ylabel="latent step")
    _save(figure, file)


def draw_hops(file: Path, lines: Mapping[str, Mapping[str, Mapping[str, float]]], rule: Mapping[str, Any]) -> None:
    """Recall against hops, a line per system, its interval as a band.

    Args:
        file: a PNG to write.
        lines: of each system, by number of hops, an estimate with mean, low and high.
        rule: what answers best without following the path, from `plume_eval.hops.run.best_rule`.
    """
    figure, axes = plt.subplots(figsize=(7, 4))
    for (name, by_hops), colour in zip(lines.items(), itertools.cycle(_COLOURS)):
        hops = [int(count) for count in by_hops]
        mean, low, high = ([one[key] for one in by_hops.values()] for key in ("mean", "low", "high"))
        axes.plot(hops, mean, label=name, color=colour, linewidth=2, marker="o", markersize=4)
        axes.fill_between(hops, low, high, color=colour, alpha=0.15, linewidth=0)
    hops = [int(count) for count in rule["by_hops"]]
    guessed = [one["recall_at_1"] for one in rule["by_hops"].values()]
    axes.plot(hops, guessed, label="best shallow rule", color="#999999", linestyle=":", linewidth=1.5)
    axes.set(xlabel="hops to the answer", ylabel="recall@1", ylim=(0, 1.05), xticks=hops)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, file)


def draw_search(
    file: Path,
    page: Image.Image,
    question: str,
    ranking: Sequence[tuple[str, float, Image.Image]],
    answer: str,
) -> None:
    """One search: the page, the question, the ranked symbols.

    Args:
        file: a PNG to write.
        page: the picture asked about.
        question: the text.
        ranking: name, similarity and picture of each candidate, best first.
        answer: the right name.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.4), width_ratios=(1.1, 1))
    left.imshow(page.resize((page.width * 8, page.height * 8), Image.Resampling.NEAREST))
    for line in range(1, page.height // TILE):
        left.axhline(line * TILE * 8, color="#dddddd", linewidth=1)
    for line in range(1, page.width // TILE):
        left.axvline(line * TILE * 8, color="#dddddd", linewidth=1)
    left.set_title(question, fontsize=10)
    left.axis("off")
    shown = ranking[:6]
    for place, (name, score, picture) in enumerate(shown):
        top = len(shown) - place
        right.imshow(picture, extent=(0, 0.8, top - 0.4, top + 0.4))
        weight = "bold" if name == answer else "normal"
        right.text(1, top, f"{score:+.3f}  {name}", va="center", fontsize=11, weight=weight)
    right.set(xlim=(0, 5), ylim=(0.3, len(shown) + 0.7), title="nearest answers by cosine (right one in bold)")
    right.axis("off")
    _save(figure, file)


def _matrix(
    axes: plt.Axes, values: np.ndarray, columns: Sequence[str], rows: Sequence[str], title: str, colours: str
) -> None:
    axes.imshow(values, cmap=colours, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.set_title(title, fontsize=11)
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        shade = "white" if value > 0.6 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color=shade)


def _save(figure: plt.Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)

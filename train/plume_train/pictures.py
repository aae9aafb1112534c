"""A picture of a run, from its log: loss terms, recall, latent states and router, with the stages behind them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: What belongs together: a title, and the numbers whose names begin so.
_PANELS: list[tuple[str, tuple[str, ...]]] = [
    ("loss terms", ("cross_entropy_", "contrastive", "anchor_contrastive", "validation_loss", "distillation")),
    ("recall@1", ("recall_", "mrr_")),
    ("norm of latent states", ("state_norm",)),
    ("cosine from one latent state to the next", ("step_cosine",)),
    ("router: load of the experts, entropy of the gates", ("expert_load_", "gate_entropy")),
    ("learning rate", ("learning_rate",)),
    ("pairs per second", ("pairs_per_second",)),
]


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a log file, those that are damaged left out; none where nothing was logged."""
    if not file.exists():
        return []
    log = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            log.append(json.loads(line))
    return log


def draw_run(log: Sequence[dict[str, Any]], out: Path) -> bool:
    """Draw a run; False where nothing was logged, and nothing is drawn.

    Args:
        log: from `read_log`.
        out: the PNG to write.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    panels = [(title, names) for title, starts in _PANELS if (names := _names(log, starts))]
    if not panels:
        return False
    figure = Figure(figsize=(11, 2.6 * -(-len(panels) // 2)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat
    borders = _borders(log)
    for axis, (title, names) in zip(axes, panels, strict=False):
        for name in names:
            points = [(line["step"], line[name]) for line in log if isinstance(line.get(name), (int, float))]
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1, marker="." if len(points) < 40 else None)
        for step, steps in borders:
            axis.axvline(step, color="0.8", linewidth=0.8, zorder=0)
            axis.annotate(
                f"K={steps}", (step, 1), xycoords=("data", "axes fraction"), fontsize=7, color="0.4", va="bottom"
            )
        axis.set_title(title, fontsize=9, pad=12)
        axis.set_xlabel("step", fontsize=7)
        axis.tick_params(labelsize=7)
        if len(names) > 1:
            axis.legend(fontsize=6, frameon=False)
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(out, dpi=150)
    return True


def _names(log: Sequence[dict[str, Any]], starts: tuple[str, ...]) -> list[str]:
    known = dict.fromkeys(name for line in log for name in line)
    # Numbers of single tasks would crowd the picture.
    return [name for name in known if name.startswith(starts) and "/" not in name]


def _borders(log: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """First logged step of every stage, and its K."""
    found: list[tuple[int, int]] = []
    stage = None
    for line in log:
        if "stage" in line and line["stage"] != stage:
            stage = line["stage"]
            found.append((line["step"], line["num_latent_steps"]))
    return found

"""A picture of a run, from its log: loss, recall, latent states and router, with the stages behind them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class _Panel(NamedTuple):
    """Numbers that belong together: those whose names begin so; the axis begins at 0 and may have an upper end."""

    title: str
    label: str
    starts: tuple[str, ...]
    top: float | None = None


_TERMS = ("cross_entropy_", "contrastive", "anchor_contrastive", "distillation", "matryoshka", "per_step", "alignment")
_PANELS = [
    _Panel("loss, and the terms of it (without their weights)", "loss", ("loss", "validation_loss", *_TERMS)),
    _Panel("recall@1 and MRR", "share of the queries", ("recall_", "mrr_"), 1.02),
    _Panel("load of the experts", "share of the rows", ("expert_load_",)),
    _Panel("entropy of the router's gates", "share of the largest possible", ("gate_entropy",), 1.02),
    _Panel("norm of the latent states", "norm", ("state_norm",)),
    _Panel("from one latent state to the next", "cosine", ("step_cosine",), 1.02),
    _Panel("learning rate", "learning rate", ("learning_rate",)),
    _Panel("pace", "pairs per second", ("pairs_per_second",)),
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


def draw_run(log: Sequence[dict[str, Any]], stages: Sequence[tuple[int, int]], out: Path) -> bool:
    """Draw a run; False where nothing was logged, and nothing is drawn.

    Args:
        log: from `read_log`.
        stages: first step and K of each stage.
        out: the PNG to write.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    panels = [(panel, names) for panel in _PANELS if (names := _names(log, panel.starts))]
    if not panels:
        return False
    num_rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 2.8 * num_rows), layout="constrained")
    axes = list(figure.subplots(num_rows, 2, squeeze=False).flat)
    for axis, (panel, names) in zip(axes, panels, strict=False):
        _draw_panel(axis, panel, names, log, stages)
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.savefig(out, dpi=150)
    return True


def _draw_panel(
    axis: Any, panel: _Panel, names: Sequence[str], log: Sequence[dict[str, Any]], stages: Sequence[tuple[int, int]]
) -> None:
    lowest, highest = 0.0, 0.0
    for name in names:
        points = [(line["step"], line[name]) for line in log if isinstance(line.get(name), (int, float))]
        style: dict[str, Any] = {"color": "black", "linewidth": 1.8} if name == "loss" else {"linewidth": 1}
        marker = "." if len(points) < 40 else None
        axis.plot(*zip(*points, strict=True), label=name.replace("_", " "), marker=marker, **style)
        lowest = min(lowest, *(value for _, value in points))
        highest = max(highest, *(value for _, value in points))
    for step, num_latent_steps in dict(stages).items():  # where several begin at a step, the last one counts
        axis.axvline(step, color="0.8", linewidth=0.8, zorder=0)
        place = {"xy": (step, 1), "xycoords": ("data", "axes fraction"), "va": "bottom"}
        axis.annotate(f"K = {num_latent_steps}", **place, fontsize=7, color="0.4")
    axis.set_title(panel.title, fontsize=9, pad=12)
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel(panel.label, fontsize=8)
    axis.set_ylim(1.05 * lowest, panel.top or 1.1 * highest or 1)
    axis.tick_params(labelsize=7)
    if len(names) > 1:
        axis.legend(fontsize=6, framealpha=0.7, edgecolor="none")


def _names(log: Sequence[dict[str, Any]], starts: tuple[str, ...]) -> list[str]:
    known = dict.fromkeys(name for line in log for name in line)
    # Numbers of single tasks would crowd the picture.
    return [name for name in known if name.startswith(starts) and "/" not in name]

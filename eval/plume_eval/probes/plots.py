"""One page of pictures for the probes; needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt


def draw_probes(file: Path, values: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Draw what the probes measured.

    Args:
        file: a PNG to write.
        values: of each probe by its name, as in `plume_eval.probes.run.Probe`.
        title: above all.
    """
    panels: list[Callable[[plt.Axes], None]] = [lambda axes: _bars(axes, values)]
    for name, label in (("K against hops", "K"), ("context cut", "hidden after step")):
        if name in values:
            panels.append(lambda axes, name=name, label=label: _by_hops(axes, name, values[name]["recall"], label))
    for name in ("decoded by the head", "decoded by a linear probe"):
        if name in values:
            panels.append(lambda axes, name=name: _decoded(axes, name, values[name]["accuracy"]))
    if "experts" in values:
        panels.append(lambda axes: _experts(axes, values["experts"]["share_by_form"]))
    if "early exit" in values:
        panels.append(lambda axes: _exits(axes, values["early exit"]["by_tolerance"]))
    columns = 3
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(15, 4.2 * lines), layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, draw in zip(grid.flat, panels, strict=False):
        axes.axis("on")
        draw(axes)
    figure.suptitle(title, fontsize=12)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def _bars(axes: plt.Axes, values: Mapping[str, Mapping[str, Any]]) -> None:
    compared = {name: one["probed"] for name, one in values.items() if "probed" in one}
    real = next(one["real"] for one in values.values() if "real" in one)
    shown = {"real": real, **compared}
    means = [one["mean"] for one in shown.values()]
    errors = np.array([[one["mean"] - one["low"], one["high"] - one["mean"]] for one in shown.values()]).T
    axes.barh(list(shown), means, xerr=errors.clip(min=0), color=["#1b6ca8"] + ["#c9ced6"] * len(compared), capsize=2)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.05), title="recall@1 under intervention")


def _by_hops(axes: plt.Axes, title: str, rows: Mapping[str, Mapping[str, float]], label: str) -> None:
    hops = list(next(iter(rows.values())))
    _matrix(axes, np.array([[row[count] for count in hops] for row in rows.values()]), hops, list(rows))
    axes.set(xlabel="hops to the answer", ylabel=label, title=f"{title}: recall@1")


def _decoded(axes: plt.Axes, title: str, accuracy: Sequence[Sequence[float]]) -> None:
    matrix = np.array(accuracy, dtype=float)
    columns = ["start", *(str(hop) for hop in range(1, matrix.shape[1]))]
    _matrix(axes, matrix, columns, [f"h{state}" for state in range(len(matrix))])
    axes.set(xlabel="symbol after so many hops", ylabel="state", title=f"{title}: accuracy")


def _experts(axes: plt.Axes, shares: Mapping[str, Sequence[float] | None]) -> None:
    known = {name: share for name, share in shares.items() if share is not None}
    matrix = np.array(list(known.values()))
    _matrix(axes, matrix, [str(expert) for expert in range(matrix.shape[1])], list(known))
    axes.set(xlabel="expert", title="share of an expert among those kept")


def _exits(axes: plt.Axes, by_tolerance: Mapping[str, Mapping[str, Any]]) -> None:
    for tolerance, one in by_tolerance.items():
        hops = [int(count) for count in one["steps_by_hops"]]
        axes.plot(hops, list(one["steps_by_hops"].values()), marker="o", markersize=3, label=f"tolerance {tolerance}")
    axes.set(xlabel="hops to the answer", ylabel="steps taken", title="early exit", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)


def _matrix(axes: plt.Axes, values: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> None:
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            shade = "white" if value > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=shade)

"""Pictures of traces: one page per input, and a map of which experts serve which modality."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from plume.tracing.trace import Trace, expert_use

_INK = "#333333"


def draw_trace(trace: Trace, path: str | os.PathLike) -> None:
    """One input's way through the latent steps, as a page.

    Args:
        trace: from `PlumeModel.trace`.
        path: where to write the picture; PNG, or what its suffix says.

    Raises:
        ImportError: matplotlib is missing.
    """
    steps = np.arange(len(trace.states))
    panels = 2 + (trace.gates is not None and len(steps) > 1) + (trace.to_candidates is not None)
    height = 2.2 * (panels - 1) + 0.9 + 0.3 * len(steps)
    figure = _figure(8, height)
    axes = figure.subplots(panels, height_ratios=[2.2] * (panels - 1) + [0.9 + 0.3 * len(steps)])
    figure.suptitle(f"{_shortened(trace.name)}  ({trace.modality}, K = {len(steps) - 1})", color=_INK)
    rows = iter(axes)

    lines = next(rows)
    lines.plot(steps, trace.to_embedding, marker="o", label="cosine to the embedding")
    lines.plot(steps[1:], trace.step_cosine, marker="s", label="cosine to the state before")
    lines.set(ylim=(-1.05, 1.05), ylabel="cosine")
    norms = lines.twinx()
    norms.plot(steps, trace.norms, color="#999999", linestyle="--", label="norm")
    norms.set(ylim=(0, 1.15 * trace.norms.max().item()), ylabel="norm")
    handles = [*lines.get_lines(), *norms.get_lines()]
    lines.legend(handles=handles, loc="lower left", ncols=3, fontsize=8, frameon=False)
    _steps(lines, steps, "state")

    if trace.gates is not None and trace.experts is not None and len(steps) > 1:
        from matplotlib.patches import Rectangle

        gates = next(rows)
        _heat(gates, trace.gates.T.numpy(), "Blues", 0, 1)
        for step, experts in enumerate(trace.experts.tolist()):
            for expert in experts:
                gates.add_patch(Rectangle((step - 0.5, expert - 0.5), 1, 1, fill=False, edgecolor="#d9480f", lw=2))
        _steps(gates, steps[:-1], "latent step (outlined: experts kept)")
        gates.set(ylabel="expert", yticks=range(trace.gates.shape[1]))

    if trace.to_candidates is not None:
        cosines = next(rows)
        _heat(cosines, trace.to_candidates.T.numpy(), "RdBu_r", -1, 1)
        cosines.set_yticks(range(len(trace.candidates)), [_shortened(name, 24) for name in trace.candidates])
        _steps(cosines, steps, "state (cosine to candidates)")

    words = next(rows)
    words.axis("off")
    for row, nearest in enumerate(trace.words):
        y = 1 - (row + 1.5) / (len(trace.words) + 1)
        shown = "   ".join(f"{_escaped(token)} {chance:.2f}" for token, chance in nearest)[:96]
        words.text(0, y, f"h{row}", color="#888888", transform=words.transAxes)
        words.text(0.06, y, shown, color=_INK, family="monospace", fontsize=8, transform=words.transAxes)
    words.set_title("nearest tokens through the output head", fontsize=10, color=_INK, loc="left")

    figure.tight_layout()
    figure.savefig(path, dpi=120)


def draw_expert_use(traces: Sequence[Trace], path: str | os.PathLike) -> None:
    """How often each expert was kept, by modality and by latent step, as heat maps.

    Raises:
        ValueError: none of the traces has a router.
    """
    use = expert_use(traces)
    if not use:
        raise ValueError("no input went through a router; expert use needs transition='moe' and at least one step")
    counts = {modality: sum(one.modality == modality for one in traces) for modality in use}
    by_step = _use_by_step(traces, len(next(iter(use.values()))))
    figure = _figure(2.6 + 1.1 * by_step.shape[1], 2.8 + 0.45 * (len(use) + len(by_step)))
    above, below = figure.subplots(2, height_ratios=[len(use) + 0.5, len(by_step) + 0.5])
    _heat(above, np.stack([share.numpy() for share in use.values()]), "Blues", 0, 1)
    above.set_yticks(range(len(use)), [f"{modality} ({counts[modality]})" for modality in use])
    above.set(xlabel="expert", ylabel="modality (inputs)", title="share of the kept experts")
    _heat(below, by_step, "Blues", 0, 1)
    below.set(xlabel="expert", ylabel="latent step", yticks=range(len(by_step)))
    for axes in (above, below):
        axes.set(xticks=range(by_step.shape[1]))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _use_by_step(traces: Sequence[Trace], num_experts: int) -> np.ndarray:
    """How often each expert was kept at each latent step: shares `[K, E]`, each row of sum 1."""
    kept = [trace.experts for trace in traces if trace.experts is not None]
    counts = np.zeros((max(map(len, kept)), num_experts))
    for experts in kept:
        for step, chosen in enumerate(experts.tolist()):
            counts[step, chosen] += 1
    return counts / counts.sum(axis=1, keepdims=True)


def _heat(axes: Any, values: np.ndarray, colours: str, low: float, high: float) -> None:
    axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    colour_of = axes.get_images()[-1].cmap
    for (row, column), value in np.ndenumerate(values):
        red, green, blue, _ = colour_of((value - low) / (high - low))
        is_dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if is_dark else _INK, fontsize=8)


def _steps(axes: Any, steps: np.ndarray, label: str) -> None:
    axes.set(xticks=steps, xlabel=label)


def _shortened(text: str, length: int = 60) -> str:
    text = _escaped(text)
    if len(text) <= length:
        return text
    # The end of a path tells most, the beginning of a sentence.
    return "..." + text[3 - length :] if os.sep in text else text[: length - 3] + "..."


def _escaped(text: str) -> str:
    # matplotlib reads a dollar sign as mathematics.
    return text.replace("\n", "\\n").replace("$", r"\$")


def _figure(width: float, height: float) -> Any:
    # Not by pyplot, which would change the backend of a notebook.
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib; pip install 'plume-embed[plot]'") from None
    return Figure(figsize=(width, height))

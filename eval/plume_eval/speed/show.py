"""Tables and a picture of what the bench measured."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plume_eval.report import markdown_table, write_report
from plume_eval.speed.config import LatencyConfig

_STAGES = ("preparing", "vision", "prefill", "latent steps", "suffix")
_COLOURS = ("#adb5bd", "#74c0fc", "#1c7ed6", "#f76707", "#ffd43b")


def tables(result: dict[str, Any], config: LatencyConfig) -> str:
    """All tables, as Markdown."""
    bandwidth, rate = (result["device"][name] for name in ("bytes_per_s", "operations_per_s"))
    cosines = ", ".join(f"{name} {value:.6f}" for name, value in result["cosines"].items())
    parts = [
        f"Measured: copy {bandwidth / 1e9:.1f} GB/s (read and written), product {rate / 1e12:.3f} TFLOP/s in "
        f"{config.dtype}. Lowest cosine to transformers' layers: {cosines}.",
        "## Whole calls\n\nFrom tensors on the host to vectors on the host; median [20th, 80th percentile] in ms of a "
        f"batch. Latent is K = {config.main_steps}. Floor: see eval/README.md.",
        _whole_calls(result, config),
        "## Ratios\n\nLatent is the fastest implementation with exact vectors, named; explicit ones are named too.",
        _ratios(result),
        "## Where the time goes\n\nIn ms of a batch. Launches are kernels on a GPU, operations on a CPU.",
        _stages(result),
    ]
    if result["left_out"]:
        parts.append("Not measured: " + "; ".join(result["left_out"]) + ".")
    return "\n\n".join(parts)


def _whole_calls(result: dict[str, Any], config: LatencyConfig) -> str:
    cases: dict[tuple[str, int, str], dict[tuple[str, int], dict[str, Any]]] = {}
    for case in result["cases"]:
        key = case["input"], case["batch_size"], case["implementation"]
        cases.setdefault(key, {})[case["mode"], case["count"]] = case
    rows = []
    for (name, size, implementation), by_mode in cases.items():
        single, latent = by_mode["latent", 0], by_mode["latent", config.main_steps]
        written = by_mode.get(("explicit", config.num_written_tokens))
        memory, energy = latent["peak_memory_bytes"], latent["joules_per_item"]
        rows.append(
            [
                f"{name}, {latent['num_tokens']} tokens",
                size,
                implementation,
                _ms(single),
                _ms(latent),
                f"{latent['floor_ms']:.2f} ({latent['times_floor']:.1f}x)",
                f"{latent['median_ms'] / single['median_ms']:.2f}",
                f"{latent['items_per_second']:.1f}",
                f"{_ms(written)}, {written['num_written']} tokens, {written['num_runs']} runs" if written else "",
                f"{memory / 2**30:.2f}" if memory else "",
                f"{energy:.2f}" if energy else "",
            ]
        )
    columns = ["input", "batch", "implementation", "single pass", "latent", "latent's floor", "latent / single pass"]
    return markdown_table([*columns, "items/s", "explicit", "GiB", "J/item"], rows)


def _ratios(result: dict[str, Any]) -> str:
    rows = [
        [
            row["input"],
            row["batch_size"],
            row["best_latent"],
            f"{row['latent_to_single_pass']:.2f}",
            _ratio(row.get("reference_latent_to_best")),
            _ratio(row.get("best_explicit_to_latent"), row.get("best_explicit")),
            _ratio(row.get("reference_explicit_to_latent")),
        ]
        for row in result["comparisons"]
    ]
    columns = ["input", "batch", "latent by", "latent / single pass", "reference latent / latent"]
    return markdown_table([*columns, "best explicit / latent", "reference explicit / latent"], rows)


def _stages(result: dict[str, Any]) -> str:
    rows = [
        [
            row["input"],
            row["batch_size"],
            row["implementation"],
            *(f"{row[f'{stage}_ms']:.2f}" for stage in ("preparing", "vision", "prefill", "step")),
            f"{row['step_floor_ms']:.3f} ({row['step_ms'] / row['step_floor_ms']:.1f}x)",
            f"{row['suffix_ms']:.2f}",
            f"{row['launches_per_step']:.0f}",
        ]
        for row in result["stages"]
    ]
    columns = ["input", "batch", "implementation", "preparing", "vision", "prefill", "per step", "step's floor"]
    return markdown_table([*columns, "suffix", "launches per step"], rows)


def _ms(row: dict[str, Any]) -> str:
    return f"{row['median_ms']:.2f} [{row['p20_ms']:.2f}, {row['p80_ms']:.2f}]"


def _ratio(value: float | None, by: str | None = None) -> str:
    return "" if value is None else f"{value:.1f}x" + (f" ({by})" if by else "")


def write_results(
    result: dict[str, Any], config: LatencyConfig, command: str, out: Path, *, picture: bool = True
) -> Path:
    """Write `latency_<model>_<device>_<yyyymm>.{md,json,png}`; returns the path without suffix."""
    model = f"{config.model or f'shapes of {config.shapes}, random weights'}, {config.dtype}"
    path = write_report(out, f"latency_{config.label}", f"Latency: {model}", command, tables(result, config), result)
    if picture and result["cases"] and find_spec("matplotlib"):  # a GPU machine need not have it
        draw(result, config, path.with_suffix(".png"))
    return path


def draw(result: dict[str, Any], config: LatencyConfig, path: Path) -> None:
    """For each input at the smallest batch: where the time goes, and latency against K.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise ImportError("drawing needs matplotlib; pip install 'plume-embed[plot]'") from None
    size = min(config.batch_sizes)
    names = list(dict.fromkeys(row["input"] for row in result["cases"] if row["batch_size"] == size))
    figure = Figure(figsize=(12, 0.6 + 3.2 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 2, squeeze=False)
    for row, name in enumerate(names):
        _draw_stages(panels[row, 0], result, config, name, size)
        _draw_steps(panels[row, 1], result, name, size)
    handles = [Patch(color=colour) for colour in _COLOURS]
    figure.legend(handles, _STAGES, loc="outside lower left", ncols=len(_STAGES), fontsize=8)
    lines = panels[0, 1].get_lines()
    labels = [str(line.get_label()) for line in lines]
    figure.legend(lines, labels, loc="outside lower right", ncols=len(lines), fontsize=8)
    figure.suptitle(f"{config.label}, {config.dtype}, batch size {size}")
    figure.savefig(path, dpi=110)


def _draw_stages(axes: Any, result: dict[str, Any], config: LatencyConfig, name: str, size: int) -> None:
    """Stages of a single pass and of K latent steps, on a linear axis; what writing takes would not fit on it."""
    bars: list[tuple[str, list[float]]] = []
    told = []
    for stage in result["stages"]:
        if (stage["input"], stage["batch_size"]) != (name, size):
            continue
        implementation = stage["implementation"]
        before = [stage["preparing_ms"], stage["vision_ms"], stage["prefill_ms"]]
        steps = [config.main_steps * stage["step_ms"], stage["suffix_ms"]]
        bars.append((f"{implementation}, single pass", [*before, 0, 0]))
        bars.append((f"{implementation}, K = {config.main_steps}", [*before, *steps]))
        told += [
            f"{implementation} {stage['preparing_ms'] + row['median_ms']:.0f}"
            for row in result["cases"]
            if (row["input"], row["batch_size"], row["implementation"]) == (name, size, implementation)
            and row["mode"] == "explicit"
        ]
    for place, (_, parts) in enumerate(bars):
        left = 0.0
        for part, colour in zip(parts, _COLOURS, strict=True):
            if part > 0:  # a difference of medians may be below
                axes.barh(place, part, left=left, color=colour)
                left += part
        axes.text(left, place, f" {left:.1f}", va="center", fontsize=7)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(f"{name}: where the time goes", fontsize=10)
    written = max((row["num_written"] or 0 for row in result["cases"]), default=0)
    note = f"\nwriting {written} tokens instead: {', '.join(told)} ms" if told else ""
    axes.set_xlabel(f"ms per batch{note}", fontsize=8)


def _draw_steps(axes: Any, result: dict[str, Any], name: str, size: int) -> None:
    chosen = [
        row for row in result["cases"] if (row["input"], row["batch_size"], row["mode"]) == (name, size, "latent")
    ]
    for implementation in dict.fromkeys(row["implementation"] for row in chosen):
        own = sorted((row for row in chosen if row["implementation"] == implementation), key=lambda row: row["count"])
        (line,) = axes.plot(
            [row["count"] for row in own], [row["median_ms"] for row in own], marker="o", ms=3, label=implementation
        )
        low, high = [row["p20_ms"] for row in own], [row["p80_ms"] for row in own]
        axes.fill_between([row["count"] for row in own], low, high, alpha=0.2, color=line.get_color())
    own = sorted({row["count"]: row["floor_ms"] for row in chosen}.items())
    axes.plot([count for count, _ in own], [floor for _, floor in own], "k--", lw=1, label="floor")
    axes.set(yscale="log", xticks=[count for count, _ in own])
    axes.set_xlabel("latent steps K", fontsize=8)
    axes.set_ylabel("ms per batch, logarithmic", fontsize=8)
    axes.yaxis.set_major_formatter("{x:g}")
    low, high = axes.get_ylim()
    shown = "25" if high > 8 * low else "2345678"  # a narrow scale has few round numbers
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in shown else "")
    axes.tick_params(which="both", labelsize=8)
    axes.set_title(f"{name}: latency against K (20th to 80th percentile)", fontsize=10)

"""Run the bench of the kernels: the gate, then each kernel, then the whole step; tables and a picture.

Floors are bytes that must be moved over the bandwidth of a copy, measured in the same run on random data.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from plume.engine.fused import ops, reference
from plume.model.model import PlumeModel
from plume_eval.kernels.cases import Shapes, arguments
from plume_eval.kernels.gate import Check, check_all
from plume_eval.kernels.step import IMPLEMENTATIONS, RolloutClock, Steps, event_clock, node_us, shares
from plume_eval.kernels.timing import Clock, cache_bytes, graph_clock, num_bytes, num_copies
from plume_eval.report import markdown_table, write_report
from plume_eval.speed.floors import Work, measure_device
from plume_kernels import MODULES

#: Rows and new tokens that are checked before anything is timed.
GATED = ((1, 1), (3, 1), (17, 1), (1, 6), (8, 6))

CONTEXT = 300


class GateError(Exception):
    """A kernel that is wrong; nothing is timed then."""


def gate(shapes: Shapes, *, dtype: torch.dtype, device: str) -> list[Check]:
    """Check all kernels.

    Raises:
        GateError: some are wrong; the message names them.
    """
    found = check_all(shapes, GATED, dtype=dtype, device=device)
    if red := [check for check in found if not check.is_green]:
        lines = [
            f"{check.name} ({check.part}), {check.num_rows} x {check.num_new}: {check.error:.1e} > {check.allowed:.1e}"
            for check in red
        ]
        raise GateError("nothing is timed, since kernels are wrong:\n" + "\n".join(lines))
    return found


def time_kernels(
    shapes: Shapes,
    batch_sizes: Sequence[int],
    bytes_per_s: float,
    *,
    dtype: torch.dtype,
    device: str,
    clock: Clock = graph_clock,
    compiles: bool = False,
    has_time: Callable[[], bool] = lambda: True,
) -> list[dict[str, Any]]:
    """Time every kernel, its definition in plain operations, and on request that in torch.compile.

    Where rows are so many that the definition computes the op there is no kernel to be timed.

    Returns:
        Of each kernel, batch size and implementation the median of microseconds, their 20th and 80th percentile, bytes,
        the floor, the share of the bandwidth, and whether inputs were out of the cache.
    """
    rows = []
    for size in batch_sizes:
        for name in MODULES if has_time() else ():
            case = partial(arguments, shapes, [CONTEXT] * size, num_slots=512, dtype=dtype, device=device)
            first = case()[name]
            sets = [first, *(case(seed=seed)[name] for seed in range(1, num_copies(first)))]
            moved = statistics.mean(num_bytes(name, args, _num_used(name, args)) for args in sets)
            floor = 1e6 * moved / bytes_per_s
            implementations: dict[str, tuple[bool, Callable[..., Any]]] = {}
            if ops.has_kernel(name, size, first[0]):
                implementations["kernel"] = (False, getattr(ops, name))
                if ops.unsupported_reason(torch.device(device), dependent_launch=True) is None:
                    implementations["dependent"] = (True, getattr(ops, name))
            implementations["plain"] = (False, getattr(reference, name))
            if compiles:
                implementations["compiled"] = (False, torch.compile(getattr(reference, name), dynamic=False))
            for implementation, (is_dependent, work) in implementations.items():
                with ops.dependent_launch(is_dependent):
                    times = sorted(clock([partial(work, *args) for args in sets]))
                median = statistics.median(times)
                rows.append(
                    {
                        "kernel": name,
                        "batch_size": size,
                        "implementation": implementation,
                        "median_us": median,
                        "p20_us": times[len(times) // 5],
                        "p80_us": times[-1 - len(times) // 5],
                        "bytes": moved,
                        "floor_us": floor,
                        "share_of_bandwidth": floor / median,
                        "is_cold": len(sets) * moved > cache_bytes(),
                    }
                )
    return rows


def _num_used(name: str, args: tuple[Any, ...]) -> int | None:
    """Experts that some row has chosen."""
    if name == "experts_first":
        return int((reference.experts_first(*args)[1] > 0).any(dim=0).sum())
    return int((args[2] > 0).any(dim=0).sum()) if name == "experts_second" else None


def time_steps(
    model: PlumeModel,
    batch_sizes: Sequence[int],
    work: Work,
    device: Any,
    *,
    clock: RolloutClock = event_clock,
    implementations: Sequence[str],
    has_time: Callable[[], bool] = lambda: True,
) -> list[dict[str, Any]]:
    """Time a latent step in every implementation; what there is no time for is left out."""
    rows = []
    for size in batch_sizes:
        floor = 1000 * work.pass_ms(device, size, CONTEXT, adapter=True, head=False)
        for implementation in implementations:
            if has_time():
                taken = Steps(model, implementation, size, CONTEXT, clock).step_us()
                gc.collect()  # graphs hold gigabytes, in cycles
                rows.append({"batch_size": size, "implementation": implementation, "step_us": taken, "floor_us": floor})
    return rows


def run(
    model: PlumeModel,
    shapes: Shapes,
    batch_sizes: Sequence[int],
    *,
    dtype: torch.dtype,
    device: str,
    time_limit_s: float | None = None,
    compiles: bool = False,
    save: Callable[[dict[str, Any]], Any] = lambda result: None,
) -> dict[str, Any]:
    """All of it, on a CUDA device.

    Args:
        model: of the shapes.
        shapes: of the kernels' inputs.
        batch_sizes: rows.
        dtype: of the weights.
        device: where.
        time_limit_s: after which nothing further is begun.
        compiles: whether to time torch.compile too.
        save: is handed the results as they come.

    Raises:
        GateError: a kernel is wrong.
    """

    def has_time(*, share: float = 1.0) -> bool:
        return time_limit_s is None or time.perf_counter() - begin < share * time_limit_s

    with torch.inference_mode():
        checks = gate(shapes, dtype=dtype, device=device)
        begin = time.perf_counter()  # compiling for the gate takes as long as it takes
        measured = measure_device(torch.device(device), dtype)
        result: dict[str, Any] = {
            "gate": [vars(check) for check in checks],
            "bytes_per_s": measured.bytes_per_s,
            "operations_per_s": measured.operations_per_s,
            "kernels": [],
            "steps": [],
            "shares_us": {},
            "node_us": 0.0,
        }
        limits: dict[str, Any] = {"compiles": compiles, "has_time": lambda: has_time(share=0.5)}
        implementations = [
            implementation for implementation in IMPLEMENTATIONS if compiles or implementation != "compiled"
        ]
        if ops.unsupported_reason(torch.device(device), dependent_launch=True):
            implementations.remove("dependent")
        for size in batch_sizes:
            result["kernels"] += time_kernels(
                shapes, [size], measured.bytes_per_s, dtype=dtype, device=device, **limits
            )
            save(result)
        for size in batch_sizes:
            result["steps"] += time_steps(
                model, [size], Work.of(model), measured, implementations=implementations, has_time=has_time
            )
            save(result)
        result["shares_us"] = shares(model, 1, CONTEXT) if has_time() else {}
        result["node_us"] = node_us()
        save(result)
        return result


def tables(result: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    worst = max(result["gate"], key=lambda check: check["error"] / check["allowed"])
    kernels = [
        [
            row["kernel"], row["batch_size"], row["implementation"], f"{row['median_us']:.1f}",
            f"{row['p20_us']:.1f} to {row['p80_us']:.1f}", f"{row['bytes'] / 1e6:.2f}", f"{row['floor_us']:.1f}",
            f"{row['share_of_bandwidth']:.0%}{'' if row['is_cold'] else ', warm'}",
        ]
        for row in result["kernels"]
    ]  # fmt: skip
    steps = [
        [
            row["batch_size"],
            row["implementation"],
            f"{row['step_us'] / 1000:.3f}",
            f"{row['floor_us'] / 1000:.3f}",
            f"{row['step_us'] / row['floor_us']:.2f}",
        ]
        for row in result["steps"]
    ]
    left = [[name, f"{taken:.0f}"] for name, taken in result["shares_us"].items()]
    return "\n\n".join(
        [
            f"Gate: {len(result['gate'])} results are right; the worst is {worst['name']} ({worst['part']}), "
            f"{worst['error']:.1e} where {worst['allowed']:.1e} is allowed.",
            f"Copy bandwidth {result['bytes_per_s'] / 1e12:.2f} TB/s, matrix products "
            f"{result['operations_per_s'] / 1e12:.0f} T operations/s; a node of a graph of kernels that do next to "
            f"nothing takes {result['node_us']:.2f} us.",
            "## One latent step\n\n"
            + markdown_table(["batch size", "implementation", "ms", "floor, ms", "times the floor"], steps),
            "## What a step of batch size 1 saves without each op\n\n" + markdown_table(["op", "us"], left),
            "## Kernels, cold but where it says warm\n\n"
            + markdown_table(
                ["kernel", "batch size", "implementation", "us", "20 % to 80 %", "MB", "floor, us", "of the bandwidth"],
                kernels,
            ),
        ]
    )


def write(result: dict[str, Any], out: Path, label: str, command: str) -> Path:
    """Results as JSON and Markdown, and a picture where matplotlib is there; returns the path without suffix."""
    path = write_report(out, f"kernels_{label}", "Kernels of a latent step", command, tables(result), result)
    with contextlib.suppress(ImportError):
        draw(result, path.with_suffix(".png"))
    return path


def draw(result: dict[str, Any], path: Path) -> None:
    """A step in every implementation over its floor, and each kernel's share of the bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    sizes = sorted({row["batch_size"] for row in result["steps"]})
    for implementation in dict.fromkeys(row["implementation"] for row in result["steps"]):
        own = {
            row["batch_size"]: row["step_us"] / 1000
            for row in result["steps"]
            if row["implementation"] == implementation
        }
        left.plot(
            [str(size) for size in sizes if size in own],
            [own[size] for size in sizes if size in own],
            "o-",
            label=implementation,
        )
    floors = {row["batch_size"]: row["floor_us"] / 1000 for row in result["steps"]}
    left.plot([str(size) for size in sizes], [floors[size] for size in sizes], "k--", label="floor")
    left.set(xlabel="batch size", ylabel="ms", title="One latent step", yscale="log")
    left.legend()
    least = min(row["batch_size"] for row in result["kernels"])
    smallest = [row for row in result["kernels"] if row["batch_size"] == least]
    names = list(dict.fromkeys(row["kernel"] for row in smallest))
    implementations = list(dict.fromkeys(row["implementation"] for row in smallest))
    for place, implementation in enumerate(implementations):
        own = {row["kernel"]: row["share_of_bandwidth"] for row in smallest if row["implementation"] == implementation}
        offset = (place - (len(implementations) - 1) / 2) * 0.8 / len(implementations)
        right.barh(
            [row + offset for row in range(len(names))],
            [own[name] for name in names],
            0.8 / len(implementations),
            label=implementation,
        )
    right.set(yticks=range(len(names)), yticklabels=names, xlabel="share of the copy bandwidth")
    right.set_title(f"Kernels at batch size {least}, cold weights")
    right.invert_yaxis()
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

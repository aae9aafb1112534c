"""Results folders joined: scores beside what was published, wins and losses, what reasoning costs.

Scores are in per cent, as the field prints them. A mean is given only over tasks that are all there and complete.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plume_eval.metrics import Estimate, bootstrap
from plume_eval.mmeb.tasks import GROUPS, all_tasks, means, published
from plume_eval.report import markdown_table, write_report

#: A published mean and that of its listed tasks agree if they differ by at most this, half of the last printed digit.
_ROUNDING = 0.05


@dataclass(frozen=True)
class System:
    """The results of one embedder: of each task, what `Evaluation` has written."""

    name: str
    results: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> System:
        """Read a folder of results.

        Raises:
            FileNotFoundError: it holds none.
        """
        names = {task.name for task in all_tasks()}
        files = [file for file in sorted(folder.glob("*.json")) if file.stem in names]
        if not files:
            raise FileNotFoundError(f"{folder} holds no results; expected a folder that `plume-eval mmeb` has written")
        return cls(folder.name, {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files})

    @property
    def scores(self) -> dict[str, float]:
        """Scores of the complete tasks, in per cent."""
        return {name: 100 * one["score"] for name, one in self.results.items() if one["is_complete"]}


def write_text(systems: Sequence[System]) -> tuple[str, dict[str, Any]]:
    """The page of a report, Markdown, and its numbers.

    Args:
        systems: the first one is compared with each of the others.
    """
    parts = [
        "## Means\n\n" + _table_of_means(systems),
        "## Tasks\n\n" + _table_of_tasks(systems),
        *[_comparison(systems[0], other) for other in systems[1:]],
        "## What it costs\n\n" + _table_of_costs(systems),
        *_incomplete(systems),
        "## Published means and the tasks they list\n\n" + audit(),
    ]
    numbers = {
        system.name: {"tasks": system.scores, "means": means(system.scores), "cost": cost(system)} for system in systems
    }
    return "\n\n".join(parts), numbers


def _table_of_means(systems: Sequence[System]) -> str:
    columns: list[tuple[str, Mapping[str, float]]] = [(system.name, means(system.scores)) for system in systems]
    columns += [(f"{one.system}, {one.labels}", one.groups | one.means) for one in published()]
    names = [name for modality, groups in GROUPS.items() for name in (*groups, modality)] + ["all"]
    rows = [[name, *(_percent(of.get(name)) for _, of in columns)] for name in names]
    told = "; ".join(dict.fromkeys(f"{one.system}: {one.source}" for one in published()))
    note = (
        "A mean of ours is missing where one of its tasks is missing or incomplete. Published columns say which page "
        f"labels they are on; only columns on the same labels compare in OOD, visdoc and all. Sources: {told}."
    )
    return markdown_table(["", *(name for name, _ in columns)], rows) + f"\n\n{note}"


def _table_of_tasks(systems: Sequence[System]) -> str:
    listed = [one for one in published() if one.tasks]
    rows = []
    for task in all_tasks():
        cells = [_cell(system.results.get(task.name)) for system in systems]
        rows.append([task.name, task.group, task.metric, *cells, *(_percent(one.tasks[task.name]) for one in listed)])
    columns = ["task", "group", "metric", *(system.name for system in systems), *(one.system for one in listed)]
    return markdown_table(columns, rows) + "\n\nIn brackets: incomplete, see below."


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _cell(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    if result["score"] is None:
        return "(none)"
    shown = f"{100 * result['score']:.1f}"
    return shown if result["is_complete"] else f"({shown})"


@dataclass(frozen=True)
class Comparison:
    """One system less another, in per cent, with 95 % intervals of a bootstrap over paired queries.

    tasks: by name, of the queries that both have. mean: of the tasks' differences.
    """

    tasks: dict[str, Estimate]
    mean: Estimate

    @property
    def wins(self) -> list[str]:
        """Tasks on which the first one is better, the interval being above 0."""
        return [name for name, one in self.tasks.items() if one.low > 0]

    @property
    def losses(self) -> list[str]:
        """Tasks on which it is worse, the interval being below 0."""
        return [name for name, one in self.tasks.items() if one.high < 0]


def compare(first: System, second: System, num_resamples: int = 2000, seed: int = 0) -> Comparison:
    """Compare two systems, query by query.

    Args:
        first: the results of one.
        second: those of the other.
        num_resamples: of the queries of each task.
        seed: of the resampling.

    Raises:
        ValueError: they have no complete task in common.
    """
    tasks: dict[str, Estimate] = {}
    drawn = []
    for name in (task.name for task in all_tasks()):
        one, other = (system.results.get(name, {"is_complete": False}) for system in (first, second))
        if not (one["is_complete"] and other["is_complete"]):
            continue
        of_first, of_second = (dict(zip(*each["per_query"].values(), strict=True)) for each in (one, other))
        rows = [row for row in of_first if row in of_second]
        gains = 100 * np.array([of_first[row] - of_second[row] for row in rows])
        tasks[name] = bootstrap(gains, num_resamples, seed)
        places = np.random.default_rng([seed, len(drawn)]).integers(0, len(gains), (num_resamples, len(gains)))
        drawn.append(gains[places].mean(axis=1))
    if not tasks:
        raise ValueError(f"{first.name} and {second.name} have no complete task in common")
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    mean = float(np.mean([one.mean for one in tasks.values()]))
    return Comparison(tasks, Estimate(mean, float(low), float(high)))


def _comparison(first: System, second: System) -> str:
    title = f"## {first.name} less {second.name}\n\n"
    try:
        found = compare(first, second)
    except ValueError as error:
        return title + str(error)
    rows = [[name, f"{one.mean:+.1f} [{one.low:+.1f}, {one.high:+.1f}]"] for name, one in found.tasks.items()]
    even = len(found.tasks) - len(found.wins) - len(found.losses)
    told = (
        f"Mean over {len(found.tasks)} tasks: {found.mean.mean:+.2f} [{found.mean.low:+.2f}, {found.mean.high:+.2f}] "
        f"per cent; {len(found.wins)} wins, {len(found.losses)} losses, {even} without a difference at 95 %, paired "
        "over queries and not corrected for the number of tasks."
    )
    return f"{title}{told}\n\n{markdown_table(['task', 'difference [95 %]'], rows)}"


def cost(system: System, tasks: Collection[str] | None = None) -> dict[str, float]:
    """Milliseconds and reasoning steps per input, over what some tasks have embedded; empty if that is nothing."""
    chosen = [one for name, one in system.results.items() if tasks is None or name in tasks]
    sides = [side for one in chosen for side in one.get("cost", {}).values()]
    embedded = sum(side["num_inputs"] for side in sides)
    if not embedded:
        return {}
    return {
        "num_inputs": embedded,
        "ms_per_input": 1000 * sum(side["seconds"] for side in sides) / embedded,
        "steps_per_input": sum(side["reasoning_steps"] * side["num_inputs"] for side in sides) / embedded,
    }


def _table_of_costs(systems: Sequence[System]) -> str:
    common = set.intersection(*(set(system.scores) for system in systems))
    rows = []
    for system in systems:
        of = cost(system, common)
        score = float(np.mean([system.scores[name] for name in common])) if common else None
        cells = [f"{of[name]:.1f}" if of else "" for name in ("ms_per_input", "steps_per_input")]
        rows.append([system.name, _percent(score), *cells, int(of["num_inputs"]) if of else 0])
    note = (
        f"Scores are means over the {len(common)} tasks that all systems have complete. Times are those of embedding "
        "the inputs that these tasks were the first to need, in the run's batches, with media decoded, summed over "
        "processes; compare only runs of one machine."
    )
    columns = ["system", "score", "ms per input", "reasoning steps per input", "inputs embedded"]
    return markdown_table(columns, rows) + f"\n\n{note}"


def _incomplete(systems: Sequence[System]) -> list[str]:
    rows = [
        [system.name, name, problem]
        for system in systems
        for name, one in system.results.items()
        for problem in one["problems"]
    ]
    return ["## Incomplete\n\n" + markdown_table(["system", "task", "problem"], rows)] if rows else []


def audit() -> str:
    """Which printed means are not those of the tasks that are printed beside them."""
    rows = []
    for one in published():
        if not one.tasks:
            continue
        listed = means(one.tasks)
        for name, printed in (one.groups | one.means).items():
            if abs(listed[name] - printed) > _ROUNDING + 1e-9:
                rows.append([one.system, name, f"{printed:.1f}", f"{listed[name]:.2f}"])
    return markdown_table(["system", "mean", "as printed", "of its listed tasks"], rows)


def write_files(systems: Sequence[System], out: Path, command: str) -> Path:
    """Write the report, its numbers and its picture; returns the path without suffix.

    Args:
        systems: as of `write_text`.
        out: folder, made if missing.
        command: what was typed.
    """
    text, numbers = write_text(systems)
    path = write_report(out, "mmeb", "MMEB-V2", command, text, numbers)
    draw(path.with_suffix(".png"), systems)
    return path


def draw(file: Path, systems: Sequence[System]) -> None:
    """A picture: the score of each group, a bar for each system and for the published ones.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib.pyplot as plt

    shown = [(system.name, means(system.scores)) for system in systems]
    shown += [(f"{one.system}, published", one.groups) for one in published() if one.groups]
    groups = [group for of_modality in GROUPS.values() for group in of_modality]
    figure, axes = plt.subplots(figsize=(12, 4.5), layout="constrained")
    width = 0.8 / len(shown)
    for place, (name, of) in enumerate(shown):
        at = [number + (place - (len(shown) - 1) / 2) * width for number in range(len(groups))]
        axes.bar(at, [of.get(group, 0) for group in groups], width, label=name)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel("score, per cent")
    axes.set_title("MMEB-V2 by group; a group with a missing task has no bar")
    figure.legend(fontsize="small", ncols=len(shown), loc="outside lower center")
    figure.savefig(file, dpi=120)
    plt.close(figure)

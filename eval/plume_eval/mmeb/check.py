"""What of the data is there, before a GPU is paid for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from plume_eval.mmeb.parsers import read_task
from plume_eval.mmeb.rows import MissingDataError
from plume_eval.mmeb.tasks import Task
from plume_eval.report import markdown_table


@dataclass(frozen=True)
class Checked:
    """What a local copy holds of a task. problems: why its score would be incomplete. notes: what else to know."""

    task: Task
    num_queries: int
    num_candidates: int
    problems: list[str]
    notes: list[str]


def check_tasks(
    tasks: Sequence[Task], root: Path, *, from_hub: bool = False, show_progress: bool = False
) -> list[Checked]:
    """Read every task and say what was found.

    Args:
        tasks: which ones.
        root: local copy of TIGER-Lab/MMEB-V2.
        from_hub: whether rows that are not there are downloaded.
        show_progress: show a bar.
    """
    found = []
    for task in tqdm(tasks, desc="Reading", unit="task", disable=not show_progress):
        try:
            data = read_task(task, root, from_hub=from_hub)
            counts = len(data.queries), len(data.candidates)
            found.append(Checked(task, *counts, data.problems, data.notes))
        except MissingDataError as error:
            found.append(Checked(task, 0, 0, [str(error)], []))
    return found


def table_of(found: Sequence[Checked]) -> str:
    """A table, Markdown: queries and candidates of each task against those that are expected."""
    rows = [
        [
            one.task.name,
            one.task.group,
            f"{one.num_queries} of {one.task.num_queries}",
            one.num_candidates,
            "" if one.problems else "yes",
            "; ".join(one.problems + one.notes),
        ]
        for one in found
    ]
    return markdown_table(["task", "group", "queries", "candidates", "complete", "what to know"], rows)

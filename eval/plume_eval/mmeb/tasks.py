"""The 78 tasks of MMEB-V2, a row each in `tasks.csv`, and the scores that were published, in `published_*.csv`.

Names, prompts, pools and metrics are those of VLM2Vec-V2 (arXiv 2507.04590) and its evaluation. Data sets are pinned
to a revision where one is known. The page labels are the corrected ones (VLM2Vec, issue 167): the two sets from
before the correction, whose labels are one page off, are not offered.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, get_args

Modality = Literal["image", "video", "visdoc"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
#: Groups of each modality, in the order in which papers list them.
GROUPS: dict[Modality, tuple[str, ...]] = {
    "image": ("I-CLS", "I-QA", "I-RET", "I-GD"),
    "video": ("V-CLS", "V-QA", "V-RET", "V-MRET"),
    "visdoc": ("VDRv1", "VDRv2", "VR", "OOD"),
}
_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of MMEB-V2.

    name, group, metric: as papers list them. parser: how rows become queries and candidates, see `parsers.py`.
    pool: whether a query has candidates of its own ("local") or all of the task's ("global").
    query_prompt, candidate_prompt: instructions. Rows of image tasks bring theirs along; what they say is compared.
    num_queries: as published. num_candidates: of a local pool at most, or of the global pool; None: it differs or is
        not known.
    repository, config, split, revision: of the rows on the Hub; without a revision the newest one is taken and noted.
    rows: name of the file of rows in a local copy of TIGER-Lab/MMEB-V2, if it can hold one.
    folder: of the task's frames. id_field, text_field: where a row names its video and the text to find it by.
    """

    name: str
    group: str
    parser: str
    pool: Literal["local", "global"]
    metric: str
    query_prompt: str
    candidate_prompt: str
    num_queries: int
    num_candidates: int | None
    repository: str
    config: str
    split: str
    revision: str
    rows: str
    folder: str
    id_field: str
    text_field: str

    @property
    def modality(self) -> Modality:
        """What its queries are about."""
        return next(modality for modality, groups in GROUPS.items() if self.group in groups)

    @property
    def labels(self) -> str:
        """Which labels of those that exist, if there are several."""
        return "page-fixed" if self.repository.endswith("-fixed") else ""


@cache
def all_tasks() -> tuple[Task, ...]:
    """All 78, in the order of the papers' tables."""
    counts = {"num_queries": int, "num_candidates": lambda text: int(text) if text else None}
    with (_HERE / "tasks.csv").open(encoding="utf-8", newline="") as file:
        rows = [{name: counts.get(name, str)(text) for name, text in row.items()} for row in csv.DictReader(file)]
    return tuple(Task(**row) for row in rows)


def find_tasks(names: Sequence[str] = ()) -> list[Task]:
    """Tasks by their names, or those of groups or modalities; all if none is named.

    Raises:
        ValueError: there is no such name.

    Example:
        >>> [task.name for task in find_tasks(["V-MRET", "GQA"])]
        ['GQA', 'QVHighlight', 'Charades-STA', 'MomentSeeker']
    """
    known = {word for task in all_tasks() for word in (task.name, task.group, task.modality)}
    if unknown := [name for name in names if name not in known]:
        groups = ", ".join(group for of_modality in GROUPS.values() for group in of_modality)
        raise ValueError(
            f"MMEB-V2 has no {unknown[0]!r}; expected the name of a task, a group ({groups}) or {', '.join(MODALITIES)}"
        )
    return [task for task in all_tasks() if not names or {task.name, task.group, task.modality} & set(names)]


def class_names(task: Task) -> list[str]:
    """All classes of a video classification task; its rows show only some."""
    return (_HERE / "class_names" / f"{task.name}.txt").read_text(encoding="utf-8").split("\n")[:-1]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published result, in per cent.

    labels: "page-fixed" where the page sets have the corrected labels, "before the fix", or "mixed".
    means: of "image", "video", "visdoc" and "all", as printed. groups, tasks: as printed, where they are.
    """

    system: str
    labels: str
    source: str
    means: dict[str, float]
    groups: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=dict)


@cache
def published() -> tuple[Published, ...]:
    """Results to compare with, as their authors printed them."""
    with (_HERE / "published_means.csv").open(encoding="utf-8", newline="") as file:
        means = list(csv.DictReader(file))
    with (_HERE / "published_tasks.csv").open(encoding="utf-8", newline="") as file:
        tasks = list(csv.DictReader(file))
    groups = [group for of_modality in GROUPS.values() for group in of_modality]
    return tuple(
        Published(
            system=row["system"],
            labels=row["labels"],
            source=row["source"],
            means={name: float(row[name]) for name in (*MODALITIES, "all")},
            groups={group: float(row[group]) for group in groups if row[group]},
            tasks={task["task"]: float(task[row["system"]]) for task in tasks if row["system"] in task},
        )
        for row in means
    )


def means(scores: dict[str, float]) -> dict[str, float]:
    """Means over the tasks of each group and modality, and "all" over the 78; of those whose tasks are all there.

    Args:
        scores: of tasks by name.
    """
    places = {task.name: (task.group, task.modality, "all") for task in all_tasks()}
    result = {}
    for place in dict.fromkeys(place for of_task in places.values() for place in of_task):
        members = [name for name, of_task in places.items() if place in of_task]
        if all(name in scores for name in members):
            result[place] = sum(scores[name] for name in members) / len(members)
    return result

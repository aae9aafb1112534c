"""Where the rows of a task come from: a local copy, or the Hub at its pinned revision.

A local copy is a folder ROOT with what `hf download --repo-type dataset TIGER-Lab/MMEB-V2 --local-dir ROOT` has
brought, its archives unpacked where they lie. Rows that it does not hold may lie beside it, `ROOT/<name of the data
set>`, as the same command brings them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plume_eval.mmeb.tasks import Task

#: Where media lie below ROOT, by modality and then group; archives were packed in several ways.
_IMAGES = ("image-tasks", "image-tasks/MMEB", "image-tasks/mmeb_v1/MMEB")
_FRAMES = {
    "V-CLS": ("frames/video_cls/{}", "frames/{}"),
    "V-RET": (
        "frames/video_ret/data/ziyan/video_retrieval/{}/frames",
        "frames/video_ret/{}/frames",
        "frames/video_ret/{}",
    ),
    "V-QA": ("frames/video_qa/{}", "frames/video_qa/video_qa/{}"),
    "V-MRET": ("frames/video_mret/{}", "frames/video_mret/video_mret/{}"),
}
_COMMIT = re.compile(r"[0-9a-f]{40}")


class MissingDataError(ValueError):
    """Rows or media of a task that are not there; says how to get them."""


@dataclass(frozen=True)
class Rows:
    """Rows of a part of a task, and the revision that they are of; "" if it is not known."""

    rows: Sequence[dict[str, Any]]
    revision: str


def read_rows(task: Task, root: Path, part: str = "", *, from_hub: bool = False) -> Rows:
    """The rows of a task.

    Args:
        task: which one.
        root: the local copy.
        part: configuration to read instead of the task's.
        from_hub: whether what is not in the local copy is downloaded.

    Raises:
        MissingDataError: they are nowhere, or cannot be read.
    """
    config = part or task.config
    for folder in local_folders(task, root):
        if folder.is_dir():
            return Rows(_read_folder(folder, config, task.split), _downloaded_revision(folder))
    if (file := root / "video-tasks" / "data" / f"{task.rows}.jsonl").is_file() and task.rows:
        return Rows(_read_lines(file), _downloaded_revision(root, str(file.relative_to(root))))
    if not from_hub:
        raise MissingDataError(f"its rows are not in {root}; {how_to_get(task, root)}")
    return _read_hub(task, config)


def local_folders(task: Task, root: Path) -> tuple[Path, ...]:
    """Where a copy of the task's data set is looked for."""
    name = task.repository.rpartition("/")[2]
    return root / "visdoc-tasks" / "data" / name, root / name


def how_to_get(task: Task, root: Path) -> str:
    """The command that brings the task's rows."""
    revision = f" --revision {task.revision}" if task.revision else ""
    return (
        f"run `hf download --repo-type dataset {task.repository}{revision} --local-dir "
        f"{root / task.repository.rpartition('/')[2]}`"
    )


def media_root(task: Task, root: Path) -> Path:
    """The folder that the task's images or frames lie in.

    Raises:
        MissingDataError: there is none.
    """
    if task.modality == "image":
        places = [root / place for place in _IMAGES if (root / place / task.name).is_dir()]
        tried = [str(root / place / task.name) for place in _IMAGES]
    else:
        tried = [str(root / "video-tasks" / place.format(task.folder)) for place in _FRAMES[task.group]]
        places = [Path(place) for place in tried if Path(place).is_dir()]
    if not places:
        raise MissingDataError(f"its media are not there; looked for {', '.join(tried)}; unpack its archive")
    return places[0]


def _read_folder(folder: Path, config: str, split: str) -> Sequence[dict[str, Any]]:
    """Rows of a copy of a Hub data set, by what its README says, else by the names of its files."""
    import datasets

    says = folder / "README.md"
    try:
        if says.is_file() and "configs:" in says.read_text(encoding="utf-8"):
            return _undecoded(datasets.load_dataset(str(folder), config or None, split=split))
        named = [file for file in sorted(folder.rglob(f"{split}*")) if file.suffix in (".parquet", ".jsonl", ".json")]
        files = [str(file) for file in named if not config or config in file.relative_to(folder).parts]
        if not files:
            raise MissingDataError(f"{folder} holds no rows of the split {split!r} of {config or 'the data set'}")
        kind = "parquet" if files[0].endswith(".parquet") else "json"
        return _undecoded(datasets.load_dataset(kind, data_files=files, split="train"))
    except MissingDataError:
        raise
    except Exception as error:  # what data sets raise has no common class
        raise MissingDataError(f"{folder} cannot be read: {error}") from error


def _read_hub(task: Task, config: str) -> Rows:
    import datasets
    from huggingface_hub import HfApi

    try:
        revision = task.revision or str(HfApi().dataset_info(task.repository).sha)
        rows = datasets.load_dataset(task.repository, config or None, split=task.split, revision=revision)
    except Exception as error:  # of the network, of the Hub, of data sets
        raise MissingDataError(f"{task.repository} cannot be read from the Hub: {error}") from error
    return Rows(_undecoded(rows), revision)


def _undecoded(rows: Any) -> Sequence[dict[str, Any]]:
    """Rows whose images stay files, since torchvision's and others' decoding is not plume's."""
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _read_lines(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise MissingDataError(f"{file}:{number}: no JSON: {error}") from error
    return rows


def _downloaded_revision(folder: Path, file: str = "") -> str:
    """The commit that `hf download` notes beside each file that it has brought."""
    notes = folder / ".cache" / "huggingface" / "download"
    found = [notes / f"{file}.metadata"] if file else sorted(notes.rglob("*.metadata"))
    commits = {note.read_text(encoding="utf-8").split("\n")[0] for note in found if note.is_file()}
    commits = {commit for commit in commits if _COMMIT.fullmatch(commit)}
    return commits.pop() if len(commits) == 1 else "several revisions" if commits else ""

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

import yaml

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
_KINDS = (".parquet", ".jsonl", ".json")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class MissingDataError(ValueError):
    """Rows or media of a task that are not there; says how to get them."""


@dataclass(frozen=True)
class Rows:
    """Rows of a part of a task.

    revision: that they are of; "" if it is not known. source: tells the files that they are of apart.
    """

    rows: Sequence[dict[str, Any]]
    revision: str
    source: str


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
            files = _files(folder, config, task.split)
            return Rows(_read_files(files), _downloaded_revision(folder), _source(files))
    if (file := root / "video-tasks" / "data" / f"{task.rows}.jsonl").is_file() and task.rows:
        return Rows(_read_lines(file), _downloaded_revision(root, str(file.relative_to(root))), _source([file]))
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


def _files(folder: Path, config: str, split: str) -> list[Path]:
    """The files of a part of a copy of a Hub data set, by what its README says, else by their names.

    The copy is not handed to `datasets` as a folder, since that keeps rows by the folder's name: a changed file
    would not be read again.
    """
    declared = _declared(folder, config, split)
    if declared is not None:
        files = sorted({file for pattern in declared for file in folder.glob(pattern)})
    else:
        files = sorted(file for file in folder.rglob("*") if file.suffix in _KINDS and ".cache" not in file.parts)
        if config:
            files = [file for file in files if config in (file.stem, *file.parts) or file.stem.endswith(f"_{config}")]
        files = [file for file in files if split in file.stem] or files
    if not files:
        raise MissingDataError(f"{folder} holds no rows of {config or 'the data set'}, split {split!r}")
    return files


def _declared(folder: Path, config: str, split: str) -> list[str] | None:
    """Patterns of a split's files in the README's front matter; None if that says nothing of them."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    parts = text.split("---\n")
    said = yaml.safe_load(parts[1]) if text.startswith("---\n") and len(parts) > 2 else {}
    configs = said.get("configs") or [] if isinstance(said, dict) else []
    for one in configs:
        is_wanted = one.get("config_name") == config if config else len(configs) == 1 or one.get("default")
        if not is_wanted:
            continue
        listed = one.get("data_files") or []
        listed = listed if isinstance(listed, list) else [listed]
        found = [part["path"] for part in listed if isinstance(part, dict) and part.get("split") == split]
        found += [part for part in listed if isinstance(part, str)]
        return [path for of_part in found for path in (of_part if isinstance(of_part, list) else [of_part])]
    return None


def _read_files(files: Sequence[Path]) -> Sequence[dict[str, Any]]:
    """Rows of files, which stay on disk; of files that have not changed since, those that were prepared before."""
    import datasets

    kind = "parquet" if files[0].suffix == ".parquet" else "json"
    try:
        return _undecoded(datasets.load_dataset(kind, data_files=list(map(str, files)), split="train"))
    except Exception as error:  # what data sets raise has no common class
        raise MissingDataError(f"{files[0]} cannot be read: {error}") from error


def _read_hub(task: Task, config: str) -> Rows:
    import datasets
    from huggingface_hub import HfApi

    try:
        revision = task.revision or str(HfApi().dataset_info(task.repository).sha)
    except Exception:  # without the network, what was downloaded before is read
        revision = ""
    try:
        rows = datasets.load_dataset(task.repository, config or None, split=task.split, revision=revision or None)
    except Exception as error:  # of the network, of the Hub, of data sets
        raise MissingDataError(f"{task.repository} cannot be read from the Hub: {error}") from error
    return Rows(_undecoded(rows), revision, f"{task.repository} {config} {revision}")


def _source(files: Sequence[Path]) -> str:
    """What tells files apart: their names, sizes and times of change."""
    return " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def _undecoded(rows: Any) -> Sequence[dict[str, Any]]:
    """Rows whose images stay files, since torchvision's and others' decoding is not plume's."""
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def _read_lines(file: Path) -> list[dict[str, Any]]:
    rows = []
    with file.open(encoding="utf-8", newline="\n") as lines:  # JSON may hold what else is the end of a line
        for number, line in enumerate(lines, start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
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

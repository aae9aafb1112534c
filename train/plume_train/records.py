"""Training rows: one JSON object per line, checked once, read again when needed.

The format is that of UME-sft (`qry` and `pos`), so that published data can be used as they are. A data set is
scanned at the start: every row is parsed and the headers of its images are read, so that a bad row is named by file
and line before a GPU is paid for; what is broken behind a header shows when the row is used. Only places in the file
are kept in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from plume.images import InputError, check_image_file
from plume.inputs import check_text
from plume.tokens import ANCHOR, READ_OUT
from plume_train.target import UnclosedTag, parse_written

_TASK_NAMES = ("dataset_name", "dataset", "subset", "source", "task_name")
_MEDIA_TAG = re.compile(r"<(image|video)>\n?")
_IMAGE_TAG = "<image>"

OnBadRow = Literal["error", "skip"]
UnclosedAnswerPolicy = Literal["error", "accept"]


class RowError(ValueError):
    """A row that cannot be used; names file and line, what was expected and what to do."""


@dataclass(frozen=True)
class Side:
    """Query or target of a row."""

    text: str
    images: tuple[Path, ...] = ()
    rationale: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Record:
    """A row. `target` is None where the row only teaches to write a rationale."""

    query: Side
    target: Side | None
    task: str
    where: str


@dataclass(frozen=True, kw_only=True)
class RecordFormat:
    """How rows are read."""

    media_root: Path
    """Folder that image paths are relative to."""
    needs_target: bool = True
    """Whether a row without `pos` is an error."""
    unclosed_answer: UnclosedAnswerPolicy = "error"
    """What to do with an `<answer>` that is never closed; the published data need "accept"."""

    def parse(self, line: str, where: str) -> Record:
        """Read one row.

        Args:
            line: the JSON text.
            where: how errors call the row, "file:line".

        Raises:
            RowError: anything that keeps the row from being used.
        """
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RowError(f"{where}: not a JSON object ({error}); one object per line is expected") from None
        if not isinstance(row, dict):
            raise RowError(f"{where}: a {type(row).__name__}; expected an object with 'qry' and 'pos'")
        query, target = (self._side(row, name, where) for name in ("qry", "pos"))
        if query is None:
            raise RowError(f"{where}: no query ('qry'); add one or drop the row")
        if target is None and self.needs_target:
            raise RowError(
                f"{where}: no target ('pos'); add one, drop the row, or set needs_target=false to train on rationales "
                "alone"
            )
        sides = [side for name in ("qry", "pos") if isinstance(side := _unwrap(row.get(name)), dict)]
        names = [holder[key] for holder in (row, *sides) for key in _TASK_NAMES if holder.get(key)]
        return Record(query, target, str(names[0]) if names else "", where)

    def _side(self, row: dict, name: str, where: str) -> Side | None:
        side = _unwrap(row.get(name))
        if side is None:
            return None
        if not isinstance(side, dict) or not isinstance(turns := side.get("conversations"), list):
            raise RowError(f"{where}: {name!r} has no list 'conversations'; see train/README.md for the format")
        if side.get("video") or side.get("videos"):
            raise RowError(f"{where}: {name!r} holds a video, which is not supported yet; drop the row")
        asked, written = _turns(turns, name, where)
        images = side.get("image") or side.get("images") or []
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
            raise RowError(f"{where}: 'image' of {name!r} is {images!r}; expected a path or a list of paths")
        if "<video>" in asked:
            raise RowError(f"{where}: {name!r} holds <video>, which is not supported yet; drop the row")
        if (tags := asked.count(_IMAGE_TAG)) != len(images):
            raise RowError(
                f"{where}: {name!r} has {len(images)} images but its text holds {tags} {_IMAGE_TAG}; expected one each"
            )
        text = _MEDIA_TAG.sub("", asked.split(f"\n{ANCHOR}")[0]).strip()
        try:
            check_text(text, f"{where}: {name!r}")
            rationale, answer = parse_written(written, self.unclosed_answer == "accept")
            check_text(rationale, f"{where}: the rationale of {name!r}")
            check_text(answer.replace(READ_OUT, ""), f"{where}: the answer of {name!r}")
        except InputError as error:
            raise RowError(str(error)) from None
        except UnclosedTag as error:
            raise RowError(f"{where}: {name!r}: {error}") from None
        if not text and not images:
            raise RowError(f"{where}: {name!r} has neither text nor image; add one or drop the row")
        return Side(text, tuple(self._find(path, name, where) for path in images), rationale, answer)

    def _find(self, path: str, name: str, where: str) -> Path:
        found = self.media_root / path
        if not found.is_file():
            raise RowError(f"{where}: {name!r} names {path}, but there is no file {found}; set media_root or drop it")
        try:
            check_image_file(found, f"{where}: {name!r}")
        except InputError as error:
            raise RowError(str(error)) from None
        return found


def _unwrap(side: Any) -> Any:
    return (side[0] if side else None) if isinstance(side, list) else side


def _turns(turns: list, name: str, where: str) -> tuple[str, str]:
    """The last text of the user and of the assistant."""
    texts = {"user": "", "assistant": ""}
    roles = {
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "system": "system",
    }
    for turn in turns:
        if not isinstance(turn, dict):
            raise RowError(f"{where}: a turn of {name!r} is a {type(turn).__name__}; expected an object")
        role, text = turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content") or ""
        if role not in roles or not isinstance(text, str):
            raise RowError(
                f"{where}: a turn of {name!r} has role {role!r} and a {type(text).__name__}; expected human or gpt and "
                "a string"
            )
        texts[roles[role]] = text
    return texts["user"], texts["assistant"]


class Records:
    """The usable rows of a JSONL file, read on demand.

    Example:
        >>> records = Records(getfixture("hops_folder") / "train.jsonl")
        >>> records[0].target.text != "", sorted(set(records.tasks))
        (True, ['hops/page-name', 'hops/page-picture'])
    """

    def __init__(
        self,
        file: str | Path,
        *,
        row_format: RecordFormat | None = None,
        on_bad_row: OnBadRow = "error",
        show_progress: bool = False,
    ):
        """Scan a file.

        Args:
            file: one JSON object per line; blank lines are allowed.
            row_format: how rows are read; by default with paths relative to the file's folder.
            on_bad_row: "error" stops at the first bad row, "skip" collects them in `bad_rows`.
            show_progress: whether to draw a progress bar.

        Raises:
            RowError: a bad row, unless skipped, or no usable row at all.
        """
        self.file = Path(file)
        self.format = row_format or RecordFormat(media_root=self.file.parent)
        self.bad_rows: list[str] = []
        self.tasks: list[str] = []
        self._places: list[tuple[int, int]] = []  # byte offset and line number
        for offset, number, line in self._lines(show_progress):
            try:
                record = self.format.parse(_decode(line, self.file.name, number), f"{self.file.name}:{number}")
            except RowError as error:
                if on_bad_row == "error":
                    raise
                self.bad_rows.append(str(error))
                continue
            self._places.append((offset, number))
            self.tasks.append(record.task)
        if not self._places:
            raise RowError(f"{self.file} holds no usable row; {len(self.bad_rows)} were bad")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        offset, number = self._places[index]
        with self.file.open("rb") as file:
            file.seek(offset)
            return self.format.parse(file.readline().decode("utf-8"), f"{self.file.name}:{number}")

    def _lines(self, show_progress: bool) -> Iterator[tuple[int, int, bytes]]:
        size = self.file.stat().st_size
        with (
            self.file.open("rb") as file,
            tqdm(
                total=size,
                desc=f"Checking {self.file.name}",
                unit="B",
                unit_scale=True,
                disable=not show_progress,
            ) as bar,
        ):
            offset = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield offset, number, line
                offset += len(line)
                bar.update(len(line))


def _decode(line: bytes, file: str, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"{file}:{number}: not UTF-8 ({error}); save the file as UTF-8") from None

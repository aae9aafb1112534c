"""Training data: rows of JSONL files, JSON arrays and Hugging Face data sets, checked once, read again when needed.

A data set is scanned at the start: every row is parsed and the headers of its images are read, so that a bad row is
named by file and line before a GPU is paid for; what is broken behind a header shows when the row is used. Of a JSONL
file only places are kept in memory.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol

from tqdm.auto import tqdm

from plume_train.data.rows import EMPTY, Record, RecordFormat, RowError, Side
from plume_train.data.scan_cache import Scan, cache_file, read_scan, write_scan

OnBadRow = Literal["error", "skip"]


class Source(Protocol):
    """Rows of one file or data set, by their number."""

    name: str

    def scan(self) -> Iterator[tuple[int, Any]]:
        """Number and parsed row of everything that it holds; a `RowError` in the place of a row that is not one."""
        ...

    def read(self, number: int) -> tuple[str, Any]:
        """Where a row stands, and the row."""
        ...


class JsonLines:
    """One JSON object per line; blank lines are allowed."""

    def __init__(self, file: Path):
        self.file = file
        self.name = file.name
        self._offsets: dict[int, int] = {}

    def scan(self) -> Iterator[tuple[int, Any]]:
        offset = 0
        with self.file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    self._offsets[number] = offset
                    yield number, self._parse(line, number)
                offset += len(line)

    def adopt(self, numbers: Sequence[int], offsets: Sequence[int]) -> None:
        """Take over where lines begin, from an earlier scan."""
        self._offsets = dict(zip(numbers, offsets, strict=True))

    def offset(self, number: int) -> int:
        """Where a line begins that has been scanned."""
        return self._offsets[number]

    def read(self, number: int) -> tuple[str, Any]:
        with self.file.open("rb") as lines:
            lines.seek(self._offsets[number])
            return f"{self.name}:{number}", self._parse(lines.readline(), number)

    def _parse(self, line: bytes, number: int) -> Any:
        where = f"{self.name}:{number}"
        try:
            return json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return RowError(f"{where}: not UTF-8 ({error}); save the file as UTF-8")
        except RecursionError:
            return RowError(f"{where}: nested deeper than a row can be; expected an object with 'query' and 'target'")
        except ValueError as error:  # also a number of more digits than Python reads
            cut = not line.endswith(b"\n")
            why = "the file ends in the middle of this line" if cut else "one object per line is expected"
            return RowError(f"{where}: not a JSON object ({error}); {why}")


class Table:
    """Rows that are in memory or in a Hugging Face data set."""

    def __init__(self, rows: Sequence[Any], name: str):
        self.rows = rows
        self.name = name

    def scan(self) -> Iterator[tuple[int, Any]]:
        for number in range(1, len(self.rows) + 1):
            yield number, self.rows[number - 1]

    def read(self, number: int) -> tuple[str, Any]:
        return f"{self.name}:{number}", self.rows[number - 1]


_READ_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_DATA_SUFFIXES = (*_READ_SUFFIXES, ".csv", ".tsv", ".txt", ".yaml", ".zip", ".gz")
_EXPECTED = "expected a file .jsonl, .json or .parquet, a folder that `datasets` has saved, or the name of a data set"


def check_source(place: str | Path) -> None:
    """Refuse training data that is not there, by its name alone; a data set on the Hub is not looked up.

    Raises:
        FileNotFoundError: says what there is, and what was expected.
    """
    path = Path(place)
    if re.match(r"[A-Za-z][\w+.-]+:/", str(place)):
        raise FileNotFoundError(f"{place} is an address; download the data, and name the path")
    is_local = len(path.parts) > 2 or (len(path.parts) > 1 and Path(path.parts[0]).is_dir())
    if not str(place) or (not path.exists() and (is_local or path.suffix in _DATA_SUFFIXES)):
        raise FileNotFoundError(f"there is nothing at {str(place)!r}; {_EXPECTED}")
    if path.is_dir() and not any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        raise FileNotFoundError(f"{place} is a folder that `datasets` has not saved; {_EXPECTED}")
    if path.is_file() and path.suffix not in _READ_SUFFIXES:
        raise FileNotFoundError(f"{place} is no data that plume knows; {_EXPECTED}")


def open_source(place: str | Path) -> Source:
    """Open training data.

    Args:
        place: a JSONL file, a JSON array, a parquet file, a folder that `datasets` saved, or the name of a data set on
            the Hub, "name" or "name:split" (the split is "train" where none is given).

    Raises:
        FileNotFoundError: see `check_source`.
        RowError: a JSON file that holds no array.
    """
    check_source(place)
    path = Path(place)
    if path.suffix in (".jsonl", ".ndjson"):
        return JsonLines(path)
    if path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except RecursionError:
            raise RowError(f"{path.name}: nested deeper than rows can be; expected an array of rows") from None
        except ValueError as error:
            raise RowError(
                f"{path.name}: not a JSON array ({error}); name a file of one object per line .jsonl"
            ) from None
        if not isinstance(rows, list):
            raise RowError(f"{path.name}: a {type(rows).__name__}; expected an array of rows, or one row per line")
        return Table(rows, path.name)
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{place} is no JSONL file, and reading other data needs `datasets`; pip install 'plume-embed[train]'"
        ) from None
    if path.is_dir():
        data: Any = datasets.load_from_disk(str(path))
        if isinstance(data, datasets.DatasetDict):
            if "train" not in data:
                raise RowError(f"{place} holds the splits {', '.join(map(str, data))}; name the folder of one of them")
            data = data["train"]
        return Table(_undecoded(data), path.name)
    if path.suffix == ".parquet":
        return Table(_undecoded(datasets.Dataset.from_parquet(str(path))), path.name)
    name, _, split = str(place).partition(":")
    return Table(_undecoded(datasets.load_dataset(name, split=split or "train")), str(place))


def _undecoded(data: Any) -> Any:
    """The data set with images as bytes, so that a broken one is a bad row and not the end of the scan."""
    import datasets

    for name, kind in data.features.items():
        inner = getattr(kind, "feature", kind)
        if isinstance(inner, datasets.Image):
            bare = datasets.Image(decode=False)
            data = data.cast_column(name, bare if inner is kind else datasets.List(bare))
    return data


class Records:
    """The usable rows of some data, read on demand.

    Example:
        >>> records = Records(getfixture("hops_folder") / "train.jsonl")
        >>> records[0].target.text != "", sorted(set(records.tasks))
        (True, ['hops/page-tiles-name', 'hops/page-tiles-picture'])
    """

    def __init__(
        self,
        data: str | Path | Sequence[str | Path],
        *,
        row_format: RecordFormat | None = None,
        on_bad_row: OnBadRow = "error",
        max_labels: int = 0,
        show_progress: bool = False,
    ):
        """Scan the data.

        Args:
            data: what `open_source` takes, or several of them.
            row_format: how rows are read.
            on_bad_row: "error" stops at the first bad row, "skip" collects them in `bad_rows`.
            max_labels: the targets of tasks that have at most so many distinct ones are kept in `labels`.
            show_progress: whether to draw a progress bar.

        Raises:
            RowError: a bad row, unless skipped, or no usable row at all.
        """
        places = [data] if isinstance(data, (str, Path)) else list(data)
        self.bad_rows: list[str] = []
        self.tasks: list[str] = []
        self.has_negatives = self.has_instructions = False
        self._groups: list[int | str | None] = []
        #: All distinct targets of tasks that have few.
        self.labels: dict[str, list[Side]] = {}
        #: Of those tasks, keys of the right targets of queries that have several.
        self.right_labels: dict[str, dict[int, tuple[int, ...]]] = {}
        self._targets: dict[str, dict[int, Side]] = defaultdict(dict)
        self._right: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        self._max_labels = max_labels
        #: Of all rows, what they say, and of the media that they name.
        self.digest = ""
        self._content = blake2b(digest_size=16)
        # Of each task up to two queries and two targets, which tell whether its pairs can be told apart.
        self._variety: dict[str, tuple[set[int], set[int]]] = defaultdict(lambda: (set(), set()))
        self._has_target: dict[str, bool] = {}
        self._sources: list[tuple[Source, RecordFormat]] = []
        self._places: list[tuple[int, int]] = []  # index of the source, number of the row
        for place in places:
            source, chosen = open_source(place), row_format or RecordFormat()
            chosen = replace(
                chosen,
                media_root=chosen.media_root or Path(place).parent,
                default_task=chosen.default_task or Path(place).stem,
            )
            self._sources.append((source, chosen))
            kept = None
            if isinstance(source, JsonLines) and not max_labels:  # whose rows would have to be read
                kept = cache_file(source.file, chosen, on_bad_row)
            scan = None if kept is None else read_scan(kept)
            if scan is None or not self._agrees(scan):
                scan, is_its_own = self._scan(source, chosen, on_bad_row, show_progress)
                if kept is not None and is_its_own:
                    write_scan(kept, scan)
            elif isinstance(source, JsonLines):
                source.adopt(scan.numbers, scan.offsets)
            self._take(scan)
        self.digest = self._content.hexdigest()
        self.labels = {task: list(found.values()) for task, found in self._targets.items() if len(found) <= max_labels}
        self.right_labels = {
            task: {query: tuple(sorted(keys)) for query, keys in self._right[task].items() if len(keys) > 1}
            for task in self.labels
        }
        self._targets.clear()
        self._right.clear()
        if not self._places:
            raise RowError(f"{', '.join(map(str, places))} holds no usable row; {len(self.bad_rows)} were bad")

    def __len__(self) -> int:
        return len(self._places)

    @property
    def groups(self) -> list[int | str | None]:
        """Group of each row; empty where no row has one."""
        return self._groups if any(group is not None for group in self._groups) else []

    def uniform_tasks(self) -> list[tuple[str, str]]:
        """Tasks in which no pair is unlike another in query and target, and which of them are all equal."""
        return [
            (task, "queries" if len(queries) < 2 else "targets")
            for task, (queries, targets) in sorted(self._variety.items())
            if self._has_target[task] and min(len(queries), len(targets)) < 2
        ]

    def empty(self, index: int) -> Record:
        """What takes the place of a row that cannot be read any more: the sides that its task has, without content."""
        task = self.tasks[index]
        source, number = self._places[index]
        where = f"{self._sources[source][0].name}:{number}"
        return Record(EMPTY, EMPTY if self._has_target[task] else None, task, where)

    def __getitem__(self, index: int) -> Record:
        source, number = self._places[index]
        origin, row_format = self._sources[source]
        where, row = origin.read(number)
        return row_format.read(row, where)

    def raw(self, index: int) -> Any:
        """A row as it was parsed, before it was read as a `Record`."""
        source, number = self._places[index]
        return self._sources[source][0].read(number)[1]

    def _agrees(self, scan: Scan) -> bool:
        """Whether tasks have the same sides as those that are known."""
        return all(self._has_target.get(task, has) == has for task, has in scan.has_target.items())

    def _take(self, scan: Scan) -> None:
        """Add the rows of the last source."""
        self._places += [(len(self._sources) - 1, number) for number in scan.numbers]
        self.tasks += scan.tasks
        self._groups += scan.groups
        self.bad_rows += scan.bad_rows
        self.has_negatives |= scan.has_negatives
        self.has_instructions |= scan.has_instructions
        self._has_target |= scan.has_target
        self._content.update(scan.digests)
        for task, keys in scan.variety.items():
            for known, more in zip(self._variety[task], keys, strict=True):
                known.update(more)

    def _scan(
        self, source: Source, row_format: RecordFormat, on_bad_row: OnBadRow, show_progress: bool
    ) -> tuple[Scan, bool]:
        """Read every row of a source; also whether what was found does not depend on the sources before it."""
        scan, is_its_own = Scan(), True
        for number, row in tqdm(source.scan(), desc=f"Checking {source.name}", unit=" rows", disable=not show_progress):
            try:
                if isinstance(row, RowError):
                    raise row
                record = row_format.read(row, f"{source.name}:{number}")
                task, has = record.task, record.target is not None
                # Rows of a task meet in batches, on all processes, and must have the same sides there.
                if self._has_target.get(task, scan.has_target.setdefault(task, has)) != has:
                    is_its_own = is_its_own and scan.has_target[task] != has
                    told = "a target" if has else "no target"
                    raise RowError(
                        f"{record.where} has {told}, unlike the rows of task {task!r} before it; give it another task"
                    )
            except (RowError, RecursionError) as error:
                if isinstance(error, RecursionError):
                    error = RowError(f"{source.name}:{number}: nested deeper than a row can be; drop it")
                if on_bad_row == "error":
                    raise error from None
                scan.bad_rows.append(str(error))
                continue
            scan.numbers.append(number)
            if isinstance(source, JsonLines):
                scan.offsets.append(source.offset(number))
            scan.tasks.append(task)
            scan.groups.append(record.batch_group)
            scan.digests += record.digest
            scan.has_negatives |= bool(record.negatives)
            scan.has_instructions |= bool(record.query.instruction or (record.target and record.target.instruction))
            if record.target is not None and len(of_task := self._targets[task]) <= self._max_labels:
                of_task.setdefault(record.target.key, replace(record.target, rationale="", answer=""))
                self._right[task][record.query.key].add(record.target.key)
            for known, side in zip(scan.variety.setdefault(task, ([], [])), (record.query, record.target), strict=True):
                if side is not None and len(known) < 2 and side.key not in known:
                    known.append(side.key)
        return scan, is_its_own

"""What a corpus consists of: files of a folder, or rows of tables."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from plume.inputs.errors import InputError
from plume.inputs.file_kinds import Kind, kind_of
from plume.search.folder import Found, Other, Skipped, digest, walk

#: Columns that are understood, and what they hold; the first that a table has is taken.
COLUMNS = {"text": Kind.TEXT, "image": Kind.IMAGE, "bytes": Kind.IMAGE, "path": None}


@dataclass(frozen=True)
class Entry:
    """Something to embed.

    name: below `root`. sha256: of the content. size, mtime_ns: as a file has them.
    content: of a row of a table; None: it lies at `root / name`, or at `path`.
    """

    root: str
    name: str
    kind: Kind
    sha256: str
    size: int
    mtime_ns: int
    path: str
    content: bytes | None = None


def entries(source: str, split: str = "train") -> Iterator[Entry | Skipped]:
    """What a source holds, in a fixed order, and what of it is left out.

    Args:
        source: a folder of files; a Parquet file, or a folder of them; a Lance table (`NAME.lance`); a data set that
            the library datasets has saved; or the name of one on the Hub. Tables have a column `text`, `image` (bytes,
            or as datasets holds images), `bytes` (of an image) or `path`.
        split: of a data set of the Hub.

    Raises:
        ValueError: there is no such source, or a table has none of these columns.
    """
    path = Path(source)
    if path.suffix == ".parquet" and path.is_file():
        return _of_tables(str(path.resolve()), _parquet([path]))
    if path.suffix == ".lance" and path.is_dir():
        return _of_tables(str(path.resolve()), _lance(path))
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file() or not path.exists():
        return _of_tables(source if not path.exists() else str(path.resolve()), _dataset(source, split))
    if path.is_dir():
        tables = sorted(path.glob("*.parquet"))
        return _of_tables(str(path.resolve()), _parquet(tables)) if tables else _of_files(path.resolve())
    raise ValueError(f"{source} is no source; expected a folder, a .parquet file, a .lance table or a data set")


def _of_files(root: Path) -> Iterator[Entry | Skipped]:
    for found in walk(root):
        if isinstance(found, Skipped):
            yield found
        if isinstance(found, Other | Skipped):
            continue
        yield _of_file(str(root), found)


def _of_file(root: str, found: Found) -> Entry | Skipped:
    kind = kind_of(found.path)
    assert kind is not None  # walk gives no others
    try:
        stat, sha256 = found.path.stat(), digest(found.path)
    except OSError as error:
        return Skipped(found.name, f"cannot be read ({error.strerror})")
    return Entry(root, found.name, kind, sha256, stat.st_size, stat.st_mtime_ns, str(found.path))


def _of_tables(root: str, batches: Iterator[tuple[str, Any]]) -> Iterator[Entry | Skipped]:
    """Rows of Arrow batches, each with the name of its table; called so with their number behind."""
    numbers: dict[str, int] = {}
    for table, batch in batches:
        column = next((name for name in COLUMNS if name in batch.schema.names), None)
        if column is None:
            raise ValueError(
                f"{root} has the columns {', '.join(batch.schema.names)}; expected one of {', '.join(COLUMNS)}"
            )
        for value in batch.column(column).to_pylist():
            number = numbers[table] = numbers.get(table, -1) + 1
            yield _of_row(root, f"{table}#{number}" if table else f"#{number}", column, value)


def _of_row(root: str, name: str, column: str, value: Any) -> Entry | Skipped:
    if isinstance(value, dict):  # as datasets holds images
        column, value = ("image", value["bytes"]) if value.get("bytes") else ("path", value.get("path"))
    if column == "path" and isinstance(value, str):
        path = Path(value) if Path(value).is_absolute() else Path(root).parent / value
        kind = kind_of(path)
        if kind is None or not path.is_file():
            return Skipped(name, f"{value} is no file that can be read")
        return _of_file(str(path.parent), Found(path, path.name))
    expected = str if column == "text" else bytes
    if not isinstance(value, expected):
        return Skipped(name, f"its {column} is a {type(value).__name__}; expected {expected.__name__}")
    content = value.encode("utf-8", "replace") if isinstance(value, str) else value
    kind = Kind.TEXT if column == "text" else Kind.IMAGE
    sha256 = hashlib.sha256(content).hexdigest()
    return Entry(root, name, kind, sha256, len(content), 0, f"{root}/{name}", content)


def _parquet(files: list[Path]) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    for file in files:
        with pyarrow.parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches():
                yield file.name, batch


def _lance(path: Path) -> Iterator[tuple[str, Any]]:
    import lancedb

    table = lancedb.connect(str(path.parent)).open_table(path.stem)
    for batch in table.search().limit(None).to_batches():
        yield "", batch


def _dataset(source: str, split: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ImportError("a data set needs the library datasets; pip install 'plume-embed[train]'") from None
    try:
        found: Any = datasets.load_from_disk(source) if Path(source).exists() else datasets.load_dataset(source)
    except Exception as error:  # whatever the library and the Hub raise
        raise ValueError(f"{source} is neither here nor a data set that can be loaded: {error}") from None
    if isinstance(found, dict):
        if split not in found:
            raise ValueError(f"{source} has the splits {', '.join(found)}; received {split!r}")
        found = found[split]
    table = found.with_format("arrow")
    return chain.from_iterable((("", batch) for batch in part.to_batches()) for part in table.iter(batch_size=1024))


def load(entry: Entry) -> Any:
    """What `documents` or `Item.parse` makes an input of.

    Raises:
        InputError: a file that is gone or has changed since it was planned, or a text that is no UTF-8.
    """
    if entry.content is None:
        path = Path(entry.path)
        try:
            stat = path.stat()
        except OSError as error:
            raise InputError(entry.name, f"cannot be read ({error.strerror})") from None
        if (stat.st_size, stat.st_mtime_ns) != (entry.size, entry.mtime_ns):
            raise InputError(entry.name, "has changed since it was planned; plan again")
        return path
    if entry.kind is not Kind.TEXT:
        return {"image": entry.content}
    try:
        return entry.content.decode()
    except UnicodeDecodeError:
        raise InputError(entry.name, "is not UTF-8") from None

"""What a corpus consists of: files of a folder, or rows of tables."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plume.inputs.errors import InputError
from plume.inputs.file_kinds import Kind, kind_of
from plume.search.folder import Found, Skipped, digest, stats_of, walk
from plume.search.store import TABLES

#: Columns that are embedded.
COLUMNS = ("text", "image", "bytes", "path")
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Entry:
    """Something to embed.

    root: the folder, or `table:` with what names a table. name: below it, of one thing only.
    sha256: of the content. size, mtime_ns: as a file has them.
    path: of its file; of a row that has none, `root/name`. content: of such a row; None: the file's.
    """

    root: str
    name: str
    kind: Kind
    sha256: str
    size: int
    mtime_ns: int
    path: str
    content: bytes | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes it the same as another."""
        return self.root, self.name, self.sha256


def entries(source: str, *, split: str = "train", column: str | None = None) -> Iterator[Entry | Skipped]:
    """What a source holds, in a fixed order, and what of it is left out.

    Args:
        source: a folder of files; a Parquet file, or a folder of them; a Lance table (`NAME.lance`); a data set that
            the library datasets has saved; or the name of one on the Hub. Rows of tables are called by their column
            `id`, whose values must differ, and by their number where there is none.
        split: of a data set.
        column: of a table: `text`, `image` (bytes, or as datasets holds images), `bytes` (of an image) or `path`; None
            takes the only one of these.

    Raises:
        ValueError: there is no such source, or no such column.
    """
    path = Path(source)
    if column is not None and column not in COLUMNS:
        raise ValueError(f"there is no kind of column {column!r}; expected one of {', '.join(COLUMNS)}")
    if path.suffix == ".parquet" and path.is_file():
        return _of_tables(path, "", column, _parquet([path]))
    if path.suffix == ".lance" and path.is_dir():
        return _of_tables(path, "", column, _lance(path))
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file() or not path.exists():
        return _of_tables(path, split, column, _dataset(source, split))
    if not path.is_dir():
        raise ValueError(f"{source} is no source; expected a folder, a .parquet file, a .lance table or a data set")
    tables = sorted(path.glob("*.parquet"))
    if not tables:
        return _of_files(path.resolve())
    if (
        file := next((found for found in walk(path) if isinstance(found, Found)), None)
    ) is not None and column != "path":
        raise ValueError(f"{source} holds {tables[0].name} and {file.name}; name the tables, or files, by themselves")
    return _of_tables(path, "", column, _parquet(tables))


def _of_files(root: Path) -> Iterator[Entry | Skipped]:
    for found in walk(root):
        if isinstance(found, Skipped):
            yield found
        elif isinstance(found, Found):
            yield _of_file(str(root), found.name, found.path)


def _of_file(root: str, name: str, path: Path) -> Entry | Skipped:
    kind = kind_of(path)
    if kind is None:
        return Skipped(name, f"{path.name} is of no kind that is read")
    try:
        stat, sha256 = path.stat(), digest(path)
    except OSError as error:
        return Skipped(name, f"cannot be read ({error.strerror})")
    return Entry(root, name, kind, sha256, stat.st_size, stat.st_mtime_ns, str(path))


def _of_tables(
    source: Path, split: str, column: str | None, batches: Iterator[tuple[str, Any]]
) -> Iterator[Entry | Skipped]:
    """Rows of Arrow batches, each with the name of its table."""
    place = source.resolve() if source.exists() else source
    root = f"{TABLES}{place}" + (f"[{split}]" if split else "")
    folder = place if place.is_dir() and place.suffix != ".lance" else place.parent
    numbers: dict[str, int] = {}
    for table, batch in batches:
        chosen = _column(root, batch.schema.names, column)
        ids = batch.column("id").to_pylist() if "id" in batch.schema.names else None
        for index, value in enumerate(batch.column(chosen).to_pylist()):
            number = numbers[table] = numbers.get(table, -1) + 1
            name = f"{table}#{number if ids is None else ids[index]}"
            yield _of_row(root, name, chosen, value, folder)


def _column(root: str, names: list[str], wanted: str | None) -> str:
    """The column that is embedded.

    Raises:
        ValueError: there is none, or more than one.
    """
    known = [name for name in COLUMNS if name in names]
    chosen = [name for name in known if wanted in (None, name)]
    if len(chosen) != 1:
        have = f"{root} has the columns {', '.join(names)}"
        raise ValueError(
            f"{have}; say which of {', '.join(known)} with --column"
            if len(known) > 1 and wanted is None
            else f"{have}; expected {wanted or 'one of ' + ', '.join(COLUMNS)}"
        )
    return chosen[0]


def _of_row(root: str, name: str, column: str, value: Any, folder: Path) -> Entry | Skipped:
    if isinstance(value, dict):  # as datasets holds images
        column, value = ("image", value["bytes"]) if value.get("bytes") else ("path", value.get("path"))
    if column == "path" and isinstance(value, str):
        return _of_file(root, name, folder / value)
    expected = bytes if column in ("image", "bytes") else str
    if not isinstance(value, expected):
        return Skipped(name, f"its {column} is a {type(value).__name__}; expected {expected.__name__}")
    content = value.encode("utf-8", "replace") if isinstance(value, str) else value
    kind = Kind.TEXT if column == "text" else Kind.IMAGE
    return Entry(root, name, kind, hashlib.sha256(content).hexdigest(), len(content), 0, f"{root}/{name}", content)


def _parquet(files: list[Path]) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    for file in files:
        with pyarrow.parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(batch_size=_ROWS_AT_ONCE):
                yield file.name, batch


def _lance(path: Path) -> Iterator[tuple[str, Any]]:
    import lancedb

    table = lancedb.connect(str(path.parent)).open_table(path.stem)
    for batch in table.search().limit(None).to_batches(_ROWS_AT_ONCE):
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
    for part in found.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        for batch in part.to_batches():
            yield "", batch


def has_changed(entry: Entry) -> bool:
    """Whether the file of an entry holds something else than when it was planned."""
    if entry.content is not None:
        return False
    path = Path(entry.path)
    try:
        return stats_of(path)[:2] != (entry.size, entry.mtime_ns) and digest(path) != entry.sha256
    except OSError:
        return True


def load(entry: Entry) -> Any:
    """What `documents` or `Item.parse` makes an input of.

    Raises:
        InputError: a file that is gone or has changed since it was planned, or a text that is no UTF-8.
    """
    if entry.content is None:
        path = Path(entry.path)
        if not path.is_file():
            raise InputError(entry.name, "is not there any more")
        if has_changed(entry):
            raise InputError(entry.name, "has changed since it was planned; plan again")
        return path
    if entry.kind is not Kind.TEXT:
        return {"image": entry.content}
    try:
        return entry.content.decode()
    except UnicodeDecodeError:
        raise InputError(entry.name, "is not UTF-8") from None

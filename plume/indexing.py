"""Bringing an index up to date with a folder: what is new, what has moved, what is gone.

Content decides, by its SHA-256: files with the same bytes and kind are embedded once, and content that has a row is not
embedded again, wherever it has moved. Windows of rows are committed as they are embedded, and nothing is deleted before
the walk is done, so that a run that is killed goes on where it stopped and loses nothing.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from plume.documents import pages
from plume.files import Found, Kind, Other, Skipped, digest, kind_of, walk
from plume.images import InputError
from plume.inputs import MAX_TEXT_BYTES, Item, read_text

if TYPE_CHECKING:
    from plume.embedder import Plume
    from plume.index import Index

_THUMBNAIL_SIDE = 192
_EXCERPT_LENGTH = 200
# A window is embedded and committed together: at most this many rows or tokens.
_ROWS_PER_WINDOW, _TOKENS_PER_WINDOW = 128, 65_536
# How many contents are copied, and files deleted, by one statement.
_CONTENTS_PER_COPY, _FILES_PER_DELETION = 64, 128


@dataclass
class Report:
    """What a run did.

    embedded: rows that were embedded. reused: rows whose vector was there already, under another name.
    removed: rows of files that are gone or have changed. unchanged: files that needed nothing.
    skipped: files and pages that could not be read, with the reason.
    others: files of kinds that plume does not read, how many of each.
    gone: folders in the index that are not there any more, with their rows, which lead nowhere. Where one has moved to
    the folder that was indexed, its rows were reused; `Index.remove` forgets the old ones.
    """

    embedded: int = 0
    reused: int = 0
    removed: int = 0
    unchanged: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    gone: dict[str, int] = field(default_factory=dict)


@dataclass
class _Content:
    """Files with the same bytes and kind, which are embedded once.

    stats: size, time of change of the content and of the entry of each file, from before its content was looked at.
    rows: pages that have a row in the index, and the files whose rows they are.
    """

    sha256: str
    kind: Kind
    files: list[Found] = field(default_factory=list)
    stats: list[tuple[int, int, int]] = field(default_factory=list)
    rows: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))


@dataclass(frozen=True)
class _Unit:
    """What becomes one row of each of its files."""

    content: _Content
    raw: Any
    page: int = 0  # 0: not a page
    num_pages: int = 1

    @property
    def names(self) -> list[str]:
        suffix = f", page {self.page}" if self.page else ""
        return [file.name + suffix for file in self.content.files]


def update_index(
    index: Index, folder: Path, plume: Plume, *, batch_size: int = 32, show_progress: bool | None = None
) -> Report:
    """See `Index.update`."""
    index.check_embedder(plume)
    root = folder.resolve()
    if not root.is_dir():
        raise ValueError(f"{folder} is no folder; expected one with files to index")
    with index.locked():
        _check_root(index, root)
        index.drop_doubled()
        return _update(index, root, plume, batch_size, None if show_progress is None else not show_progress)


def _check_root(index: Index, root: Path) -> None:
    """Refuse a folder inside or around one that is in the index already: each file has one root."""
    for name in {row["root"] for row in index.rows(["root"])}:
        other = Path(name)
        if other != root and (other in root.parents or root in other.parents):
            raise ValueError(
                f"{root} and {other}, which is in the index, overlap; index {other} again, or remove it "
                "from the index first (--forget)"
            )


def _update(index: Index, root: Path, plume: Plume, batch_size: int, hide_progress: bool | None) -> Report:
    report = Report()
    rows = index.rows(["name", "sha256", "page", "num_pages", "size", "mtime_ns"], root)
    contents, current, touched = _find_work(index, root, rows, report, hide_progress)
    index.touch(root, touched)
    report.reused += _copy_known(index, root, contents)
    processor = plume.plume_model.processor
    assert processor is not None
    window: list[tuple[_Unit, Item]] = []
    tokens = 0
    for content in tqdm(contents, desc="Indexing", unit="file", disable=hide_progress):
        for unit in _units(content, report):
            if unit.page in content.rows:
                continue
            try:
                item = processor.parse(unit.raw, unit.names[0]).instructed(index.identity.instruction)
                length = processor.num_tokens(item, unit.names[0])
            except InputError as error:
                _skip(report, unit.names, error, content)
                continue
            if _has_changed(content):
                # What was read need not be what was hashed, whose vector the hash would be for all times.
                _leave_for_later(report, content, current)
                break
            window.append((unit, item))
            tokens += length
            if len(window) == _ROWS_PER_WINDOW or tokens > _TOKENS_PER_WINDOW:
                _add(index, root, window, plume, batch_size, report)
                window, tokens = [], 0
    if window:
        _add(index, root, window, plume, batch_size, report)
    report.removed = _remove_stale(index, root, rows, current)
    index.compact(wipe=report.removed > 0)
    report.gone = index.gone()
    return report


def _stats_of(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _has_changed(content: _Content) -> bool:
    """Whether the file that is read for a content has been written to since its content was hashed."""
    try:
        return _stats_of(content.files[0].path) != content.stats[0]
    except OSError:
        return True


def _leave_for_later(report: Report, content: _Content, current: dict[str, str | None]) -> None:
    for file in content.files:
        report.skipped.append(Skipped(file.name, "was written to while it was read; run this again"))
        current[file.name] = None  # what the index has of it stays


def _find_work(
    index: Index, root: Path, rows: Sequence[dict[str, Any]], report: Report, hide_progress: bool | None
) -> tuple[list[_Content], dict[str, str | None], dict[tuple[str, str], tuple[int, int]]]:
    """The contents that need work; the content of every file by name; and files that were touched without a change.

    A content is None where it cannot be told. What cannot be told of a folder stands under the name of the folder.
    """
    pages_of: dict[tuple[str, str], set[int]] = defaultdict(set)
    num_pages: dict[tuple[str, str], int] = {}
    by_stat: dict[tuple[str, int, int], str] = {}
    for row in rows:
        key = row["name"], row["sha256"]
        pages_of[key].add(row["page"])
        num_pages[key] = row["num_pages"]
        by_stat[row["name"], row["size"], row["mtime_ns"]] = row["sha256"]

    contents: dict[tuple[str, Kind], _Content] = {}
    current: dict[str, str | None] = {}
    touched: dict[tuple[str, str], tuple[int, int]] = {}
    found_files = walk(root, leave_out=index.path.resolve())
    for found in tqdm(found_files, desc="Looking", unit="file", disable=hide_progress):
        if isinstance(found, Other):
            report.others[found.kind] += 1
            continue
        if isinstance(found, Skipped):
            report.skipped.append(found)
            if not found.is_known:
                current[found.name] = None
            continue
        try:
            stats = _stats_of(found.path)
            kind = kind_of(found.path)
            if kind is Kind.TEXT and stats[0] > MAX_TEXT_BYTES:  # refused later, so that it need not be read
                reason = f"holds {stats[0]:,} bytes, more than {MAX_TEXT_BYTES:,}; split it"
                report.skipped.append(Skipped(found.name, reason, is_known=True))
                continue
            known = by_stat.get((found.name, *stats[:2]))
            sha = known or digest(found.path)
        except OSError as error:
            report.skipped.append(Skipped(found.name, f"cannot be read ({error.strerror})"))
            current[found.name] = None
            continue
        current[found.name] = sha
        if len(pages_of[found.name, sha]) == num_pages.get((found.name, sha)):
            report.unchanged += 1
            if known is None:
                touched[found.name, sha] = stats[:2]
            continue
        assert kind is not None  # walk gives no others
        content = contents.setdefault((sha, kind), _Content(sha, kind))
        content.files.append(found)
        content.stats.append(stats)
    for row in index.rows(["sha256", "kind", "page", "path"]) if contents else ():
        if (content := contents.get((row["sha256"], Kind(row["kind"])))) is not None:
            content.rows[row["page"]].add(row["path"])
    return list(contents.values()), current, touched


def _units(content: _Content, report: Report) -> Iterator[_Unit]:
    """What a file holds: itself, or its pages."""
    file = content.files[0]
    try:
        if content.kind is Kind.PDF:
            for page in pages(file.path, file.name):
                yield _Unit(content, page, page.page, page.num_pages)
        elif content.kind is Kind.TEXT:
            yield _Unit(content, read_text(file.path, file.name))
        else:
            yield _Unit(content, file.path)
    except InputError as error:
        _skip(report, [file.name for file in content.files], error, content)


def _skip(report: Report, names: Sequence[str], error: InputError, content: _Content) -> None:
    """List every file with this content, with the reason alone."""
    path = str(content.files[0].path)
    reason = str(error).removeprefix(names[0]).removeprefix(": ").strip()
    reason = reason.replace(f"{path} ", "").replace(path, "the file")
    report.skipped += [Skipped(name, reason) for name in names]


def _add(
    index: Index, root: Path, window: Sequence[tuple[_Unit, Item]], plume: Plume, batch_size: int, report: Report
) -> None:
    """Embed a window and commit its rows, one for each file that holds the content."""
    vectors = plume.encode_document(
        [item for _, item in window],
        instruction=index.identity.instruction,
        num_latent_steps=index.identity.num_latent_steps,
        batch_size=batch_size,
        show_progress_bar=False,
    )
    rows = [
        row for (unit, item), vector in zip(window, vectors, strict=True) for row in _rows_of(root, unit, item, vector)
    ]
    index.add(rows)
    report.embedded += len(window)
    report.reused += len(rows) - len(window)


def _rows_of(root: Path, unit: _Unit, item: Item, vector: np.ndarray) -> Iterator[dict[str, Any]]:
    content, thumbnail = unit.content, _thumbnail(item)
    for file, (size, mtime_ns, _) in zip(content.files, content.stats, strict=True):
        yield {
            "root": str(root),
            "name": file.name,
            "path": str(root / file.name),
            "kind": str(content.kind),
            "page": unit.page,
            "num_pages": unit.num_pages,
            "sha256": content.sha256,
            "size": size,
            "mtime_ns": mtime_ns,
            "excerpt": item.text[:_EXCERPT_LENGTH],
            "thumbnail": thumbnail,
            "vector": vector,
        }


def _copy_known(index: Index, root: Path, contents: Sequence[_Content]) -> int:
    """Give the rows of known contents to those of their files that lack them; the number of rows written."""
    known = {(content.sha256, content.kind): content for content in contents if content.rows}
    keys = sorted({sha for sha, _ in known})
    written = 0
    for start in range(0, len(keys), _CONTENTS_PER_COPY):
        new: dict[tuple[str, int], dict[str, Any]] = {}
        for row in index.rows_with(keys[start : start + _CONTENTS_PER_COPY]):
            if (content := known.get((row["sha256"], Kind(row["kind"])))) is None:
                continue
            for file, (size, time, _) in zip(content.files, content.stats, strict=True):
                path = str(root / file.name)
                if path not in content.rows[row["page"]]:
                    place = {"root": str(root), "name": file.name, "path": path, "size": size, "mtime_ns": time}
                    new[path, row["page"]] = {**row, **place}
        if new:
            index.add(new.values())
        written += len(new)
    return written


def _remove_stale(index: Index, root: Path, rows: Sequence[dict[str, Any]], current: dict[str, str | None]) -> int:
    """Delete rows of files that are gone or hold something else now; those that cannot be told stay."""
    untold = {name for name, sha in current.items() if sha is None}
    stale: dict[tuple[str, str], int] = defaultdict(int)
    for row in rows:
        name = row["name"]
        folders = {name.rsplit("/", depth)[0] for depth in range(1, name.count("/") + 1)}
        if current.get(name, "gone") != row["sha256"] and not untold & {name, *folders}:
            stale[name, row["sha256"]] += 1
    files = list(stale)
    for start in range(0, len(files), _FILES_PER_DELETION):
        index.delete(root, files[start : start + _FILES_PER_DELETION])
    return sum(stale.values())


def _thumbnail(item: Item) -> bytes:
    """A small JPEG of the first image, or of the middle of the first video; empty for text."""
    image = item.images[0] if item.images else item.videos[0].picture() if item.videos else None
    if image is None:
        return b""
    small = image.copy()
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()

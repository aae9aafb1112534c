"""Bringing an index up to date with a folder: what is new, what has moved, what is gone.

Content decides, by its SHA-256: files with the same bytes and kind are embedded once, and content that has a row is not
embedded again, wherever it has moved. Windows of rows are committed as they are embedded, and nothing is deleted before
the walk is done, so that a run that is killed goes on where it stopped and loses nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from plume.embedder.encode import in_windows, limits_of
from plume.embedder.plume import Plume
from plume.inputs.errors import InputError
from plume.inputs.file_kinds import Kind, kind_of
from plume.inputs.item import MAX_TEXT_BYTES, Item, MediaLimits
from plume.inputs.processor import PlumeProcessor
from plume.search.folder import Found, Other, Skipped, digest, stats_of, walk, walk_key
from plume.search.rows import Document, Splitter, about, excerpt_of
from plume.search.store import TABLES, RowStore

# A window is embedded and committed together: at most this many rows or tokens.
_ROWS_PER_WINDOW, _TOKENS_PER_WINDOW = 128, 65_536
# Texts of rows of an older version, which are read and committed together.
_TEXTS_PER_COMMIT = 1_024
# How many contents are copied, and files deleted, by one statement.
_CONTENTS_PER_COPY, _FILES_PER_DELETION = 64, 128
# Files whose contents are known together: equal ones among them are embedded once, others when the first has its rows.
_FILES_PER_LOOK = 1024


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

    def names(self, document: Document) -> list[str]:
        """How reports call a document, once for each file."""
        what = {Kind.PDF: "page", Kind.TEXT: "passage"}.get(self.kind, "clip")
        suffix = f", {what} {document.page}" if document.page else ""
        return [file.name + suffix for file in self.files]


class _Loaded(NamedTuple):
    """A document of a content that can be embedded."""

    content: _Content
    document: Document
    item: Item
    num_tokens: int


def update_store(
    store: RowStore,
    root: Path,
    plume: Plume,
    *,
    instruction: str,
    num_latent_steps: int,
    image_settings: Mapping[str, Any],
    splitter: Splitter,
    batch_size: int,
    hide_progress: bool | None,
) -> Report:
    """Bring the rows of a folder up to date; the store must be locked. See `Index.update`.

    Args:
        store: of the index.
        root: the folder, absolute.
        plume: the embedder.
        instruction: for every document.
        num_latent_steps: K of documents.
        image_settings: what `Plume.encode` is told of images.
        splitter: of long texts and videos.
        batch_size: inputs per pass.
        hide_progress: None hides bars outside of terminals.
    """
    check_root(store, root)
    store.drop_doubled()
    report = Report()
    look = _Look(store, root, report)
    processor = plume.plume_model.processor
    assert processor is not None
    limits = limits_of(processor, image_settings)
    with tqdm(total=look.count(), desc="Indexing", unit="file", disable=hide_progress) as progress:
        for files in in_windows(
            look.changed(progress), max_items=_FILES_PER_LOOK, max_tokens=_FILES_PER_LOOK, num_tokens=lambda _: 1
        ):
            contents = _contents(store, files)
            report.reused += _copy_known(store, root, contents)
            work = _load(contents, processor, limits, splitter, instruction, look, progress)
            for window in in_windows(
                work,
                max_items=_ROWS_PER_WINDOW,
                max_tokens=_TOKENS_PER_WINDOW,
                num_tokens=lambda loaded: loaded.num_tokens,
            ):
                vectors = plume.encode_document(
                    [loaded.item for loaded in window],
                    instruction=instruction,
                    num_latent_steps=num_latent_steps,
                    batch_size=batch_size,
                    show_progress_bar=False,
                    **image_settings,
                )
                pairs = zip(window, vectors, strict=True)
                new = [row for loaded, vector in pairs for row in _rows_of(root, loaded, vector)]
                store.add(new)
                report.embedded += len(window)
                report.reused += len(new) - len(window)
    report.removed = look.remove_stale()
    read_texts(store, root, splitter)
    store.compact(wipe=report.removed > 0)
    return report


def read_texts(store: RowStore, root: Path, splitter: Splitter) -> None:
    """Read the texts of rows that an older version has written, without embedding anything.

    Rows of a file that is not as it was, or cannot be read, are left for the next time.
    """
    read: list[dict[str, Any]] = []
    rows = sorted(store.without_text(root), key=itemgetter("name", "sha256"))
    for _, group in groupby(rows, key=itemgetter("name", "sha256")):
        pages = list(group)
        path, written = root / pages[0]["name"], (pages[0]["size"], pages[0]["mtime_ns"])
        try:
            if stats_of(path)[:2] != written:
                continue
            found = splitter.documents(path, pages[0]["name"], Kind(pages[0]["kind"]))
            texts = {document.page: document.text for document in found}
            if stats_of(path)[:2] != written:
                continue
        except (InputError, OSError):
            continue
        for row in pages:
            text = texts.get(row["page"], "" if row["kind"] != Kind.TEXT else None)
            if text is None:  # of other passages than there are now
                continue
            key = {name: row[name] for name in ("root", "name", "page", "sha256")}
            read.append({**key, "text": text, "excerpt": excerpt_of(text)})
        if len(read) >= _TEXTS_PER_COMMIT:
            store.amend(read)
            read = []
    store.amend(read)


def check_root(store: RowStore, root: Path) -> None:
    """Refuse a folder inside or around one that is in the index already: each file has one root.

    Raises:
        ValueError: names the other.
    """
    for (name,) in store.counts("root"):
        other = Path(name)
        if other != root and (other in root.parents or root in other.parents):
            raise ValueError(
                f"{root} and {other}, which is in the index, overlap; index {other} again, or remove it "
                "from the index first (--forget)"
            )


def _load(
    contents: Iterable[_Content],
    processor: PlumeProcessor,
    limits: MediaLimits,
    splitter: Splitter,
    instruction: str,
    look: _Look,
    progress: tqdm,
) -> Iterator[_Loaded]:
    """What is to be embedded, loaded; what cannot be read is listed in the report."""
    for content in contents:
        progress.update(len(content.files))
        file = content.files[0]
        try:
            for document in splitter.documents(file.path, file.name, content.kind):
                if document.page in content.rows:
                    continue
                names = content.names(document)
                try:
                    item = processor.fit(Item.parse(document.raw, names[0], limits).instructed(instruction), names[0])
                except InputError as error:
                    look.report.skipped += [Skipped(name, error.reason) for name in names]
                    continue
                if _has_changed(content):
                    # What was read need not be what was hashed, whose vector the hash would be for all times.
                    look.leave_for_later(content)
                    break
                yield _Loaded(content, document, item, processor.num_tokens(item))
        except InputError as error:
            look.report.skipped += [Skipped(one.name, error.reason) for one in content.files]


def _has_changed(content: _Content) -> bool:
    """Whether the file that is read for a content has been written to since its content was hashed."""
    try:
        return stats_of(content.files[0].path) != content.stats[0]
    except OSError:
        return True


class _Changed(NamedTuple):
    """A file that may need work: what it holds, and its stats from before that was looked at."""

    file: Found
    kind: Kind
    sha256: str
    stats: tuple[int, int, int]


class _Look:
    """The files of a folder beside the rows that the index has of them, both in the order of a walk.

    Rows wait as columns of Arrow, of which a few are turned into objects at a time.
    """

    def __init__(self, store: RowStore, root: Path, report: Report):
        self.store, self.root, self.report = store, root, report
        # Rows of files that are gone or hold something else, by name and SHA-256; and of what that cannot be told.
        self._stale: Counter[tuple[str, str]] = Counter()
        self._untold: set[str] = set()
        self._touched: dict[tuple[str, str], tuple[int, int]] = {}

    def count(self) -> int:
        """Files that will be looked at."""
        return sum(isinstance(found, Found) for found in self._walk())

    def changed(self, progress: tqdm) -> Iterator[_Changed]:
        """Files whose content has no rows under their name, or not all of them."""
        known = _Groups(self.store.by_name(self.root))
        for found in self._walk():
            if isinstance(found, Other):
                self.report.others[found.kind] += 1
            elif isinstance(found, Skipped):
                self._skip(found)
            else:
                rows = known.of(found.name, self._pass)
                changed = self._look_at(found, rows)
                if changed is None:
                    progress.update()
                else:
                    yield changed
        known.of(None, self._pass)
        self._touch()

    def leave_for_later(self, content: _Content) -> None:
        """Note that a content was written to while it was read; what the index has of its files stays."""
        for file in content.files:
            self._skip(Skipped(file.name, "was written to while it was read; run this again"))

    def remove_stale(self) -> int:
        """Delete rows of files that are gone or hold something else now; those that cannot be told stay."""
        gone: Counter[tuple[str, str]] = Counter()
        for (name, sha), count in self._stale.items():
            folders = {name.rsplit("/", depth)[0] for depth in range(1, name.count("/") + 1)}
            if not self._untold & {name, *folders}:
                gone[name, sha] = count
        files = list(gone)
        for start in range(0, len(files), _FILES_PER_DELETION):
            self.store.delete(self.root, files[start : start + _FILES_PER_DELETION])
        return gone.total()

    def _walk(self) -> Iterator[Found | Skipped | Other]:
        return walk(self.root, leave_out=self.store.path.resolve())

    def _look_at(self, found: Found, rows: Sequence[dict[str, Any]]) -> _Changed | None:
        """A file that needs work; None where its rows are complete, or it cannot be read."""
        try:
            stats = stats_of(found.path)
            kind = kind_of(found.path)
            assert kind is not None  # walk gives no others
            if kind is Kind.TEXT and stats[0] > MAX_TEXT_BYTES:  # refused later, so that it need not be read
                reason = f"holds {stats[0]:,} bytes, more than {MAX_TEXT_BYTES:,}; split it"
                self._skip(Skipped(found.name, reason, is_known=True))
                self._pass(rows)
                return None
            by_stat = {(row["size"], row["mtime_ns"]): row["sha256"] for row in rows}
            known = by_stat.get(stats[:2])
            sha = known or digest(found.path)
        except OSError as error:
            self._skip(Skipped(found.name, f"cannot be read ({error.strerror})"))
            return None
        self._pass([row for row in rows if row["sha256"] != sha])
        same = [row for row in rows if row["sha256"] == sha]
        if not same or len({row["page"] for row in same}) != same[0]["num_pages"]:
            return _Changed(found, kind, sha, stats)
        self.report.unchanged += 1
        if known is None:
            self._touched[found.name, sha] = stats[:2]
            if len(self._touched) == _FILES_PER_LOOK:
                self._touch()
        return None

    def _skip(self, skipped: Skipped) -> None:
        self.report.skipped.append(skipped)
        if not skipped.is_known:
            self._untold.add(skipped.name)

    def _pass(self, rows: Iterable[dict[str, Any]]) -> None:
        """Note rows that belong to nothing any more."""
        self._stale.update((row["name"], row["sha256"]) for row in rows)

    def _touch(self) -> None:
        self.store.touch(self.root, self._touched)
        self._touched = {}


class _Groups:
    """Rows by file, taken one file after the other in the order of a walk."""

    def __init__(self, rows: Iterable[dict[str, Any]]):
        self._groups = groupby(rows, key=itemgetter("name"))
        self._next = self._take()

    def of(self, name: str | None, pass_over: Callable[[Iterable[dict[str, Any]]], None]) -> list[dict[str, Any]]:
        """The rows of a file, after those of all files before it have been passed over; None stands behind all."""
        while self._next is not None and (name is None or walk_key(self._next[0]) < walk_key(name)):
            pass_over(self._next[1])
            self._next = self._take()
        if self._next is None or self._next[0] != name:
            return []
        rows, self._next = self._next[1], self._take()
        return rows

    def _take(self) -> tuple[str, list[dict[str, Any]]] | None:
        taken = next(self._groups, None)
        return None if taken is None else (taken[0], list(taken[1]))


def _contents(store: RowStore, files: Sequence[_Changed]) -> list[_Content]:
    """What some files hold, with the rows that the index has of that, under any name."""
    contents: dict[tuple[str, Kind], _Content] = {}
    for changed in files:
        content = contents.setdefault((changed.sha256, changed.kind), _Content(changed.sha256, changed.kind))
        content.files.append(changed.file)
        content.stats.append(changed.stats)
    for row in store.rows_with(sorted({sha for sha, _ in contents}), ["sha256", "kind", "page", "path"]):
        if (content := contents.get((row["sha256"], Kind(row["kind"])))) is not None:
            content.rows[row["page"]].add(row["path"])
    return list(contents.values())


def _rows_of(root: Path, loaded: _Loaded, vector: np.ndarray) -> Iterator[dict[str, Any]]:
    content = loaded.content
    same = about(loaded.item, content.kind, content.sha256, loaded.document, vector)
    for file, (size, mtime_ns, _) in zip(content.files, content.stats, strict=True):
        place = {"root": str(root), "name": file.name, "path": str(root / file.name)}
        yield {**place, "size": size, "mtime_ns": mtime_ns, **same}


def _copy_known(store: RowStore, root: Path, contents: Sequence[_Content]) -> int:
    """Give the rows of known contents to those of their files that lack them; the number of rows written."""
    known = {(content.sha256, content.kind): content for content in contents if content.rows}
    keys = sorted({sha for sha, _ in known})
    written = 0
    for start in range(0, len(keys), _CONTENTS_PER_COPY):
        new: dict[tuple[str, int], dict[str, Any]] = {}
        for row in store.rows_with(keys[start : start + _CONTENTS_PER_COPY]):
            if (content := known.get((row["sha256"], Kind(row["kind"])))) is None:
                continue
            for file, (size, time, _) in zip(content.files, content.stats, strict=True):
                path = str(root / file.name)
                if path not in content.rows[row["page"]]:
                    place = {"root": str(root), "name": file.name, "path": path, "size": size, "mtime_ns": time}
                    is_cut = row["root"].startswith(TABLES) and row.get("start") is None  # it may be its beginning
                    text = None if is_cut else row.get("text")
                    new[path, row["page"]] = {**row, **place, "text": text}
        if new:
            store.add(new.values())
        written += len(new)
    return written

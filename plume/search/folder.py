"""The files below a folder: which ones plume reads, and what is left out."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from plume.inputs.file_kinds import SUFFIXES


@dataclass(frozen=True)
class Found:
    """A file that plume reads.

    path: on disk.
    name: relative to the folder that was walked, with forward slashes.
    """

    path: Path
    name: str


@dataclass(frozen=True)
class Other:
    """A file of a kind that plume does not read."""

    name: str

    @property
    def kind(self) -> str:
        """What its name says of it.

        Example:
            >>> Other("a/B.ZIP").kind, Other("Makefile").kind
            ('.zip', 'without a suffix')
        """
        return Path(self.name).suffix.lower() or "without a suffix"


@dataclass(frozen=True)
class Skipped:
    """A file or folder that is left out, and why.

    is_known: whether it is sure that nothing of it belongs into an index; else what an index has of it stays.
    """

    name: str
    reason: str
    is_known: bool = False


def walk(folder: Path, leave_out: Path | None = None) -> Iterator[Found | Skipped | Other]:
    """The files below a folder in order of their names, and what is left out.

    Hidden files and folders are passed over. Links to files are read, links to folders are not followed, so that a
    loop of links ends.

    Args:
        folder: where to begin; an OSError if it cannot be read.
        leave_out: a folder below it that is passed over.
    """
    todo = [_entries(folder, "")]
    while todo:  # not by recursion: folders may be nested deeper than Python calls
        if (listed := next(todo[-1], None)) is None:
            todo.pop()
            continue
        entry, name = listed
        path = Path(entry.path)
        if not _is_unicode(entry.name):
            escaped = name.encode("utf-8", "backslashreplace").decode()
            yield Skipped(escaped, "its name is not valid Unicode; rename it", is_known=True)
            continue
        if entry.name.startswith(".") or path == leave_out:
            continue
        try:
            if entry.is_dir(follow_symlinks=False):
                todo.append(_entries(path, f"{name}/"))
                continue
            target = path.stat()
        except OSError as error:  # a folder that may not be read; a link to nowhere, or to itself
            is_folder = entry.is_dir(follow_symlinks=False)
            reason = "the folder cannot be read" if is_folder else "cannot be opened"
            yield Skipped(name, f"{reason} ({error.strerror})")
            continue
        if stat.S_ISDIR(target.st_mode):
            yield Skipped(name, "is a link to a folder, which is not followed", is_known=True)
        elif stat.S_ISREG(target.st_mode):
            yield Found(path, name) if path.suffix.lower() in SUFFIXES else Other(name)


def walk_key(name: str) -> str:
    r"""By which names stand in the order of a walk, where what a folder holds follows upon the folder.

    Example:
        >>> sorted(["a.txt", "a/b.txt", "a/b/c.txt"], key=walk_key)
        ['a/b/c.txt', 'a/b.txt', 'a.txt']
    """
    return name.replace("/", "\0")


def _entries(folder: Path, prefix: str) -> Iterator[tuple[os.DirEntry, str]]:
    """What a folder holds by name, each with its name from where the walk began."""
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    return iter([(entry, prefix + entry.name) for entry in listed])


def stats_of(path: Path) -> tuple[int, int, int]:
    """Size, time of change of the content, and of the entry of a file, which tell whether it has been written to."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_unicode(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

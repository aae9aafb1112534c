"""Which files plume reads, told by their names, and where they are."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from plume.video import is_animated


class Kind(StrEnum):
    """What a file holds."""

    TEXT = "text"
    IMAGE = "image"
    VIDEO = "video"
    PDF = "pdf"


TEXT_SUFFIXES = {".txt", ".md", ".rst"}
_JPEG_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"}
_PHONE_SUFFIXES = {".avif", ".heic", ".heif", ".hif"}
IMAGE_SUFFIXES = {".png", ".apng", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".jp2", ".ppm", ".pgm"}
IMAGE_SUFFIXES |= _JPEG_SUFFIXES | _PHONE_SUFFIXES
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"}
PDF_SUFFIXES = {".pdf"}
SUFFIXES = TEXT_SUFFIXES | IMAGE_SUFFIXES | VIDEO_SUFFIXES | PDF_SUFFIXES


def kind_of(path: Path) -> Kind | None:
    """The kind of a file by its name, None where plume does not read it. An animated GIF or WebP is a video.

    Example:
        >>> kind_of(Path("holiday/Beach.JPG")).value, kind_of(Path("a.zip"))
        ('image', None)
    """
    suffix = path.suffix.lower()
    if suffix in (".gif", ".webp") and path.is_file():
        try:
            return Kind.VIDEO if is_animated(path) else Kind.IMAGE
        except Exception:  # decoders of broken files raise anything; loading it says what is wrong
            return Kind.IMAGE
    for kind, suffixes in (
        (Kind.TEXT, TEXT_SUFFIXES),
        (Kind.IMAGE, IMAGE_SUFFIXES),
        (Kind.VIDEO, VIDEO_SUFFIXES),
        (Kind.PDF, PDF_SUFFIXES),
    ):
        if suffix in suffixes:
            return kind
    return None


@dataclass(frozen=True)
class Found:
    """A file that plume reads.

    path: on disk.
    name: relative to the folder that was walked, with forward slashes.
    """

    path: Path
    name: str


@dataclass(frozen=True)
class Skipped:
    """A file or folder that is left out, and why.

    is_known: whether it is sure that nothing of it belongs into an index; else what an index has of it stays.
    """

    name: str
    reason: str
    is_known: bool = False


def walk(folder: Path, leave_out: Path | None = None) -> Iterator[Found | Skipped]:
    """The files below a folder in order of their names, and what is left out.

    Hidden files and folders are passed over, files of other kinds too. Links to files are read, links to folders are
    not followed, so that a loop of links ends.

    Args:
        folder: where to begin.
        leave_out: a folder below it that is passed over.
    """
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        path = Path(entry.path)
        if not _is_unicode(entry.name):
            escaped = entry.name.encode("utf-8", "backslashreplace").decode()
            yield Skipped(escaped, "its name is not valid Unicode; rename it", is_known=True)
            continue
        if entry.name.startswith(".") or path == leave_out:
            continue
        if entry.is_dir(follow_symlinks=False):
            try:
                inside = list(walk(path, leave_out))
            except OSError as error:
                yield Skipped(entry.name, f"the folder cannot be read ({error.strerror})")
                continue
            for one in inside:
                yield replace(one, name=f"{entry.name}/{one.name}")
            continue
        try:
            target = path.stat()
        except OSError as error:  # a link to nowhere, or to itself
            yield Skipped(entry.name, f"cannot be opened ({error.strerror})")
            continue
        if stat.S_ISDIR(target.st_mode):
            yield Skipped(entry.name, "is a link to a folder, which is not followed", is_known=True)
        elif stat.S_ISREG(target.st_mode) and path.suffix.lower() in SUFFIXES:
            yield Found(path, entry.name)


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

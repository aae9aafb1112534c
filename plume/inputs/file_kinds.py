"""Which files plume reads, told by their names; nothing is imported or opened for it but animations."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path


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
ANIMATION_SUFFIXES = {".gif", ".webp"}
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
    if suffix in ANIMATION_SUFFIXES and path.is_file():
        from plume.inputs.video import is_animated

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


def names_a_file(text: str) -> bool:
    """Whether a text is the name of a file that plume reads, which whoever wrote it may have meant.

    Example:
        >>> names_a_file("a red kite"), names_a_file("nosuch.png")
        (False, False)
    """
    suffix = text[text.rfind(".") :].lower()
    return suffix in SUFFIXES and len(text) < 1000 and "\n" not in text and "\0" not in text and Path(text).is_file()


def as_typed(path: Path) -> str:
    """The name of a path; an address, whose two strokes a path joins to one, as it was.

    Example:
        >>> as_typed(Path("s3://bucket/a.png")), as_typed(Path("photos//a.png"))
        ('s3://bucket/a.png', 'photos/a.png')
    """
    return re.sub(r"^([A-Za-z][\w+.-]+):/(?!/)", r"\1://", str(path))


def why_not_read(path: Path) -> str | None:
    """Why a path is no file that plume reads, as far as its name tells; None where it is one.

    Example:
        >>> why_not_read(Path("/"))
        'it is a folder; name the files in it, or index it with `plume index`'
    """
    if path.is_dir():
        return "it is a folder; name the files in it, or index it with `plume index`"
    if not path.is_file():
        is_address = "://" in as_typed(path)
        return "it is an address; download the file, and name its path" if is_address else "there is no such file"
    if kind_of(path) is None:
        return f"it is of an unknown kind; expected one of {', '.join(sorted(SUFFIXES))}"
    return None

"""Which files plume reads, told by their names."""

from __future__ import annotations

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
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff"}
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"}
PDF_SUFFIXES = {".pdf"}
SUFFIXES = TEXT_SUFFIXES | IMAGE_SUFFIXES | VIDEO_SUFFIXES | PDF_SUFFIXES


def kind_of(path: Path) -> Kind | None:
    """The kind of a file by its name, None where plume does not read it. An animated GIF is a video.

    Example:
        >>> kind_of(Path("holiday/Beach.JPG")).value, kind_of(Path("a.zip"))
        ('image', None)
    """
    suffix = path.suffix.lower()
    if suffix == ".gif" and path.is_file():
        try:
            return Kind.VIDEO if is_animated(path) else Kind.IMAGE
        except (OSError, SyntaxError, ValueError):
            return Kind.IMAGE  # loading it says what is wrong
    for kind, suffixes in (
        (Kind.TEXT, TEXT_SUFFIXES),
        (Kind.IMAGE, IMAGE_SUFFIXES),
        (Kind.VIDEO, VIDEO_SUFFIXES),
        (Kind.PDF, PDF_SUFFIXES),
    ):
        if suffix in suffixes:
            return kind
    return None

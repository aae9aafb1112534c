"""Which files plume reads, told by their names."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from plume.inputs.video import is_animated


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

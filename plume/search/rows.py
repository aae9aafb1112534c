"""From what a file holds to the rows of an index: its documents, and what is said of each beside its vector."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from plume.inputs.file_kinds import Kind
from plume.inputs.item import Item, read_text
from plume.inputs.pages import pages

_THUMBNAIL_SIDE = 192
_EXCERPT_LENGTH = 200


class Document(NamedTuple):
    """What becomes a row: an input as `Item.parse` takes it, and which page of how many it is; 0: not a page."""

    raw: Any
    page: int = 0
    num_pages: int = 1


def documents(path: Path, name: str, kind: Kind) -> Iterator[Document]:
    """What a file holds: itself, or its pages.

    Args:
        path: of the file.
        name: how errors call it.
        kind: what it holds.

    Raises:
        InputError: it cannot be read.
    """
    if kind is Kind.PDF:
        for page in pages(path, name):
            yield Document(page, page.page, page.num_pages)
    else:
        yield Document(read_text(path, name) if kind is Kind.TEXT else path)


def about(item: Item, kind: Kind, sha256: str, document: Document, vector: np.ndarray) -> dict[str, Any]:
    """The columns of a row that do not depend on where its file is."""
    return {
        "kind": str(kind),
        "page": document.page,
        "num_pages": document.num_pages,
        "sha256": sha256,
        "excerpt": item.text[:_EXCERPT_LENGTH],
        "thumbnail": _thumbnail(item),
        "vector": vector,
    }


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

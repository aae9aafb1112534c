"""From what a file holds to the rows of an index: its documents, and what is said of each beside its vector."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from plume.inputs.errors import InputError
from plume.inputs.file_kinds import Kind
from plume.inputs.item import Item, read_text
from plume.inputs.pages import Page, pages

_THUMBNAIL_SIDE = 192
_EXCERPT_LENGTH = 200
# Characters of a text, and of the words, that a place for the excerpt is looked for in.
_LOOKED_THROUGH, _LOOKED_FOR = 100_000, 500


class Document(NamedTuple):
    """What becomes a row: an input as `Item.parse` takes it, and which page of how many it is; 0: not a page."""

    raw: Any
    page: int = 0
    num_pages: int = 1

    @property
    def text(self) -> str:
        """Its words, all of them: of a text, of a page of a PDF, of the text beside media; empty where it has none."""
        text: Any = self.raw
        if isinstance(self.raw, Page):
            try:
                text = self.raw.text()
            except InputError:  # the page itself can be embedded
                return ""
        elif isinstance(self.raw, dict):
            text = self.raw.get("text")
        return unicodedata.normalize("NFC", text) if isinstance(text, str) else ""


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
    text = document.text
    return {
        "kind": str(kind),
        "page": document.page,
        "num_pages": document.num_pages,
        "sha256": sha256,
        "text": text,
        "excerpt": excerpt_of(text),
        "thumbnail": _thumbnail(item),
        "vector": vector,
    }


def excerpt_of(text: str, words: str = "") -> str:
    """The beginning of a text, or the place where the longest of the words that it holds stands first.

    Example:
        >>> excerpt_of("what was " * 100 + "paid for INV-00042", "the inv-00042")[-18:]
        'paid for INV-00042'
    """
    if len(text) <= _EXCERPT_LENGTH or not words:
        return text[:_EXCERPT_LENGTH]
    plain, wanted = _plain(text[:_LOOKED_THROUGH]), set(re.findall(r"\w+", _plain(words[:_LOOKED_FOR])))
    longest = max((found for found in re.finditer(r"\w+", plain) if found[0] in wanted), key=_length, default=None)
    if longest is not None:  # long words say more
        place = longest.start()
    else:  # scripts without spaces
        place = next((at for word in sorted(wanted, key=len, reverse=True) if (at := plain.find(word)) >= 0), 0)
    start = max(0, min(place - _EXCERPT_LENGTH // 3, len(text) - _EXCERPT_LENGTH))
    return text[start : start + _EXCERPT_LENGTH]


def _length(found: re.Match[str]) -> int:
    return len(found[0])


def _plain(text: str) -> str:
    """A text of the same length without capitals and accents."""
    return text.lower() if text.isascii() else "".join(map(_plain_sign, text))


@lru_cache(maxsize=4_096)
def _plain_sign(sign: str) -> str:
    first, *rest = unicodedata.normalize("NFKD", sign)
    return (first if all(map(unicodedata.combining, rest)) else sign).lower()[0]


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

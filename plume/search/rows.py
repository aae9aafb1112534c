"""From what a file holds to the rows of an index: its documents, and what is said of each beside its vector."""

from __future__ import annotations

import io
import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from plume.inputs.errors import InputError
from plume.inputs.file_kinds import Kind
from plume.inputs.item import Item, read_text
from plume.inputs.pages import Page, pages
from plume.inputs.video import seconds_of

_THUMBNAIL_SIDE = 192
_EXCERPT_LENGTH = 200
_HEADING = re.compile(r"^#{1,6} .*$", re.MULTILINE)
_HEADINGS_ALONE = re.compile(r"\s*(#{1,6} [^\n]*\s*)*")
# Of a passage, which it shares with the one before.
_OVERLAP = 0.15
# Characters of a text, and of the words, that a place for the excerpt is looked for in.
_LOOKED_THROUGH, _LOOKED_FOR = 100_000, 500


class Document(NamedTuple):
    """What becomes a row: an input as `Item.parse` takes it.

    page: which page of how many it is, or which passage or clip; 0: the whole of a text, an image, a video.
    start, end: characters of a passage, a line's end counting as one; seconds of a clip.
    """

    raw: Any
    page: int = 0
    num_pages: int = 1
    start: float | None = None
    end: float | None = None

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


@dataclass(frozen=True)
class Splitter:
    """Parts of long texts and videos, which get rows of their own.

    passage_tokens: of a passage at most, without the headings above it; None: a text is one row.
    clip_seconds: of a clip; None: a video is one row.
    tokenizer: counts.
    """

    passage_tokens: int | None = None
    clip_seconds: float | None = None
    tokenizer: Any = None

    def documents(self, raw: Any, name: str, kind: Kind) -> Iterator[Document]:
        """What a file or a content holds: itself, its pages, passages, or clips beside the whole.

        Args:
            raw: a path, or what a table holds.
            name: how errors call it.
            kind: what it holds.

        Raises:
            InputError: it cannot be read.
        """
        if kind is Kind.PDF and isinstance(raw, Path):
            for page in pages(raw, name):
                yield Document(page, page.page, page.num_pages)
        elif kind is Kind.TEXT:
            yield from self._passages(read_text(raw, name) if isinstance(raw, Path) else raw)
        else:
            yield from self._clips(raw, kind)

    def _passages(self, text: Any) -> Iterator[Document]:
        if self.passage_tokens is None or not isinstance(text, str):
            yield Document(text)
            return
        parts = [part for part in self._cutter.chunk_indices(text) if not _HEADINGS_ALONE.fullmatch(part[1])]
        if len(parts) < 2:
            yield Document(text)
            return
        headings = [(found.start(), found[0]) for found in _HEADING.finditer(text)]
        for number, (start, passage) in enumerate(parts, start=1):
            above = "".join(f"{heading}\n" for heading in headings_above(headings, start))
            yield Document(above + passage, number, len(parts), start, start + len(passage))

    @cached_property
    def _cutter(self) -> Any:
        """Of semantic-text-splitter: at headings, then paragraphs, sentences, words, as large as they may be."""
        try:
            from semantic_text_splitter import MarkdownSplitter
        except ImportError:
            raise ImportError("passages need semantic-text-splitter; pip install 'plume-embed[index]'") from None
        from tokenizers import Tokenizer

        counter = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        counter.no_truncation()
        counter.no_padding()
        assert self.passage_tokens is not None
        overlap = round(_OVERLAP * self.passage_tokens)
        return MarkdownSplitter.from_huggingface_tokenizer(counter, self.passage_tokens, overlap=overlap)

    def _clips(self, raw: Any, kind: Kind) -> Iterator[Document]:
        seconds = seconds_of(raw) if kind is Kind.VIDEO and self.clip_seconds and isinstance(raw, Path) else None
        if self.clip_seconds is None or seconds is None or seconds <= self.clip_seconds:
            yield Document(raw)
            return
        length, stride = self.clip_seconds, self.clip_seconds / 2
        count = math.ceil((seconds - length) / stride - 1e-6) + 1  # the last one ends with the video
        yield Document(raw, 0, count + 1)
        for number in range(count):
            start = number * stride
            end = min(start + length, seconds)
            clip = {"video": raw, "start": start, "end": None if end == seconds else end}
            yield Document(clip, number + 1, count + 1, start, end)


def headings_above(headings: list[tuple[int, str]], start: int) -> list[str]:
    """Headings of Markdown that a passage stands under, the highest first.

    Args:
        headings: place and line of each, in their order.
        start: of the passage.

    Example:
        >>> headings_above([(0, "# a"), (10, "## b"), (20, "## c"), (30, "# d")], 25)
        ['# a', '## c']
    """
    above: list[str] = []
    for place, line in headings:
        if place >= start:
            break
        depth = len(line) - len(line.lstrip("#"))
        above = [one for one in above if len(one) - len(one.lstrip("#")) < depth] + [line]
    return above


def about(item: Item, kind: Kind, sha256: str, document: Document, vector: np.ndarray) -> dict[str, Any]:
    """The columns of a row that do not depend on where its file is."""
    text = document.text
    return {
        "kind": str(kind),
        "page": document.page,
        "num_pages": document.num_pages,
        "start": document.start,
        "end": document.end,
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

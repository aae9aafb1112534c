"""What a user may pass as one input, checked and loaded: text, images, video, pages, or any mixture of them."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from plume.inputs.errors import InputError, located, no_file
from plume.inputs.file_kinds import VIDEO_SUFFIXES, Kind, kind_of, why_not_read
from plume.inputs.images import BACKGROUND, BYTES, MAX_PIXELS, is_data_uri, load_image
from plume.inputs.pages import Page, pages
from plume.inputs.video import Sampling, Video, load_video

_ACCEPTED = (
    "a string, a PIL image, a plume.Page, a pathlib.Path, an array of pixels, the bytes of an image, chat messages, or "
    'a dict with "text", "image", "video" and "instruction"'
)
_SAMPLES = ("fps", "max_frames", "start", "end")
_KEYS = ("text", "image", "video", "instruction", *_SAMPLES)

#: Longer text files are refused before they are read; no model takes a tenth of it.
MAX_TEXT_BYTES = 2**20

Part = str | Image.Image | Video
"""A piece of an input, in the place where the model reads it."""


@dataclass(frozen=True)
class MediaLimits:
    """How large images and videos may be, and how they are read.

    pixels: the fewest and the most pixels of an image or a page; None leaves images as they are.
    background: colour behind transparent pixels; see `load_image`.
    sampling: frames of a video.
    takes_empty: whether an input without content is an empty text, rather than an error.
    """

    pixels: tuple[int, int] | None = None
    background: str | None = BACKGROUND
    sampling: Sampling = field(default_factory=Sampling)
    takes_empty: bool = False


@dataclass(frozen=True)
class Item:
    """One input, loaded: text, RGB images and video in the order in which the model reads them.

    content: strings, images and videos; in training, paths to images that are loaded later.
    instruction: what to do with the input; stands before its first text.
    """

    content: tuple[Any, ...]
    instruction: str = ""

    @property
    def text(self) -> str:
        """All its text."""
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def is_empty(self) -> bool:
        """Whether it holds no media, and no text but white space."""
        return not any(part.strip() if isinstance(part, str) else part for part in self.content)

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """Its images, in order."""
        return tuple(part for part in self.content if not isinstance(part, (str, Video)))

    @property
    def videos(self) -> tuple[Video, ...]:
        """Its videos, in order."""
        return tuple(part for part in self.content if isinstance(part, Video))

    @property
    def modality(self) -> str:
        """The kinds it holds, for example "image+text"."""
        kinds = ("image",) * bool(self.images) + ("video",) * bool(self.videos) + ("text",) * bool(self.text)
        return "+".join(kinds)

    @classmethod
    def parse(cls, raw: Any, name: str = "the input", limits: MediaLimits | None = None) -> Item:
        """Check and load what a user passed.

        Args:
            raw: one of

                - a string: always text, never a path; tokens that steer the model are text too where it mentions them;
                - a PIL image; a `Page` of a document; the bytes of an image file, or a dict with "bytes" or "path";
                - a `pathlib.Path` to an image, a video, or a text file (an animated GIF or WebP is a video);
                - an array or tensor of uint8: of two or three axes an image, `[H, W]`, `[H, W, C]` or `[C, H, W]`; of
                  four axes one video, `[T, H, W, C]` or `[T, C, H, W]`, never a batch of images;
                - a dict with any of "text", "image" and "video" (each one or a list) and "instruction"; media stand
                  before text, whatever the order of the keys. "fps" and "max_frames" sample its videos, "start" and
                  "end" are the seconds between which they do;
                - chat messages: a message with "role" and "content", or a list of them, with parts such as
                  `{"type": "image", "image": ...}` in any order. System messages are instructions.

                An image is a PIL image, a path, a URL, a data URI, bytes or an array; a video is a file, or its frames.
            name: how errors call the input, for example "input 3".
            limits: limits of media; larger ones are reduced as they are loaded.

        Raises:
            InputError: an unsupported type, an empty input, unknown keys, a file that is missing, unreadable or
                too large.

        Example:
            >>> item = Item.parse({"text": "a red kite", "instruction": "Find the bird:"})
            >>> item.content, item.instruction
            (('a red kite',), 'Find the bird:')
        """
        if isinstance(raw, Item):
            return raw
        limits = limits or MediaLimits()
        if is_messages(raw):
            item = _from_messages([raw] if isinstance(raw, Mapping) else raw, name, limits)
        elif isinstance(raw, Mapping) and not _is_file(raw):
            item = _from_dict(raw, name, limits)
        elif isinstance(raw, str):
            item = cls((raw,))
        elif isinstance(raw, Path):
            item = cls((_load_path(raw, name, limits),))
        elif isinstance(raw, Video) or (isinstance(raw, (np.ndarray, Tensor)) and raw.ndim == 4):
            item = cls((load_video(raw, limits.sampling, name, limits.background),))
        elif isinstance(raw, (Image.Image, Page, np.ndarray, Tensor, Mapping, *BYTES)):
            item = cls((_load_image(raw, name, limits),))
        else:
            raise InputError(name, f"it is a {type(raw).__name__}; expected {_ACCEPTED}")
        for text in (*(part for part in item.content if isinstance(part, str)), item.instruction):
            check_unicode(text, name)
        if item.is_empty and not limits.takes_empty:
            raise InputError(name, "it is empty; expected text that is not blank, an image, a page or a video")
        return item

    def instructed(self, instruction: str | None) -> Item:
        """The same input with this instruction, unless it has one of its own."""
        if self.instruction or not instruction:
            return self
        check_unicode(instruction, "the instruction")
        return replace(self, instruction=instruction)


def is_messages(raw: Any) -> bool:
    """Whether an input is a chat message, or a list of them, which is one input and not a batch."""
    if isinstance(raw, Mapping):
        return "role" in raw and "content" in raw
    return isinstance(raw, list) and bool(raw) and all(isinstance(m, Mapping) and is_messages(m) for m in raw)


def list_inputs(inputs: Any) -> tuple[Sequence[Any], bool]:
    """The inputs of a call, and whether it is one alone.

    Raises:
        InputError: a container whose items are no inputs, or whose order means nothing.

    Example:
        >>> list_inputs("a"), list_inputs(("a", "b"))
        ((['a'], True), (['a', 'b'], False))
    """
    single = (str, Mapping, Path, Image.Image, Item, Page, Video, *BYTES)
    # The items of a one-dimensional array are inputs; with more axes it is one, made of pixels.
    is_pixels = isinstance(inputs, (np.ndarray, Tensor)) and inputs.ndim > 1
    if isinstance(inputs, single) or is_messages(inputs) or is_pixels:
        return [inputs], True
    kind = type(inputs).__name__
    if hasattr(inputs, "columns"):
        raise InputError(
            "the inputs",
            f"they are a {kind}, whose items are its columns; expected a list of inputs: pass one column, or "
            'rows as dicts, for example frame["text"].tolist() or frame.to_dict("records")',
        )
    if isinstance(inputs, (set, frozenset)):
        raise InputError(
            "the inputs", f"they are a {kind}, which has no order; expected a list of them: pass sorted(inputs)"
        )
    if isinstance(inputs, io.IOBase):
        raise InputError(
            "the inputs", f"they are an open file ({kind}), whose items are its lines; pass file.read() or a path"
        )
    if (to_list := getattr(inputs, "to_pylist", None)) is not None:  # of Arrow, whose items are no Python objects
        inputs = to_list()
    try:
        return list(inputs), False
    except TypeError:
        raise InputError(
            "the inputs", f"they are a {kind}; expected one input or a list of them, each {_ACCEPTED}"
        ) from None


def check_unicode(text: str, name: str) -> None:
    """Refuse text that no tokenizer can read.

    Raises:
        InputError: it is not valid Unicode.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(name, f"the text is not valid Unicode ({error.reason}); clean it") from None


def _is_file(raw: Any) -> bool:
    """Whether this is a file as Hugging Face data sets hold it."""
    return isinstance(raw, Mapping) and bool(raw) and set(raw) <= {"bytes", "path"}


def _from_dict(raw: Mapping, name: str, limits: MediaLimits) -> Item:
    if unknown := [key for key in raw if key not in _KEYS]:
        raise InputError(name, f"it has unknown keys {unknown}; expected {', '.join(map(repr, _KEYS))}")
    instruction = raw.get("instruction") or ""
    if not isinstance(instruction, str):
        raise InputError(name, f'"instruction" is a {type(instruction).__name__}; expected a string')
    if any(raw.get(key) is not None for key in _SAMPLES):
        limits = replace(limits, sampling=_sampled(raw, limits.sampling, name))
    if raw.get("video") is None and (key := next((key for key in ("start", "end") if raw.get(key) is not None), None)):
        raise InputError(name, f'it has "{key}" and no "video" of which a part could be taken')
    media: list[Any] = []
    for key in raw:
        if key in ("image", "video") and isinstance(raw[key], (list, tuple)) and not raw[key]:
            raise InputError(
                name,
                f'"{key}" is an empty {type(raw[key]).__name__}; expected one {key} or several; where there is '
                "none leave it out",
            )
        if key == "image" and raw[key] is not None:
            media += [_load_image(image, name, limits) for image in _images_of(raw[key], name)]
        elif key == "video" and raw[key] is not None:
            media += [load_video(video, limits.sampling, name, limits.background) for video in _videos_of(raw[key])]
    texts = "" if raw.get("text") is None else raw["text"]
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise InputError(name, f'"text" is a {type(texts).__name__}; expected a string or a list of strings')
    return Item((*media, *(text for text in texts if text)), instruction)


def _from_messages(messages: Sequence[Mapping], name: str, limits: MediaLimits) -> Item:
    content: list[Any] = []
    instructions: list[str] = []
    for message in messages:
        role, parts = message["role"], message["content"]
        if role not in ("system", "user"):
            raise InputError(name, f"it has a message of role {role!r}; plume embeds system and user messages")
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
            raise InputError(name, f"the content of a message is {parts!r:.80}; expected a string or a list of parts")
        for part in parts:
            loaded = _from_part(part, name, limits)
            texts = [text for text in loaded if isinstance(text, str)]
            if role == "user":
                content += loaded
            elif len(texts) == len(loaded):
                instructions += [text.strip() for text in texts]
            else:
                raise InputError(name, "a system message holds media; put them into the user message")
    return Item(
        tuple(part for part in content if not isinstance(part, str) or part), " ".join(filter(None, instructions))
    )


def _from_part(part: Mapping, name: str, limits: MediaLimits) -> list[Part]:
    """Load one part of a message, as transformers and OpenAI's format write them; it may hold several media."""
    kind = str(part.get("type", "text")).removesuffix("_url")
    if kind not in ("text", "image", "video"):
        raise InputError(name, f'it has a part of type {part.get("type")!r}; expected "text", "image" or "video"')
    keys = (kind, f"{kind}_url", "url", "path", "base64")
    value = next((part[key] for key in keys if part.get(key) is not None), None)
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]
    if value is None:
        raise InputError(name, f"it has a part of type {kind!r} without content; expected a key {kind!r}")
    if kind == "text":
        if not isinstance(value, str):
            raise InputError(name, f'"text" is a {type(value).__name__}; expected a string')
        return [value]
    if "base64" in part and isinstance(value, str) and not is_data_uri(value):
        value = f"data:;base64,{value}"
    if kind == "image":
        return [_load_image(image, name, limits) for image in _images_of(value, name)]
    if any(part.get(key) is not None for key in _SAMPLES):
        limits = replace(limits, sampling=_sampled(part, limits.sampling, name))
    return [load_video(video, limits.sampling, name, limits.background) for video in _videos_of(value)]


def _load_path(path: Path, name: str, limits: MediaLimits) -> Part:
    if not path.is_file():
        raise no_file(name, path, "a file of text, an image or a video")
    kind = kind_of(path)
    if kind is Kind.IMAGE:
        return _load_image(path, name, limits)
    if kind is Kind.VIDEO:
        return load_video(path, limits.sampling, name, limits.background)
    if kind is Kind.TEXT:
        return read_text(path, name)
    if kind is Kind.PDF:
        raise InputError(
            located(name, path), f"it has pages, each an input of its own; pass plume.pages({str(path)!r})"
        )
    raise InputError(located(name, path), "it is of no kind that plume reads; rename it, or pass its content")


def read_text(path: Path, name: str) -> str:
    """A text file, UTF-8 with or without a mark at its start.

    Raises:
        InputError: it is not UTF-8, or blank.
    """
    where = located(name, path)
    try:
        if (size := path.stat().st_size) > MAX_TEXT_BYTES:
            raise InputError(where, f"it holds {size:,} bytes, more than {MAX_TEXT_BYTES:,}; split it")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(where, f"it is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise InputError(where, f"it cannot be read ({error.strerror})") from None
    if not text.strip():
        raise InputError(where, "it is empty; expected text that is not blank")
    return text


def _load_image(image: Any, name: str, limits: MediaLimits) -> Image.Image:
    if isinstance(image, Page):
        return image.render(limits.pixels[1] if limits.pixels else MAX_PIXELS, name)
    return load_image(image, name, limits.pixels, limits.background)


def _images_of(value: Any, name: str) -> Sequence[Any]:
    single = (str, os.PathLike, Image.Image, np.ndarray, Tensor, Page, *BYTES)
    if isinstance(value, single) or _is_file(value):
        return [value]
    if not isinstance(value, Sequence):
        raise InputError(name, f'"image" is a {type(value).__name__}; expected an image, a path, or a list')
    return value


def _videos_of(value: Any) -> Sequence[Any]:
    """One video, or several: a list of single frames is one video."""
    if not isinstance(value, (list, tuple)) or not value:
        return [value]
    return list(value) if all(_is_video(video) for video in value) else [value]


def _is_video(value: Any) -> bool:
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value).lower().endswith(tuple(VIDEO_SUFFIXES))
    if isinstance(value, (np.ndarray, Tensor)):
        return value.ndim == 4
    return isinstance(value, (Video, list, tuple)) or (isinstance(value, Mapping) and not _is_file(value))


def _sampled(raw: Mapping, sampling: Sampling, name: str) -> Sampling:
    fps, most = raw.get("fps"), raw.get("max_frames")
    for key, value in (("fps", fps), ("max_frames", most)):
        if value is not None and not (isinstance(value, Real) and 0 < float(value) < math.inf):
            raise InputError(name, f"{key!r} is {value!r:.80}; expected a number above 0")
    if most is not None and (most != int(most) or most < 1):
        raise InputError(name, f"'max_frames' is {most!r}; expected a whole number from 1")
    start, end = 0.0 if raw.get("start") is None else raw["start"], raw.get("end")
    is_span = all(
        isinstance(one, Real) and not isinstance(one, bool) and math.isfinite(one)
        for one in (start, 0 if end is None else end)
    )
    if not is_span or start < 0 or (end is not None and end <= start):
        raise InputError(
            name, f'"start" is {start!r:.80} and "end" {end!r:.80}; expected seconds, and the end after the start'
        )
    sampling = replace(sampling, start=float(start), end=None if end is None else float(end))
    most = sampling.max_frames if most is None else int(most)
    if fps is None and sampling.fps is None:
        return replace(sampling, num_frames=min(sampling.num_frames, most), max_frames=most)
    return replace(sampling, fps=sampling.fps if fps is None else float(fps), max_frames=most)


def inputs_in_file(path: Path) -> list[tuple[str, Any]]:
    """What a file holds, as inputs with names: itself, or the pages of a PDF. Media are not read yet.

    Raises:
        InputError: no such file, a kind that plume does not read, a text or PDF that cannot be opened.

    Example:
        >>> path = getfixture("two_page_pdf")
        >>> [name.rpartition("/")[2] for name, _ in inputs_in_file(path)]
        ['two pages.pdf#page=1', 'two pages.pdf#page=2']
    """
    if (reason := why_not_read(path)) is not None:
        raise InputError(str(path), reason)
    kind = kind_of(path)
    if kind is Kind.PDF:
        return [(f"{path}#page={page.page}", page) for page in pages(path, str(path))]
    if kind is Kind.TEXT:
        return [(str(path), read_text(path, str(path)))]
    return [(str(path), path)]

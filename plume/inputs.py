"""What a user may pass as one input, checked and loaded: text, an image, or both with an instruction."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from plume.tokens import RESERVED

#: Larger images are refused before a pixel is decoded: about a quarter of a gigabyte as RGB.
MAX_IMAGE_PIXELS = 89_478_485
#: The image processor of Qwen2-VL refuses longer shapes.
MAX_ASPECT_RATIO = 200

_ACCEPTED = 'a string, a PIL image, a pathlib.Path to an image, or a dict with "text", "image" and "instruction"'


class InputError(ValueError):
    """An input that cannot be embedded; says which, what was expected and what to do."""


@dataclass(frozen=True)
class Item:
    """One input, loaded: RGB images in order, then text; either may be absent, not both."""

    text: str
    images: tuple[Image.Image, ...] = ()
    instruction: str = ""

    @classmethod
    def parse(cls, raw: Any, name: str = "the input") -> Item:
        """Check and load what a user passed.

        Args:
            raw: a string (always text, never a path), a PIL image, a `pathlib.Path` to an image file, or a dict
                with any of "text", "image" (one or a list) and "instruction".
            name: how errors call the input, for example "input 3".

        Raises:
            InputError: an unsupported type, an empty input, unknown keys, a file that is missing, unreadable or
                too large, or text that holds one of the model's own tokens.

        Example:
            >>> Item.parse({"text": "a red kite", "instruction": "Find the bird:"}).messages()[0]
            {'role': 'system', 'content': 'Find the bird:'}
        """
        if isinstance(raw, Item):
            return raw
        if isinstance(raw, str):
            raw = {"text": raw}
        elif isinstance(raw, (Image.Image, Path)):
            raw = {"image": raw}
        elif not isinstance(raw, Mapping):
            raise InputError(f"{name} is a {type(raw).__name__}; expected {_ACCEPTED}")

        if unknown := set(raw) - {"text", "image", "instruction"}:
            raise InputError(f'{name} has unknown keys {sorted(unknown)}; expected "text", "image", "instruction"')
        text, instruction = raw.get("text") or "", raw.get("instruction") or ""
        for key, value in (("text", text), ("instruction", instruction)):
            if not isinstance(value, str):
                raise InputError(f'{name}: "{key}" is a {type(value).__name__}; expected a string')
            check_text(value, name)
        media = raw.get("image")
        media = [] if media is None else media
        media = [media] if isinstance(media, (str, os.PathLike, Image.Image)) else media
        if not isinstance(media, Sequence):
            raise InputError(f'{name}: "image" is a {type(media).__name__}; expected an image, a path, or a list')
        if not media and not text.strip():
            raise InputError(f"{name} is empty; expected text that is not blank, or an image")
        return cls(text, tuple(load_image(one, name) for one in media), instruction)

    def instructed(self, instruction: str | None) -> Item:
        """The same input with this instruction, unless it has one of its own."""
        if self.instruction or not instruction:
            return self
        check_text(instruction, "the instruction")
        return replace(self, instruction=instruction)

    def messages(self) -> list[dict]:
        """The input as chat messages, as the processor's chat template reads them."""
        content: list[dict] = [{"type": "image", "image": image} for image in self.images]
        if self.text:
            content.append({"type": "text", "text": self.text})
        system = [{"role": "system", "content": self.instruction}] if self.instruction else []
        return [*system, {"role": "user", "content": content}]


def check_text(text: str, name: str) -> None:
    """Refuse text that holds a token which steers the model.

    Raises:
        InputError: names the token.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: the text is not valid Unicode ({error.reason}); clean it") from None
    for token in RESERVED:
        if token in text:
            raise InputError(f"{name}: the text holds {token!r}, a token that plume places itself; remove it")


def load_image(image: Image.Image | str | os.PathLike, name: str = "the input") -> Image.Image:
    """Load an image as upright RGB, within limits.

    Raises:
        InputError: the file is missing, is not a readable image, or is too large or too long to decode safely.
    """
    if not isinstance(image, (Image.Image, str, os.PathLike)):
        raise InputError(f"{name}: an image is a {type(image).__name__}; expected a PIL image or a path")
    source = "the image" if isinstance(image, Image.Image) else os.fspath(image)
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(image)
        _check_size(opened, f"{name}: {source}")
        return _as_rgb(ImageOps.exif_transpose(opened), f"{name}: {source}")
    except FileNotFoundError:
        raise InputError(f"{name}: no file at {source}; expected a path to an image") from None
    except Image.DecompressionBombError:
        raise InputError(f"{name}: {source} is too large to decode safely; scale it down") from None
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, AssertionError) as error:
        raise InputError(f"{name}: {source} cannot be read as an image ({error}); replace the file") from error


def check_image_file(path: Path, name: str) -> None:
    """Refuse a file that is no image, or too large, from its header alone.

    Raises:
        InputError: as `load_image`; what is broken behind the header shows only when it is decoded.
    """
    try:
        with Image.open(path) as image:
            _check_size(image, f"{name}: {path}")
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: {path} cannot be read as an image ({error}); replace the file") from None


def _as_rgb(image: Image.Image, source: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # a plain conversion would clip 16 bits to 8
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError(f"{source} has 32 bits per pixel, whose range is not known; save it with 8 bits")
    return image.convert("RGB")


def _check_size(image: Image.Image, source: str) -> None:
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise InputError(
            f"{source} has {width} x {height} pixels, more than {MAX_IMAGE_PIXELS:,} are not decoded; scale it down"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InputError(f"{source} is {width} x {height}; sides may differ by {MAX_ASPECT_RATIO} times at most")

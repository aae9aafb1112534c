"""Images, loaded within limits: upright, RGB, and no larger than the model looks at them."""

from __future__ import annotations

import base64
import binascii
import http.client
import io
import os
import string
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

#: Larger images are refused before a pixel is decoded: about a quarter of a gigabyte as RGB.
MAX_IMAGE_PIXELS = 89_478_485
#: The image processor of Qwen2-VL refuses longer shapes.
MAX_ASPECT_RATIO = 200
#: More than this is not downloaded.
MAX_DOWNLOAD_BYTES = 512 * 2**20
_DOWNLOAD_TIMEOUT_S = 30
_FACTOR = 28  # patch_size * merge_size of every supported backbone


class InputError(ValueError):
    """An input that cannot be embedded; says which, what was expected and what to do."""


def load_image(
    image: Image.Image | np.ndarray | str | os.PathLike,
    name: str = "the input",
    pixels: tuple[int, int] | None = None,
) -> Image.Image:
    """Load an image as upright RGB, within limits.

    Args:
        image: a PIL image, an array `[height, width, 3]` of uint8, a path, an http(s) or file URL, or a data URI.
        name: how errors call the input.
        pixels: the fewest and the most pixels that the model looks at. A larger image is reduced at once, exactly
            as the image processor would do it later, so that waiting images take little memory.

    Raises:
        InputError: the file is missing, is not a readable image, or is too large or too long to decode safely.
    """
    if isinstance(image, np.ndarray):
        image = _from_array(image, name)
    if not isinstance(image, (Image.Image, str, os.PathLike)):
        raise InputError(f"{name}: an image is a {type(image).__name__}; expected a PIL image, a path or a URL")
    source = "the image" if isinstance(image, Image.Image) else brief(image)
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(open_source(image, name))
        check_size(opened.size, f"{name}: {source}")
        if opened.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            opened = ImageOps.exif_transpose(opened)
        return _reduced(_as_rgb(opened, f"{name}: {source}"), pixels)
    except FileNotFoundError:
        raise InputError(f"{name}: no file at {source}; expected a path to an image") from None
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: {source} is too large to decode safely ({error}); scale it down") from None
    except InputError:
        raise
    except Exception as error:  # decoders of broken files raise anything
        raise InputError(f"{name}: {source} cannot be read as an image ({_reason(error)}); replace the file") from error


def check_image_file(path: Path, name: str) -> None:
    """Refuse a file that is no image, or too large, from its header alone.

    Raises:
        InputError: as `load_image`; what is broken behind the header shows only when it is decoded.
    """
    try:
        with Image.open(path) as image:
            check_size(image.size, f"{name}: {path}")
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: {path} cannot be read as an image ({error}); replace the file") from None


def open_source(source: str | os.PathLike, name: str) -> str | os.PathLike | io.BytesIO:
    """A path as it is, or the bytes behind a URL or a data URI.

    Raises:
        InputError: the URL does not answer, or holds more than `MAX_DOWNLOAD_BYTES`.
    """
    text = os.fspath(source)
    if not isinstance(source, str) or not text.startswith(("http://", "https://", "file://", "data:")):
        return source
    if text.startswith("file://"):
        return urllib.request.url2pathname(text.removeprefix("file://"))
    if text.startswith("data:"):
        try:
            return io.BytesIO(base64.b64decode(text.partition(",")[2], validate=True))
        except binascii.Error as error:
            raise InputError(f"{name}: {brief(text)} is not valid base64 ({error})") from None
    try:
        address = urllib.parse.quote(text, safe=string.punctuation)
        with urllib.request.urlopen(address, timeout=_DOWNLOAD_TIMEOUT_S) as answer:
            content = answer.read(MAX_DOWNLOAD_BYTES + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise InputError(f"{name}: {brief(text)} cannot be downloaded ({error}); save it to a file") from None
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise InputError(f"{name}: {brief(text)} holds more than {MAX_DOWNLOAD_BYTES:,} bytes; save it to a file")
    return io.BytesIO(content)


def seen_size(width: int, height: int, pixels: tuple[int, int]) -> tuple[int, int]:
    """Width and height at which the model looks at an image or a frame: multiples of 28 within the budget.

    Example:
        >>> seen_size(1920, 1080, (784, 602_112))
        (1008, 560)
    """
    seen_height, seen_width = smart_resize(height, width, factor=_FACTOR, min_pixels=pixels[0], max_pixels=pixels[1])
    return seen_width, seen_height


def check_size(size: tuple[int, int], source: str) -> None:
    """Refuse a width and height that are too large to decode, or too long for the image processor."""
    width, height = size
    if width * height > MAX_IMAGE_PIXELS:
        raise InputError(
            f"{source} has {width} x {height} pixels, more than {MAX_IMAGE_PIXELS:,} are not decoded; scale it down"
        )
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InputError(f"{source} is {width} x {height}; sides may differ by {MAX_ASPECT_RATIO} times at most")


def brief(source: str | os.PathLike) -> str:
    """A path or URL, short enough for a message."""
    text = os.fspath(source)
    return text if len(text) <= 200 else f"{text[:60]}... ({len(text):,} characters)"


def _reason(error: Exception) -> str:
    """What went wrong; without the path, which an OSError repeats and which may be a whole file in base64."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise InputError(f"{name}: an image is {array.dtype} of shape {array.shape}; expected uint8 [height, width, 3]")
    return Image.fromarray(array)


def _reduced(image: Image.Image, pixels: tuple[int, int] | None) -> Image.Image:
    if pixels is None or image.width * image.height <= pixels[1]:
        return image
    size = seen_size(image.width, image.height, pixels)
    # Budgets whose ends nearly meet do not map every size to itself; then the image waits as it is.
    return image.resize(size, Image.Resampling.BICUBIC) if seen_size(*size, pixels) == size else image


def _as_rgb(image: Image.Image, source: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # a plain conversion would clip 16 bits to 8
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError(f"{source} has 32 bits per pixel, whose range is not known; save it with 8 bits")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")

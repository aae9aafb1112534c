"""Images, loaded within limits: upright, RGB, on a background, and no larger than the model looks at them.

Letters: H and W height and width in pixels.
"""

from __future__ import annotations

import base64
import binascii
import errno
import http.client
import io
import os
import stat
import string
import urllib.parse
import urllib.request
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from plume.config import PlumeConfig
from plume.inputs.errors import InputError, located, no_file

#: Larger images are refused before a pixel is decoded: about a quarter of a gigabyte as RGB.
MAX_IMAGE_PIXELS = 89_478_485
#: The image processor of Qwen2-VL refuses longer shapes.
MAX_ASPECT_RATIO = 200
#: More than this is not downloaded.
MAX_DOWNLOAD_BYTES = 512 * 2**20
#: Pixels per image of the published evaluation, which enlarges to four visual tokens at least; at most 3,009.
MIN_PIXELS, MAX_PIXELS = 3_136, 2_359_296
#: What is behind transparent pixels, unless a checkpoint says otherwise.
BACKGROUND = PlumeConfig.background
#: The types that hold the bytes of a file.
BYTES = (bytes, bytearray, memoryview)
_DOWNLOAD_TIMEOUT_S = 30
_FACTOR = 28  # patch_size * merge_size of every supported backbone

# What a file holds decides, not its name, and some of Pillow's other decoders start programs (EPS: Ghostscript).
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


def load_image(
    image: Any, name: str = "the input", pixels: tuple[int, int] | None = None, background: str | None = BACKGROUND
) -> Image.Image:
    """Load an image as upright RGB, within limits.

    Args:
        image: a PIL image, a path, an http(s) or file URL, a data URI, the bytes of a file, a dict with "bytes" or
            "path", or an array or tensor of uint8: `[H, W]`, `[H, W, C]` or `[C, H, W]` with C = 1, 3 or 4 (RGBA).
        name: how errors call the input.
        pixels: the fewest and the most pixels that the model looks at. A larger image is reduced at once, exactly
            as the image processor would do it later, so that waiting images take little memory. A JPEG file at least
            twice as large is decoded at half, a quarter or an eighth of its size, which is several times faster; its
            pixels differ from those of a full decode by less than one level of 256 on average.
        background: colour behind transparent pixels, any name that Pillow knows; None drops transparency and shows
            the colours that are stored beneath.

    Raises:
        InputError: the file is missing, is not a readable image, or is too large or too long to decode safely.
    """
    if isinstance(image, (np.ndarray, torch.Tensor)):
        image = _from_array(image, name)
    file = None if isinstance(image, (Image.Image, Mapping, *BYTES)) else brief(image, name)
    where = name if file is None else located(name, file)
    try:
        opened = image if isinstance(image, Image.Image) else open_image(open_source(image, name))
        check_size(opened.size, where)
        if pixels is not None and opened.format == "JPEG" and opened is not image:
            opened = _decode_reduced(opened, pixels)
        if opened.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            opened = ImageOps.exif_transpose(opened)
        return _reduced(as_rgb(opened, where, background), pixels)
    except FileNotFoundError:
        raise no_file(name, file, "a path to an image") from None
    except Image.DecompressionBombError as error:
        raise InputError(where, f"it is too large to decode safely ({error}); scale it down") from None
    except InputError:
        raise
    except Exception as error:  # decoders of broken files raise anything
        raise InputError(where, f"it cannot be read as an image ({_reason(error)}); replace the file") from error


def check_image_file(path: Path, name: str) -> None:
    """Refuse a file that is no image, or too large, from its header alone.

    Raises:
        InputError: as `load_image`; what is broken behind the header shows only when it is decoded.
    """
    try:
        with open_image(open_source(path, name)) as image:
            check_size(image.size, located(name, path))
    except InputError:
        raise
    except Exception as error:  # decoders of broken files raise anything
        raise InputError(
            located(name, path), f"it cannot be read as an image ({_reason(error)}); replace the file"
        ) from None


def open_image(source: str | os.PathLike | io.BytesIO) -> Image.Image:
    """Open an image of a format that is safe to decode; nothing is decoded yet.

    Args:
        source: from `open_source`.
    """
    if _is_heif(source):
        _read_heif()
        return Image.open(source, formats=("HEIF",))
    return Image.open(source, formats=_FORMATS)


def open_source(source: Any, name: str) -> str | os.PathLike | io.BytesIO:
    """A path as it is, once it is known to be a plain file; or the bytes behind anything else.

    Args:
        source: a path, an http(s) or file URL, a data URI, bytes, or a dict with "bytes" or "path".
        name: how errors call the input.

    Raises:
        InputError: it is of another type, is no plain file, does not answer, or holds more than `MAX_DOWNLOAD_BYTES`.
        FileNotFoundError: there is no such file.
    """
    if isinstance(source, Mapping):  # as Hugging Face data sets hold files
        content = source.get("bytes")
        if content is not None and not isinstance(content, BYTES):
            raise InputError(name, f'"bytes" is a {type(content).__name__}; expected the bytes of a file')
        source = content or source.get("path") or source
    if isinstance(source, BYTES):
        return io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(name, f"a file is a {type(source).__name__}; expected a path, a URL or bytes")
    text = os.fspath(source)
    if isinstance(source, str) and is_data_uri(text):
        return io.BytesIO(_from_data_uri(text.strip(), name))
    if isinstance(source, str) and text.startswith(("http://", "https://")):
        return _downloaded(text, name)
    path = source
    if isinstance(source, str) and text.startswith("file://"):
        path = urllib.request.url2pathname(text.removeprefix("file://").removeprefix("localhost"))
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise FileNotFoundError(error.errno, error.strerror) from None
        raise
    # A pipe or a device would block, or never end.
    if not stat.S_ISREG(mode):
        raise InputError(located(name, brief(source)), "it is not a plain file; expected a path to one")
    return path


def is_data_uri(text: str) -> bool:
    """Whether a text holds a file itself; the scheme may be written in capitals."""
    return text[:64].lstrip()[:5].lower() == "data:"


def seen_size(width: int, height: int, pixels: tuple[int, int]) -> tuple[int, int]:
    """Width and height at which the model looks at an image or a frame: multiples of 28 within the budget.

    Example:
        >>> seen_size(1920, 1080, (3_136, 602_112))
        (1008, 560)
    """
    seen_height, seen_width = smart_resize(height, width, factor=_FACTOR, min_pixels=pixels[0], max_pixels=pixels[1])
    return seen_width, seen_height


def check_size(size: tuple[int, int], source: str) -> None:
    """Refuse a width and height that are too large to decode, or too long for the image processor."""
    width, height = size
    if width * height > MAX_IMAGE_PIXELS:
        raise InputError(
            source, f"it has {width} x {height} pixels, more than {MAX_IMAGE_PIXELS:,} are not decoded; scale it down"
        )
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InputError(source, f"it is {width} x {height}; sides may differ by {MAX_ASPECT_RATIO} times at most")


def brief(source: Any, name: str = "the input") -> str:
    """A path or URL, short enough for a message.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            name,
            f"an image is a {type(source).__name__}; expected a PIL image, a path, a URL, bytes or an array of uint8",
        )
    text = os.fspath(source)
    return text if len(text) <= 200 else f"{text[:60]}... ({len(text):,} characters)"


def as_rgb(image: Image.Image, source: str, background: str | None = BACKGROUND) -> Image.Image:
    """The image in RGB, its transparent pixels on a background; see `load_image`.

    Example:
        >>> as_rgb(Image.new("LA", (1, 1), (0, 51)), "it").getpixel((0, 0))
        (204, 204, 204)
    """
    if image.mode.startswith("I;16"):  # a plain conversion would clip 16 bits to 8
        shades = np.asarray(image)
        key = image.info.get("transparency")
        image = Image.fromarray((shades >> 8).astype(np.uint8))
        if isinstance(key, int):
            image.putalpha(Image.fromarray(np.where(shades == key, 0, 255).astype(np.uint8)))
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)  # of 16 bits, which Pillow has reduced
    if image.mode in ("I", "F"):
        raise InputError(source, "it has 32 bits per pixel, whose range is not known; save it with 8 bits")
    image.load()
    if image.mode in ("La", "RGBa"):  # whose colours are multiplied by their opacity
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if background is None or not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")


def _is_heif(source: str | os.PathLike | io.BytesIO) -> bool:
    if isinstance(source, io.BytesIO):
        head = source.getbuffer()[4:12].tobytes()
    else:
        with open(source, "rb") as file:
            head = file.read(12)[4:]
    return head[:4] == b"ftyp" and head[4:] in _HEIF_BRANDS


@cache
def _read_heif() -> None:
    """Teach Pillow the format of telephones.

    Raises:
        ImportError: the extra is not installed.
    """
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ImportError("it is HEIC, which needs pillow-heif: pip install 'plume-embed[heic]'") from None
    register_heif_opener()


def _from_data_uri(text: str, name: str) -> bytes:
    """The content of a data URI, whose base64 may be broken into lines, percent-encoded or of the URL-safe alphabet."""
    header, _, body = text.partition(",")
    content = urllib.parse.unquote_to_bytes(body)
    if not header.rstrip().lower().endswith(";base64"):
        return content
    content = b"".join(content.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except binascii.Error as error:
        raise InputError(
            located(name, brief(text)), f"it is not valid base64 ({error}); encode the file again"
        ) from None


def _downloaded(text: str, name: str) -> io.BytesIO:
    where = located(name, brief(text))
    try:
        address = urllib.parse.quote(text, safe=string.punctuation)
        with urllib.request.urlopen(address, timeout=_DOWNLOAD_TIMEOUT_S) as answer:
            content = answer.read(MAX_DOWNLOAD_BYTES + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise InputError(where, f"it cannot be downloaded ({error}); save it to a file") from None
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise InputError(
            located(name, brief(text)), f"it holds more than {MAX_DOWNLOAD_BYTES:,} bytes; save it to a file"
        )
    return io.BytesIO(content)


def _reason(error: Exception) -> str:
    """What went wrong; without the path, which an OSError repeats and which may be a whole file in base64."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "it holds no image of a format that plume reads"
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def as_array(pixels: np.ndarray | torch.Tensor, name: str, what: str) -> np.ndarray:
    """An array or tensor of pixels as an array.

    Raises:
        InputError: numpy has no such type of numbers, as bfloat16.
    """
    if isinstance(pixels, np.ndarray):
        return pixels
    try:
        return pixels.detach().cpu().numpy()
    except (TypeError, RuntimeError):
        raise InputError(
            name, f"{what} is {pixels.dtype} of shape {tuple(pixels.shape)}; expected pixels of uint8"
        ) from None


def channels_last(array: np.ndarray, name: str, what: str) -> np.ndarray:
    """Pixels of uint8 as `[..., H, W, C]`, from that layout or `[..., C, H, W]`; C is 1, 3 or 4.

    Raises:
        InputError: neither, or both, so that nobody can tell.
    """
    layouts = f"uint8 [{what}H, W, C] or [{what}C, H, W] with C = 1, 3 or 4"
    if array.dtype == np.uint8 and array.ndim >= 3 and array.size:
        is_first, is_last = array.shape[-3] in (1, 3, 4), array.shape[-1] in (1, 3, 4)
        if is_first and is_last:
            raise InputError(
                name, f"an array of shape {array.shape} is {layouts}, and nobody can tell which; pass PIL images"
            )
        if is_last:
            return array
        if is_first:
            return np.moveaxis(array, -3, -1)
    raise InputError(name, f"an array is {array.dtype} of shape {array.shape}; expected {layouts}")


def _from_array(array: np.ndarray | torch.Tensor, name: str) -> Image.Image:
    array = as_array(array, name, "an image")
    if array.ndim == 2 and array.dtype == np.uint8 and array.size:
        return Image.fromarray(array)
    if array.ndim != 3:
        raise InputError(
            name, f"an image is {array.dtype} of shape {array.shape}; expected uint8 [H, W], [H, W, C] or [C, H, W]"
        )
    pixels = channels_last(array, name, "")
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


def _decode_reduced(image: Image.Image, pixels: tuple[int, int]) -> Image.Image:
    """A large JPEG at the size at which the model looks at it, decoded at the next power of two below its own."""
    whole = image.size
    if whole[0] * whole[1] <= pixels[1]:
        return image
    size = seen_size(*whole, pixels)
    drafted = image.draft(None, size)
    if drafted is None or image.size == whole:  # less than twice as large
        return image
    # What is decoded may be a part of a pixel larger than the image.
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC, box=drafted[1])


def _reduced(image: Image.Image, pixels: tuple[int, int] | None) -> Image.Image:
    if pixels is None or image.width * image.height <= pixels[1]:
        return image
    size = seen_size(image.width, image.height, pixels)
    # Budgets whose ends nearly meet do not map every size to itself; then the image waits as it is.
    return image.resize(size, Image.Resampling.BICUBIC) if seen_size(*size, pixels) == size else image

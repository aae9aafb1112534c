"""Media of requests, decoded within ceilings: what is sent is the bytes of a file, never a place to read one from.

A server must not do what a script may: open paths and addresses, decode whatever a file claims to be, or say what went
wrong inside. A string for a medium is a data URI or base64; its size, its format and its pixels are looked at before it
is decoded, and video is decoded in a process of its own, which has little memory and little time.
"""

from __future__ import annotations

import base64
import binascii
import io
import logging
import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from PIL import Image

from plume.inputs.errors import InputError
from plume.inputs.images import is_data_uri, load_image
from plume.inputs.item import MediaLimits
from plume.inputs.video import Sampling, Video, load_video
from plume.serving.errors import RequestError, wrong

#: Formats of images that are decoded.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

#: For a process to start, which imports torch.
_START_S = 120.0

_log = logging.getLogger("plume.serving")


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What a request may hold at most; beyond it, it is refused before anything is decoded."""

    inputs: int = 2_048
    text_characters: int = 2**18
    request_characters: int = 2**20
    media: int = 64
    videos: int = 4
    image_bytes: int = 20_000_000
    image_pixels: int = 25_000_000
    video_bytes: int = 100_000_000
    video_frames: int = 64
    video_seconds: float = 30.0
    video_memory: int = 4 * 2**30


def is_address(value: Any) -> bool:
    """Whether a medium is said by where it is."""
    return isinstance(value, str) and not is_data_uri(value) and "://" in value[:64]


def content_of(value: Any, most: int, param: str) -> bytes:
    """The bytes of a medium.

    Args:
        value: a data URI, bare base64, or bytes that have been fetched.
        most: bytes at most.
        param: how errors call it.

    Raises:
        RequestError: it is neither, or too large.
    """
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise wrong("a medium must be a string: a data URI or base64", param)
    text = value.strip()
    if is_data_uri(text):
        header, _, text = text.partition(",")
        if not header.lower().rstrip().endswith(";base64"):
            raise wrong("a data URI must be in base64", param)
    if len(text) > most * 4 // 3 + 4:
        raise RequestError(413, f"a medium holds more than {most:,} bytes", param)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise wrong(
            "a medium is not valid base64, which a path never is; send the content of the file", param
        ) from None


def decode_image(content: bytes, ceilings: Ceilings, limits: MediaLimits, param: str) -> Image.Image:
    """An image, no larger than the model looks at it.

    Raises:
        RequestError: it is of no format that is decoded, too large, or damaged.
    """
    try:
        opened = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception as error:  # decoders of broken files raise anything
        _log.info("an image was refused: %s", type(error).__name__)
        raise wrong(f"an image cannot be decoded; expected one of {', '.join(FORMATS)}", param) from None
    if opened.width * opened.height > ceilings.image_pixels:
        raise wrong(f"an image has more than {ceilings.image_pixels:,} pixels; scale it down", param)
    try:
        return load_image(content, param, limits.pixels, limits.background)
    except InputError as error:
        _log.info("an image was refused: %s", type(error.__cause__ or error).__name__)
        raise wrong("an image is damaged, too long, or has pixels that cannot be read", param) from None


class VideoDecoder:
    """Decodes video in a process of its own, which is ended and replaced where it takes too long or dies."""

    def __init__(self, ceilings: Ceilings):
        self.ceilings = ceilings
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def decode(self, content: bytes, sampling: Sampling, background: str | None, param: str) -> Video:
        """The frames that the model looks at.

        Raises:
            RequestError: the video cannot be decoded within the ceilings.
        """
        with self._lock:  # one at a time: each may take all the memory that there is for video
            try:
                if self._pool is None:
                    self._pool = ProcessPoolExecutor(
                        1,
                        mp_context=multiprocessing.get_context("spawn"),
                        initializer=_confine,
                        initargs=(self.ceilings.video_memory,),
                    )
                    self._pool.submit(int).result(timeout=_START_S)  # its start is not the video's time
                work = self._pool.submit(_decode_video, content, sampling, background)
                reason, video = work.result(timeout=self.ceilings.video_seconds)
            except (TimeoutError, BrokenProcessPool) as error:
                reason, video = type(error).__name__, None
                self._end()
        if video is None:
            _log.info("a video was refused: %s", reason)
            raise wrong("a video cannot be decoded, or takes too much memory or time", param)
        return video

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            for process in list((pool._processes or {}).values()):
                with suppress(OSError):
                    process.kill()
            pool.shutdown(wait=True, cancel_futures=True)


def _confine(memory: int) -> None:
    """Bound the memory of this process beyond what it has now, where the system tells that."""
    import resource

    with suppress(ValueError, OSError):
        with open("/proc/self/statm") as numbers:
            now = int(numbers.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))


def _decode_video(content: bytes, sampling: Sampling, background: str | None) -> tuple[str, Video | None]:
    try:
        return "", load_video(content, sampling, "a video", background)
    except Exception as error:  # decoders of broken files raise anything
        return type(error).__name__, None

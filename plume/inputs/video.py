"""Video: which frames are taken, and how they are decoded.

Frames are chosen evenly, `linspace(0, N - 1, n)` cut to whole numbers, as the published evaluation does (8 of N; all
of a shorter clip), or at a number of frames per second of presentation time. Each is resized as it is decoded, so that
a clip never takes more memory than the model looks at, as Qwen2-VL's video processor resizes it (the rest is in
`plume/inputs/patches.py`).

Letters: T frames, N frames of the source, h and w the resized height and width in pixels.
"""

from __future__ import annotations

import errno
import io
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from plume.config import PlumeConfig
from plume.inputs.errors import InputError, located, no_file
from plume.inputs.images import (
    BACKGROUND,
    BYTES,
    as_array,
    as_rgb,
    brief,
    channels_last,
    check_size,
    load_image,
    open_image,
    open_source,
    seen_size,
)

#: Pixels of an animated image that are decoded at most: frames of such files build on each other.
MAX_ANIMATION_PIXELS = 2**31
#: Pixels of a video file that are decoded at most, those on the way to the frames that are taken included.
MAX_VIDEO_PIXELS = 2**38
#: Frames of a fixed rate are counted from here on; a time stamp that is early by less than this is on time.
_CLOSE_S = 1e-6
# Where the next frame is further ahead than this, the decoder jumps to the key frame before it.
_JUMP_FRAMES = 250
# Containers that hold their own content. Playlists and session descriptions open other files and the network.
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,ogg,flv,asf"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which frames of a video the model sees, and how large; fields as `PlumeConfig.video_*`.

    start, end: seconds of the video outside of which nothing is taken; None: to its end.
    """

    num_frames: int = PlumeConfig.video_num_frames
    fps: float | None = PlumeConfig.video_fps
    max_frames: int = PlumeConfig.video_max_frames
    min_pixels: int = PlumeConfig.video_min_pixels
    max_pixels: int = PlumeConfig.video_max_pixels
    start: float = 0.0
    end: float | None = None


@dataclass(frozen=True, eq=False)
class Video:
    """The frames of one clip as the model sees them.

    frames: `[T, 3, h, w]`, uint8; h and w are multiples of 28.
    seconds_per_frame: time between two of them, None where unknown.
    """

    frames: Tensor
    seconds_per_frame: float | None = None

    def picture(self, place: float = 0.5) -> Image.Image:
        """One frame, at this share of the clip."""
        index = min(int(place * len(self.frames)), len(self.frames) - 1)
        return Image.fromarray(rearrange(self.frames[index], "c h w -> h w c").numpy())


def sample_frames(total: int, sampling: Sampling, times: Sequence[float] | None = None) -> list[int]:
    """Indices of the frames to take from `total` frames.

    At a number of frames per second those are taken that are on the screen 0, 1, 2, ... intervals after the first.

    Args:
        total: N.
        sampling: a number of frames, or of frames per second.
        times: when each frame appears, in seconds, ascending, `[N]`; None where that is not known.

    Raises:
        ValueError: frames per second are asked for, but the times are not known.

    Example:
        >>> sample_frames(100, Sampling())
        [0, 14, 28, 42, 56, 70, 84, 99]
        >>> sample_frames(3, Sampling())
        [0, 1, 2]
        >>> sample_frames(100, Sampling(fps=1), times=[i / 25 for i in range(100)])
        [0, 25, 50, 75]
    """
    if sampling.fps is None:
        wanted = sampling.num_frames
        return list(range(total)) if total <= wanted else np.linspace(0, total - 1, wanted).astype(int).tolist()
    if times is None:
        raise ValueError("frames per second are unknown for this video; give a number of frames (video_num_frames)")
    if not total:
        return []
    at = np.asarray(times)
    # Frame i is on the screen at the intervals begin[i] .. begin[i + 1] - 1.
    begin = np.ceil((at - at[0] - _CLOSE_S) * sampling.fps)
    end = np.append(begin[1:], np.floor((at[-1] - at[0] + _CLOSE_S) * sampling.fps) + 1)
    shown = np.flatnonzero(end > begin)
    if len(shown) > sampling.max_frames:
        moments = np.linspace(at[0], at[-1], sampling.max_frames)
        shown = np.unique(np.searchsorted(at, moments + _CLOSE_S, side="right") - 1)
    return shown.tolist()


def frames_between(total: int, sampling: Sampling, times: Sequence[float] | None, name: str) -> list[int]:
    """Indices of the frames to take from those between the start and the end that are asked for.

    Raises:
        InputError: there are none, or it is not known when frames appear.
    """
    if not sampling.start and sampling.end is None:
        return sample_frames(total, sampling, times)
    if times is None:
        raise InputError(name, "it does not say when its frames appear, so that no part of it can be taken by time")
    shown = (times[-1] - times[0]) / (total - 1) if total > 1 else 1.0  # about as long as the last frame stands
    if sampling.start > times[-1] + shown:
        raise InputError(name, f"it has no frames from {sampling.start:g} s on; the last one is at {times[-1]:g} s")
    end = math.inf if sampling.end is None else sampling.end
    first = max(int(np.searchsorted(times, sampling.start + _CLOSE_S, side="right")) - 1, 0)  # on the screen by then
    last = max(int(np.searchsorted(times, end - _CLOSE_S)), first + 1)
    return [first + index for index in sample_frames(last - first, sampling, times[first:last])]


def seconds_of(path: str | os.PathLike) -> float | None:
    """How long a video is; None where that is not known, it is an animated image, or it cannot be read."""
    try:
        import av

        if _is_animation(path):
            return None
        with av.open(os.fspath(path), options={"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}) as file:
            moments, tick, _ = _moments(file, file.streams.video[0], path)
            if tick is None or len(moments) < 2:
                return None
            return (moments[-1] - moments[0]) * tick * len(moments) / (len(moments) - 1)  # the last one stands too
    except Exception:  # decoders of broken files raise anything, which is told where the frames are read
        return None


def load_video(video: Any, sampling: Sampling, name: str = "the input", background: str | None = BACKGROUND) -> Video:
    """Sample, decode and resize one video.

    Args:
        video: a path or URL of a file, its bytes, or a dict with "bytes" or "path" (PyAV decodes it; an animated GIF
            or WebP needs no extra); a sequence of frames, each as `load_image` takes it; an array or tensor of uint8,
            `[T, H, W, C]` or `[T, C, H, W]` with C = 1, 3 or 4; or a dict with "array" and "video_metadata" as
            sentence-transformers takes it.
        sampling: which frames, and how large.
        name: how errors call the input.
        background: colour behind transparent pixels; see `load_image`.

    Raises:
        InputError: no frames, frames of several sizes, or a file that cannot be decoded.
    """
    if isinstance(video, Video):
        if sampling.start or sampling.end is not None:
            raise InputError(name, "its frames have been taken already; give the file, of which a part can be taken")
        return video
    fps = None
    if isinstance(video, Mapping) and "array" in video:
        video, fps = video.get("array"), _rate(video.get("video_metadata"), name)
    try:
        if isinstance(video, (str, os.PathLike, Mapping, *BYTES)):
            return _load_file(video, sampling, name, background)
        if isinstance(video, (np.ndarray, Tensor)):
            array = as_array(video, name, "a video")
            if array.ndim != 4:
                raise InputError(name, f"a video is {_described(video)}; expected uint8 [T, H, W, C] or [T, C, H, W]")
            frames = channels_last(array, name, "T, ")
            video = [frame[..., 0] if frame.shape[-1] == 1 else frame for frame in frames]
        if isinstance(video, Sequence) and len(video):
            return _gather(
                lambda index: _to_tensor(load_image(video[index], name, background=background)),
                len(video),
                fps,
                sampling,
                name,
            )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(name, str(error)) from None
    raise InputError(name, f"a video is {_described(video)}; expected a path, a URL, or frames")


def _rate(metadata: Any, name: str) -> float | None:
    """Frames per second that came with an array, None where nothing is said of them."""
    if metadata is None:
        return None
    fps = metadata.get("fps") if isinstance(metadata, Mapping) else getattr(metadata, "fps", metadata)
    if fps is None:
        return None
    if isinstance(fps, bool) or not isinstance(fps, Real) or not 0 < float(fps) < math.inf:
        raise InputError(name, f'"video_metadata" is {metadata!r:.80}; expected a dict with "fps" above 0')
    return float(fps)


def is_animated(path: str | os.PathLike) -> bool:
    """Whether an image file moves."""
    with open_image(path) as image:
        return getattr(image, "is_animated", False)


def _gather(frame_at: Callable[[int], Tensor], total: int, fps: float | None, sampling: Sampling, name: str) -> Video:
    """The sampled frames of a source that gives any frame `[3, H, W]`, all of one size."""
    times = [index / fps for index in range(total)] if fps else None
    indices = frames_between(total, sampling, times, name)
    frames = []
    size = None
    for index in indices:
        frame = frame_at(index)
        if size is not None and frame.shape != size:
            raise InputError(name, f"frames of a video differ in size, {_size(size)} and {_size(frame.shape)}")
        size = frame.shape
        frames.append(_resize(frame, sampling, name))
    return Video(torch.stack(frames), _spacing(indices, times))


def _load_file(source: Any, sampling: Sampling, name: str, background: str | None) -> Video:
    called = brief(source) if isinstance(source, (str, os.PathLike)) else "the video"
    where = located(name, called) if isinstance(source, (str, os.PathLike)) else name
    try:
        opened = open_source(source, name)
    except FileNotFoundError:
        raise no_file(name, called, "a path to a video") from None
    except OSError as error:
        raise InputError(where, f"it cannot be read ({error.strerror})") from None
    if _is_animation(opened):
        return _load_animation(opened, sampling, where, background)
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise InputError(
            name, f"decoding {called} needs PyAV; pip install 'plume-embed[video]', or pass its frames"
        ) from None
    try:
        place = opened if isinstance(opened, io.BytesIO) else os.fspath(opened)
        with av.open(place, options={"format_whitelist": _DEMUXERS, "protocol_whitelist": "file"}) as container:
            return _decode(container, place, sampling, where, background)
    except InputError:
        raise
    except FFmpegError as error:
        reason = "it is of no format that plume reads" if error.errno == errno.EINVAL else error.strerror
        raise InputError(where, f"it cannot be decoded as a video ({reason}); replace the file") from None
    except Exception as error:  # decoders of broken files raise anything
        raise InputError(where, f"it cannot be decoded as a video ({error}); replace the file") from None


_last_moments: tuple[Any, tuple[list[int], float | None, bool]] | None = None


def _moments(container: Any, stream: Any, source: Any) -> tuple[list[int], float | None, bool]:
    """When frames appear, in ticks of so many seconds, and whether the file says so; else they are counted.

    Those of the file that was read last are remembered, since many clips of one are read one after the other.
    """
    global _last_moments
    key = None
    if isinstance(source, (str, os.PathLike)):
        stat = os.stat(source)
        key = os.fspath(source), stat.st_size, stat.st_mtime_ns, stat.st_ino
    known = _last_moments  # another thread may read another file meanwhile
    if key is not None and known is not None and known[0] == key:
        return known[1]
    packets = [packet.pts for packet in container.demux(stream) if packet.size]
    timed = None not in packets and len(set(packets)) == len(packets)
    moments = sorted(packets) if timed else list(range(len(packets)))
    tick = float(stream.time_base) if timed else 1 / float(stream.average_rate) if stream.average_rate else None
    found = moments, tick, timed
    if key is not None:
        _last_moments = key, found
    return found


def _decode(container: Any, source: Any, sampling: Sampling, where: str, background: str | None) -> Video:
    if not container.streams.video:
        raise InputError(where, "it has no video stream; replace the file")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    check_size((stream.width, stream.height), where)
    budget = _PixelBudget(MAX_VIDEO_PIXELS, where)
    moments, tick, timed = _moments(container, stream, source)
    jumping = timed
    while moments:
        times = None if tick is None else [(moment - moments[0]) * tick for moment in moments]
        indices = frames_between(len(moments), sampling, times, where)
        frames, seen = _frames_at(
            container,
            stream,
            [(i, moments[i]) for i in indices],
            timed,
            jumping,
            lambda one: _resize(_upright(one, where, background), sampling, where),
            budget,
        )
        if len(frames) == len(indices):
            if len({frame.shape for frame in frames}) > 1:
                raise InputError(where, "it changes its size on the way; replace the file")
            return Video(torch.stack(frames), _spacing(indices, times))
        if not jumping and len(seen) == len(moments):
            break
        # A jump that missed is made good by reading from the start. Packets may hold no frame of their own; then the
        # frames that there are count.
        moments = moments if jumping else seen
        jumping = False
    raise InputError(where, "it has no frames; replace the file")


class _PixelBudget:
    """Stops a file that would cost more than any video that people make."""

    def __init__(self, most: int, where: str):
        self.left, self.where = most, where

    def take(self, pixels: int) -> None:
        """Count a frame that has been decoded."""
        self.left -= pixels
        if self.left < 0:
            raise InputError(self.where, "it takes too long to decode; cut it, scale it down, or pass frames of it")


def _upright(frame: Any, where: str, background: str | None) -> Tensor:
    """A decoded frame in RGB, `[3, H, W]`."""
    has_alpha = any(component.is_alpha for component in frame.format.components)
    pixels = frame.to_ndarray(format="rgba" if has_alpha else "rgb24")
    if has_alpha:
        pixels = np.array(as_rgb(Image.fromarray(pixels), where, background))
    # Phones store frames sideways, and how far to turn them, in degrees against the clock.
    upright = np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90))
    return rearrange(torch.from_numpy(upright), "h w c -> c h w")


def _frames_at(
    container: Any,
    stream: Any,
    wanted: list[tuple[int, int]],
    timed: bool,
    jumping: bool,
    look_at: Callable[[Any], Tensor],
    budget: _PixelBudget,
) -> tuple[list[Tensor], list[int]]:
    """The frames at these indices and moments, as far as they are found, and the moments gone through.

    Args:
        container: of the file.
        stream: of video.
        wanted: index and moment of each frame, ascending.
        timed: whether moments are time stamps; else they count frames.
        jumping: whether to jump to key frames.
        look_at: makes what is kept of a frame.
        budget: counts what is decoded.
    """
    frames: list[Tensor] = []
    seen: list[int] = []
    todo, jump = deque(wanted), jumping and wanted[0][0] > _JUMP_FRAMES
    container.seek(0)
    while todo:
        if jump:
            container.seek(todo[0][1], stream=stream)
        for frame in container.decode(stream):
            moment = frame.pts if timed else len(seen)
            if moment is None or (jump and moment > todo[0][1]):
                return frames, seen
            jump = False
            budget.take(frame.width * frame.height)
            seen.append(moment)
            if moment >= todo[0][1]:
                frames.append(look_at(frame))
                index, _ = todo.popleft()
                jump = jumping and bool(todo) and todo[0][0] - index > _JUMP_FRAMES
            if jump or not todo:
                break
        else:
            break
    return frames, seen


def _is_animation(opened: Any) -> bool:
    """Whether Pillow decodes a file, as its content tells."""
    if isinstance(opened, io.BytesIO):
        head = opened.getvalue()[:12]
    else:
        with open(opened, "rb") as file:
            head = file.read(12)
    return head[:4] == b"GIF8" or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


def _load_animation(source: Any, sampling: Sampling, where: str, background: str | None) -> Video:
    try:
        with open_image(source) as image:
            check_size(image.size, where)
            total = getattr(image, "n_frames", 1)
            if total * image.width * image.height > MAX_ANIMATION_PIXELS:
                raise InputError(
                    where,
                    f"it has {total:,} frames of {image.width} x {image.height} pixels, more than "
                    f"{MAX_ANIMATION_PIXELS:,} pixels in all are not decoded; cut it or scale it down",
                )
            is_timed = sampling.fps is not None or sampling.start or sampling.end is not None
            indices = frames_between(total, sampling, _times(image, total) if is_timed else None, where)
            frames, times, now = [], [], 0.0
            for index in range(indices[-1] + 1):  # frames build on each other
                image.seek(index)
                frame = as_rgb(image, where, background)
                if index in indices:
                    frames.append(_resize(_to_tensor(frame), sampling, where))
                times.append(now)
                now += _duration(image)
    except InputError:
        raise
    except Exception as error:  # decoders of broken files raise anything
        raise InputError(where, f"it cannot be read as an animation ({error}); replace the file") from None
    return Video(torch.stack(frames), _spacing(indices, times if now else None))


def _times(image: Image.Image, total: int) -> list[float] | None:
    """When each frame of an animation appears, in seconds; None where it does not say."""
    times, now = [], 0.0
    for index in range(total):
        image.seek(index)
        image.load()
        times.append(now)
        now += _duration(image)
    return times if now else None


def _duration(image: Image.Image) -> float:
    """Seconds for which the current frame stands; known once it is loaded."""
    return (image.info.get("duration") or 0) / 1000


def _resize(frame: Tensor, sampling: Sampling, where: str) -> Tensor:
    """One frame at the size that the model sees, `[3, H, W] -> [3, h, w]`, uint8."""
    height, width = frame.shape[1:]
    check_size((width, height), where)
    seen_width, seen_height = seen_size(width, height, (sampling.min_pixels, sampling.max_pixels))
    if (seen_height, seen_width) == (height, width):
        return frame.clone()
    return F.interpolate(
        frame[None], size=(seen_height, seen_width), mode="bicubic", antialias=True, align_corners=False
    )[0]


def _to_tensor(image: Image.Image) -> Tensor:
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w")


def _spacing(indices: list[int], times: Sequence[float] | None) -> float | None:
    """Mean time between the frames that were taken."""
    if times is None or len(indices) < 2:
        return None
    return (times[indices[-1]] - times[indices[0]]) / (len(indices) - 1) or None


def _size(shape: Sequence[int]) -> str:
    return f"{shape[2]} x {shape[1]}"


def _described(video: Any) -> str:
    if isinstance(video, (np.ndarray, Tensor)):
        return f"{str(video.dtype).removeprefix('torch.')} of shape {tuple(video.shape)}"
    return "an empty list" if isinstance(video, Sequence) and not len(video) else f"a {type(video).__name__}"

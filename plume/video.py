"""Video: which frames are taken, and how they are decoded.

Frames are chosen evenly, `linspace(0, N - 1, n)` cut to whole numbers, as the published evaluation does (8 of N; all
of a shorter clip), or at a number of frames per second. Each is resized as it is decoded, so that a clip never takes
more memory than the model looks at, as Qwen2-VL's video processor resizes it (the rest is in `plume/patches.py`).

Letters: T frames, h and w the resized height and width in pixels.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageSequence
from torch import Tensor
from torch.nn import functional as F

from plume.images import InputError, brief, check_size, load_image, open_source, seen_size

# Where the next frame is further ahead than this, the decoder jumps to the key frame before it.
_JUMP_FRAMES = 250


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which frames of a video the model sees, and how large; fields as `PlumeConfig.video_*`."""

    num_frames: int = 8
    fps: float | None = None
    max_frames: int = 64
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28


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


def sample_frames(total: int, sampling: Sampling, source_fps: float | None = None) -> list[int]:
    """Indices of the frames to take from `total` frames.

    Raises:
        ValueError: frames per second are asked for, but those of the source are unknown.

    Example:
        >>> sample_frames(100, Sampling())
        [0, 14, 28, 42, 56, 70, 84, 99]
        >>> sample_frames(3, Sampling())
        [0, 1, 2]
        >>> sample_frames(100, Sampling(fps=1), source_fps=25)
        [0, 25, 50, 75]
    """
    if sampling.fps is None:
        wanted = sampling.num_frames
    elif not source_fps:
        raise ValueError("frames per second are unknown for this video; give a number of frames (video_num_frames)")
    else:
        step = max(source_fps / sampling.fps, 1.0)
        indices = [int(i * step) for i in range(int((total - 1) / step) + 1)]
        if len(indices) <= sampling.max_frames:
            return indices
        wanted = sampling.max_frames
    if total <= wanted:
        return list(range(total))
    return np.linspace(0, total - 1, wanted).astype(int).tolist()


def load_video(video: Any, sampling: Sampling, name: str = "the input") -> Video:
    """Sample, decode and resize one video.

    Args:
        video: a path or URL of a file (PyAV decodes it; an animated GIF needs no extra), a sequence of frames (PIL
            images or paths), an array `[T, height, width, 3]` or a tensor `[T, 3, height, width]` of uint8, or a dict
            with "array" and "video_metadata" as sentence-transformers takes it.
        sampling: which frames, and how large.
        name: how errors call the input.

    Raises:
        InputError: no frames, frames of several sizes, or a file that cannot be decoded.
    """
    if isinstance(video, Video):
        return video
    fps = None
    if isinstance(video, Mapping):
        metadata = video.get("video_metadata") or {}
        video, fps = video.get("array"), metadata.get("fps")
    try:
        if isinstance(video, (str, os.PathLike)):
            return _load_file(video, sampling, name)
        if isinstance(video, (np.ndarray, Tensor)):
            frames = _as_frames(video, name)
            return _gather(lambda index: frames[index], len(frames), fps, sampling, name)
        if isinstance(video, Sequence) and len(video):
            return _gather(lambda index: _to_tensor(load_image(video[index], name)), len(video), fps, sampling, name)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    raise InputError(f"{name}: a video is {_described(video)}; expected a path, a URL, or frames")


def is_animated(path: str | os.PathLike) -> bool:
    """Whether an image file moves."""
    with Image.open(path) as image:
        return getattr(image, "is_animated", False)


def _gather(frame_at: Callable[[int], Tensor], total: int, fps: float | None, sampling: Sampling, name: str) -> Video:
    """The sampled frames of a source that gives any frame `[3, H, W]`, all of one size."""
    indices = sample_frames(total, sampling, fps)
    frames = []
    size = None
    for index in indices:
        frame = frame_at(index)
        if size is not None and frame.shape != size:
            raise InputError(f"{name}: frames of a video differ in size, {_size(size)} and {_size(frame.shape)}")
        size = frame.shape
        frames.append(_resize(frame, sampling, name))
    return Video(torch.stack(frames), _spacing(indices, fps))


def _load_file(source: str | os.PathLike, sampling: Sampling, name: str) -> Video:
    opened = open_source(source, name)
    if isinstance(opened, (str, os.PathLike)) and not os.path.isfile(opened):
        raise InputError(f"{name}: no file at {brief(source)}; expected a path to a video")
    if os.fspath(source).lower().endswith(".gif"):
        return _load_gif(opened, sampling, f"{name}: {brief(source)}")
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise InputError(
            f"{name}: decoding {brief(source)} needs PyAV; pip install 'plume-embed[video]', or pass its frames"
        ) from None
    where = f"{name}: {brief(source)}"
    try:
        with av.open(opened if not isinstance(opened, os.PathLike) else str(opened)) as container:
            return _decode(container, sampling, where)
    except InputError:
        raise
    except FFmpegError as error:
        raise InputError(f"{where} cannot be decoded as a video ({error.strerror}); replace the file") from None
    except Exception as error:  # decoders of broken files raise anything
        raise InputError(f"{where} cannot be decoded as a video ({error}); replace the file") from None


def _decode(container: Any, sampling: Sampling, where: str) -> Video:
    if not container.streams.video:
        raise InputError(f"{where} has no video stream; replace the file")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    check_size((stream.width, stream.height), where)
    fps = float(stream.average_rate) if stream.average_rate else None
    packets = [packet.pts for packet in container.demux(stream) if packet.size]
    # Frames are known by their time stamps, or by counting where those are missing.
    timed = None not in packets and len(set(packets)) == len(packets)
    moments = sorted(packets) if timed else list(range(len(packets)))
    jumping = timed
    while moments:
        indices = sample_frames(len(moments), sampling, fps)
        frames, seen = _frames_at(
            container,
            stream,
            [(i, moments[i]) for i in indices],
            timed,
            jumping,
            lambda one: _resize(one, sampling, where),
        )
        if len(frames) == len(indices):
            if len({frame.shape for frame in frames}) > 1:
                raise InputError(f"{where} changes its size on the way; replace the file")
            return Video(torch.stack(frames), _spacing(indices, fps))
        if not jumping and len(seen) == len(moments):
            break
        # A jump that missed is made good by reading from the start. Packets may hold no frame of their own; then the
        # frames that there are count.
        moments = moments if jumping else seen
        jumping = False
    raise InputError(f"{where} has no frames; replace the file")


def _frames_at(
    container: Any,
    stream: Any,
    wanted: list[tuple[int, int]],
    timed: bool,
    jumping: bool,
    resize: Callable[[Tensor], Tensor],
) -> tuple[list[Tensor], list[int]]:
    """The frames at these indices and moments, resized, as far as they are found, and the moments gone through."""
    frames: list[Tensor] = []
    seen: list[int] = []
    todo, jump = deque(wanted), False
    container.seek(0)
    while todo:
        if jump:
            container.seek(todo[0][1], stream=stream)
        for frame in container.decode(stream):
            moment = frame.pts if timed else len(seen)
            if moment is None or (jump and moment > todo[0][1]):
                return frames, seen
            jump = False
            seen.append(moment)
            if moment >= todo[0][1]:
                # Phones store frames sideways, and how far to turn them, in degrees against the clock.
                upright = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
                frames.append(resize(rearrange(torch.from_numpy(upright), "h w c -> c h w")))
                index, _ = todo.popleft()
                jump = jumping and bool(todo) and todo[0][0] - index > _JUMP_FRAMES
            if jump or not todo:
                break
        else:
            break
    return frames, seen


def _load_gif(source: Any, sampling: Sampling, where: str) -> Video:
    try:
        with Image.open(source) as image:
            check_size(image.size, where)
            total = getattr(image, "n_frames", 1)
            milliseconds = image.info.get("duration") or 0
            fps = 1000 / milliseconds if milliseconds else None
            indices = sample_frames(total, sampling, fps)
            frames = [
                _resize(_to_tensor(frame.convert("RGB")), sampling, where)
                for index, frame in enumerate(ImageSequence.Iterator(image))
                if index in indices
            ]
    except InputError:
        raise
    except Exception as error:  # decoders of broken files raise anything
        raise InputError(f"{where} cannot be read as an animation ({error}); replace the file") from None
    return Video(torch.stack(frames), _spacing(indices, fps))


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


def _as_frames(video: np.ndarray | Tensor, name: str) -> Tensor:
    """`[T, 3, H, W]`, uint8, from the two layouts in use."""
    array = torch.from_numpy(video) if isinstance(video, np.ndarray) else video
    if array.dtype == torch.uint8 and array.ndim == 4 and len(array):
        if array.shape[1] == 3:
            return array
        if array.shape[3] == 3:
            return rearrange(array, "t h w c -> t c h w")
    raise InputError(
        f"{name}: a video is {_described(video)}; expected uint8 [T, height, width, 3] or [T, 3, height, width], T > 0"
    )


def _to_tensor(image: Image.Image) -> Tensor:
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w")


def _spacing(indices: list[int], fps: float | None) -> float | None:
    if not fps or len(indices) < 2:
        return None
    return (indices[-1] - indices[0]) / (len(indices) - 1) / fps


def _size(shape: Sequence[int]) -> str:
    return f"{shape[2]} x {shape[1]}"


def _described(video: Any) -> str:
    if isinstance(video, (np.ndarray, Tensor)):
        return f"{str(video.dtype).removeprefix('torch.')} of shape {tuple(video.shape)}"
    return "an empty list" if isinstance(video, Sequence) and not len(video) else f"a {type(video).__name__}"

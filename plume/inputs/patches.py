"""Patches: how pixels of images and frames are laid out for the vision tower.

Equal to the bit to transformers' `Qwen2VLImageProcessorPil` and `Qwen2VLVideoProcessor`, which normalise in two
slightly different ways; many small images cost a tenth of the time here, and torchvision is not needed. NumPy does the
work, on one thread: torch would take all cores, from the model that runs meanwhile.

Letters: T frames, h and w height and width in pixels, multiples of 28.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from plume.inputs.images import seen_size
from plume.inputs.video import Video

# A patch is dt frames of p x q pixels; mh x mw patches that become one visual token follow each other.
_PATCHES = "n (t dt) c (h mh p) (w mw q) -> n (t h w mh mw) c dt p q"


@dataclass(frozen=True, kw_only=True)
class PatchFormat:
    """What the vision tower of a checkpoint expects.

    pixels: the fewest and the most pixels of an image. mean, std: of the channels, for pixels in [0, 1].
    patch: side of a patch in pixels. merge: patches per side of a visual token. temporal: frames per patch.
    """

    pixels: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch: int = 14
    merge: int = 2
    temporal: int = 2

    def cut(self, frames: np.ndarray, temporal: int) -> np.ndarray:
        """Patches of clips of one size, `[n, T, 3, h, w] -> [n, patches, 3, temporal, patch, patch]`.

        T is a multiple of `temporal`, frames per patch.
        """
        cut = rearrange(frames, _PATCHES, dt=temporal, mh=self.merge, mw=self.merge, p=self.patch, q=self.patch)
        return np.ascontiguousarray(cut)

    def normalised(self, patches: np.ndarray, scale: float) -> np.ndarray:
        """Patches as float32, from which mean * scale is taken before they are divided by std * scale."""
        mean, std = (
            np.array(values, np.float32)[:, None, None, None] * np.float32(scale) for values in (self.mean, self.std)
        )
        patches -= mean
        patches /= std
        return patches

    def grid(self, num_frames: int, height: int, width: int) -> list[int]:
        """Patches in time, height and width."""
        return [-(-num_frames // self.temporal), height // self.patch, width // self.patch]


def pack_images(images: Sequence[Image.Image], patch_format: PatchFormat, as_bytes: bool = False) -> dict[str, Tensor]:
    """Patches of some RGB images, resized to the size at which the model looks at them.

    Args:
        images: of any sizes.
        patch_format: of the checkpoint.
        as_bytes: leave what `from_bytes` does to the device that the patches go to, an eighth of the memory.

    Returns:
        `pixel_values` `[patches, 3 * temporal * patch * patch]`, float32, or `[patches, 3 * patch * patch]`, uint8;
        `image_grid_thw` `[images, 3]`.
    """
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    arrays: list[np.ndarray] = []
    for index, image in enumerate(images):
        size = seen_size(image.width, image.height, patch_format.pixels)
        resized = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
        arrays.append(np.asarray(resized))
        by_size[size].append(index)
    patches: list[np.ndarray] = [np.empty(0)] * len(images)
    whole = np.empty((0, 0), np.float32)
    for alike in by_size.values():
        pixels = np.stack([arrays[index] for index in alike])
        # Bytes are cut before they become floats, and one frame stands for all of its temporal patch.
        one_frame = patch_format.cut(rearrange(pixels, "n h w c -> n 1 c h w"), temporal=1)
        if as_bytes:
            whole = rearrange(one_frame, "n s c 1 p q -> n s (c p q)")
        else:
            one_frame = one_frame.astype(np.float32)
            one_frame /= 255
            whole = repeat(
                patch_format.normalised(one_frame, 1), "n s c 1 p q -> n s (c dt p q)", dt=patch_format.temporal
            )
        for index, one in zip(alike, whole, strict=True):
            patches[index] = one
    whole = whole.reshape(-1, whole.shape[-1]) if len(by_size) == 1 else np.concatenate(patches)
    grids = [patch_format.grid(1, *array.shape[:2]) for array in arrays]
    return {"pixel_values": torch.from_numpy(whole), "image_grid_thw": torch.tensor(grids)}


def from_bytes(patches: Tensor, patch_format: PatchFormat) -> Tensor:
    """What `pack_images` would have made of the images whose bytes these are, to the bit, on the patches' device.

    Args:
        patches: `[patches, 3 * patch * patch]`, uint8.
        patch_format: of the checkpoint.

    Returns:
        `[patches, 3 * temporal * patch * patch]`, float32.
    """

    def constant(*values: float) -> Tensor:  # a tensor, since a GPU multiplies by the reciprocal of a number
        return torch.tensor(values, device=patches.device)[:, None]

    x = rearrange(patches, "n (c k) -> n c k", c=len(patch_format.mean)).float()
    x = (x / constant(255.0) - constant(*patch_format.mean)) / constant(*patch_format.std)
    return repeat(x, "n c k -> n (c dt k)", dt=patch_format.temporal)


def pack_videos(videos: Sequence[Video], patch_format: PatchFormat) -> dict[str, Tensor]:
    """Patches of some videos, whose frames have the size at which the model looks at them.

    Returns:
        `pixel_values_videos` `[patches, 3 * temporal * patch * patch]`, float32; `video_grid_thw` `[videos, 3]`;
        `second_per_grid_ts` `[videos]`, seconds per temporal patch (1 where unknown), which Qwen2.5-VL needs.
    """
    patches = []
    for video in videos:
        frames = video.frames.numpy()
        if missing := -len(frames) % patch_format.temporal:
            frames = np.concatenate([frames, frames[-1:].repeat(missing, axis=0)])
        cut = patch_format.cut(frames[None], patch_format.temporal)[0].astype(np.float32)
        # Mean and std are scaled here instead of the pixels, as the other of the two processors does.
        patches.append(rearrange(patch_format.normalised(cut, 255), "s c dt p q -> s (c dt p q)"))
    spacing = [video.seconds_per_frame for video in videos]
    return {
        "pixel_values_videos": torch.from_numpy(np.concatenate(patches)),
        "video_grid_thw": torch.tensor([patch_format.grid(len(v.frames), *v.frames.shape[2:]) for v in videos]),
        "second_per_grid_ts": torch.tensor(
            [patch_format.temporal * seconds if seconds else 1.0 for seconds in spacing]
        ),
    }

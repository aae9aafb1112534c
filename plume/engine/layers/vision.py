"""The vision tower of Qwen2-VL as the engine runs it: all images of a batch packed into one sequence of patches.

transformers' tower is the definition. It attends image by image, in one call each; here images of like size share a
call, and on a GPU in half precision all of them do. Nothing is asked of the device: sizes are known to the host.

Letters: N patches of all images, M visual tokens (N / 4), C channels per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from plume.engine.layers.text import JoinedLinear
from plume.engine.layers.weights import VisionWeights
from plume.model.interface import at_least_float32

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of queries, keys and values."""


class Grid:
    """Sizes of the media of a batch, in patches: `[(time, height, width), ...]`, on the host."""

    def __init__(self, sizes: Sequence[tuple[int, int, int]]):
        self.sizes = tuple(sizes)
        #: Patches that see each other, one length per image or temporal patch of a video.
        self.lengths = tuple(height * width for time, height, width in self.sizes for _ in range(time))

    def split(self, patches: Tensor) -> Iterator[tuple[Tensor, Grid]]:
        """Each medium by itself: its patches and its size."""
        counts = [time * height * width for time, height, width in self.sizes]
        return ((part, Grid([size])) for part, size in zip(patches.split(counts), self.sizes, strict=True))

    def places(self, merge: int) -> Tensor:
        """Row and column of each patch, `[N, 2]`; patches of one visual token follow each other."""
        parts = []
        for time, height, width in self.sizes:
            place = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1)
            place = rearrange(place, "(h mh) (w mw) two -> (h w mh mw) two", mh=merge, mw=merge)
            parts.append(repeat(place, "n two -> (t n) two", t=time))
        return torch.cat(parts)


class Block:
    """One layer: attention and MLP, each behind a LayerNorm and around a residual."""

    def __init__(self, block: Any, linear: type[JoinedLinear]):
        self.norm, self.mlp_norm, self.act = block.norm1, block.norm2, block.mlp.act
        layers = block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
        self.qkv, self.out, self.up, self.down = (linear([layer]) for layer in layers)


class VisionTower:
    """Patches to features of visual tokens."""

    def __init__(self, weights: VisionWeights, linear: type[JoinedLinear] = JoinedLinear):
        """Take over the weights of a tower; they stay shared with it.

        Raises:
            UnsupportedModelError: a layer is not what it is in a plain Qwen2-VL.
        """
        self.weights = weights
        self.blocks = [Block(block, linear) for block in weights.blocks]

    def rotation(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each patch's angles, float32, `[N, 1, C]`; the first half of the sines is negated."""
        places = grid.places(self.weights.merge).to(self.weights.inverse_frequencies.device, non_blocking=True)
        angles = (places[..., None] * self.weights.inverse_frequencies).flatten(start_dim=1)[:, None]  # [N, 1, C/2]
        cosine, sine = angles.cos(), angles.sin()
        return torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)

    def __call__(self, patches: Tensor, rotation: tuple[Tensor, Tensor], attend: Attention) -> Tensor:
        """Features of visual tokens, `[M, D]`.

        Args:
            patches: of all images, one after the other, `[N, 3 * temporal * patch * patch]`.
            rotation: from `rotation`.
            attend: from `segment_attention`, for the lengths of the grid.
        """
        # A convolution whose patches never overlap is a product.
        weight = self.weights.embed.weight
        x = F.linear(patches.to(weight.dtype), weight.flatten(start_dim=1))
        for block in self.blocks:
            heads = rearrange(block.qkv(block.norm(x)), "n (qkv h c) -> n qkv h c", qkv=3, h=self.weights.num_heads)
            attended = attend(_rotated(heads[:, 0], rotation), _rotated(heads[:, 1], rotation), heads[:, 2])
            x = block.out.add_to(x, rearrange(attended, "n h c -> n (h c)"))
            x = block.down.add_to(x, block.act(block.up(block.mlp_norm(x))))
        return self.weights.merger(x)


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys `[N, H, C]` turned, in at least float32."""
    cosine, sine = rotation
    wide = at_least_float32(x)
    return torch.addcmul(wide * cosine, wide.roll(x.shape[-1] // 2, dims=-1), sine.to(wide.dtype)).to(x.dtype)


def segment_attention(lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Attention:
    """Attention within segments of these lengths: queries, keys, values and result `[N, H, C]`.

    Made before a graph is captured, since the bounds of unlike segments go to the device.
    """
    is_half = dtype in (torch.bfloat16, torch.float16)
    if varlen_attn is not None and device.type == "cuda" and is_half and len(set(lengths)) > 1:
        bounds = torch.tensor((0, *lengths), device=device).cumsum(0).int()
        longest = max(lengths)

        def packed(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return varlen_attn(queries, keys, values, bounds, bounds, longest, longest)  # type: ignore[misc]

        return packed
    runs = [(length, len(list(same))) for length, same in groupby(lengths)]

    def grouped(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        parts, start = [], 0
        for length, count in runs:
            q, k, v = (
                rearrange(x[start : start + length * count], "(i l) h c -> i h l c", i=count)
                for x in (queries, keys, values)
            )
            parts.append(rearrange(F.scaled_dot_product_attention(q, k, v), "i h l c -> (i l) h c"))
            start += length * count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return grouped

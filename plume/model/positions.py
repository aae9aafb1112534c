"""Rotary positions: of the prefix, of the latent steps, and of the suffix.

In the prefix a text token takes the next integer on three equal axes, and a visual token its place in time, height and
width (M-RoPE), so that visual tokens share positions. Latent steps and suffix are ordinary tokens: one integer per row
on all three axes. Two conventions say where latent step 0 stands:

    "mrope"      one after `<bot>`                       PLUME, section 3; our default
    "kv_length"  the number of prefix tokens             how the published checkpoints are evaluated

They agree for text and differ by hundreds after an image.

Letters: B batch, L prefix length (padded), S suffix length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor
from transformers import PreTrainedConfig

from plume.config import LatentPositions, VisionPositions
from plume.model.interface import Media


def prefix_positions(
    config: PreTrainedConfig, input_ids: Tensor, mask: Tensor, media: Media, *, rule: VisionPositions
) -> Tensor:
    """M-RoPE positions of a prefix, `[3, B, L]`; zero at padding.

    A medium that begins at p takes p + its place in time, height and width, and text continues behind the largest of
    them: of all three axes, as Qwen2-VL was trained, or of height and width alone, as transformers 5 does it.
    Qwen2.5-VL counts time in `tokens_per_second`.

    Args:
        config: of the backbone.
        input_ids: token ids, `[B, L]`.
        mask: True at real tokens, `[B, L]`; padding may stand on either side.
        media: gives the sizes of images and videos, in the order of the rows.
        rule: `PlumeConfig.vision_positions`.

    Example:
        >>> config = getfixture("model").backbone.config
        >>> ids = torch.tensor([[9, config.video_token_id, config.video_token_id, 9]])
        >>> media = Media(video_grid_thw=torch.tensor([[2, 2, 2]]))  # two visual tokens, one after the other in time
        >>> prefix_positions(config, ids, ids > 0, media, rule="all_axes")[:, 0].tolist()
        [[0, 1, 2, 3], [0, 1, 1, 3], [0, 1, 1, 3]]
    """
    positions = ((mask.long().cumsum(dim=1) - 1) * mask).repeat(3, 1, 1)
    images, videos = _image_places(config, media), _video_places(config, media)
    places = {config.image_token_id: images, config.video_token_id: videos}
    is_visual = (input_ids == config.image_token_id) | (input_ids == config.video_token_id)
    for row in (is_visual & mask).any(dim=1).nonzero()[:, 0].tolist():
        ids = input_ids[row][mask[row]].tolist()
        positions[:, row, mask[row]] = _row_positions(ids, places, rule).to(positions.device)
    return positions


def _row_positions(ids: list[int], places: dict[int, Iterator[Tensor]], rule: VisionPositions) -> Tensor:
    """Positions of one row without padding, `[3, L]`; takes the places of its media from `places`, by placeholder."""
    pieces: list[Tensor] = []
    start = index = 0
    while index < len(ids):
        if ids[index] in places:
            place = next(places[ids[index]])  # [3, visual tokens]
            pieces.append(place + start)
            extent = place.amax(dim=1) + 1
            start += int(extent[1:].max() if rule == "height_width" else extent.max())
            index += place.shape[1]
        else:
            end = next((i for i in range(index, len(ids)) if ids[i] in places), len(ids))
            pieces.append(torch.arange(start, start + end - index).repeat(3, 1))
            start, index = start + end - index, end
    return torch.cat(pieces, dim=1)


def _image_places(config: PreTrainedConfig, media: Media) -> Iterator[Tensor]:
    """Of each image, the place of its visual tokens in time, height and width, `[3, visual tokens]`."""
    for size in [] if media.image_grid_thw is None else media.image_grid_thw.tolist():
        yield _places(config, size, torch.arange(size[0]))


def _video_places(config: PreTrainedConfig, media: Media) -> Iterator[Tensor]:
    """The same of each video."""
    spacing = iter(() if media.second_per_grid_ts is None else media.second_per_grid_ts.float().cpu())
    for size in [] if media.video_grid_thw is None else media.video_grid_thw.tolist():
        moments = torch.arange(size[0])
        if config.model_type != "qwen2_vl":
            moments = (moments * (config.vision_config.tokens_per_second * next(spacing, 1))).long()
        yield _places(config, size, moments)


def _places(config: Any, size: list[int], moments: Tensor) -> Tensor:
    height, width = (side // config.vision_config.spatial_merge_size for side in size[1:])
    grid = torch.meshgrid(moments, torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(grid).flatten(start_dim=1)


def latent_start(last: Tensor, num_tokens: Tensor, convention: LatentPositions) -> Tensor:
    """Position of latent step 0 in each row, `[B]`.

    Args:
        last: position of `<bot>`, where the three axes are equal, `[B]`.
        num_tokens: real tokens of the prefix, `[B]`.
        convention: see the module's docstring.

    Example:
        >>> last, num_tokens = torch.tensor([4]), torch.tensor([7])  # an image of four tokens among them
        >>> latent_start(last, num_tokens, "mrope").item(), latent_start(last, num_tokens, "kv_length").item()
        (5, 7)
    """
    return num_tokens if convention == "kv_length" else last + 1


def latent_positions(start: Tensor, step: int) -> Tensor:
    """Positions `[3, B, 1]` of one latent step, counted from 0."""
    return repeat(start + step, "b -> axes b 1", axes=3)


def suffix_positions(start: Tensor, num_latent_steps: Tensor, length: int) -> Tensor:
    """Positions `[3, B, S]` of a suffix of `length` tokens that follows each row's own number of steps.

    Args:
        start: position of latent step 0, `[B]`.
        num_latent_steps: K of each row, `[B]`.
        length: S.
    """
    first = rearrange(start + num_latent_steps, "b -> b 1")
    return repeat(first + torch.arange(length, device=start.device), "b s -> axes b s", axes=3)

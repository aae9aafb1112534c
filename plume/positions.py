"""Rotary positions of the latent steps and of the suffix.

The prefix has the M-RoPE positions of its backbone: a text token takes the next integer on three equal axes, a
vision token its place in the grid, so that vision tokens share positions. Latent steps and suffix are ordinary
tokens: one integer per row on all three axes. Two conventions say where latent step 0 stands:

    "mrope"      one after `<bot>`                       PLUME, section 3; our default
    "kv_length"  the number of prefix tokens             how the published checkpoints are evaluated

They agree for text and differ by hundreds after an image.

Letters: B batch, L prefix length (padded), S suffix length.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

from plume.config import LatentPositions


def latent_start(positions: Tensor, mask: Tensor, convention: LatentPositions) -> Tensor:
    """Position of latent step 0 in each row.

    Args:
        positions: positions of the left-padded prefix, `[3, B, L]`.
        mask: True at real tokens, `[B, L]`.
        convention: see the module's docstring.

    Returns:
        One integer per row, `[B]`.

    Example:
        >>> positions = torch.tensor([0, 1, 1, 1, 1, 3, 4]).expand(3, 1, 7)  # an image of four tokens
        >>> mask = torch.ones(1, 7, dtype=torch.bool)
        >>> latent_start(positions, mask, "mrope").item(), latent_start(positions, mask, "kv_length").item()
        (5, 7)
    """
    if convention == "kv_length":
        return mask.sum(dim=1)
    return positions[0, :, -1] + 1  # the last column is <bot>, where the three axes are equal


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

"""Training only: text that is to be said from latent steps alone.

After the rollout some text is read on its cache, each token of which sees some latent columns and the text of its own
group before it, and nothing else: neither prefix nor suffix. Whatever it needs to be said must then be in the latents.
With one group per latent step this is SIM-CoT's step decoder (arXiv 2509.20317), with one group that sees all of them
BToks' (arXiv 2604.11095), the backbone in the place of a decoder of its own. Nothing of it is needed at inference.

Letters: B batch, L prefix length, K latent steps, S suffix length, R tokens that are said, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import repeat
from torch import Tensor

from plume.model.interface import Segment

Sees = Literal["own_step", "up_to_step", "all"]


@dataclass(frozen=True)
class Reconstruction:
    """What is to be said.

    ids `[B, R]`: tokens that are read, each group beginning with `<eot>`.
    groups `[B, R]`: the group of each; -1 at padding.
    places `[B, R]`: how many tokens of its group come before.
    sees: which latent steps a group sees.
    steps_per_group: latent steps of a group; group g has steps g c .. g c + c - 1.
    """

    ids: Tensor
    groups: Tensor
    places: Tensor
    sees: Sees
    steps_per_group: int

    def segment(self, embeds: Tensor, start: Tensor, num_latent_steps: Tensor) -> Segment:
        """The tokens where they stand: behind the last latent step that their group sees.

        Args:
            embeds: their input embeddings, `[B, R, D]`.
            start: rotary position of latent step 0, `[B]`.
            num_latent_steps: K of each row, `[B]`.
        """
        behind = (self.groups.clamp(min=0) + 1) * self.steps_per_group
        first = num_latent_steps[:, None].expand_as(behind) if self.sees == "all" else behind
        positions = repeat(start[:, None] + first + self.places, "b r -> axes b r", axes=3)
        return Segment(embeds, self.groups >= 0, positions)

    def readable(self, num_latent_steps: Tensor, length: int, most_steps: int, num_suffix: int) -> Tensor:
        """What each token may read of the cache and of the text, `[B, R, L + K + S + R]`.

        Args:
            num_latent_steps: K of each row, `[B]`.
            length: L.
            most_steps: latent columns in the cache.
            num_suffix: S.
        """
        groups, count = self.groups, self.groups.shape[1]
        step = torch.arange(most_steps, device=groups.device)
        owner = step // self.steps_per_group
        latents = {
            "own_step": owner == groups[..., None],
            "up_to_step": owner <= groups[..., None],
            "all": torch.ones_like(groups, dtype=torch.bool)[..., None].expand(-1, -1, most_steps),
        }[self.sees] & (step < num_latent_steps[:, None])[:, None]
        is_past = torch.ones(count, count, dtype=torch.bool, device=groups.device).tril()
        text = (groups[:, :, None] == groups[:, None]) & is_past  # padding reads padding, so that no row is empty
        nothing = [text.new_zeros(*groups.shape, size) for size in (length, num_suffix)]
        return torch.cat([nothing[0], latents, nothing[1], text], dim=2)

"""Positions against the table of the method, with the M-RoPE of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLModel

from plume.positions import latent_positions, latent_start, suffix_positions

IMAGE, TEXT = 151655, 100


@pytest.fixture(scope="module")
def backbone():
    with torch.device("meta"):
        return Qwen2VLModel(Qwen2VLConfig(image_token_id=IMAGE))


# L, visual grid (tokens high, wide), tokens before the image; p_bot; start per convention. From method.md, section 12.
CASES = [
    pytest.param(84, None, 0, 83, 84, 84, id="text prompt"),
    pytest.param(90, (2, 2), 15, 87, 88, 90, id="text prompt with the blank image"),
    pytest.param(674, (24, 24), 15, 121, 122, 674, id="image of 24 x 24 visual tokens"),
]


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(("length", "grid", "before", "bot", "mrope", "kv_length"), CASES)
def test_latents_and_suffix_stand_where_the_method_says(backbone, length, grid, before, bot, mrope, kv_length, padding):
    ids = torch.full((1, length), TEXT)
    thw = None
    if grid is not None:
        ids[0, before : before + grid[0] * grid[1]] = IMAGE
        thw = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
    ids = torch.cat([torch.zeros(1, padding, dtype=torch.long), ids], dim=1)
    mask = torch.arange(length + padding)[None] >= padding
    positions, _ = backbone.get_rope_index(ids, (ids == IMAGE).int(), image_grid_thw=thw, attention_mask=mask.long())
    assert positions[:, 0, -1].tolist() == [bot] * 3
    for convention, expected in (("mrope", mrope), ("kv_length", kv_length)):
        start = latent_start(positions, mask, convention)
        assert start.tolist() == [expected]
        assert [latent_positions(start, step)[0, 0, 0].item() for step in (0, 7)] == [expected, expected + 7]
        suffix = suffix_positions(start, torch.tensor([8]), 5)
        assert suffix.shape == (3, 1, 5)
        assert suffix[2, 0].tolist() == list(range(expected + 8, expected + 13))


def test_the_suffix_follows_each_rows_own_number_of_steps():
    suffix = suffix_positions(torch.tensor([10, 20]), torch.tensor([0, 4]), 3)
    assert suffix[0].tolist() == [[10, 11, 12], [24, 25, 26]]

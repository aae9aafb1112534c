"""Positions against the table of the method, with the M-RoPE of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2VLConfig, Qwen2VLModel

from plume import PlumeConfig, PlumeModel
from plume.engine.layout import lay_out
from plume.model.interface import Media
from plume.model.positions import latent_positions, latent_start, prefix_positions, suffix_positions
from plume.random_models import SHORT_STRINGS

IMAGE, VIDEO, TEXT = 151655, 151656, 100


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
        start = latent_start(positions[0, :, -1], mask.sum(dim=1), convention)
        assert start.tolist() == [expected]
        assert [latent_positions(start, step)[0, 0, 0].item() for step in (0, 7)] == [expected, expected + 7]
        suffix = suffix_positions(start, torch.tensor([8]), 5)
        assert suffix.shape == (3, 1, 5)
        assert suffix[2, 0].tolist() == list(range(expected + 8, expected + 13))


def test_the_suffix_follows_each_rows_own_number_of_steps():
    suffix = suffix_positions(torch.tensor([10, 20]), torch.tensor([0, 4]), 3)
    assert suffix[0].tolist() == [[10, 11, 12], [24, 25, 26]]


# Patches of a video behind three tokens of text; where text continues by each rule.
VIDEOS = [
    pytest.param((2, 2, 2), 5, 4, id="more moments than sides"),
    pytest.param((32, 22, 30), 35, 18, id="many moments"),
    pytest.param((2, 8, 4), 7, 7, id="more height than moments"),
    pytest.param((1, 2, 2), 4, 4, id="one moment"),
]


def prefix(family: str, grids: list[tuple[str, tuple[int, int, int]]]):
    """Three tokens of text, then media with two tokens between them, then two."""
    config = (Qwen2VLConfig if family == "qwen2_vl" else Qwen2_5_VLConfig)(image_token_id=IMAGE, video_token_id=VIDEO)
    ids = [TEXT] * 3
    for kind, (time, height, width) in grids:
        ids += [IMAGE if kind == "image" else VIDEO] * (time * height * width // 4) + [TEXT] * 2
    given = {f"{kind}_grid_thw": torch.tensor([size for k, size in grids if k == kind]) for kind, _ in grids}
    return config, torch.tensor([ids]), given


@pytest.mark.parametrize(("grid", "all_axes", "height_width"), VIDEOS)
def test_text_continues_behind_a_video_by_the_rule_of_the_checkpoint(grid, all_axes, height_width):
    config, ids, given = prefix("qwen2_vl", [("video", grid)])
    mask = torch.ones_like(ids).bool()
    for rule, expected in (("all_axes", all_axes), ("height_width", height_width)):
        positions = prefix_positions(config, ids, mask, Media(**given), rule=rule)
        assert positions[:, 0, -2:].tolist() == [[expected, expected + 1]] * 3


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("padding", [0, 3])
def test_the_rule_of_transformers_is_that_of_its_own_code(family, padding):
    media = [("image", (1, 4, 6)), ("video", (3, 4, 2)), ("video", (9, 2, 2)), ("image", (1, 2, 2))]
    config, ids, given = prefix(family, media)
    seconds = {"second_per_grid_ts": torch.tensor([0.3, 1.7])} if family == "qwen2_5_vl" else {}
    ids = torch.cat([torch.full((1, padding), TEXT), ids], dim=1)
    mask = torch.arange(ids.shape[1])[None] >= padding
    with torch.device("meta"):
        backbone = (Qwen2VLModel if family == "qwen2_vl" else Qwen2_5_VLModel)(config)
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    expected, _ = backbone.get_rope_index(ids, kinds, **given, **seconds, attention_mask=mask.long())
    positions = prefix_positions(config, ids, mask, Media(**given, **seconds), rule="height_width")
    assert torch.equal(positions, expected)


@pytest.mark.parametrize("rule", ["all_axes", "height_width"])
def test_the_rule_is_saved_and_decides_where_latent_steps_stand(backbone_folder, tmp_path, picture, rule):
    model = PlumeModel.from_backbone(
        str(backbone_folder), vision_positions=rule, video_min_pixels=784, video_max_pixels=784, **SHORT_STRINGS
    )
    model.save_pretrained(tmp_path)
    loaded = PlumeModel.from_pretrained(tmp_path)
    assert loaded.config.vision_positions == rule
    item = loaded.processor.parse({"video": [picture(28, 28, seed) for seed in range(8)], "text": "red"})
    batch = loaded.processor.encode([item])
    start = lay_out(loaded, dict(batch)).start.item()
    # One token before the video, one visual token per moment, then <|vision_end|>, the text, <disc_emb> and <bot>.
    assert start == (1 + 4 if rule == "all_axes" else 1 + 1) + 4


def test_new_models_take_the_rule_that_stock_checkpoints_were_trained_with():
    assert PlumeConfig().vision_positions == "all_axes"
    with pytest.raises(ValueError, match="vision_positions must be one of 'all_axes', 'height_width'"):
        PlumeConfig(vision_positions="time")

"""Both families of backbones give plume the states of their own forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from plume import Plume, PlumeModel
from plume.random_models import SHORT_STRINGS, save_tiny_backbone


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def family_model(request, tmp_path_factory) -> PlumeModel:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_backbone(folder, ["red", "kite"], family=request.param, vision_layers=2)
    return PlumeModel.from_backbone(str(folder), num_latent_steps=3, **SHORT_STRINGS).eval()


def inputs(seed: int = 0) -> list:
    rng = np.random.default_rng(seed)

    def frames(*shape):
        return rng.integers(0, 256, shape, dtype=np.uint8)

    return [
        "red kite",
        {"image": Image.fromarray(frames(84, 140, 3)), "text": "kite"},
        {"video": {"array": frames(6, 84, 56, 3), "video_metadata": {"fps": 1.5}}, "text": "red"},
        {"image": [Image.fromarray(frames(56, 56, 3))] * 2, "video": frames(2, 56, 56, 3)},
    ]


def test_prefix_states_are_those_of_the_stock_model(family_model):
    """The stock model derives positions, masks and vision features by its own code."""
    config = family_model.config.backbone_config
    for raw in inputs():
        batch = family_model.processor.encode([family_model.processor.parse(raw)])
        ids = batch["input_ids"]
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        if config.model_type == "qwen2_vl":
            stock_batch = {name: value for name, value in batch.items() if name != "second_per_grid_ts"}
        else:
            stock_batch = batch
        stock = family_model.backbone(**stock_batch, mm_token_type_ids=kinds, use_cache=False)
        found = family_model(**batch).states[:, 0]
        assert torch.allclose(found, stock.last_hidden_state[:, -1], atol=2e-5)


def test_neighbours_and_padding_do_not_matter(family_model):
    items = [family_model.processor.parse(raw) for raw in inputs(1)]
    together = family_model(**family_model.processor.encode(items)).embedding
    alone = torch.cat([family_model(**family_model.processor.encode([item])).embedding for item in items])
    assert torch.allclose(together, alone, atol=1e-5)


def test_every_door_opens_every_family(family_model, tmp_path):
    family_model.save_pretrained(tmp_path)
    items = [family_model.processor.parse(raw) for raw in inputs()[:2]]
    expected = family_model(**family_model.processor.encode(items)).embedding
    found = Plume(tmp_path, device="cpu").encode(items, convert_to_tensor=True)
    assert torch.allclose(found, expected, atol=1e-6)

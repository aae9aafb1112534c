"""Patches of images are those of transformers' own processor, to the bit."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from plume.patches import Layout, pack_images


@pytest.mark.parametrize("temporal", [1, 2])
@pytest.mark.parametrize("pixels", [(784, 2_359_296), (100 * 784, 2_359_296), (784, 20 * 784)], ids=str)
def test_images_are_packed_as_transformers_packs_them(picture, pixels, temporal):
    stock = Qwen2VLImageProcessorPil(
        size={"shortest_edge": pixels[0], "longest_edge": pixels[1]}, temporal_patch_size=temporal
    )
    sizes = [(28, 28), (56, 84), (57, 85), (300, 31), (28, 28), (640, 480), (1, 1)]
    images = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    expected = stock(images, return_tensors="pt")
    layout = Layout(
        pixels=pixels, mean=tuple(stock.image_mean), std=tuple(stock.image_std), temporal=stock.temporal_patch_size
    )
    found = pack_images(images, layout)
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])
    assert found["pixel_values"].is_contiguous()

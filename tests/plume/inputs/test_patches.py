"""Patches of images are those of transformers' own processor, to the bit."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from plume.embedder.digests import media_keys
from plume.engine.engine import Engine
from plume.inputs.patches import PatchFormat, from_bytes, pack_images


@pytest.mark.parametrize("temporal", [1, 2])
@pytest.mark.parametrize("pixels", [(784, 2_359_296), (100 * 784, 2_359_296), (784, 20 * 784)], ids=str)
def test_images_are_packed_as_transformers_packs_them(picture, pixels, temporal):
    stock = Qwen2VLImageProcessorPil(
        size={"shortest_edge": pixels[0], "longest_edge": pixels[1]}, temporal_patch_size=temporal
    )
    sizes = [(28, 28), (56, 84), (57, 85), (300, 31), (28, 28), (640, 480), (1, 1)]
    images = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    expected = stock(images, return_tensors="pt")
    layout = PatchFormat(
        pixels=pixels, mean=tuple(stock.image_mean), std=tuple(stock.image_std), temporal=stock.temporal_patch_size
    )
    found = pack_images(images, layout)
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])
    assert found["pixel_values"].is_contiguous()


@pytest.mark.parametrize("temporal", [1, 2])
def test_patches_that_travel_as_bytes_become_the_same_floats(picture, temporal):
    layout = PatchFormat(pixels=(784, 2_359_296), mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28), temporal=temporal)
    images = [picture(*size, seed=seed) for seed, size in enumerate([(56, 84), (57, 85), (28, 28), (56, 84)])]
    expected, packed = pack_images(images, layout), pack_images(images, layout, as_bytes=True)
    assert packed["pixel_values"].dtype == torch.uint8
    assert packed["pixel_values"].nbytes * 4 * temporal == expected["pixel_values"].nbytes
    assert torch.equal(from_bytes(packed["pixel_values"], layout), expected["pixel_values"])
    assert torch.equal(packed["image_grid_thw"], expected["image_grid_thw"])


@pytest.mark.parametrize("cache", [{}, {"vision_cache_bytes": 1 << 24}, {"prefix_cache_bytes": 1 << 24}])
def test_the_engine_takes_patches_as_bytes(model, picture, cache):
    items = [model.processor.parse({"image": [picture(84, 56), picture()], "text": "red"}), model.processor.parse("a")]
    engine = Engine(model, **cache)
    keys = media_keys(items) if cache else None
    expected = engine(model.processor.encode(items), media_keys=keys).embedding
    sent = model.processor.encode(items, as_bytes=True)
    assert sent["pixel_values"].dtype == torch.uint8
    assert torch.equal(Engine(model, **cache)(sent, media_keys=keys).embedding, expected)

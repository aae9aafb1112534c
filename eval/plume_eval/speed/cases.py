"""Models of given shapes and inputs of given sizes."""

from __future__ import annotations

import re
import tempfile
from typing import Any, cast

import torch
from PIL import Image

from plume.inputs.item import Item
from plume.inputs.processor import PlumeProcessor
from plume.model.model import PlumeModel
from plume.random_models import SHAPES_2B, SHAPES_7B, SHORT_STRINGS, random_model, save_tiny_backbone
from plume_eval.speed.config import InputSize, LatencyConfig

_WORDS = ("red", "kite")
#: Backbones for a CPU; "mid" has 28 million parameters.
_SMALL: dict[str, dict[str, Any]] = {
    "tiny": {},
    "mid": {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "vision_width": 256, "vision_layers": 6},
}


def make_model(config: LatencyConfig, device: str) -> PlumeModel:
    """The model that is measured.

    Raises:
        ValueError: no such checkpoint.
    """
    dtype = getattr(torch, config.dtype)
    if config.model is not None:
        return PlumeModel.from_pretrained(config.model, dtype=dtype).to(device).eval()
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(0)
        save_tiny_backbone(folder, _WORDS, **_SMALL.get(str(config.shapes), {}))
        small = PlumeModel.from_backbone(folder, dtype="float32", **cast(Any, SHORT_STRINGS)).eval()
        if config.shapes in _SMALL:
            return small.to(device=device, dtype=dtype)  # type: ignore[call-arg]
        shapes = {"2b": SHAPES_2B, "7b": SHAPES_7B}[str(config.shapes)]
        return random_model(small, shapes, device, dtype)


def make_items(processor: PlumeProcessor, size: InputSize, count: int) -> list[Item]:
    """Inputs of one size, all different; the text is as long as makes the prefix `size.tokens` long, if it can be."""
    generator = torch.Generator().manual_seed(0)
    media = []
    for _ in range(count if size.pixels else 0):
        frames = torch.randint(0, 256, (max(size.num_frames, 1), *(size.pixels or ()), 3), generator=generator)
        frames = frames.to(torch.uint8).numpy()
        media.append({"video": frames} if size.num_frames else {"image": Image.fromarray(frames[0])})
    words = _words(processor)

    def item(index: int, num_words: int) -> Item:
        # Which words stand where differs from item to item, how many tokens they have does not.
        text = " ".join(words[(index >> (place % 8)) & 1] for place in range(num_words))
        return Item.parse({**media[index], "text": text} if media else text)

    missing = size.tokens - processor.encode([item(0, 1)])["input_ids"].shape[1]
    return [item(index, 1 + max(missing, 0)) for index in range(count)]


def _words(processor: PlumeProcessor) -> list[str]:
    """Two words of one token each."""
    tokenizer: Any = processor.tokenizer
    known = sorted(word for word in tokenizer.get_vocab() if re.fullmatch(r"[a-z][a-z-]+", word))

    def is_one_token(word: str) -> bool:
        once, thrice = (len(tokenizer(" ".join([word] * count))["input_ids"]) for count in (1, 3))
        return thrice - once == 2

    return [word for word in (*_WORDS, *known) if is_one_token(word)][:2]

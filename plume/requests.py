"""What a call of `Plume.encode` asks for: its inputs in portions, their budget, the form of its result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers.util import quantize_embeddings

from plume.documents import Page
from plume.images import InputError
from plume.inputs import Budget, Item, is_messages
from plume.processor import PlumeProcessor
from plume.video import Video

Window = list[tuple[int, Item, int]]
"""Place, item and number of tokens of some inputs."""


def budget_of(processor: PlumeProcessor, kwargs: Mapping[str, Any]) -> Budget:
    """What media may cost in this call."""
    budget = processor.budget
    settings = kwargs.get("processing_kwargs") or {}
    if set(settings) - {"image"} or set(settings.get("image") or {}) - {"size"}:
        raise ValueError(
            f'processing_kwargs={settings!r}: only {{"image": {{"size": ...}}}} can be set for a call; texts are '
            "never truncated, and frames are set in the configuration or in the input"
        )
    size = (image_settings(kwargs) or {}).get("size")
    return replace(budget, pixels=(size["shortest_edge"], size["longest_edge"])) if size else budget


def windows_of(
    processor: PlumeProcessor,
    raws: Sequence[Any],
    instruction: str,
    budget: Budget,
    limit: tuple[int, int],
    skipped: list[str] | None,
) -> Iterator[Window]:
    """Place, item and number of tokens of the inputs, in portions of at most so many inputs or tokens.

    Bad inputs are raised, or described in `skipped`.
    """
    window: Window = []
    tokens = 0
    for index, raw in enumerate(raws):
        try:
            item = Item.parse(raw, f"input {index}", budget).instructed(instruction)
            length = processor.num_tokens(item, f"input {index}")
        except InputError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        if window and (len(window) == limit[0] or tokens + length > limit[1]):
            yield window
            window, tokens = [], 0
        window.append((index, item, length))
        tokens += length
    if window:
        yield window


def image_settings(kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a call says of images, as sentence-transformers passes it."""
    return (kwargs.get("processing_kwargs") or {}).get("image")


def is_single(inputs: Any) -> bool:
    """Whether this is one input rather than several."""
    one = (str, Mapping, Path, Image.Image, Item, Page, Video)
    return (
        isinstance(inputs, one)
        or is_messages(inputs)
        or (isinstance(inputs, (np.ndarray, torch.Tensor)) and inputs.ndim in (3, 4))
    )


def converted(
    whole: Any, single: bool, precision: Any, as_tensor: bool, as_numpy: bool
) -> torch.Tensor | np.ndarray | list[torch.Tensor]:
    """Vectors in the precision and the form that a call asks for; the one of a single input without its row."""
    if precision != "float32" and len(whole):
        whole = quantize_embeddings(whole, precision=precision)
    if as_tensor:
        whole = torch.as_tensor(whole)
    elif as_numpy:
        whole = whole.numpy() if isinstance(whole, torch.Tensor) else whole
    else:
        whole = list(torch.as_tensor(whole))
    return whole[0] if single else whole

"""What a call of `Plume.encode` asks for: its inputs in portions, their budget, the form of its result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sentence_transformers.util import quantize_embeddings

from plume.images import InputError
from plume.inputs import Budget, Item
from plume.processor import PlumeProcessor

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


def comparable(vectors: Any, dim: int | None) -> Any:
    """Integers and quantised vectors as numbers that similarities can be computed of; others as they are.

    Args:
        vectors: `[N, D]`, `[D]` or a list, of any precision; bits are packed, D / 8 bytes.
        dim: D.

    Raises:
        ValueError: integers of 8 bits that may be vectors of another length, or their bits.

    Example:
        >>> comparable(np.array([0b10100000], np.uint8), 8).tolist()
        [1.0, -1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0]
    """
    if isinstance(vectors, list) and vectors and isinstance(vectors[0], (np.ndarray, torch.Tensor)):
        vectors = torch.stack([torch.as_tensor(one) for one in vectors])
    array = torch.as_tensor(vectors)
    if array.dtype not in (torch.int8, torch.uint8):
        return vectors if array.is_floating_point() else array.float()
    if dim is not None and array.shape[-1] * 8 < dim:
        raise ValueError(
            f"vectors of {array.shape[-1]} integers of 8 bits may be that many numbers, or the bits of "
            f"{array.shape[-1] * 8}; this model has {dim}: set truncate_dim as it was when they were made, or pass "
            "numbers of 32 bits"
        )
    if dim is None or array.shape[-1] * 8 != dim:
        return array.float()
    packed = array.cpu().numpy()
    packed = (packed.astype(np.int16) + 128).astype(np.uint8) if packed.dtype == np.int8 else packed
    return torch.from_numpy(np.unpackbits(packed, axis=-1).astype(np.float32) * 2 - 1)


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

"""Vectors of any precision, as similarities are computed of them.

Letters: N inputs, D length of a vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def comparable(vectors: Any, dim: int | None) -> Any:
    """Integers and quantised vectors as floating numbers, of which similarities can be computed; others as they are.

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
        vectors = torch.stack([torch.as_tensor(vector) for vector in vectors])
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

"""Keys and values of all layers in one tensor of fixed size, which a CUDA graph can be captured over.

`kv [layer, 2, B, G, L_max, C]`. Row b holds `lengths[b]` tokens in its first slots, without gaps; the next token goes
to slot `lengths[b]`. Rows differ in length without padding between prefix and latent steps, and nothing about
lengths is known to the host. The last slot is scratch: tokens that are masked are written there and never read.

Letters: B batch, n new tokens, G key/value heads, C channels per head, L_max slots.
"""

from __future__ import annotations

from copy import copy

import torch
from einops import rearrange
from torch import Tensor


class StaticCache:
    """Room for so many tokens of so many rows; empty, and not cleared, until a prefix is written."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_rows: int,
        num_key_value_heads: int,
        num_slots: int,
        channels: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """Allocate.

        Args:
            num_layers: of the text model.
            num_rows: B.
            num_key_value_heads: G.
            num_slots: L_max, tokens of a row at most, and one more.
            channels: C.
            dtype: of keys and values.
            device: where.
        """
        shape = num_layers, 2, num_rows, num_key_value_heads, num_slots, channels
        self.kv = torch.empty(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
        self._rows = torch.arange(num_rows, device=device)[:, None]
        self._slots = torch.arange(num_slots, device=device)

    @property
    def num_bytes(self) -> int:
        """Memory taken."""
        return self.kv.nbytes

    def first(self, num_rows: int) -> StaticCache:
        """The first rows, sharing memory."""
        part = copy(self)
        part.kv, part.lengths, part._rows = self.kv[:, :, :num_rows], self.lengths[:num_rows], self._rows[:num_rows]
        return part

    def clear(self, start: int) -> None:
        """Zero the slots from `start` on.

        What is masked still takes part in products, where a NaN of an earlier use would spread.
        """
        self.kv[..., start:, :] = 0

    def write_prefix(self, layer: int, keys_values: Tensor) -> None:
        """Put keys and values of a right-padded prefix, `[B, L, 2, G, C]`, into the first slots."""
        self.kv[layer, ..., : keys_values.shape[1], :] = rearrange(keys_values, "b l kv g c -> kv b g l c")

    def append(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Make room for new tokens, `mask [B, n]` true where they are real.

        Returns:
            The slot of each, `[B, n]`, and the slots that each may read, `[B, n, L_max]`.
        """
        count = mask.long().cumsum(dim=1)
        slots = torch.where(mask, self.lengths[:, None] + count - 1, len(self._slots) - 1)
        self.lengths += count[:, -1]
        return slots, self._slots <= slots[..., None]

    def write(self, layer: int, slots: Tensor, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """Put new keys and values, `[B, n, 2, G, C]`, into their slots; all keys and values of the layer."""
        both = self.kv[layer]
        both[:, self._rows, :, slots] = keys_values
        return both[0], both[1]

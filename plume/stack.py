"""The text model of Qwen2-VL as the engine runs it: the same formulas in less than half of the operations.

transformers' layers are the definition; `tests/invariants/test_engine.py` compares. What differs is how often memory is
touched and kernels are launched: queries, keys and values come from one product, gate and up from another, residuals
are added by the product before, the rotation takes three operations, keys and values go to a cache of fixed size, and
of the prefix's last layer only what is read afterwards is computed.

Prefixes are right-padded, so that the causal mask alone keeps padding from being read, which the fastest
attention kernels know how to do. The query heads that share a key/value head are rows of one product.

Letters: B batch, L prefix length or slots, n new tokens, m of them wanted, D hidden size, H query heads,
G key/value heads, C channels per head.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from plume.backbone import Segment
from plume.parts import TextParts
from plume.projection import Projection
from plume.static_cache import StaticCache
from plume.transition import Adapter


def rotation(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of angles, `[..., C/2] -> [..., C]`; the first half of the sines is negated."""
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([cosine, cosine], dim=-1).to(dtype), torch.cat([-sine, sine], dim=-1).to(dtype)


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn channels j and j + C/2 of queries or keys, `[..., C]`, by their angle; see `rotation`."""
    return torch.addcmul(heads * cosine, heads.roll(heads.shape[-1] // 2, dims=-1), sine)


class Layer:
    """One layer: attention and gated MLP, each behind an RMSNorm and around a residual."""

    def __init__(self, own: Any, projection: type[Projection]):
        self.own = own
        self.qkv, self.out, self.gate_up, self.down = (projection(layers) for layers in self._linear())

    @property
    def norm(self) -> Tensor:
        """Scale before attention, `[D]`."""
        return self.own.input_layernorm.weight

    @property
    def mlp_norm(self) -> Tensor:
        """Scale before the MLP, `[D]`."""
        return self.own.post_attention_layernorm.weight

    def _linear(self) -> list[list[Any]]:
        attention, mlp = self.own.self_attn, self.own.mlp
        return [
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        ]


class TextStack:
    """All layers, and the final norm."""

    def __init__(self, parts: TextParts, projection: type[Projection] = Projection):
        """Join the weights of a text model; they stay shared with it.

        Args:
            parts: from `plume.backbone.text_parts`.
            projection: how products are computed.

        Raises:
            UnsupportedModelError: a layer is not what it is in a plain Qwen2-VL.
        """
        self.parts = parts
        self.layers = [Layer(own, projection) for own in parts.layers]
        self.axis = torch.repeat_interleave(torch.tensor(parts.rotary_sections)).to(
            self.norm.device
        )  # [C/2] of 0, 1, 2

    @property
    def norm(self) -> Tensor:
        """Scale of the final norm, `[D]`."""
        return self.parts.norm.weight

    def new_cache(self, num_rows: int, num_slots: int) -> StaticCache:
        """A cache of this model's shape."""
        return StaticCache(
            num_layers=len(self.layers),
            num_rows=num_rows,
            num_key_value_heads=self.parts.num_key_value_heads,
            num_slots=num_slots,
            channels=self.parts.channels,
            dtype=self.norm.dtype,
            device=self.norm.device,
        )

    def decoder(
        self, cache: StaticCache, read: Tensor, adapter: Adapter, *, looks_at_states: bool
    ) -> tuple[StaticDecoder, Adapter]:
        """Decoder and adapter of a rollout behind a prefix that has been read.

        Args:
            cache: holds the prefix.
            read: hidden states at anchor and `<bot>`, `[B, 2, D]`.
            adapter: as the engine has it.
            looks_at_states: whether the rollout looks at a state before the adapter gets it.
        """
        return StaticDecoder(self, cache, read), adapter

    def read_prefix(self, embeds: Tensor, positions: Tensor, columns: Tensor, cache: StaticCache | None) -> Tensor:
        """Read right-padded prefixes from their beginning.

        Args:
            embeds: input embeddings, `[B, L, D]`.
            positions: rotary positions, `[3, B, L]`.
            columns: the positions whose hidden states are wanted, `[B, m]`.
            cache: takes keys and values; `cache.lengths` is the caller's to set. None if nothing will follow.

        Returns:
            Hidden states after the final norm, `[B, m, D]`.
        """
        rows = torch.arange(len(embeds), device=embeds.device)[:, None]
        rotation = self._rotation(positions, embeds.dtype)
        x = embeds
        if cache is not None:
            cache.clear(embeds.shape[1])
        for index, layer in enumerate(self.layers):
            queries, keys_values = self._qkv(layer, x, rotation)
            if cache is not None:
                cache.write_prefix(index, keys_values)
            keys, values = rearrange(keys_values, "b l kv g c -> kv b g l c")
            if index < len(self.layers) - 1:
                attended = F.scaled_dot_product_attention(
                    rearrange(queries, "b l h c -> b h l c"), keys, values, is_causal=True, enable_gqa=True
                )
                attended = rearrange(attended, "b h l c -> b l (h c)")
            else:
                x = x[rows, columns]
                readable = torch.arange(embeds.shape[1], device=embeds.device) <= columns[..., None]  # [B, m, L]
                attended = self._attend(queries[rows, columns], keys, values, self._mask(readable, x.dtype))
            x = self._finish(layer, x, attended)
        return F.rms_norm(x, x.shape[-1:], self.norm, self.parts.eps)

    def read_next(self, segment: Segment, cache: StaticCache) -> Tensor:
        """Read tokens that follow what the cache holds, `[B, n] -> [B, n, D]`; masked ones leave no trace."""
        slots, readable = cache.append(segment.mask)
        x = segment.embeds
        mask, rotation = self._mask(readable, x.dtype), self._rotation(segment.positions, x.dtype)
        for index, layer in enumerate(self.layers):
            queries, keys_values = self._qkv(layer, x, rotation)
            keys, values = cache.write(index, slots, keys_values)
            x = self._finish(layer, x, self._attend(queries, keys, values, mask))
        return F.rms_norm(x, x.shape[-1:], self.norm, self.parts.eps)

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each position's angles, `[B, n, 1, C]`; the first half of the sines is negated."""
        per_channel = rearrange(positions[self.axis], "c b n -> b n 1 c")  # each channel follows one axis
        return rotation(per_channel * self.parts.inverse_frequencies, dtype)

    def _qkv(self, layer: Layer, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries `[B, n, H, C]`, rotated; keys, rotated, and values `[B, n, 2, G, C]`."""
        cosine, sine = rotation
        normed = F.rms_norm(x, x.shape[-1:], layer.norm, self.parts.eps)
        heads = rearrange(layer.qkv(normed), "b n (heads c) -> b n heads c", c=self.parts.channels)
        num_rotated = self.parts.num_heads + self.parts.num_key_value_heads
        rotated = rotate(heads[:, :, :num_rotated], cosine, sine)
        queries, keys = rotated[:, :, : self.parts.num_heads], rotated[:, :, self.parts.num_heads :]
        return queries, torch.stack([keys, heads[:, :, num_rotated:]], dim=2)

    def _mask(self, readable: Tensor, dtype: torch.dtype) -> Tensor:
        """What `_attend` adds to its logits, `[B, 1, H / G * m, L]`: nothing where `readable [B, m, L]`."""
        mask = torch.zeros(readable.shape, dtype=dtype, device=readable.device).masked_fill_(~readable, -torch.inf)
        return repeat(mask, "b m l -> b 1 (h m) l", h=self.parts.num_heads // self.parts.num_key_value_heads)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attention of few queries, `[B, m, H, C]`, over many keys `[B, G, L, C]`: `[B, m, H * C]`."""
        grouped = rearrange(queries, "b m (g h) c -> b g (h m) c", g=keys.shape[1])
        attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return rearrange(attended, "b g (h m) c -> b m (g h c)", m=queries.shape[1])

    def _finish(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer behind attention, `[B, n, D]`."""
        shape = x.shape
        flat = layer.out.add_to(x.flatten(end_dim=1), attended.flatten(end_dim=1))
        normed = F.rms_norm(flat, shape[-1:], layer.mlp_norm, self.parts.eps)
        gate, up = layer.gate_up(normed).chunk(2, dim=-1)
        return layer.down.add_to(flat, F.silu(gate) * up).view(shape)


class StaticDecoder:
    """A text stack and its cache, as `plume.rollout` reads through them.

    The prefix is read before; the rollout's first call returns what it left: the states at anchor and `<bot>`.
    """

    def __init__(self, stack: TextStack, cache: StaticCache, read: Tensor):
        self.stack, self.cache = stack, cache
        self._read: Tensor | None = read

    def feed(self, segment: Segment, *, with_layers: bool = False) -> Tensor:
        """Hidden states of the next segment, `[B, n, D]`."""
        assert not with_layers, "the engine keeps no layers"
        if self._read is not None:
            read, self._read = self._read, None
            return read
        return self.stack.read_next(segment, self.cache)

"""The text model and the transition adapter as the engine runs them: the same formulas in half of the operations.

transformers' layers and `plume.model.transition` are the definitions; `tests/invariants/test_engine.py` compares. What
differs is how often memory is touched and kernels are launched: queries, keys and values come from one product, gate
and up from another, residuals are added by the product before, the rotation takes three operations, keys and values go
to a cache of fixed size, of the prefix's last layer only what is read afterwards is computed, and all experts run in
two products.

Prefixes are right-padded here (`plume.engine.layout` says why), so that the causal mask alone keeps padding from
being read, which the fastest attention kernels know how to do. The query heads that share a key/value head are rows of
one product.

Letters: B batch, L prefix length or slots, n new tokens, m of them wanted, D hidden size, H query heads,
G key/value heads, C channels per head, E experts, the shared one first, I their inner size.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from plume.engine.layers.weights import TextWeights, UnsupportedModelError
from plume.model.interface import Decoder, Segment
from plume.model.transition import MixtureOfExperts, TransitionAdapter, weigh


class JoinedLinear:
    """`x W^T + b` in the model's dtype.

    The weights of several layers over the same input stand below each other in one tensor, of which the layers' own
    parameters become views: nothing is held twice, and what is learnt in place is seen here too.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        """Join some layers.

        Args:
            layers: `nn.Linear`, over the same input; all of them have a bias, or none has.

        Raises:
            UnsupportedModelError: one is not a plain `nn.Linear`.
        """
        for layer in layers:
            if type(layer) is not nn.Linear:
                raise UnsupportedModelError(
                    f"a {type(layer).__name__} stands where nn.Linear is expected; merge adapters first"
                )
        linear: list[nn.Linear] = list(layers)  # type: ignore[arg-type]
        self.weight = _joined([layer.weight for layer in linear])
        biases = [layer.bias for layer in linear if layer.bias is not None]
        self.bias = _joined(biases) if biases else None

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs of all layers beside each other, `[..., in] -> [..., out]`."""
        return F.linear(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual + self(x)`, `[M, out]`, in one operation where that is exact."""
        if self.bias is None:
            return torch.addmm(residual, x, self.weight.T)
        return residual + F.linear(x, self.weight, self.bias)


class JoinedInt8Linear(JoinedLinear):
    """The same in int8 (CPU): weights with one scale per output channel, inputs quantised as they come, one scale each.

    A row's result depends on that row alone. Weights in the model's dtype are kept, so that they can be trained on.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__(layers)
        # Without VNNI two products are added in 16 bits, which half of the range cannot overflow.
        self._levels = 127 if torch.cpu._is_vnni_supported() else 63
        self._quantised, self._scales = _quantised(self.weight.float(), self._levels)

    def __call__(self, x: Tensor) -> Tensor:
        flat, scales = _quantised(x.flatten(end_dim=-2), self._levels)
        y = torch._int_mm(flat, self._quantised.T).to(x.dtype) * (scales * self._scales.T)
        y = y if self.bias is None else y + self.bias
        return y.unflatten(0, x.shape[:-1])

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual + self(x)


def _quantised(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Rows as int8, `[M, n]`, and their scales, `[M, 1]`."""
    scales = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / levels
    return (x / scales).round_().to(torch.int8), scales


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters below each other; they become views of the result, unless they are so already."""
    first = parameters[0].data
    if len(parameters) == 1:
        return first
    ends = [parameter.data_ptr() + parameter.nbytes for parameter in parameters]
    starts = [parameter.data_ptr() for parameter in parameters]
    storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    if len(storages) == 1 and starts[1:] == ends[:-1]:  # another engine has been here
        return first.as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, whole.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = part
    return whole


class StaticCache:
    """Keys and values of all layers in one tensor of fixed size, which a CUDA graph can be captured over.

    `kv [layer, 2, B, G, slots, C]`. Row b holds `lengths[b]` tokens in its first slots, without gaps; the next token
    goes to slot `lengths[b]`. Rows differ in length without padding between prefix and latent steps, and nothing about
    lengths is known to the host. The last slot is scratch: masked tokens are written there and never read. Memory is
    not cleared until a prefix is written.
    """

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
            num_slots: the largest number of tokens of a row, and one more.
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
        rows = copy(self)
        rows.kv, rows.lengths, rows._rows = self.kv[:, :, :num_rows], self.lengths[:num_rows], self._rows[:num_rows]
        return rows

    def clear(self, start: int) -> None:
        """Zero the slots from `start` on.

        What is masked still takes part in products, where a NaN of an earlier use would spread.
        """
        self.kv[..., start:, :] = 0

    def write_prefix(self, layer: int, keys_values: Tensor) -> None:
        """Put keys and values of a right-padded prefix, `[B, L, 2, G, C]`, into the first slots."""
        self.kv[layer, ..., : keys_values.shape[1], :] = rearrange(keys_values, "b l kv g c -> kv b g l c")

    def append(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Reserve slots for new tokens, `mask [B, n]` true where they are real.

        Returns:
            The slot of each, `[B, n]`, and the slots that each may read, `[B, n, slots]`.
        """
        count = mask.long().cumsum(dim=1)
        slots = torch.where(mask, self.lengths[:, None] + count - 1, len(self._slots) - 1)
        self.lengths += count[:, -1]
        return slots, self._slots <= slots[..., None]

    def write(self, layer: int, slots: Tensor, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """Put new keys and values, `[B, n, 2, G, C]`, into their slots; all keys and values of the layer."""
        layer_kv = self.kv[layer]
        layer_kv[:, self._rows, :, slots] = keys_values
        return layer_kv[0], layer_kv[1]


def rotation(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of angles, `[..., C/2] -> [..., C]`; the first half of the sines is negated."""
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([cosine, cosine], dim=-1).to(dtype), torch.cat([-sine, sine], dim=-1).to(dtype)


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn channels j and j + C/2 of queries or keys, `[..., C]`, by their angle; see `rotation`."""
    return torch.addcmul(heads * cosine, heads.roll(heads.shape[-1] // 2, dims=-1), sine)


class Layer:
    """One layer: attention and gated MLP, each behind an RMSNorm and around a residual."""

    def __init__(self, module: Any, linear: type[JoinedLinear]):
        self.module = module
        self.qkv, self.out, self.gate_up, self.down = (linear(layers) for layers in self._linear())

    @property
    def norm(self) -> Tensor:
        """Scale before attention, `[D]`."""
        return self.module.input_layernorm.weight

    @property
    def mlp_norm(self) -> Tensor:
        """Scale before the MLP, `[D]`."""
        return self.module.post_attention_layernorm.weight

    def _linear(self) -> list[list[Any]]:
        attention, mlp = self.module.self_attn, self.module.mlp
        return [
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        ]


class TextLayers:
    """All layers, and the final norm."""

    def __init__(self, weights: TextWeights, linear: type[JoinedLinear] = JoinedLinear):
        """Join the weights of a text model; they stay shared with it.

        Args:
            weights: from `plume.engine.layers.weights.text_weights`.
            linear: how products are computed.

        Raises:
            UnsupportedModelError: a layer is not what it is in a plain Qwen2-VL.
        """
        self.weights = weights
        self.layers = [Layer(module, linear) for module in weights.layers]
        self.axis = torch.repeat_interleave(torch.tensor(weights.rotary_sections)).to(
            self.norm.device
        )  # [C/2] of 0, 1, 2

    @property
    def norm(self) -> Tensor:
        """Scale of the final norm, `[D]`."""
        return self.weights.norm.weight

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Input embeddings of plain tokens, `[B, n] -> [B, n, D]`."""
        return self.weights.embedding(ids)

    def new_cache(self, num_rows: int, num_slots: int) -> StaticCache:
        """A cache of this model's shape."""
        return StaticCache(
            num_layers=len(self.layers),
            num_rows=num_rows,
            num_key_value_heads=self.weights.num_key_value_heads,
            num_slots=num_slots,
            channels=self.weights.channels,
            dtype=self.norm.dtype,
            device=self.norm.device,
        )

    def decoder(self, cache: StaticCache, prefix_states: Tensor) -> StaticDecoder:
        """What a rollout reads through, behind a prefix that has been read.

        Args:
            cache: holds the prefix.
            prefix_states: hidden states at anchor and `<bot>`, `[B, 2, D]`.
        """
        return StaticDecoder(self, cache, prefix_states)

    def read_prefix(self, embeds: Tensor, positions: Tensor, columns: Tensor, cache: StaticCache | None) -> Tensor:
        """Read right-padded prefixes from their beginning.

        Args:
            embeds: input embeddings, `[B, L, D]`.
            positions: rotary positions, `[3, B, L]`.
            columns: the columns whose hidden states are wanted, `[B, m]`.
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
        return F.rms_norm(x, x.shape[-1:], self.norm, self.weights.eps)

    def read_next(self, segment: Segment, cache: StaticCache) -> Tensor:
        """Read tokens that follow what the cache holds, `[B, n] -> [B, n, D]`; masked ones leave no trace."""
        slots, readable = cache.append(segment.mask)
        x = segment.embeds
        mask, rotation = self._mask(readable, x.dtype), self._rotation(segment.positions, x.dtype)
        for index, layer in enumerate(self.layers):
            queries, keys_values = self._qkv(layer, x, rotation)
            keys, values = cache.write(index, slots, keys_values)
            x = self._finish(layer, x, self._attend(queries, keys, values, mask))
        return F.rms_norm(x, x.shape[-1:], self.norm, self.weights.eps)

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each position's angles, `[B, n, 1, C]`; the first half of the sines is negated."""
        per_channel = rearrange(positions[self.axis], "c b n -> b n 1 c")  # each channel follows one axis
        return rotation(per_channel * self.weights.inverse_frequencies, dtype)

    def _qkv(self, layer: Layer, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries `[B, n, H, C]`, rotated; keys, rotated, and values `[B, n, 2, G, C]`."""
        cosine, sine = rotation
        normed = F.rms_norm(x, x.shape[-1:], layer.norm, self.weights.eps)
        heads = rearrange(layer.qkv(normed), "b n (heads c) -> b n heads c", c=self.weights.channels)
        num_rotated = self.weights.num_heads + self.weights.num_key_value_heads
        rotated = rotate(heads[:, :, :num_rotated], cosine, sine)
        queries, keys = rotated[:, :, : self.weights.num_heads], rotated[:, :, self.weights.num_heads :]
        return queries, torch.stack([keys, heads[:, :, num_rotated:]], dim=2)

    def _mask(self, readable: Tensor, dtype: torch.dtype) -> Tensor:
        """What `_attend` adds to its logits, `[B, 1, H / G * m, L]`: nothing where `readable [B, m, L]`."""
        mask = torch.zeros(readable.shape, dtype=dtype, device=readable.device).masked_fill_(~readable, -torch.inf)
        return repeat(mask, "b m l -> b 1 (h m) l", h=self.weights.num_heads // self.weights.num_key_value_heads)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attention of few queries, `[B, m, H, C]`, over many keys `[B, G, L, C]`: `[B, m, H * C]`."""
        grouped = rearrange(queries, "b m (g h) c -> b g (h m) c", g=keys.shape[1])
        attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return rearrange(attended, "b g (h m) c -> b m (g h c)", m=queries.shape[1])

    def _finish(self, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer behind attention, `[B, n, D]`."""
        shape = x.shape
        flat = layer.out.add_to(x.flatten(end_dim=1), attended.flatten(end_dim=1))
        normed = F.rms_norm(flat, shape[-1:], layer.mlp_norm, self.weights.eps)
        gate, up = layer.gate_up(normed).chunk(2, dim=-1)
        return layer.down.add_to(flat, F.silu(gate) * up).view(shape)


class StaticDecoder(Decoder):
    """The text layers and a cache, as `plume.model.rollout` reads through them.

    The prefix has been read before. The rollout's first call returns what is needed of it: the states at anchor and
    `<bot>`.
    """

    def __init__(self, layers: TextLayers, cache: StaticCache, prefix_states: Tensor):
        self.layers, self.cache = layers, cache
        self._prefix_states: Tensor | None = prefix_states

    def feed(self, segment: Segment, *, with_layers: bool = False) -> Tensor:
        assert not with_layers, "the engine keeps no layers"
        if self._prefix_states is not None:
            states, self._prefix_states = self._prefix_states, None
            return states
        return self.layers.read_next(segment, self.cache)

    def forget(self, segment: Segment) -> None:
        self.cache.lengths -= segment.mask.sum(dim=1)


def weights_of_all(weights: Tensor, has_shared: bool) -> Tensor:
    """Weights `[B, E]` of all experts, from those of the routed ones."""
    return F.pad(weights, (1, 0), value=1.0) if has_shared else weights


def first_layers(normed: Tensor, weight: Tensor, bias: Tensor, num_experts: int) -> Tensor:
    """First layers and GELU of all experts over `normed [B, D]`: `[E, B, I]`; weight `[E I, D]`, bias `[E I]`."""
    return rearrange(F.gelu(F.linear(normed, weight, bias)), "b (e i) -> e b i", e=num_experts)


def second_layers(state: Tensor, inner: Tensor, weights: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The state and what the experts add, `[B, D]`: inner `[E, B, I]`, weights `[B, E]`, weight `[E D, I]`, bias."""
    num_experts = len(inner)
    second = rearrange(weight, "(e d) i -> e i d", e=num_experts)
    outputs = torch.baddbmm(rearrange(bias, "(e d) -> e 1 d", e=num_experts), inner, second)  # [E, B, D]
    weights = weights.to(state.dtype)[:, None]
    return torch.baddbmm(state[:, None], weights, rearrange(outputs, "e b d -> b e d"))[:, 0]


def bias_of(linear: JoinedLinear) -> Tensor:
    """The bias of layers that have one."""
    assert linear.bias is not None
    return linear.bias


class JoinedExperts:
    """A mixture of experts with the weights of all experts below each other; they stay shared with it.

    Every expert runs on every row in `MixtureOfExperts` too, so what changes is how often kernels are launched.
    """

    def __init__(self, adapter: MixtureOfExperts):
        self.adapter = adapter
        shared = adapter.shared_expert
        experts: list[Any] = [*adapter.experts] if shared is None else [shared, *adapter.experts]
        self.first = JoinedLinear([expert.fc1 for expert in experts])
        self.second = JoinedLinear([expert.fc2 for expert in experts])

    def __call__(self, state: Tensor, step: int, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `TransitionAdapter.forward`."""
        adapter = self.adapter
        gates = adapter.route(state, step, context)
        weights = weights_of_all(weigh(gates, adapter.top_k), adapter.shared_expert is not None)
        inner = first_layers(adapter.ln(state), self.first.weight, bias_of(self.first), weights.shape[1])
        return second_layers(state, inner, weights, self.second.weight, bias_of(self.second)), gates


def join_experts(adapter: TransitionAdapter) -> TransitionAdapter | JoinedExperts:
    """The adapter in the form that the engine runs."""
    return JoinedExperts(adapter) if type(adapter) is MixtureOfExperts else adapter

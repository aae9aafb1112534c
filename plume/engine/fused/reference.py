"""What the ops of a latent step compute, in plain operations: on any device, in any dtype.

`plume.engine.fused.ops` registers them, and has kernels compute them where there are kernels. They share their formulas
with `plume.engine.layers.text` and `plume.model.transition`; what is new is where one ends and the next begins.

The residual stream of a pass is a sum of terms, `[P, M, D]`, which are added up in order where it is read.

Letters: B batch, n new tokens of a row, M = B n rows (row b n + i is token i of batch row b), D hidden size, H query
heads, G key/value heads, C channels per head, I inner size, P terms, Z splits of the cache of `tiles.SPLIT` slots,
L slots, E routed experts, X all of them.
"""

from __future__ import annotations

from math import log

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from plume.engine.layers.text import first_layers, rotate, rotation, second_layers, weights_of_all
from plume.model.transition import route, weigh
from plume_kernels import tiles


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of this dtype are added up: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _normed(stream: Tensor, norm: Tensor, eps: float) -> Tensor:
    x = stream.to(sum_dtype(stream.dtype)).sum(dim=0)
    return F.rms_norm(x, x.shape[-1:], norm.to(x.dtype), eps).to(norm.dtype)


def _num_readable(mask: Tensor, lengths: Tensor) -> Tensor:
    """Slots that are filled once the real tokens up to each have been written, `[B, n]`."""
    return lengths[:, None] + mask.long().cumsum(dim=1)


def qkv(
    stream: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    inverse_frequencies: Tensor,
    mask: Tensor,
    lengths: Tensor,
    kv: Tensor,
) -> Tensor:
    """Queries of new tokens, rotated; their keys and values go to the cache.

    Args:
        stream: `[P, M, D]`.
        norm: scale of the RMSNorm, `[D]`.
        eps: of the RMSNorm.
        weight: of queries, keys and values below each other, `[(H + 2 G) C, D]`.
        bias: likewise, `[(H + 2 G) C]`.
        positions: one rotary position per row, `[M]`.
        inverse_frequencies: of the rotation, `[C/2]`.
        mask: True at real tokens, `[B, n]`; the others go to the last slot, which is never read.
        lengths: filled slots of each row, `[B]`.
        kv: keys and values of one layer, `[2, B, G, L, C]`; is written.

    Returns:
        `[M, H, C]`.
    """
    groups, num_slots, channels = kv.shape[2:]
    heads = rearrange(F.linear(_normed(stream, norm, eps), weight, bias), "m (h c) -> m h c", c=channels)
    num_heads = heads.shape[1] - 2 * groups
    angles = positions.to(inverse_frequencies.dtype)[:, None, None] * inverse_frequencies  # [M, 1, C/2]
    rotated = rotate(heads[:, : num_heads + groups], *rotation(angles, heads.dtype))
    keys_values = torch.stack([rotated[:, num_heads:], heads[:, num_heads + groups :]], dim=1)  # [M, 2, G, C]
    slots = torch.where(mask, _num_readable(mask, lengths) - 1, num_slots - 1)  # [B, n]
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    kv[:, rows, :, slots] = rearrange(keys_values, "(b n) kv g c -> b n kv g c", b=len(mask))
    return rotated[:, :num_heads].contiguous()


def attention(queries: Tensor, kv: Tensor, mask: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of new tokens over each split of the cache.

    Args:
        queries: from `qkv`, `[M, H, C]`.
        kv: keys and values, the new tokens' own among them, `[2, B, G, L, C]`.
        mask: True at real tokens, `[B, n]`.
        lengths: slots of each row that were filled before the new tokens, `[B]`.

    Returns:
        Outputs `[Z, M, H, C]`, undefined where a split holds nothing that the token may read; and the logarithms to
        base 2 of the sums of exponentials, `[Z, M, H]`, -inf there.
    """
    batch, groups, num_slots = kv.shape[1:4]
    num_splits = -(-num_slots // tiles.SPLIT)
    readable = torch.arange(num_splits * tiles.SPLIT, device=kv.device) < _num_readable(mask, lengths)[..., None]
    is_filled = readable[:, -1, :num_slots, None]  # what is not may be NaN
    keys, values = (x.masked_fill(~is_filled[:, None], 0).to(sum_dtype(kv.dtype)) for x in kv)
    padded = (F.pad(x, (0, 0, 0, num_splits * tiles.SPLIT - num_slots)) for x in (keys, values))
    keys, values = (rearrange(x, "b g (z l) c -> b g z l c", z=num_splits) for x in padded)
    grouped = rearrange(queries.to(keys.dtype), "(b n) (g h) c -> b g (n h) c", b=batch, g=groups)
    logits = torch.einsum("bgrc,bgzlc->bgzrl", grouped, keys) / queries.shape[-1] ** 0.5
    readable = repeat(readable, "b n (z l) -> b 1 z (n h) l", z=num_splits, h=queries.shape[1] // groups)
    logits = logits.masked_fill(~readable, -torch.inf)
    sizes: dict[str, int] = {"n": mask.shape[1]}
    shares = logits.softmax(dim=-1).to(kv.dtype).to(values.dtype)  # rounded, as products in half precision have it
    outputs = rearrange(shares @ values, "b g z (n h) c -> z (b n) (g h) c", **sizes)
    lse = rearrange(logits.logsumexp(dim=-1) / log(2), "b g z (n h) -> z (b n) (g h)", **sizes)
    return outputs.contiguous(), lse.contiguous()


def out(outputs: Tensor, lse: Tensor, weight: Tensor, stream: Tensor) -> Tensor:
    """The splits of attention added up, projected, and added to the residual stream.

    Args:
        outputs: from `attention`, `[Z, M, H, C]`.
        lse: likewise, `[Z, M, H]`.
        weight: of the output projection, `[D, H C]`.
        stream: `[P, M, D]`.

    Returns:
        `[M, D]`, in float32 at least.
    """
    shares = (lse * log(2)).softmax(dim=0).nan_to_num(0)[..., None]  # nothing to read at all: 0
    attended = torch.where(shares > 0, shares * outputs, 0).sum(dim=0).flatten(start_dim=1)
    return stream.to(lse.dtype).sum(dim=0) + F.linear(attended.to(weight.dtype), weight)


def gate_up(x: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
    """The first half of the gated MLP.

    Args:
        x: `[M, D]`.
        norm: scale of the RMSNorm, `[D]`.
        eps: of the RMSNorm.
        weight: of gate and up projection below each other, `[2 I, D]`.

    Returns:
        `[M, I]`.
    """
    gate, up = F.linear(_normed(x[None], norm, eps), weight).chunk(2, dim=-1)
    return F.silu(gate) * up


def down(inner: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """The second half of the gated MLP, added to the residual stream.

    Args:
        inner: from `gate_up`, `[M, I]`.
        weight: `[D, I]`.
        x: `[M, D]`.

    Returns:
        `[P, M, D]`; see `plume_kernels.tiles.num_terms`.
    """
    if num_terms(inner, weight) == 1:
        return (x + F.linear(inner, weight))[None]
    size = tiles.segment(inner.shape[1])
    products = [F.linear(*pair) for pair in zip(inner.split(size, dim=1), weight.split(size, dim=1), strict=True)]
    return torch.stack([x + products[0], *(product.to(x.dtype) for product in products[1:])])


def num_terms(inner: Tensor, weight: Tensor) -> int:
    """Terms of the stream that `down` leaves."""
    return tiles.num_terms(len(weight), weight.shape[1], len(inner), tiles.device_name(weight))


def final_norm(stream: Tensor, norm: Tensor, eps: float) -> Tensor:
    """RMSNorm of the residual stream, `[P, M, D] -> [M, D]`; scale `norm [D]`."""
    return _normed(stream, norm, eps)


def experts_first(
    stream: Tensor | None,
    norm: Tensor,
    eps: float,
    state: Tensor,
    context: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    ln_eps: float,
    step: Tensor,
    router: Tensor,
    router_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    has_shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of a mixture of experts, and the final norm before it.

    Args:
        stream: what the last layer left, `[P, B, D]`; None if the state is given.
        norm: scale of the final norm, `[D]`.
        eps: of the final norm.
        state: `[B, D]`; is written if there is a stream.
        context: what steers the router, `[B, D]`.
        ln_weight: scale of the LayerNorm, `[D]`.
        ln_bias: shift of the LayerNorm, `[D]`.
        ln_eps: of the LayerNorm.
        step: embedding of the step, `[D]`.
        router: `[E, 2 D]`.
        router_bias: `[E]`.
        weight: first layers of all experts below each other, the shared one first, `[X I, D]`.
        bias: likewise, `[X I]`.
        top_k: routed experts that each row keeps.
        has_shared: whether there is a shared expert.

    Returns:
        Gates `[B, E]`; weights of all experts `[B, X]`; `[X, B, I]`, undefined for experts that no row has chosen.
    """
    if stream is not None:
        state.copy_(_normed(stream, norm, eps))
    gates = route(state, context, step, router, router_bias)
    weights = weights_of_all(weigh(gates, top_k), has_shared)
    normed = F.layer_norm(state, state.shape[-1:], ln_weight, ln_bias, ln_eps)
    return gates, weights, first_layers(normed, weight, bias, weights.shape[1]).contiguous()


def experts_second(state: Tensor, inner: Tensor, weights: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The second half of a mixture of experts.

    Args:
        state: `[B, D]`.
        inner: from `experts_first`, `[X, B, I]`.
        weights: likewise, `[B, X]`.
        weight: second layers of all experts below each other, `[X D, I]`.
        bias: likewise, `[X D]`.

    Returns:
        The input of the next latent step, `[B, D]`.
    """
    return second_layers(state, inner, weights, weight, bias)

"""Queries, keys and values of new tokens, rotated, and written to where attention reads them.

    x = sum of the stream's terms
    q, k, v = RMSNorm(x) Wᵀ + b
    q, k = rotated by the token's position; k, v into the row's next free slots, masked tokens into the last one

Defined by `plume.engine.fused.reference.qkv`. A program takes BLOCK_N rotary pairs of one head: channels j and j + C/2
are rotated together, so both come from one program.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from plume_kernels import tiles
from plume_kernels.launch import contiguous, launch, prefetch, wait
from plume_kernels.rows import normed_products, num_readable


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def _qkv_kernel(
    stream_ptr,  # [P, M, D]
    norm_ptr,  # [D]
    weight_ptr,  # [(H + 2 G) C, D]
    bias_ptr,  # [(H + 2 G) C]
    positions_ptr,  # [M]
    frequencies_ptr,  # [C/2]
    mask_ptr,  # [B, n]
    lengths_ptr,  # [B]
    queries_ptr,  # [M, H, C]
    kv_ptr,  # [2, B, G, L, C]
    num_rows, stride_kv, stride_batch, num_slots, eps,
    D: tl.constexpr, P: tl.constexpr, H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, NUM_NEW: tl.constexpr,
    FEW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, pair = tl.program_id(1) // (C // 2 // BLOCK_N), tl.program_id(1) % (C // 2 // BLOCK_N) * BLOCK_N
    pairs = pair + tl.arange(0, BLOCK_N)
    mask_m = rows < num_rows
    first, second = head * C + pairs, head * C + C // 2 + pairs  # channels
    if PDL:
        prefetch(weight_ptr, first, D, D)
        prefetch(weight_ptr, second, D, D)
        wait()

    a, b = normed_products(
        stream_ptr, norm_ptr, weight_ptr, num_rows, head * C + pair, C // 2, eps,
        D, P, FEW, BLOCK_M, BLOCK_N, BLOCK_K, UPCAST,
    )  # fmt: skip
    a += tl.load(bias_ptr + first).to(tl.float32)[None, :]
    b += tl.load(bias_ptr + second).to(tl.float32)[None, :]

    position = tl.load(positions_ptr + rows, mask=mask_m, other=0).to(tl.float32)
    angle = position[:, None] * tl.load(frequencies_ptr + pairs)[None, :]
    is_rotated = head < H + G  # values are not
    cosine, sine = tl.where(is_rotated, tl.cos(angle), 1.0), tl.where(is_rotated, tl.sin(angle), 0.0)
    rotated_a, rotated_b = a * cosine - b * sine, b * cosine + a * sine

    if head < H:
        target = queries_ptr + (rows[:, None] * H + head) * C + pairs[None, :]
    else:
        batch, token = rows // NUM_NEW, rows % NUM_NEW
        is_real = tl.load(mask_ptr + rows, mask=mask_m, other=0) != 0
        filled = num_readable(mask_ptr, lengths_ptr, batch, token, mask_m, NUM_NEW)
        slot = tl.where(is_real, tl.minimum(filled, num_slots) - 1, num_slots - 1)  # never beyond the cache
        place = (head - H) // G * stride_kv.to(tl.int64) + batch.to(tl.int64) * stride_batch
        row = place + ((head - H) % G * num_slots + slot) * C
        target = kv_ptr + row[:, None] + pairs[None, :]
    tl.store(target, rotated_a.to(target.dtype.element_ty), mask=mask_m[:, None])
    tl.store(target + C // 2, rotated_b.to(target.dtype.element_ty), mask=mask_m[:, None])


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
    """See `plume.engine.fused.reference.qkv`."""
    (terms, num_rows, width), (_, _, groups, num_slots, channels) = stream.shape, kv.shape
    num_heads = len(weight) // channels - 2 * groups
    contiguous(stream, norm, weight, bias, positions, inverse_frequencies, mask, lengths, kv[0, 0])
    tile = tiles.find("qkv", len(weight), width, num_rows, tiles.device_name(stream))
    block_n = math.gcd(channels // 2, max(8, tile.block_n // 2))
    queries = torch.empty(num_rows, num_heads, channels, dtype=weight.dtype, device=weight.device)
    grid = triton.cdiv(num_rows, tile.block_m), len(weight) // 2 // block_n
    launch(
        _qkv_kernel,
        grid,
        (
            stream, norm, weight, bias, positions, inverse_frequencies, mask.view(torch.uint8), lengths, queries, kv,
            num_rows, kv.stride(0), kv.stride(1), num_slots, eps,
        ),
        tile,
        D=width, P=terms, H=num_heads, G=groups, C=channels, NUM_NEW=mask.shape[1],
        FEW=tiles.few(num_rows, tile.block_m), BLOCK_M=tile.block_m, BLOCK_N=block_n, BLOCK_K=tile.block_k,
    )  # fmt: skip
    return queries

"""The second half of the gated MLP, added to the residual stream.

    stream = x + sum over segments of inner_s W_sᵀ

Defined by `plume.definitions.down`. The channels are added up in segments of fixed size
(`plume_kernels.tiles.segment`). With few rows a program takes one segment, and the stream is left in as many terms,
which whoever reads it adds up; with many, a program takes all of them, side by side. The order of additions is the
same, so both give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from plume_kernels import tiles
from plume_kernels.launch import contiguous, launch, prefetch, wait
from plume_kernels.rows import load_weight


@triton.jit(do_not_specialize=["num_rows"])
def _down_kernel(
    inner_ptr,  # [M, I]
    weight_ptr,  # [D, I]
    x_ptr,  # [M, D]
    stream_ptr,  # [P, M, D]
    num_rows,
    D: tl.constexpr, INNER: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    term = tl.program_id(2)
    mask_m = rows < num_rows
    offs_k = tl.arange(0, BLOCK_K)
    if PDL:
        # A kilobyte of each row, since the kernel before keeps the memory busy; no segment is shorter.
        LAST: tl.constexpr = INNER - (INNER - 1) // SEGMENT * SEGMENT
        prefetch(weight_ptr + term * SEGMENTS * SEGMENT, cols, INNER, 512 if LAST > 512 else LAST)
        wait()

    place = rows[:, None] * D + cols[None, :]
    total = tl.where(term == 0, tl.load(x_ptr + place, mask=mask_m[:, None], other=0.0), 0.0)
    if SEGMENTS == 1:
        start = term * SEGMENT
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(start, tl.minimum(start + SEGMENT, INNER), BLOCK_K):
            w = load_weight(weight_ptr, cols, k + offs_k, INNER, UPCAST)
            inner = tl.load(inner_ptr + rows[:, None] * INNER + (k + offs_k)[None, :], mask=mask_m[:, None], other=0.0)
            acc = tl.dot(inner.to(w.dtype), w, acc, input_precision="ieee")
        total += acc
    else:
        # All segments at once: sums that need not wait for each other, which a warp or two of each take.
        S: tl.constexpr = 4 if SEGMENTS > 2 else 2
        segments = tl.arange(0, S)
        sums = tl.zeros((S, BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, SEGMENT, BLOCK_K):
            ks = segments[:, None] * SEGMENT + k + offs_k[None, :]  # [S, k]
            is_within = segments * SEGMENT + k < INNER  # the last is shorter
            w = tl.load(
                weight_ptr + cols[None, None, :] * INNER + ks[:, :, None], mask=is_within[:, None, None], other=0.0
            )
            mask = mask_m[None, :, None] & is_within[:, None, None]
            inner = tl.load(inner_ptr + rows[None, :, None] * INNER + ks[:, None, :], mask=mask, other=0.0)
            if UPCAST:
                w = w.to(tl.float32)
            added = tl.dot(inner.to(w.dtype), w, sums, input_precision="ieee")
            sums = tl.where(is_within[:, None, None], added, sums)
        for own in tl.static_range(SEGMENTS):
            total += tl.sum(tl.where((segments == own)[:, None, None], sums, 0.0), axis=0)
    tl.store(stream_ptr + term * num_rows * D + place, total, mask=mask_m[:, None])


def down(inner: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """See `plume.definitions.down`."""
    (num_rows, width), inner_width = x.shape, inner.shape[1]
    contiguous(inner, weight, x)
    device = tiles.device_name(x)
    tile = tiles.find("down", width, inner_width, num_rows, device)
    terms, segments = tiles.num_terms(width, inner_width, num_rows, device), tiles.num_segments(inner_width)
    segment = tiles.segment(inner_width)
    if terms < segments:  # a table's tile may be meant for one segment
        stage_bytes = 4 * tile.block_k * (tile.block_m + tile.block_n) * weight.element_size()
        tile = replace(tile, num_stages=tiles.deepest(stage_bytes, tile.num_stages))
    stream = x.new_empty(terms, num_rows, width, dtype=torch.float32)
    launch(
        _down_kernel,
        (triton.cdiv(num_rows, tile.block_m), width // tile.block_n, terms),
        (inner, weight, x, stream, num_rows),
        tile,
        D=width, INNER=inner_width, SEGMENT=segment, SEGMENTS=segments // terms,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=math.gcd(tile.block_k, inner_width % segment),
    )  # fmt: skip
    return stream

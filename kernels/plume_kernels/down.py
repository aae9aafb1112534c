"""The second half of the gated MLP, added to the residual stream.

    stream = x + sum over segments of inner_s W_sᵀ

Defined by `plume.engine.fused.reference.down`. The channels are added up in segments of fixed size
(`plume_kernels.tiles.segment`). With few rows a program takes one segment, and the stream is left in as many terms,
which whoever reads it adds up; with many, a program takes all of them, side by side. The order of additions is the
same, so both give the same bits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from plume_kernels import tiles
from plume_kernels.launch import contiguous, launch, prefetch, wait
from plume_kernels.rows import add_segments


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
    if PDL:
        # A kilobyte of each row, since the kernel before keeps the memory busy; no segment is shorter.
        LAST: tl.constexpr = INNER - (INNER - 1) // SEGMENT * SEGMENT
        prefetch(weight_ptr + term * SEGMENTS * SEGMENT, cols, INNER, 512 if LAST > 512 else LAST)
        wait()

    place = rows[:, None] * D + cols[None, :]
    total = tl.where(term == 0, tl.load(x_ptr + place, mask=mask_m[:, None], other=0.0), 0.0)
    start = term * SEGMENTS * SEGMENT
    end = tl.minimum(start + SEGMENTS * SEGMENT, INNER)
    total = add_segments(
        total, inner_ptr, weight_ptr, rows, cols, mask_m, start, end,
        INNER, SEGMENT, SEGMENTS, BLOCK_M, BLOCK_N, BLOCK_K, UPCAST,
    )  # fmt: skip
    tl.store(stream_ptr + term * num_rows * D + place, total, mask=mask_m[:, None])


def down(inner: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """See `plume.engine.fused.reference.down`."""
    (num_rows, width), inner_width = x.shape, inner.shape[1]
    contiguous(inner, weight, x)
    device = tiles.device_name(x)
    tile = tiles.find("down", width, inner_width, num_rows, device)
    terms, segments = tiles.num_terms(width, inner_width, num_rows, device), tiles.num_segments(inner_width)
    if terms < segments:  # a table's tile may be meant for one segment
        stage_bytes = 4 * tile.block_k * (tile.block_m + tile.block_n) * weight.element_size()
        tile = replace(tile, num_stages=tiles.deepest(stage_bytes, tile.num_stages))
    stream = x.new_empty(terms, num_rows, width, dtype=torch.float32)
    launch(
        _down_kernel,
        (triton.cdiv(num_rows, tile.block_m), width // tile.block_n, terms),
        (inner, weight, x, stream, num_rows),
        tile,
        D=width, INNER=inner_width, SEGMENT=tiles.segment(inner_width), SEGMENTS=segments // terms,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tiles.within_segments(tile.block_k, inner_width),
    )  # fmt: skip
    return stream

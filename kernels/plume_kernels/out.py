"""The splits of attention added up, projected, and added to the residual stream.

    attended = sum over splits of 2^(lse_z - best) / total outputs_z,     total = sum of 2^(lse_z - best)
    x = sum of the stream's terms + attended Wᵀ

`best` is the largest lse_z. Defined by `plume.engine.fused.reference.out`. With few rows the projection adds the splits
up itself, a head at a time and for real rows only; with many, every one of its programs would read them all again, so
that a kernel of its own does it before. Both give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plume_kernels import tiles
from plume_kernels.launch import contiguous, launch, prefetch, wait
from plume_kernels.rows import filled_up, load_stream, load_weight

#: Splits, and rows times splits, up to which the projection adds the splits up itself.
MOST_SPLITS, MOST_MERGED = 4, 16


@triton.jit
def _load_lse(lse_ptr, z, rows, mask_m, head, num_rows, H: tl.constexpr):
    """Of one split, `[M]`; -inf where a row has no slot in it."""
    return tl.load(lse_ptr + (z * num_rows + rows) * H + head, mask=mask_m, other=float("-inf"))


@triton.jit
def _share(lse, best):
    """2^(lse - best), `[M]`; zero where a row has no slot in this split, or in any."""
    return tl.exp2(lse - tl.where(best == float("-inf"), 0.0, best))


@triton.jit
def _reciprocal(total):
    """1 / total, `[M]`, of rows that have any slot."""
    return 1.0 / tl.where(total > 0, total, 1.0)


@triton.jit
def _add_split(
    outputs_ptr, lse_ptr, z, rows, mask_m, head, num_rows, best, scale, acc, H: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """The sum of outputs, `[M, C]`, with one more split."""
    lse = _load_lse(lse_ptr, z, rows, mask_m, head, num_rows, H)
    share = (_share(lse, best) * scale)[:, None]
    offs = ((z * num_rows + rows) * H + head)[:, None] * C + tl.arange(0, C)[None, :]
    part = tl.load(outputs_ptr + offs, mask=(lse > float("-inf"))[:, None], other=0.0)  # else unwritten
    return tl.fma(tl.broadcast_to(share, part.shape), part, acc)


@triton.jit(do_not_specialize=["num_rows"])
def _combine_kernel(
    outputs_ptr,  # [Z, M, H, C]
    lse_ptr,  # [Z, M, H]
    attended_ptr,  # [M, H, C]
    num_rows,
    H: tl.constexpr, C: tl.constexpr, Z: tl.constexpr, BLOCK_M: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows, head = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1)
    mask_m = rows < num_rows
    if PDL:
        wait()
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total, acc = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, C), tl.float32)
    for z in range(0, Z):
        best = tl.maximum(best, _load_lse(lse_ptr, z, rows, mask_m, head, num_rows, H))
    for z in range(0, Z):
        total += _share(_load_lse(lse_ptr, z, rows, mask_m, head, num_rows, H), best)
    scale = _reciprocal(total)
    for z in range(0, Z):
        acc = _add_split(outputs_ptr, lse_ptr, z, rows, mask_m, head, num_rows, best, scale, acc, H, C)
    target = attended_ptr + (rows * H + head)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(target, acc.to(target.dtype.element_ty), mask=mask_m[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _out_kernel(
    attended_ptr,  # [Z, M, H, C], or [M, H, C] if Z = 0
    lse_ptr,  # [Z, M, H]
    weight_ptr,  # [D, H C]
    stream_ptr,  # [P, M, D]
    x_ptr,  # [M, D]
    num_rows,
    D: tl.constexpr, P: tl.constexpr, H: tl.constexpr, C: tl.constexpr, Z: tl.constexpr, FEW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = rows < num_rows
    offs_c = tl.arange(0, C)
    if PDL:
        prefetch(weight_ptr, cols, H * C, H * C)
        wait()

    few = tl.program_id(0) * BLOCK_M + tl.arange(0, FEW)  # only these rows can be real
    mask_few = few < num_rows
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for head in range(0, H):
        w = load_weight(weight_ptr, cols, head * C + offs_c, H * C, UPCAST)
        if Z > 0:
            best = tl.full((FEW,), float("-inf"), tl.float32)
            total, acc = tl.zeros((FEW,), tl.float32), tl.zeros((FEW, C), tl.float32)
            # Unrolled: the compiler overlaps the loads of innermost loops only, and the heads' is to be one.
            for z in tl.static_range(Z):
                best = tl.maximum(best, _load_lse(lse_ptr, z, few, mask_few, head, num_rows, H))
            for z in tl.static_range(Z):
                total += _share(_load_lse(lse_ptr, z, few, mask_few, head, num_rows, H), best)
            scale = _reciprocal(total)
            for z in tl.static_range(Z):
                acc = _add_split(attended_ptr, lse_ptr, z, few, mask_few, head, num_rows, best, scale, acc, H, C)
            attended = filled_up(acc, BLOCK_M, w.dtype)
        else:
            offs = (rows * H + head)[:, None] * C + offs_c[None, :]
            attended = tl.load(attended_ptr + offs, mask=mask_m[:, None], other=0.0)
        product = tl.dot(attended.to(w.dtype), w, product, input_precision="ieee")

    x = load_stream(stream_ptr, rows, cols, mask_m, num_rows, D, P) + product
    tl.store(x_ptr + rows[:, None] * D + cols[None, :], x, mask=mask_m[:, None])


def combine(outputs: Tensor, lse: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention over the whole cache, `[M, H, C]`, from that over its splits."""
    num_splits, num_rows, num_heads, channels = outputs.shape
    contiguous(outputs, lse)
    attended = outputs.new_empty(num_rows, num_heads, channels, dtype=dtype)
    launch(
        _combine_kernel,
        (triton.cdiv(num_rows, 4), num_heads),
        (outputs, lse, attended, num_rows),
        tiles.Tile(num_warps=2),
        H=num_heads, C=channels, Z=num_splits, BLOCK_M=4,
    )  # fmt: skip
    return attended


def out(outputs: Tensor, lse: Tensor, weight: Tensor, stream: Tensor) -> Tensor:
    """See `plume.engine.fused.reference.out`."""
    (num_splits, num_rows, num_heads, channels), (terms, _, width) = outputs.shape, stream.shape
    contiguous(outputs, lse, weight, stream)
    attended = outputs
    if num_splits > MOST_SPLITS or num_rows * num_splits > MOST_MERGED:
        attended, num_splits = combine(outputs, lse, weight.dtype), 0
    tile = tiles.find("out", width, num_heads * channels, num_rows, tiles.device_name(stream))
    x = stream.new_empty(num_rows, width, dtype=torch.float32)
    launch(
        _out_kernel,
        (triton.cdiv(num_rows, tile.block_m), width // tile.block_n),
        (attended, lse, weight, stream, x, num_rows),
        tile,
        D=width, P=terms, H=num_heads, C=channels, Z=num_splits,
        FEW=tiles.few(num_rows, tile.block_m), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
    )  # fmt: skip
    return x

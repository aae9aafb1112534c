"""What several kernels do to rows: read the residual stream, normalise, multiply, count tokens.

The residual stream is a sum of terms, `[P, M, D]`, that whoever reads it adds up in order: the product that wrote them
was split, and adding without atomics takes a kernel that comes after.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_stream(stream_ptr, rows, cols, mask_m, num_rows, D: tl.constexpr, P: tl.constexpr):
    """The stream at some rows and columns, `[rows, cols]` in float32."""
    offs = rows[:, None] * D + cols[None, :]
    x = tl.load(stream_ptr + offs, mask=mask_m[:, None], other=0.0).to(tl.float32)
    for term in tl.static_range(1, P):
        x += tl.load(stream_ptr + term * num_rows * D + offs, mask=mask_m[:, None], other=0.0).to(tl.float32)
    return x


@triton.jit
def filled_up(tile, BLOCK_M: tl.constexpr, dtype: tl.constexpr):
    """Few rows `[R, n]`, rounded, and repeated until there are as many as a product takes, `[M, n]`: row i mod R."""
    FEW: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    # A sum over one, since the compiler passes no layout through a sum: it would have every warp of the product do all
    # that came before by itself, many times over.
    tile = tl.sum(tl.reshape(tile, (1, FEW, N)), axis=0).to(dtype)
    return tl.reshape(tl.broadcast_to(tile[None, :, :], (BLOCK_M // FEW, FEW, N)), (BLOCK_M, N))


@triton.jit
def load_weight(weight_ptr, offs_n, offs_k, K: tl.constexpr, UPCAST: tl.constexpr):
    """Rows `offs_n` of a weight `[N, K]` at channels `offs_k`, transposed: `[k, n]`."""
    w = tl.load(weight_ptr + offs_n[None, :] * K + offs_k[:, None])
    return w.to(tl.float32) if UPCAST else w


@triton.jit
def normed_products(
    stream_ptr, norm_ptr, weight_ptr, num_rows, first, second, eps,
    D: tl.constexpr, P: tl.constexpr, FEW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Products of RMSNorm(x) with the rows `first` and with the rows `second` of a weight `[N, D]`, `[M, n]` each.

    The norm's factor is the same for all channels of a row, so it is applied to the sum, and one pass is enough. The
    sum of squares is taken from the diagonal of x xᵀ: a product adds up its channels in order whatever the tile, while
    the order of `tl.sum` depends on how the compiler lays the tile out.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, FEW)  # only these can be real
    mask_m = rows < num_rows
    first_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gram = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    offs_k = tl.arange(0, BLOCK_K)
    for k in range(0, D, BLOCK_K):
        cols = k + offs_k
        first_w = load_weight(weight_ptr, first, cols, D, UPCAST)
        second_w = load_weight(weight_ptr, second, cols, D, UPCAST)
        x = load_stream(stream_ptr, rows, cols, mask_m, num_rows, D, P)
        scale = tl.load(norm_ptr + cols).to(tl.float32)
        rounded = filled_up(x, BLOCK_M, first_w.dtype)
        gram = tl.dot(rounded, tl.trans(rounded), gram, input_precision="ieee")
        scaled = filled_up(x * scale[None, :], BLOCK_M, first_w.dtype)
        first_acc = tl.dot(scaled, first_w, first_acc, input_precision="ieee")
        second_acc = tl.dot(scaled, second_w, second_acc, input_precision="ieee")
    offs_m = tl.arange(0, BLOCK_M)
    squares = tl.sum(tl.where(offs_m[:, None] == offs_m[None, :], gram, 0.0), axis=1)
    factor = tl.rsqrt(squares / D + eps)[:, None]
    return first_acc * factor, second_acc * factor


@triton.jit
def num_readable(mask_ptr, lengths_ptr, batch, token, mask_m, NUM_NEW: tl.constexpr):
    """Slots of a row of the cache that are filled once its real tokens up to `token` have been written, `[M]`."""
    count = tl.load(lengths_ptr + batch, mask=mask_m, other=0).to(tl.int32)
    for new in tl.static_range(NUM_NEW):
        is_real = tl.load(mask_ptr + batch * NUM_NEW + new, mask=mask_m, other=0).to(tl.int32)
        count += tl.where(new <= token, is_real, 0)
    return count

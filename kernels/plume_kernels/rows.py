"""What several kernels do to rows: read the residual stream, normalise, multiply, count tokens.

The residual stream is a sum of terms, `[P, M, D]`, that whoever reads it adds up in order: the product that wrote them
was split, and adding without atomics takes a kernel that comes after.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Sums that the squares of a row's channels are first added up in; see `add_squares`.
LANES = tl.constexpr(128)


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
def add_segments(
    total, x_ptr, weight_ptr, rows, cols, mask_m, start, end,
    K: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile `[M, n]` with the products of x `[M, K]` and a weight `[N, K]`, added up in segments, one after the other.

    Of the channels from `start` to `end`, so that the last segment may be shorter. With more than one segment they are
    worked on side by side, by different warps: within one, each product waits for the one before.
    """
    offs_k = tl.arange(0, BLOCK_K)
    if SEGMENTS == 1:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(start, end, BLOCK_K):
            w = load_weight(weight_ptr, cols, k + offs_k, K, UPCAST)
            x = tl.load(x_ptr + rows[:, None] * K + (k + offs_k)[None, :], mask=mask_m[:, None], other=0.0)
            acc = tl.dot(x.to(w.dtype), w, acc, input_precision="ieee")
        total += acc
    else:
        S: tl.constexpr = 4 if SEGMENTS > 2 else 2
        segments = tl.arange(0, S)
        sums = tl.zeros((S, BLOCK_M, BLOCK_N), tl.float32)
        for k in range(start, start + SEGMENT, BLOCK_K):
            ks = segments[:, None] * SEGMENT + k + offs_k[None, :]  # [S, k]
            is_within = (segments * SEGMENT + k < end)[:, None, None]
            w = tl.load(weight_ptr + cols[None, None, :] * K + ks[:, :, None], mask=is_within, other=0.0)
            mask = mask_m[None, :, None] & is_within
            x = tl.load(x_ptr + rows[None, :, None] * K + ks[:, None, :], mask=mask, other=0.0)
            if UPCAST:
                w = w.to(tl.float32)
            sums = tl.where(is_within, tl.dot(x.to(w.dtype), w, sums, input_precision="ieee"), sums)
        for own in tl.static_range(SEGMENTS):
            total += tl.sum(tl.where((segments == own)[:, None, None], sums, 0.0), axis=0)
    return total


@triton.jit
def add_squares(lanes, x, start):
    """Sums of squares by channel modulo 128, `[R, 128]`, with those of k more channels, `[R, k]`, from `start` on.

    `tl.sum` would add in an order that depends on how the compiler lays the tile out, and a sum for each block in one
    that depends on the tile. Each of these is in the order of the channels.
    """
    FEW: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    tl.static_assert(K <= 2 * LANES)
    squares = x * x
    if K < LANES:
        is_here = tl.arange(0, LANES // K)[None, :, None] == start // K % (LANES // K)
        lanes += tl.reshape(tl.where(is_here, squares[:, None, :], 0.0), (FEW, LANES))
    elif K == LANES:
        lanes += squares
    else:
        before, behind = tl.split(tl.permute(tl.reshape(squares, (FEW, 2, LANES)), (0, 2, 1)))
        lanes = lanes + before + behind
    return lanes


@triton.jit
def sum_of_lanes(lanes, BLOCK_M: tl.constexpr):
    """The sum of all, repeated for the rows of a product, `[M]`. By twos, which have one order only."""
    FEW: tl.constexpr = lanes.shape[0]
    for _ in tl.static_range(7):
        lanes = tl.sum(tl.reshape(lanes, (FEW, lanes.shape[1] // 2, 2)), axis=2)
    return tl.reshape(tl.broadcast_to(tl.reshape(lanes, (1, FEW)), (BLOCK_M // FEW, FEW)), (BLOCK_M,))


@triton.jit
def normed_products(
    stream_ptr, norm_ptr, weight_ptr, num_rows, first, gap, eps,
    D: tl.constexpr, P: tl.constexpr, FEW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Products of RMSNorm(x) with two blocks of rows of a weight `[N, D]`, `[M, n]` each.

    The blocks begin at `first` and `first + gap`. Their rows are taken in turns in one product, so that warps share its
    columns and each has both results of a pair. The norm's factor is the same for all channels of a row, so it is
    applied to the sum, and one pass is enough.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, FEW)  # only these can be real
    mask_m = rows < num_rows
    offs_k, offs_n = tl.arange(0, BLOCK_K), tl.arange(0, 2 * BLOCK_N)
    places = first + offs_n // 2 + offs_n % 2 * gap
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    lanes = tl.zeros((FEW, LANES), tl.float32)
    for k in range(0, D, BLOCK_K):
        cols = k + offs_k
        w = load_weight(weight_ptr, places, cols, D, UPCAST)
        x = load_stream(stream_ptr, rows, cols, mask_m, num_rows, D, P)
        # Of two axes, since too few bytes for each thread would not be loaded ahead.
        scale = tl.load(norm_ptr + cols[None, :] + tl.zeros((FEW, 1), tl.int32)).to(tl.float32)
        lanes = add_squares(lanes, x, k)
        scaled = filled_up(x * scale, BLOCK_M, w.dtype)
        acc = tl.dot(scaled, w, acc, input_precision="ieee")
    factor = tl.rsqrt(sum_of_lanes(lanes, BLOCK_M) / D + eps)[:, None]
    return tl.split(tl.reshape(acc * factor, (BLOCK_M, BLOCK_N, 2)))


@triton.jit
def num_readable(mask_ptr, lengths_ptr, batch, token, mask_m, NUM_NEW: tl.constexpr):
    """Slots of a row of the cache that are filled once its real tokens up to `token` have been written, `[M]`."""
    count = tl.load(lengths_ptr + batch, mask=mask_m, other=0).to(tl.int32)
    for new in tl.static_range(NUM_NEW):
        is_real = tl.load(mask_ptr + batch * NUM_NEW + new, mask=mask_m, other=0).to(tl.int32)
        count += tl.where(new <= token, is_real, 0)
    return count

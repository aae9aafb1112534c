"""The transition adapter: a mixture of experts between two latent steps.

    inner_e = GELU(normed W1_eᵀ + b1_e)                              first
    next = state + sum of weights_e (inner_e W2_eᵀ + b2_e)           second

`plume_kernels.routing` comes before. Defined by `plume.engine.fused.reference.experts_first`, of which that is a part,
and `plume.engine.fused.reference.experts_second`. A program whose expert no row of its tile has chosen ends there, so
that a small batch reads few experts; in a large one each row weighs them.

Letters: X experts, the shared one first; B rows, D hidden size, I inner size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plume_kernels import tiles
from plume_kernels.launch import contiguous, launch, prefetch, wait
from plume_kernels.routing import route
from plume_kernels.rows import add_segments, load_weight


@triton.jit(do_not_specialize=["num_rows"])
def _first_kernel(
    normed_ptr,  # [B, D]
    weights_ptr,  # [B, X]
    weight_ptr, bias_ptr,  # [X I, D], [X I]
    inner_ptr,  # [X, B, I]
    num_rows,
    D: tl.constexpr, INNER: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.program_id(2)
    mask_m = rows < num_rows
    offs_k = tl.arange(0, BLOCK_K)
    if PDL:
        if expert == 0:  # the shared one, which all rows need
            prefetch(weight_ptr, cols, D, D)
        wait()

    own = tl.load(weights_ptr + rows * EXPERTS + expert, mask=mask_m, other=0.0)
    if tl.sum((own > 0).to(tl.int32), axis=0) > 0:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            w = load_weight(weight_ptr + expert * INNER * D, cols, k + offs_k, D, UPCAST)
            x = tl.load(normed_ptr + rows[:, None] * D + (k + offs_k)[None, :], mask=mask_m[:, None], other=0.0)
            acc = tl.dot(x.to(w.dtype), w, acc, input_precision="ieee")
        acc += tl.load(bias_ptr + expert * INNER + cols).to(tl.float32)[None, :]
        gelu = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
        target = inner_ptr + (expert * num_rows + rows[:, None]) * INNER + cols[None, :]
        tl.store(target, gelu.to(target.dtype.element_ty), mask=mask_m[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _second_kernel(
    state_ptr,  # [B, D]
    inner_ptr,  # [X, B, I]
    weights_ptr,  # [B, X]
    weight_ptr, bias_ptr,  # [X D, I], [X D]
    next_ptr,  # [B, D]
    num_rows, stride_state,
    D: tl.constexpr, INNER: tl.constexpr, EXPERTS: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = rows < num_rows
    if PDL:
        prefetch(weight_ptr, cols, INNER, INNER)  # of the first expert, the shared one, which all rows need
        wait()

    offs = rows[:, None] * stride_state + cols[None, :]
    total = tl.load(state_ptr + offs, mask=mask_m[:, None], other=0.0).to(tl.float32)
    for expert in range(0, EXPERTS):
        own = tl.load(weights_ptr + rows * EXPERTS + expert, mask=mask_m, other=0.0)
        if tl.sum((own > 0).to(tl.int32), axis=0) > 0:
            acc = add_segments(
                tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
                inner_ptr + expert * num_rows * INNER, weight_ptr + expert * D * INNER, rows, cols, mask_m, 0, INNER,
                INNER, SEGMENT, SEGMENTS, BLOCK_M, BLOCK_N, BLOCK_K, UPCAST,
            )  # fmt: skip
            acc += tl.load(bias_ptr + expert * D + cols).to(tl.float32)[None, :]
            total += own[:, None] * acc
    target = next_ptr + rows[:, None] * D + cols[None, :]
    tl.store(target, total.to(target.dtype.element_ty), mask=mask_m[:, None])


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
    """See `plume.engine.fused.reference.experts_first`."""
    gates, weights, normed = route(
        stream, norm, eps, state, context, ln_weight, ln_bias, ln_eps, step, router, router_bias, top_k, has_shared
    )
    (num_rows, width), num_experts = state.shape, weights.shape[1]
    inner_width = len(weight) // num_experts
    contiguous(weight, bias)
    inner = state.new_empty(num_experts, num_rows, inner_width)
    device = tiles.device_name(state)
    tile = tiles.find("experts_first", inner_width, width, 1, device)
    launch(
        _first_kernel,
        (triton.cdiv(num_rows, 16), inner_width // tile.block_n, num_experts),
        (normed, weights, weight, bias, inner, num_rows),
        tile,
        D=width, INNER=inner_width, EXPERTS=num_experts, BLOCK_M=16, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
    )  # fmt: skip
    return gates, weights, inner


def experts_second(state: Tensor, inner: Tensor, weights: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `plume.engine.fused.reference.experts_second`."""
    num_experts, num_rows, inner_width = inner.shape
    width = state.shape[1]
    contiguous(inner, weights, weight, bias)
    assert state.stride(1) == 1
    tile = tiles.find("experts_second", width, inner_width, 1, tiles.device_name(state))
    following = torch.empty(num_rows, width, dtype=state.dtype, device=state.device)
    launch(
        _second_kernel,
        (triton.cdiv(num_rows, 16), width // tile.block_n),
        (state, inner, weights, weight, bias, following, num_rows, state.stride(0)),
        tile,
        D=width, INNER=inner_width, EXPERTS=num_experts,
        SEGMENT=tiles.segment(inner_width), SEGMENTS=tiles.num_segments(inner_width),
        BLOCK_M=16, BLOCK_N=tile.block_n, BLOCK_K=tiles.within_segments(tile.block_k, inner_width),
    )  # fmt: skip
    return following

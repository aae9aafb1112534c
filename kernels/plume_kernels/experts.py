"""The transition adapter: a mixture of experts between two latent steps, in two launches.

    state = RMSNorm(sum of the stream's terms)                       unless it is given
    gates = softmax(W_router [state + context ; step embedding] + b)
    weights = 1 for the shared expert; the gates of the top T for the others, 0 for the rest
    inner_e = GELU(LayerNorm(state) W1_eᵀ + b1_e)                    first
    next = state + sum of weights_e (inner_e W2_eᵀ + b2_e)           second

Defined by `plume.definitions.experts_first` and `plume.definitions.experts_second`. Every program of the first routes
by itself, which costs 24 KB of reads that are in L2; one of them writes what others need. A program whose expert no
row of its tile has chosen ends there, so that a small batch reads few experts; in a large one each row weighs them.
Tiles are the same for every number of rows, since those of the norms' sums decide the order of additions.

Letters: E routed experts, T kept ones, X all of them, the shared one first; B rows, D hidden size, I inner size, P
terms of the residual stream.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plume_kernels import tiles
from plume_kernels.launch import contiguous, launch, prefetch, wait
from plume_kernels.rows import load_stream, load_weight


@triton.jit
def _load_state(
    stream_ptr, norm_ptr, state_ptr, rows, cols, mask_m, num_rows, stride_state, factor,
    D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The state at some columns in float32, rounded as it is written, `[B, cols]`; P = 0 if it is given."""
    if P > 0:
        x = load_stream(stream_ptr, rows, cols, mask_m, num_rows, D, P)
        normed = x * factor[:, None] * tl.load(norm_ptr + cols).to(tl.float32)[None, :]
        return normed.to(state_ptr.dtype.element_ty).to(tl.float32)
    else:
        offs = rows[:, None] * stride_state + cols[None, :]
        return tl.load(state_ptr + offs, mask=mask_m[:, None], other=0.0).to(tl.float32)


@triton.jit
def _top(gates, offs_e, TOP_K: tl.constexpr):
    """The gates of the T largest of each row, zero elsewhere, `[B, E]`; of equals, the first."""
    left, kept = gates, tl.zeros_like(gates)
    for _ in tl.static_range(TOP_K):
        is_best = offs_e[None, :] == tl.argmax(left, axis=1)[:, None]
        kept = tl.where(is_best, gates, kept)
        left = tl.where(is_best, -1.0, left)
    return kept


@triton.jit(do_not_specialize=["num_rows"])
def _first_kernel(
    stream_ptr,  # [P, B, D]
    final_norm_ptr,  # [D]
    state_ptr,  # [B, D], written if P > 0
    context_ptr,  # [B, D]
    ln_weight_ptr, ln_bias_ptr, step_ptr,  # [D]
    router_ptr, router_bias_ptr,  # [E, 2 D], [E]
    weight_ptr, bias_ptr,  # [X I, D], [X I]
    gates_ptr, weights_ptr, inner_ptr,  # [B, E], [B, X], [X, B, I]
    num_rows, stride_state, stride_context, eps, ln_eps,
    D: tl.constexpr, P: tl.constexpr, INNER: tl.constexpr, E: tl.constexpr, SHARED: tl.constexpr,
    TOP_K: tl.constexpr, HAS_CONTEXT: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    expert = tl.program_id(2)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = rows < num_rows
    mask_first = mask_m & (tl.program_id(1) + 0 * rows == 0)  # one program of each expert, and one of all, write
    mask_writer = mask_first & (expert + 0 * rows == 0)
    offs_k, offs_e = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    if PDL:
        wait()

    factor = tl.full((BLOCK_M,), 1.0, tl.float32)
    if P > 0:
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for k in range(0, D, BLOCK_K):
            x = load_stream(stream_ptr, rows, k + offs_k, mask_m, num_rows, D, P)
            squares += tl.sum(x * x, axis=1)
        factor = tl.rsqrt(squares / D + eps)

    total = tl.zeros((BLOCK_M,), tl.float32)
    logits = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for k in range(0, D, BLOCK_K):
        ks = k + offs_k
        state = _load_state(
            stream_ptr, final_norm_ptr, state_ptr, rows, ks, mask_m, num_rows, stride_state, factor, D, P
        )
        total += tl.sum(state, axis=1)
        if P > 0:
            target = state_ptr + rows[:, None] * stride_state + ks[None, :]
            tl.store(target, state.to(target.dtype.element_ty), mask=mask_writer[:, None])
        if HAS_CONTEXT:
            offs = rows[:, None] * stride_context + ks[None, :]
            state += tl.load(context_ptr + offs, mask=mask_m[:, None], other=0.0).to(tl.float32)
        place = router_ptr + offs_e[None, :] * 2 * D + ks[:, None]
        of_state = tl.load(place, mask=mask_e[None, :], other=0.0)
        of_step = tl.load(place + D, mask=mask_e[None, :], other=0.0)
        step = tl.load(step_ptr + ks)[None, :] + tl.zeros((BLOCK_M, BLOCK_K), step_ptr.dtype.element_ty)
        if UPCAST:
            of_state, of_step, step = of_state.to(tl.float32), of_step.to(tl.float32), step.to(tl.float32)
        # In bfloat16 all of these are exact, and products are added in float32: as the definition has it.
        logits = tl.dot(state.to(of_state.dtype), of_state, logits, input_precision="ieee")
        logits = tl.dot(step, of_step, logits, input_precision="ieee")
    mean = total / D

    logits += tl.load(router_bias_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)[None, :]
    logits = tl.where(mask_e[None, :], logits, float("-inf"))
    raised = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    gates = raised / tl.sum(raised, axis=1)[:, None]
    kept = _top(tl.where(mask_e[None, :], gates, -1.0), offs_e, TOP_K)
    own = tl.sum(tl.where(offs_e[None, :] == expert - SHARED, kept, 0.0), axis=1)
    own = tl.where(expert < SHARED, 1.0, own)  # [B], of this program's expert
    tl.store(weights_ptr + rows * (E + SHARED) + expert, own, mask=mask_first)
    place = gates_ptr + rows[:, None] * E + offs_e[None, :]
    tl.store(place, gates, mask=mask_writer[:, None] & mask_e[None, :])

    if tl.sum((mask_m & (own > 0)).to(tl.int32), axis=0) > 0:
        variance = tl.zeros((BLOCK_M,), tl.float32)
        for k in range(0, D, BLOCK_K):
            ks = k + offs_k
            state = _load_state(
                stream_ptr, final_norm_ptr, state_ptr, rows, ks, mask_m, num_rows, stride_state, factor, D, P
            )
            variance += tl.sum((state - mean[:, None]) * (state - mean[:, None]), axis=1)
        ln_factor = tl.rsqrt(variance / D + ln_eps)

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            ks = k + offs_k
            w = load_weight(weight_ptr + expert * INNER * D, cols, ks, D, UPCAST)
            state = _load_state(
                stream_ptr, final_norm_ptr, state_ptr, rows, ks, mask_m, num_rows, stride_state, factor, D, P
            )
            scale, shift = tl.load(ln_weight_ptr + ks).to(tl.float32), tl.load(ln_bias_ptr + ks).to(tl.float32)
            normed = (state - mean[:, None]) * ln_factor[:, None] * scale[None, :] + shift[None, :]
            acc = tl.dot(normed.to(w.dtype), w, acc, input_precision="ieee")
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
    D: tl.constexpr, INNER: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = rows < num_rows
    offs_k = tl.arange(0, BLOCK_K)
    if PDL:
        prefetch(weight_ptr, cols, INNER, INNER)
        wait()

    offs = rows[:, None] * stride_state + cols[None, :]
    total = tl.load(state_ptr + offs, mask=mask_m[:, None], other=0.0).to(tl.float32)
    for expert in range(0, EXPERTS):
        own = tl.load(weights_ptr + rows * EXPERTS + expert, mask=mask_m, other=0.0)
        if tl.sum((own > 0).to(tl.int32), axis=0) > 0:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(0, INNER, BLOCK_K):
                ks = k + offs_k
                w = load_weight(weight_ptr + expert * D * INNER, cols, ks, INNER, UPCAST)
                place = inner_ptr + (expert * num_rows + rows[:, None]) * INNER + ks[None, :]
                inner = tl.load(place, mask=mask_m[:, None], other=0.0)
                acc = tl.dot(inner.to(w.dtype), w, acc, input_precision="ieee")
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
    """See `plume.definitions.experts_first`."""
    (num_rows, width), num_routed = state.shape, len(router)
    num_experts = num_routed + has_shared
    inner_width = len(weight) // num_experts
    contiguous(stream, norm, ln_weight, ln_bias, step, router, router_bias, weight, bias)
    assert state.stride(1) == 1
    assert context is None or context.stride(1) == 1
    gates = state.new_empty(num_rows, num_routed, dtype=torch.float32)
    weights = state.new_empty(num_rows, num_experts, dtype=torch.float32)
    inner = state.new_empty(num_experts, num_rows, inner_width)
    tile = tiles.find(
        "experts_first", inner_width, width, 1, tiles.device_name(state), weight_bytes=weight.element_size()
    )
    launch(
        _first_kernel,
        (triton.cdiv(num_rows, 16), inner_width // tile.block_n, num_experts),
        (
            state if stream is None else stream, norm, state, state if context is None else context,
            ln_weight, ln_bias, step, router, router_bias, weight, bias, gates, weights, inner,
            num_rows, state.stride(0), 0 if context is None else context.stride(0), eps, ln_eps,
        ),
        tile,
        D=width, P=0 if stream is None else len(stream), INNER=inner_width, E=num_routed, SHARED=int(has_shared),
        TOP_K=top_k, HAS_CONTEXT=context is not None, BLOCK_E=max(16, triton.next_power_of_2(num_routed)),
        BLOCK_M=16, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
    )  # fmt: skip
    return gates, weights, inner


def experts_second(state: Tensor, inner: Tensor, weights: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `plume.definitions.experts_second`."""
    num_experts, num_rows, inner_width = inner.shape
    width = state.shape[1]
    contiguous(inner, weights, weight, bias)
    assert state.stride(1) == 1
    tile = tiles.find(
        "experts_second", width, inner_width, 1, tiles.device_name(state), weight_bytes=weight.element_size()
    )
    following = torch.empty(num_rows, width, dtype=state.dtype, device=state.device)
    launch(
        _second_kernel,
        (triton.cdiv(num_rows, 16), width // tile.block_n),
        (state, inner, weights, weight, bias, following, num_rows, state.stride(0)),
        tile,
        D=width, INNER=inner_width, EXPERTS=num_experts,
        BLOCK_M=16, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
    )  # fmt: skip
    return following

"""What comes before the experts of the transition adapter: the final norm, the router, and the LayerNorm.

    state = RMSNorm(sum of the stream's terms)                       unless it is given
    gates = softmax(W_router [state + context ; step embedding] + b)
    weights = 1 for the shared expert; the gates of the top T for the others, 0 for the rest
    normed = LayerNorm(state)

A part of `plume.engine.fused.reference.experts_first`. A program takes one row. It is a launch of its own, since every
program of the experts' first layers would otherwise do all of this before it could ask for the first of its weights.

Letters: E routed experts, T kept ones, X all of them, the shared one first; B rows, D hidden size, P terms of the
residual stream.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plume_kernels import tiles
from plume_kernels.launch import contiguous, launch, prefetch, wait


@triton.jit
def _top(gates, offs_e, TOP_K: tl.constexpr):
    """The gates of the T largest, zero elsewhere, `[E]`; of equals, the first."""
    left, kept = gates, tl.zeros_like(gates)
    for _ in tl.static_range(TOP_K):
        is_best = offs_e == tl.argmax(left, axis=0)
        kept = tl.where(is_best, gates, kept)
        left = tl.where(is_best, -1.0, left)
    return kept


@triton.jit(do_not_specialize=["num_rows"])
def _route_kernel(
    stream_ptr,  # [P, B, D]
    final_norm_ptr,  # [D]
    state_ptr,  # [B, D], written if P > 0
    context_ptr,  # [B, D]
    ln_weight_ptr, ln_bias_ptr, step_ptr,  # [D]
    router_ptr, router_bias_ptr,  # [E, 2 D], [E]
    gates_ptr, weights_ptr, normed_ptr,  # [B, E], [B, X], [B, D]
    num_rows, stride_state, stride_context, eps, ln_eps,
    D: tl.constexpr, P: tl.constexpr, E: tl.constexpr, SHARED: tl.constexpr, TOP_K: tl.constexpr,
    HAS_CONTEXT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, AT_ONCE: tl.constexpr,
    UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, cols, offs_e = tl.program_id(0), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    mask, mask_e = cols < D, offs_e < E
    if PDL:
        prefetch(router_ptr, tl.minimum(offs_e, E - 1), 2 * D, 2 * D)
        wait()

    if P > 0:
        x = tl.load(stream_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        for term in tl.static_range(1, P):
            x += tl.load(stream_ptr + (term * num_rows + row) * D + cols, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(final_norm_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        rounded = (x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps) * scale).to(state_ptr.dtype.element_ty)
        tl.store(state_ptr + row * stride_state + cols, rounded, mask=mask)
        state = rounded.to(tl.float32)
    else:
        state = tl.load(state_ptr + row * stride_state + cols, mask=mask, other=0.0).to(tl.float32)

    mean = tl.sum(state, axis=0) / D
    centred = tl.where(mask, state - mean, 0.0)
    factor = tl.rsqrt(tl.sum(centred * centred, axis=0) / D + ln_eps)
    scale = tl.load(ln_weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(ln_bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    normed = centred * factor * scale + shift
    tl.store(normed_ptr + row * D + cols, normed.to(normed_ptr.dtype.element_ty), mask=mask)

    if HAS_CONTEXT:
        steered = state + tl.load(context_ptr + row * stride_context + cols, mask=mask, other=0.0).to(tl.float32)
        state = steered.to(context_ptr.dtype.element_ty).to(tl.float32)
    step = tl.load(step_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    logits = tl.zeros((BLOCK_E,), tl.float32)
    for expert in range(0, E, AT_ONCE):
        experts = expert + tl.arange(0, AT_ONCE)
        place = router_ptr + experts[:, None] * 2 * D + cols[None, :]
        mask_w = (experts < E)[:, None] & mask[None, :]
        of_state = tl.load(place, mask=mask_w, other=0.0).to(tl.float32)
        of_step = tl.load(place + D, mask=mask_w, other=0.0).to(tl.float32)
        own = tl.sum(state[None, :] * of_state + step[None, :] * of_step, axis=1)  # [AT_ONCE]
        is_own = offs_e[None, :] == experts[:, None]
        logits += tl.sum(tl.where(is_own, own[:, None], 0.0), axis=0)

    logits += tl.load(router_bias_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    logits = tl.where(mask_e, logits, float("-inf"))
    raised = tl.exp(logits - tl.max(logits, axis=0))
    gates = raised / tl.sum(raised, axis=0)
    tl.store(gates_ptr + row * E + offs_e, gates, mask=mask_e)
    kept = _top(tl.where(mask_e, gates, -1.0), offs_e, TOP_K)
    tl.store(weights_ptr + row * (E + SHARED) + SHARED + offs_e, kept, mask=mask_e)
    if SHARED:
        tl.store(weights_ptr + row * (E + SHARED), 1.0)


def route(
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
    top_k: int,
    has_shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates `[B, E]`, weights of all experts `[B, X]`, and what these read, `[B, D]`.

    See `plume.engine.fused.reference.experts_first`.
    """
    (num_rows, width), num_routed = state.shape, len(router)
    contiguous(stream, norm, ln_weight, ln_bias, step, router, router_bias)
    assert state.stride(1) == 1
    assert context is None or context.stride(1) == 1
    gates = state.new_empty(num_rows, num_routed, dtype=torch.float32)
    weights = state.new_empty(num_rows, num_routed + has_shared, dtype=torch.float32)
    normed = state.new_empty(num_rows, width)
    launch(
        _route_kernel,
        (num_rows,),
        (
            state if stream is None else stream, norm, state, state if context is None else context,
            ln_weight, ln_bias, step, router, router_bias, gates, weights, normed,
            num_rows, state.stride(0), 0 if context is None else context.stride(0), eps, ln_eps,
        ),
        tiles.Tile(num_warps=8),
        D=width, P=0 if stream is None else len(stream), E=num_routed, SHARED=int(has_shared), TOP_K=top_k,
        HAS_CONTEXT=context is not None, BLOCK_D=triton.next_power_of_2(width),
        BLOCK_E=max(16, triton.next_power_of_2(num_routed)), AT_ONCE=min(4, triton.next_power_of_2(num_routed)),
    )  # fmt: skip
    return gates, weights, normed

"""The first half of the gated MLP.

    inner = SiLU(RMSNorm(x) W_gateᵀ) * (RMSNorm(x) W_upᵀ)

Defined by `plume.engine.fused.reference.gate_up`. A program takes the same columns of gate and up. This is where most
bytes are: 59 % of a layer's weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plume_kernels import tiles
from plume_kernels.launch import contiguous, launch, prefetch, wait
from plume_kernels.rows import normed_products


@triton.jit(do_not_specialize=["num_rows"])
def _gate_up_kernel(
    x_ptr,  # [M, D]
    norm_ptr,  # [D]
    weight_ptr,  # [2 I, D]
    inner_ptr,  # [M, I]
    num_rows, eps,
    D: tl.constexpr, INNER: tl.constexpr, FEW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * BLOCK_N
    if PDL:
        # Half of all, which fits L2 beside what the kernels before ask for.
        prefetch(weight_ptr, first + tl.arange(0, BLOCK_N), D, D // 2)
        prefetch(weight_ptr, INNER + first + tl.arange(0, BLOCK_N), D, D // 2)
        wait()
    gate, up = normed_products(
        x_ptr, norm_ptr, weight_ptr, num_rows, first, INNER, eps, D, 1, FEW, BLOCK_M, BLOCK_N, BLOCK_K, UPCAST
    )
    inner = gate * tl.sigmoid(gate) * up
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = first + tl.arange(0, BLOCK_N)
    target = inner_ptr + rows[:, None] * INNER + cols[None, :]
    tl.store(target, inner.to(target.dtype.element_ty), mask=(rows < num_rows)[:, None])


def gate_up(x: Tensor, norm: Tensor, eps: float, weight: Tensor) -> Tensor:
    """See `plume.engine.fused.reference.gate_up`."""
    (num_rows, width), inner_width = x.shape, len(weight) // 2
    contiguous(x, norm, weight)
    tile = tiles.find("gate_up", inner_width, width, num_rows, tiles.device_name(x))
    inner = torch.empty(num_rows, inner_width, dtype=weight.dtype, device=weight.device)
    launch(
        _gate_up_kernel,
        (triton.cdiv(num_rows, tile.block_m), inner_width // tile.block_n),
        (x, norm, weight, inner, num_rows, eps),
        tile,
        D=width, INNER=inner_width, FEW=tiles.few(num_rows, tile.block_m),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
    )  # fmt: skip
    return inner

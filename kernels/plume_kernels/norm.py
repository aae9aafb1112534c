"""The final norm, where no transition adapter follows that would apply it: hidden = RMSNorm(sum of the stream's terms).

Defined by `plume.engine.fused.reference.final_norm`. A program takes one row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plume_kernels import tiles
from plume_kernels.launch import contiguous, launch, wait


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    stream_ptr,  # [P, M, D]
    norm_ptr,  # [D]
    hidden_ptr,  # [M, D]
    num_rows, eps,
    D: tl.constexpr, P: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, cols = tl.program_id(0), tl.arange(0, BLOCK_D)
    mask = cols < D
    if PDL:
        wait()
    x = tl.load(stream_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
    for term in tl.static_range(1, P):
        x += tl.load(stream_ptr + (term * num_rows + row) * D + cols, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(norm_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    hidden = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps) * scale
    target = hidden_ptr + row * D + cols
    tl.store(target, hidden.to(target.dtype.element_ty), mask=mask)


def final_norm(stream: Tensor, norm: Tensor, eps: float) -> Tensor:
    """See `plume.engine.fused.reference.final_norm`."""
    terms, num_rows, width = stream.shape
    contiguous(stream, norm)
    hidden = torch.empty(num_rows, width, dtype=norm.dtype, device=norm.device)
    launch(
        _norm_kernel,
        (num_rows,),
        (stream, norm, hidden, num_rows, eps),
        tiles.Tile(),
        D=width, P=terms, BLOCK_D=triton.next_power_of_2(width),
    )  # fmt: skip
    return hidden

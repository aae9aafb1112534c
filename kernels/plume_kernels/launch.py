"""How kernels are launched: compiled for a GPU, interpreted without one, or noted for a compiler.

`TRITON_INTERPRET=1`, set before this is imported, runs kernels in numpy, which cannot compute in bfloat16: kernels take
`UPCAST` and then compute in float32. Programmatic dependent launch, `PDL`, lets a kernel start while the one before it
ends: it asks for its weights and waits only then, before it reads what others write.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError as TritonError
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plume_kernels.tiles import Tile

#: Whether kernels run in Triton's interpreter.
INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass
class Call:
    """A launch that was noted: the kernel, what it was given, and its options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


_noted: list[Call] | None = None
_uses_pdl = False


@contextlib.contextmanager
def noted() -> Iterator[list[Call]]:
    """While this lasts, launches are noted and nothing runs; tensors may then be on the meta device."""
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = before


@contextlib.contextmanager
def dependent(is_on: bool = True) -> Iterator[None]:
    """While this lasts, kernels are launched with programmatic dependent launch, which needs compute capability 9.0."""
    global _uses_pdl
    before, _uses_pdl = _uses_pdl, is_on
    try:
        yield
    finally:
        _uses_pdl = before


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], tile: Tile, **constants: Any) -> None:
    """Launch a kernel, or note that it was asked for.

    Args:
        kernel: takes `args`, then the constants, `UPCAST` and `PDL`.
        grid: programs.
        args: tensors and numbers.
        tile: whose warps and stages it runs with.
        constants: by name.
    """
    constants |= {"UPCAST": INTERPRETED, "PDL": _uses_pdl and not INTERPRETED}
    options: dict[str, Any] = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    # Without fused multiply-add two kernels that compute the same formula give the same bits.
    options["enable_fp_fusion"] = False
    if constants["PDL"]:
        options["launch_pdl"] = True
    if _noted is not None:
        _noted.append(Call(kernel, grid, args, constants, options))
        return
    kernel[grid](*args, **constants, **({} if INTERPRETED else options))


def contiguous(*tensors: Tensor | None) -> None:
    """Kernels compute addresses from shapes alone."""
    for tensor in tensors:
        assert tensor is None or tensor.is_contiguous(), f"expected contiguous memory, received {tensor.stride()}"


@triton.jit
def prefetch(weight_ptr, offs_n, K: tl.constexpr, CHANNELS: tl.constexpr):
    """Ask for the first channels of rows of a weight `[N, K]`, so that they are in L2 when needed."""
    LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth  # 128 bytes
    LINES: tl.constexpr = CHANNELS // LINE if CHANNELS >= LINE else 1
    AT_ONCE: tl.constexpr = 8 if LINES % 8 == 0 else 4 if LINES % 4 == 0 else 1
    for first in tl.static_range(0, LINES, AT_ONCE):
        lines = (first + tl.arange(0, AT_ONCE)) * LINE
        pointers = weight_ptr + offs_n[:, None] * K + lines[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def wait():
    """Let the next kernel start, then wait until all that came before has ended and its writes can be read."""
    gdc_launch_dependents()
    gdc_wait()

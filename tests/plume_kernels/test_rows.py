"""What kernels share: a row's sum of squares has the same bits whatever the tile, and whoever else is in it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from plume_kernels.rows import LANES, add_squares, sum_of_lanes

pytestmark = pytest.mark.interpreted


@triton.jit
def _sums_kernel(x_ptr, sums_ptr, D: tl.constexpr, R: tl.constexpr, K: tl.constexpr):  # noqa: N803
    lanes = tl.zeros((R, LANES), tl.float32)
    for k in range(0, D, K):
        x = tl.load(x_ptr + tl.arange(0, R)[:, None] * D + k + tl.arange(0, K)[None, :])
        lanes = add_squares(lanes, x, k)
    tl.store(sums_ptr + tl.arange(0, 16), sum_of_lanes(lanes, 16))


def test_a_sum_of_squares_has_the_same_bits_whatever_the_tile():
    x = torch.randn(16, 768)
    expected = x.double().square().sum(dim=1)
    found = []
    for rows in (4, 8, 16):
        for channels in (32, 64, 128, 256):
            sums = torch.full((16,), torch.nan)
            _sums_kernel[(1,)](x, sums, 768, rows, channels)
            assert torch.allclose(sums[:rows].double(), expected[:rows], rtol=1e-6)
            assert torch.equal(sums, sums[:rows].repeat(16 // rows))
            found.append(sums[:4])
    assert all(torch.equal(found[0], other) for other in found)

"""Compiled code is read as the hardware reads it: stall counts, barriers, loops; every kernel's bounds are found."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from plume_eval.kernels.audit import audit, table
from plume_eval.kernels.cases import Shapes
from plume_eval.kernels.machine_code import loops, parse
from plume_kernels.launch import INTERPRETED

#: As nvdisasm writes it; a loop within a loop, and one that writes the stack.
LISTING = """
_some_kernel:
        /*0000*/                   S2R R2, SR_TID.X ;            /* 0x0000000000027919 */
                                                                 /* 0x000f220000002100 */
.L_x_1:
.L_x_0:
        /*0010*/                   LDS R4, [R2] ;                /* 0x0000000002047984 */
                                                                 /* 0x000e220000000800 */
        /*0020*/              @!P1 IADD3 R5, R4, 0x1, RZ ;       /* 0x0000000104057810 */
                                                                 /* 0x001fca0007ffe0ff */
        /*0030*/               @P0 BRA `(.L_x_0) ;               /* 0xfffffffc00e00947 */
                                                                 /* 0x000fea000383ffff */
        /*0040*/               @P2 BRA `(.L_x_1) ;               /* 0xfffffffc00c00947 */
                                                                 /* 0x000fea000383ffff */
.L_x_2:
        /*0050*/                   STL [R1], R5 ;                /* 0x0000000501007387 */
                                                                 /* 0x000fe20000100800 */
        /*0060*/               @P3 BRA `(.L_x_2) ;               /* 0xfffffffc00f00947 */
                                                                 /* 0x000fea000383ffff */
"""


def test_stall_counts_waits_and_loops_are_found():
    instructions, labels = parse(LISTING)
    assert [one.operation for one in instructions] == ["S2R", "LDS", "IADD3", "BRA", "BRA", "STL", "BRA"]
    assert [one.stall for one in instructions] == [1, 1, 5, 5, 5, 1, 5]
    found = loops(instructions, labels)
    assert [[one.operation for one in loop.body] for loop in found] == [["LDS", "IADD3", "BRA"]]
    assert found[0].cycles == 11
    assert found[0].cycles_with_waits == 30 + 5 + 5  # the addition waits for what is read from shared memory


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel cannot be compiled")
def test_every_kernel_has_bounds(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = audit(Shapes(hidden_size=256, inner_size=512), [1], num_slots=128)
    assert {"qkv", "attention", "out", "gate_up", "down", "experts_first", "experts_second"} <= {
        one.kernel for one in found
    }
    assert all(one.chain_us > 0 and one.at_a_time > 0 and one.waves == 1 for one in found)
    assert len(table(found).splitlines()) == len(found) + 2

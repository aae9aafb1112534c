"""Every kernel compiles for a GPU, with the tiles that are shipped: what the interpreter cannot see.

Compiled for compute capability 9.0 on any machine, at the shapes of Qwen2-VL-2B and 7B.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from plume_eval.kernels.cases import BY_NAME, arguments
from plume_eval.kernels.compiling import MOST_SHARED, compile_call, note, resources
from plume_eval.kernels.tuning import products
from plume_kernels import MODULES, tiles
from plume_kernels.launch import INTERPRETED, dependent
from tests.plume_kernels.comparing import kernel

pytestmark = pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel cannot be compiled")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def compiled(
    name: str, shapes: str, num_rows: int, num_new: int, *, num_slots: int = 512, uses_pdl: bool = False
) -> list:
    args = arguments(
        BY_NAME[shapes], [300] * num_rows, num_new=num_new, num_slots=num_slots, dtype=torch.bfloat16, device="meta"
    )[name]
    with dependent(uses_pdl):
        return [compile_call(call) for call in note(lambda: kernel(name)(*args))]


@pytest.mark.parametrize(("num_rows", "num_new"), [(1, 1), (8, 6)], ids=["a step", "8 suffixes"])
@pytest.mark.parametrize("name", MODULES)
def test_a_kernel_compiles_at_the_shapes_of_2b(name, num_rows, num_new):
    found = compiled(name, "2b", num_rows, num_new)
    assert found
    for one in found:
        assert one.asm["cubin"]
        taken = resources(one)
        assert taken.shared_bytes <= MOST_SHARED[86], "the default tiles fit everywhere"
        assert taken.stack_bytes <= 32, "registers are spilled"  # the sine of a large angle takes 28
        if name not in ("attention", "final_norm") and one.metadata.name not in ("_combine_kernel", "_route_kernel"):
            # One kind of matrix instruction whatever the rows, so that a row gives the same bits in every batch;
            # and weights stream past the registers.
            assert "mma.sync" in one.asm["ptx"]
            assert "wgmma" not in one.asm["ptx"]
            assert "cp.async" in one.asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_a_kernel_compiles_for_older_devices(name):
    args = arguments(BY_NAME["2b"], [300], num_slots=512, dtype=torch.bfloat16, device="meta")[name]
    for call in note(partial(kernel(name), *args)):
        assert resources(compile_call(call, 80)).shared_bytes <= MOST_SHARED[86]


@pytest.mark.slow
@pytest.mark.parametrize("num_slots", [64, 128, 384, 512, 640, 32768])
def test_attention_over_any_cache_compiles(num_slots):
    for name in ("attention", "out"):
        for one in compiled(name, "2b", 1, 1, num_slots=num_slots):
            assert resources(one).shared_bytes <= MOST_SHARED[90]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qkv", "attention", "down", "experts_first"])
def test_a_kernel_compiles_at_the_shapes_of_7b(name):
    for one in compiled(name, "7b", 1, 1):
        assert one.metadata.shared <= MOST_SHARED[90]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_a_dependent_kernel_waits_before_it_reads_what_others_write(name):
    for one in compiled(name, "2b", 1, 1, uses_pdl=True):
        before, wait, behind = one.asm["ptx"].partition("griddepcontrol.wait")
        assert wait
        assert "griddepcontrol.launch_dependents" in before
        assert "ld.global" not in before
        assert "cp.async" not in before
        assert "st.global" not in before
        assert "ld.global" in behind or "cp.async" in behind
        assert one.metadata.launch_pdl


def test_tables_of_tiles_are_read_and_cut_to_what_divides(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    tiles.read_table.cache_clear()
    wide = tiles.Tile(block_n=128, block_k=256, num_warps=8)
    table = {"largest_rows": 96, "tiles": {tiles.key("gate_up", 8960, 1536, 16): asdict(wide)}}
    (tmp_path / "Some_GPU.json").write_text(json.dumps(table))
    assert tiles.find("gate_up", 8960, 1536, 9, "Some GPU") == wide
    for num_rows in (3, 17):
        assert tiles.find("gate_up", 8960, 1536, num_rows, "Some GPU") == tiles.default("gate_up", 8960, num_rows)
    assert tiles.find("gate_up", 64 * 3, 64, 1).block_k == 64
    assert tiles.largest_rows("Some GPU") == 96
    assert tiles.largest_rows("Another") == tiles.LARGEST_ROWS
    (tmp_path / "Broken.json").write_text('{"tiles": {}}')
    with pytest.raises(ValueError, match=r"Broken\.json is no table of tiles .*kernels/tune\.py"):
        tiles.find("gate_up", 64, 64, 1, "Broken")
    (tmp_path / "Small.json").write_text('{"largest_rows": 16, "tiles": {}}')
    with pytest.raises(ValueError, match="largest_rows is 16, expected at least 64"):
        tiles.find("gate_up", 64, 64, 1, "Small")
    tiles.read_table.cache_clear()


def test_the_tables_of_devices_name_products_that_are_looked_up():
    tables = sorted(tiles.FOLDER.glob("*.json"))
    assert tables
    known = {
        tiles.key(name, *size, num_rows)
        for shapes in BY_NAME.values()
        for name, size in products(shapes).items()
        for num_rows in tiles.BUCKETS
    }
    for table in tables:
        assert set(tiles.read_table(table.stem.replace("_", " "))[1]) <= known


@pytest.mark.parametrize("path", sorted(tiles.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_tile_that_is_shipped_compiles(path):
    _, table = tiles.read_table(path.stem.replace("_", " "))
    assert table
    tried = set()
    for shapes in BY_NAME.values():
        for kind, size in products(shapes).items():
            for rows in tiles.BUCKETS:
                key = tiles.key(kind, *size, rows)
                if key not in table:
                    continue
                tried.add(key)
                args = arguments(shapes, [300] * rows, num_slots=512, dtype=torch.bfloat16, device="meta")[kind]
                with tiles.forced(**{kind: table[key]}):
                    calls = note(partial(kernel(kind), *args))
                assert all(resources(compile_call(call)).shared_bytes <= MOST_SHARED[90] for call in calls), key
    assert tried == set(table)

"""Every kernel computes what its definition says, in Triton's interpreter; `make test` runs this in its own process.

The interpreter checks indices and arithmetic. `test_compiling.py` has the compiler look at the same kernels, and
`tests/test_gpu_kernels.py` runs them.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace

import pytest
import torch

from plume.engine.fused import reference
from plume_eval.kernels.cases import Shapes, arguments
from plume_eval.kernels.comparing import outcome
from plume_kernels import MODULES, tiles
from tests.plume_kernels.comparing import compare, kernel, tensors

pytestmark = pytest.mark.interpreted

TINY = Shapes()
WIDE = Shapes(hidden_size=320, num_heads=5, num_key_value_heads=1, channels=64, inner_size=1088, expert_size=192)


def test_this_process_interprets():
    assert os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize("num_new", [1, 5])
@pytest.mark.parametrize("lengths", [[3], [1, 9, 4], [2] * 17], ids=["1 row", "3 rows", "17 rows"])
@pytest.mark.parametrize("name", MODULES)
def test_a_kernel_gives_what_its_definition_gives(name, lengths, num_new):
    compare(name, arguments(TINY, lengths, num_new=num_new)[name])


@pytest.mark.parametrize("name", MODULES)
def test_a_kernel_runs_at_an_odd_width_behind_a_split_product(name):
    compare(name, arguments(replace(WIDE, num_terms=4), [5, 1, 2], num_new=2)[name])


@pytest.mark.parametrize("name", MODULES)
def test_a_kernel_errs_little_in_bfloat16(name):
    # The interpreter truncates where a GPU rounds; `tests/test_gpu_kernels.py` is strict.
    compare(name, arguments(TINY, [3, 8], dtype=torch.bfloat16)[name], tolerance=2e-2)


@pytest.mark.parametrize("num_new", [1, 5, 6])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, tiles.SPLIT - 1, tiles.SPLIT, tiles.SPLIT + 1, 2 * tiles.SPLIT])
def test_attention_reads_up_to_each_tokens_own_slot(length, num_new):
    compare("attention", arguments(TINY, [length, 7], num_new=num_new, num_slots=3 * tiles.SPLIT)["attention"])


@pytest.mark.parametrize("name", ["qkv", "attention"])
def test_masked_tokens_leave_no_trace(name):
    mask = torch.tensor([[True, False, True, True], [False, False, False, True], [False] * 4])
    args = arguments(TINY, [300, 2, 0], num_new=4, mask=mask)[name]
    compare(name, args, kept_rows=mask.flatten())


@pytest.mark.parametrize(
    ("lengths", "num_slots"),
    [([300], 400), ([1, 300, 420, 17, 2, 3], 500), ([300], 1200)],
    ids=["merged", "many rows", "many splits"],
)
def test_splits_are_added_up(lengths, num_slots):
    compare("out", arguments(TINY, lengths, num_slots=num_slots)["out"])


@pytest.mark.parametrize("lengths", [[300], [300, 5], [5, 300, 1, 200, 90], [9] * 16], ids=len)
def test_splits_give_the_same_bits_whoever_adds_them_up(monkeypatch, lengths):
    from plume_kernels import out

    args = arguments(TINY, lengths, num_slots=500)["out"]
    found = []
    for most in (0, 100):
        monkeypatch.setattr(out, "MOST_MERGED", most)
        found.append(kernel("out")(*args))
    assert torch.equal(*found)


def test_a_split_product_gives_the_bits_of_a_whole_one():
    args = arguments(Shapes(inner_size=1024), [3, 4])["down"]
    with tiles.forced(down=tiles.Tile(is_split=True)):
        terms = kernel("down")(*args)
    with tiles.forced(down=tiles.Tile(is_split=False)):
        whole = kernel("down")(*args)
    assert terms.shape[0] == 4
    assert whole.shape[0] == 1
    summed = ((terms[0] + terms[1]) + terms[2]) + terms[3]
    assert torch.equal(summed, whole[0])


@pytest.mark.parametrize("name", ["qkv", "out", "gate_up", "down", "experts_first", "experts_second"])
@pytest.mark.parametrize(
    "tile",
    [tiles.Tile(block_m=32, block_n=64, block_k=256), tiles.Tile(block_n=16, block_k=32)],
    ids=["large tile", "small tile"],
)
def test_every_tile_gives_the_same(name, tile):
    with tiles.forced(**{name: tile}):
        compare(name, arguments(Shapes(inner_size=512), [3, 1, 4] * 6)[name])


@pytest.mark.parametrize(
    "shapes",
    [
        Shapes(num_experts=1, top_k=1),
        Shapes(num_experts=1, top_k=1, has_shared=False),
        Shapes(num_experts=3, top_k=3, has_shared=False),
        Shapes(num_experts=17, top_k=1),
    ],
    ids=["one expert", "one and no shared one", "all of three", "17 experts"],
)
@pytest.mark.parametrize("name", ["experts_first", "experts_second"])
def test_every_number_of_experts_runs(name, shapes):
    compare(name, arguments(shapes, [1] * 3)[name])


@pytest.mark.parametrize("chosen", [0, 3])
def test_all_rows_may_choose_one_expert(chosen):
    args = list(arguments(Shapes(top_k=1), [1] * 18)["experts_first"])
    args[10] = torch.full_like(args[10], -30).index_fill(0, torch.tensor(chosen), 30)
    compare("experts_first", tuple(args))
    inner = kernel("experts_first")(*args)[2]
    assert [one.isnan().all().item() for one in inner[1:]] == [place != chosen for place in range(4)]


def test_near_ties_route_as_their_gates_say():
    # Two experts within a millionth of each other: whichever is taken, weights are the gates of those taken.
    args = list(arguments(TINY, [1] * 5)["experts_first"])
    args[9] = args[9].clone()
    args[9][2] = args[9][1]
    args[10] = torch.tensor([3.0, 1.0, 1.0 + 1e-6, 0.0])
    gates, weights, _ = kernel("experts_first")(*args)
    exact = reference.experts_first(*args)[0]
    assert torch.allclose(gates, exact, rtol=1e-5)
    kept = weights[:, 1:] > 0
    assert torch.equal(kept.sum(dim=1), torch.full((5,), 2))
    assert torch.equal(weights[:, 1:], gates.masked_fill(~kept, 0))
    assert (gates.masked_fill(kept, 0).amax(dim=1) <= gates.masked_fill(~kept, 2).amin(dim=1) + 1e-6).all()


def test_experts_that_no_row_has_chosen_are_not_read():
    args = list(arguments(TINY, [1] * 3)["experts_second"])
    args[2] = args[2].clone()
    args[2][:, 2] = 0
    expected = kernel("experts_second")(*args)
    args[1] = args[1].clone()
    args[1][2] = torch.nan
    assert torch.equal(kernel("experts_second")(*args), expected)


@pytest.mark.parametrize("context", ["prefix_last", "none"])
def test_a_state_that_is_given_is_read_where_it_stands(context):
    args = list(arguments(TINY, [1] * 3)["experts_first"])
    read = torch.randn(3, 2, TINY.hidden_size)
    args[0], args[3] = None, read[:, -1]  # rows with a gap, as the engine keeps them
    args[4] = read[:, -1] if context == "prefix_last" else None
    before = read.clone()
    found = tensors(kernel("experts_first")(*args))
    expected = reference.experts_first(*(one.double() if isinstance(one, torch.Tensor) else one for one in args))
    assert torch.equal(read, before)
    assert torch.allclose(found[0].double(), expected[0], rtol=1e-5)


def test_a_row_that_is_not_a_number_spoils_no_other():
    for name in MODULES:
        args = list(arguments(TINY, [3, 5, 2])[name])
        place = {"out": 3, "attention": 0}.get(name, 0)
        expected = tensors(kernel(name)(*args))
        spoilt = args[place].clone()
        rows = spoilt if spoilt.ndim == 2 or name == "attention" else spoilt.movedim(1, 0)
        rows[1] = torch.nan
        args[place] = spoilt
        found = tensors(kernel(name)(*args))
        if name == "experts_first":  # undefined where a row has no use for an expert
            is_used = expected[1].T[..., None] > 0
            expected[2], found[2] = expected[2].where(is_used, 0), found[2].where(is_used, 0)
        is_seen = False
        for one, other in zip(found, expected, strict=True):
            along = next(axis for axis, size in enumerate(one.shape) if size == 3)
            is_seen |= bool(one.select(along, 1).isnan().any())
            for row in (0, 2):
                assert torch.equal(one.select(along, row).nan_to_num(7), other.select(along, row).nan_to_num(7)), name
        assert is_seen, name


def test_a_row_gives_the_bits_that_it_gives_among_others_whoever_adds_up_the_stream():
    shapes = replace(WIDE, num_terms=1)
    among = arguments(shapes, [300, 2, 9, 40, 1, 8], num_slots=512)
    rows = {0: [0], 3: [2, 3]}
    whole = kernel("down")(*among["down"])
    assert whole.shape[0] == 1
    for place, chosen in rows.items():
        inner, weight, x = among["down"]
        terms = kernel("down")(inner[chosen], weight, x[chosen])
        assert terms.shape[0] == tiles.num_segments(shapes.inner_size) > 1
        alone = chosen.index(place)
        for name in ("qkv", "final_norm", "experts_first"):
            found = []
            for stream, own in ((whole, list(range(6))), (terms, chosen)):
                args = list(among[name])
                args[0] = stream
                if name == "qkv":
                    args[5], args[7], args[8], args[9] = args[5][own], args[7][own], args[8][own], args[9][:, own]
                    args[9] = args[9].contiguous()
                if name == "experts_first":
                    args[3], args[4] = args[3][own].contiguous(), args[4][own].contiguous()
                found.append([*tensors(kernel(name)(*args)), *([args[3]] if name == "experts_first" else [])])
            for one, other in zip(*found, strict=True):
                along = next(axis for axis, size in enumerate(one.shape) if size == 6)
                pair = one.select(along, place), other.select(along, alone)
                if name == "experts_first" and one.ndim == 3:  # unwritten where a tile has no use for an expert
                    pair = tuple(it.where(found[1][1][alone, :, None] > 0, 0) for it in pair)
                assert torch.equal(*pair), name


@pytest.mark.parametrize("num_rows", [1, 3])
def test_experts_give_the_bits_of_a_row_in_a_small_and_in_a_large_batch(num_rows):
    args = list(arguments(WIDE, [1] * 40)["experts_first"])
    many = tensors(kernel("experts_first")(*args))
    few = [args[0][:, :num_rows].contiguous(), *args[1:3], args[3][:num_rows].clone(), args[4][:num_rows], *args[5:]]
    found = tensors(kernel("experts_first")(*few))
    assert torch.equal(found[0], many[0][:num_rows])
    assert torch.equal(found[1], many[1][:num_rows])
    is_used = found[1].T[..., None] > 0
    assert torch.equal(found[2].where(is_used, 0), many[2][:, :num_rows].where(is_used, 0))
    assert torch.equal(few[3], args[3][:num_rows])


#: Which arguments have rows, and along which axis.
ROWS = {
    "qkv": {0: 1, 5: 0, 7: 0, 8: 0, 9: 1},
    "attention": {0: 0, 1: 1, 2: 0, 3: 0},
    "out": {0: 1, 1: 1, 3: 1},
    "gate_up": {0: 0},
    "down": {0: 0, 2: 0},
    "experts_first": {0: 1, 3: 0, 4: 0},
    "experts_second": {0: 0, 1: 1, 2: 0},
    "final_norm": {0: 1},
}


@pytest.mark.parametrize("name", MODULES)
def test_a_row_gives_the_same_bits_however_many_rows_are_real(name):
    # Kernels work on as few rows as they can before a product, in powers of two; here 1, 3, 6 and 13 of them.
    small = Shapes(hidden_size=192, num_key_value_heads=1, inner_size=512, expert_size=320)
    whole = arguments(small, [200, 2, 9, 140, 1, 8, 129, 128, 3, 100, 7, 5, 64], num_slots=256)
    found = []
    for chosen in (list(range(13)), [3], [0, 3, 7], [12, 1, 5, 3, 8, 2]):
        args = [one.clone() if isinstance(one, torch.Tensor) else one for one in whole[name]]
        for place, axis in ROWS[name].items():
            args[place] = args[place].index_select(axis, torch.tensor(chosen)).contiguous()
        # numpy's products depend on how many channels they have at a time, a GPU's do not.
        with tiles.forced(down=tiles.Tile(is_split=len(chosen) <= tiles.MOST_SPLIT)):
            results = outcome(name, kernel(name)(*args), tuple(args))
        if name == "down":  # in one term or in several
            results["result"] = functools.reduce(torch.add, results["result"])
        row = {}
        for part, one in results.items():
            along = next(axis for axis, size in enumerate(one.shape) if size == len(chosen))
            row[part] = one.select(along, chosen.index(3)).nan_to_num(7)
        if name == "experts_first":  # undefined where a row has no use for an expert
            row["inner"] = row["inner"].where(row["weights"][:, None] > 0, 0)
        if name == "attention":
            row["outputs"] = row["outputs"].where(row["lse"][..., None] > torch.finfo().min, 0)
        found.append(row)
    for other in found[1:]:
        assert all(torch.equal(one, other[part]) for part, one in found[0].items())

"""Find the tiles of a device: few candidates for each product, timed as a CUDA graph, wrong ones refused.

The result is a table for `plume_kernels.tiles`; `kernels/tune.py` writes it. A tile is kept only if its results agree
with those of the first candidate, the default.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from triton.errors import TritonError

from plume_eval.kernels.cases import Shapes, arguments
from plume_eval.kernels.comparing import errors, outcome
from plume_eval.kernels.timing import Clock, graph_clock, num_copies
from plume_kernels import kernel, tiles
from plume_kernels.tiles import Tile

#: Rows at which each bucket is tuned: those that come most often.
TUNED_ROWS = {4: 1, 16: 8, 32: 32, 64: 48}

#: Rows at which kernels and cuBLAS are compared.
CROSSOVER_ROWS = (16, 32, 64, 96, 128)

#: Of the norm, that tiles may differ by: they add up in one order, so hardly at all.
AGREEMENT = 1e-3


def products(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Columns and channels, N and K, of the product in each kernel that has a tile."""
    heads, width = shapes.num_heads * shapes.channels, shapes.hidden_size
    return {
        "qkv": (heads + 2 * shapes.num_key_value_heads * shapes.channels, width),
        "out": (width, heads),
        "gate_up": (shapes.inner_size, width),
        "down": (width, shapes.inner_size),
        "experts_first": (shapes.expert_size, width),
        "experts_second": (width, shapes.expert_size),
    }


def candidates(name: str, columns: int, num_rows: int) -> list[Tile]:
    """Tiles worth trying, eight at most, the default first."""
    if num_rows <= 16:
        sizes = [(16, 256, 2, 3), (16, 128, 4, 5), (32, 128, 4, 4), (32, 256, 4, 3), (64, 128, 4, 3), (16, 64, 2, 6)]
    else:
        sizes = [(16, 64, 2, 5), (32, 64, 4, 4), (32, 128, 4, 3), (64, 64, 4, 4), (64, 64, 8, 4)]
    block_m = tiles.block_rows(num_rows)
    found = [tiles.default(name, columns, num_rows), *(Tile(block_m, *size) for size in sizes)]
    is_split = name == "down" and num_rows <= tiles.MOST_SPLIT
    return list(dict.fromkeys(replace(tile, is_split=is_split) for tile in found))


def tune(
    shapes: Sequence[Shapes],
    definitions: Mapping[str, Callable[..., Any]],
    *,
    device: str = "cuda",
    clock: Clock = graph_clock,
    time_limit_s: float | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time all candidates.

    Args:
        shapes: of the models to tune for.
        definitions: what each kernel computes, on cuBLAS; decides up to how many rows the kernels are the faster.
        device: where.
        clock: how launches are timed.
        time_limit_s: products that come later keep the default.
        report: is told of every product.

    Returns:
        A table of tiles, as `plume_kernels.tiles` reads it.
    """
    begin, table = time.perf_counter(), {}
    for bucket, num_rows in TUNED_ROWS.items():
        for one in shapes:
            for name, (columns, channels) in products(one).items():
                if name.startswith("experts") and bucket != tiles.BUCKETS[0]:
                    continue  # theirs do not depend on the rows
                key = tiles.key(name, columns, channels, num_rows)
                if time_limit_s is not None and time.perf_counter() - begin > time_limit_s:
                    report(f"{key}: time is up, it keeps the default")
                    continue
                times = _times(one, name, candidates(name, columns, num_rows), num_rows, device, clock)
                tile, default = min(times, key=lambda own: times[own]), next(iter(times))
                table[key] = tile
                report(f"{key}: {times[tile]:.1f} us, {default} {times[default]:.1f} us; {len(times)} were right")
    largest = _crossover(shapes[0], table, definitions, device, clock, report)
    return {"largest_rows": largest, "tiles": {key: asdict(tile) for key, tile in table.items()}}


def _times(
    shapes: Shapes, name: str, tried: Sequence[Tile], num_rows: int, device: str, clock: Clock
) -> dict[Tile, float]:
    """Microseconds of the tiles that run and are right."""
    sets, times, expected = _sets(shapes, name, num_rows, device), {}, None
    for tile in tried:
        with tiles.forced(**{name: tile}):
            try:
                found = outcome(name, kernel(name)(*sets[0]), sets[0])
            except TritonError:  # asks for more shared memory or registers than there are
                if expected is None:
                    raise
                continue
            if name == "down":  # in one term or in several
                found = {"result": found["result"].sum(dim=0)}
            exact = {part: value.double() for part, value in found.items()}
            expected = exact if expected is None else expected
            if max(errors(name, found, expected).values()) > AGREEMENT:
                continue
            times[tile] = statistics.median(clock([partial(kernel(name), *args) for args in sets]))
    return times


def _sets(shapes: Shapes, name: str, num_rows: int, device: str) -> list[tuple[Any, ...]]:
    """Arguments of many layers, so that the first layer's are out of the cache again after the last."""

    def one(seed: int) -> tuple[Any, ...]:
        return arguments(shapes, [300] * num_rows, dtype=torch.bfloat16, device=device, seed=seed)[name]

    first = one(0)
    return [first, *(one(seed) for seed in range(1, num_copies(first)))]


def _crossover(
    shapes: Shapes,
    table: Mapping[str, Tile],
    definitions: Mapping[str, Callable[..., Any]],
    device: str,
    clock: Clock,
    report: Callable[[str], None],
) -> int:
    """The most rows at which the products of a layer are faster in kernels than in cuBLAS, at least `LARGEST_ROWS`."""
    largest = tiles.LARGEST_ROWS
    for num_rows in CROSSOVER_ROWS:
        kernels = others = 0.0
        for name in ("qkv", "out", "gate_up", "down"):
            sets = _sets(shapes, name, num_rows, device)
            own = table.get(tiles.key(name, *products(shapes)[name], num_rows))
            with tiles.forced(**({name: own} if own else {})):
                kernels += statistics.median(clock([partial(kernel(name), *args) for args in sets]))
                others += statistics.median(clock([partial(definitions[name], *args) for args in sets]))
        report(f"{num_rows} rows: {kernels:.1f} us in kernels, {others:.1f} us in cuBLAS")
        if num_rows > largest and kernels < others:
            largest = num_rows
    return largest

"""How much of a product one program takes: tables made by `kernels/tune.py`, and a safe default.

A tile changes when a product is computed, never what: every sum runs over its channels in order, in segments of
fixed size, whatever the tile. So a row gives the same bits in every batch, as long as kernels compute it, which is up
to `largest_rows`.

    tuned/<device>.json   {"largest_rows": 64, "tiles": {"gate_up/8960x1536/16": {"block_n": 32, ...}, ...}}

A key names the kernel, N x K of its product and the bucket of rows.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "tuned"

#: Slots of the cache that one program of `attention` reads.
SPLIT = 128

#: Rows of the largest products that the kernels take, at least; larger ones go to cuBLAS, whose bits depend on the
#: batch. Eight inputs of eight tokens, so that up to a batch of eight nothing behind the prefix depends on the batch.
LARGEST_ROWS = 64

#: Rows up to which `down` is split.
MOST_SPLIT = 4

#: Bytes of shared memory that the stages of a default tile may take in bfloat16, so that all fits devices from 8.6 on.
LEAST_SHARED = 88 * 1024

#: Buckets of rows in the tables. What is best for a row by itself is not for eight, though both are one tile of 16.
BUCKETS = (4, 16, 32, 64)


@dataclass(frozen=True)
class Tile:
    """One program's share.

    block_m, block_n, block_k: rows, columns and channels at a time. num_warps, num_stages: as Triton has them.
    is_split: whether the segments of `down` go to programs of their own, to be added by who reads them; see `find`.
    """

    block_m: int = 16
    block_n: int = 32
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 4
    is_split: bool = False


def bucket(num_rows: int) -> int:
    """The bucket of a number of rows; the last has no end."""
    return next((size for size in BUCKETS if num_rows <= size), BUCKETS[-1])


def block_rows(num_rows: int) -> int:
    """Rows of a product that a program takes at a time: what a tensor core takes, or twice that."""
    return 16 if num_rows <= 16 else 32


def few(num_rows: int, block_m: int) -> int:
    """Rows that a program works on before it multiplies: the real ones in powers of two, four at least.

    Fewer than four are slower, since threads then write them to shared memory in pieces of two bytes.

    Example:
        >>> few(1, 16), few(6, 16), few(40, 32)
        (4, 8, 32)
    """
    return min(block_m, max(4, 1 << (num_rows - 1).bit_length()))


def segment(channels: int) -> int:
    """Channels that `down` and `experts_second` add up before they add the sums: a quarter, in multiples of 256.

    Example:
        >>> segment(8960), segment(18944), segment(128)
        (2304, 4864, 256)
    """
    return 256 * math.ceil(channels / 4 / 256)


def num_segments(channels: int) -> int:
    """Segments of so many channels."""
    return math.ceil(channels / segment(channels))


def within_segments(block_k: int, channels: int) -> int:
    """Channels at a time that divide every segment, the last one too."""
    return math.gcd(block_k, channels % segment(channels))


def deepest(stage_bytes: int, most: int) -> int:
    """Stages of so many bytes that fit, two at least."""
    return min(most, max(2, 1 + LEAST_SHARED // stage_bytes))


def default(kernel: str, columns: int, num_rows: int) -> Tile:
    """A tile that fits everywhere: about as many programs as a large device has multiprocessors, or twice that."""
    block_m = block_rows(num_rows)
    block_n = 16 if columns <= 4096 and kernel != "experts_first" else 32  # which each expert has programs of
    block_k = 128 if num_rows <= 16 else 64  # as much as registers hold
    num_warps = 2 if block_n == 16 and kernel != "out" else 4
    if kernel in ("gate_up", "experts_first"):  # programs are many, and more of them fit with fewer stages
        return Tile(block_m, block_n, block_k, num_warps)
    at_once = 1
    if kernel in ("down", "experts_second"):
        at_once = 1 if kernel == "down" and num_rows <= MOST_SPLIT else 4  # segments, which go to different warps
        block_k, num_warps = 64, 4 if num_rows <= 16 else 8
    # Rows are in float32 where terms of a stream or splits are added up: in all at most those of 16 rows, or of 24. The
    # norm's scale is loaded for each row of a stream.
    rows_bytes = {"qkv": 6 * block_m, "out": 4 * (16 if num_rows <= 4 else max(24, block_m))}
    stage_bytes = at_once * block_k * (rows_bytes.get(kernel, 2 * block_m) + 2 * block_n)
    return Tile(block_m, block_n, block_k, num_warps, num_stages=deepest(stage_bytes, 7))


def key(kernel: str, columns: int, channels: int, num_rows: int) -> str:
    """How tables name a product.

    Example:
        >>> key("gate_up", 8960, 1536, 6)
        'gate_up/8960x1536/16'
    """
    return f"{kernel}/{columns}x{channels}/{bucket(num_rows)}"


def find(kernel: str, columns: int, channels: int, num_rows: int, device: str = "") -> Tile:
    """The tile of a product, cut to what divides it.

    Args:
        kernel: the module's name.
        columns: N, a multiple of 8.
        channels: K, a multiple of 16.
        num_rows: M.
        device: its name, as CUDA tells it.
    """
    tile = _forced.get(kernel)
    if tile is None:
        tile = read_table(device)[1].get(key(kernel, columns, channels, num_rows)) or default(kernel, columns, num_rows)
        # All who read the stream pay for its terms, which is worth while for few rows.
        tile = replace(tile, is_split=kernel == "down" and num_rows <= MOST_SPLIT)
    return replace(tile, block_n=math.gcd(columns, tile.block_n), block_k=math.gcd(channels, tile.block_k))


def num_terms(columns: int, channels: int, num_rows: int, device: str = "") -> int:
    """Terms of the residual stream that `down` leaves, `[P, M, D]`."""
    return num_segments(channels) if find("down", columns, channels, num_rows, device).is_split else 1


def largest_rows(device: str = "") -> int:
    """Rows of the largest products that the kernels take on this device."""
    return read_table(device)[0]


def device_name(tensor: torch.Tensor) -> str:
    """What the table of a tensor's device is called by; empty without a GPU."""
    return _name(tensor.device) if tensor.is_cuda else ""


@cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def path(device: str) -> Path:
    """Where a device's table is."""
    return FOLDER / f"{device.replace(' ', '_')}.json"


@cache
def read_table(device: str) -> tuple[int, dict[str, Tile]]:
    """The largest number of rows and the tiles of a device; the defaults and none if it has no table.

    Raises:
        ValueError: a table that does not say what tables say, with the file.
    """
    file = path(device)
    if not device or not file.is_file():
        return LARGEST_ROWS, {}
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        tiles = {name: Tile(**tile) for name, tile in table["tiles"].items()}
        if table["largest_rows"] < LARGEST_ROWS:
            raise ValueError(f"largest_rows is {table['largest_rows']}, expected at least {LARGEST_ROWS}")
        return table["largest_rows"], tiles
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no table of tiles ({error}); make it anew with kernels/tune.py") from None


_forced: dict[str, Tile] = {}


class forced:  # noqa: N801 - reads as a statement
    """While this lasts, kernels take the tiles that are given by name, as tuning and tests need it."""

    def __init__(self, **tiles: Tile):
        self.tiles = tiles

    def __enter__(self) -> None:
        self._before = dict(_forced)
        _forced.update(self.tiles)

    def __exit__(self, *_: object) -> None:
        _forced.clear()
        _forced.update(self._before)

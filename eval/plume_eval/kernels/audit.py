"""What compiled kernels take of a device and what their loops cost at least: bounds read from machine code, not times.

programs, waves     launched; turns in which they find room on the multiprocessors
at a time           programs that fit a multiprocessor by their registers, shared memory and warps
cycles              stall counts of one iteration of a loop, of one warp, which no bandwidth lowers; behind the stroke
                    with waits for shared memory and the like, by assumed latencies
chain               cycles with waits x iterations of all loops of a program, one after the other
waiting loads       loads of an iteration that are not asked for ahead, each of which is waited for
in flight           bytes of weights that a busy multiprocessor has asked for at any time
before              share of its weights that a program asks for before it waits, with dependent launch
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

import plume_kernels
from plume_eval.kernels.cases import Shapes, arguments
from plume_eval.kernels.compiling import compile_call, note, resources
from plume_eval.kernels.machine_code import Loop, disassemble, loops, parse
from plume_eval.report import markdown_table
from plume_kernels import MODULES, tiles
from plume_kernels.launch import Call, dependent

#: An H100 or H200: multiprocessors, and what each has.
MULTIPROCESSORS = 132
REGISTERS, SHARED_BYTES, WARPS, PROGRAMS = 65536, 228 * 1024, 64, 32
#: Shared memory that the device takes of each program for itself.
RESERVED_BYTES = 1024
CYCLES_PER_US = 1980

#: Kernels whose functions say less than their modules.
NAMES = {"_first_kernel": "experts_first", "_second_kernel": "experts_second", "_norm_kernel": "final_norm"}


@dataclass(frozen=True)
class Entry:
    """One launch of a kernel; see the module."""

    kernel: str
    batch_size: int
    programs: int
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    at_a_time: int
    waves: int
    loops: tuple[tuple[int, int, int], ...]
    """Cycles without and with waits, and iterations, of each; of all instructions where there is none."""
    waiting_loads: int
    in_flight_bytes: float
    share_before: float

    @property
    def chain_us(self) -> float:
        """The loops of a program, one after the other."""
        return sum(cycles * iterations for _, cycles, iterations in self.loops) / CYCLES_PER_US


def audit(shapes: Shapes, batch_sizes: Sequence[int], *, context: int = 300, num_slots: int = 512) -> list[Entry]:
    """Compile and read every kernel of a step of a model.

    Args:
        shapes: of the model.
        batch_sizes: rows, of one new token each.
        context: filled slots of the cache.
        num_slots: of the cache.
    """
    found = []
    for batch_size in batch_sizes:
        terms = tiles.num_terms(shapes.hidden_size, shapes.inner_size, batch_size)
        own = replace(shapes, num_terms=terms)
        args = arguments(own, [context] * batch_size, num_slots=num_slots, dtype=torch.bfloat16, device="meta")
        for name in MODULES:
            work = partial(plume_kernels.kernel(name), *args[name])
            with dependent():
                waiting = note(work)
            found += [read(*pair, shapes, batch_size) for pair in zip(note(work), waiting, strict=True)]
    return found


def read(call: Call, waiting: Call, shapes: Shapes, batch_size: int) -> Entry:
    """Compile and read one launch, by itself and as a dependent one."""
    compiled = compile_call(call)
    taken, programs, warps = resources(compiled), math.prod(call.grid), call.options["num_warps"]
    at_a_time = resident(warps, taken.registers, taken.shared_bytes)
    instructions, labels = parse(disassemble(compiled))
    own = loops(instructions, labels)
    name = call.kernel.fn.__name__
    iterations = num_iterations(name, call.constants, chosen(shapes, batch_size))
    is_straight = not own  # there is no loop, or all of it is unrolled
    own = own or [Loop(tuple(instructions))]
    busy = programs
    if name == "_first_kernel":  # those of experts that no row has chosen end at once
        busy = programs * chosen(shapes, batch_size) // call.grid[2]
    all_bytes = iterations * weight_bytes(name, call.constants)
    asked = 128 * 32 * warps * compile_call(waiting).asm["ptx"].count("prefetch.global.L2")  # a line for each thread
    together = min(at_a_time, max(1.0, busy / MULTIPROCESSORS))
    return Entry(
        kernel=NAMES.get(name, name.strip("_").removesuffix("_kernel")),
        batch_size=batch_size,
        programs=programs,
        warps=warps,
        registers=taken.registers,
        stack_bytes=taken.stack_bytes,
        shared_bytes=taken.shared_bytes,
        at_a_time=at_a_time,
        waves=math.ceil(programs / at_a_time / MULTIPROCESSORS),
        loops=tuple(
            (
                loop.cycles,
                loop.cycles_with_waits,
                1 if is_straight else max(1, iterations // unrolled(loop, name, call.constants, warps)),
            )
            for loop in own
        ),
        waiting_loads=sum(loop.count("LDG") for loop in own),
        in_flight_bytes=(call.options["num_stages"] - 1) * weight_bytes(name, call.constants) * together,
        share_before=asked / all_bytes if all_bytes else 0.0,
    )


def resident(warps: int, registers: int, shared_bytes: int) -> int:
    """Programs that a multiprocessor has room for.

    Registers are given to a warp by 256.

    Example:
        >>> resident(4, 168, 74 * 1024), resident(2, 48, 25 * 1024), resident(2, 32, 0)
        (3, 8, 32)
    """
    by_registers = REGISTERS // (math.ceil(registers * 32 / 256) * 256 * warps)
    return min(by_registers, SHARED_BYTES // (shared_bytes + RESERVED_BYTES), WARPS // warps, PROGRAMS)


def chosen(shapes: Shapes, batch_size: int) -> int:
    """Experts that are read: those of one row, or all."""
    return (shapes.top_k if batch_size == 1 else shapes.num_experts) + shapes.has_shared


def num_iterations(name: str, constants: dict[str, Any], num_chosen: int) -> int:
    """Iterations of each loop of a kernel, in the program that has most of them."""
    if name == "_attention_kernel":
        return constants["SPLIT"] // constants["BLOCK_L"]
    if name == "_out_kernel":
        return constants["H"]
    if name == "_combine_kernel":
        return constants["Z"]
    if name == "_down_kernel":
        return constants["SEGMENT"] // constants["BLOCK_K"]
    if name == "_second_kernel":
        return num_chosen * constants["SEGMENT"] // constants["BLOCK_K"]
    return constants["D"] // constants["BLOCK_K"] if "BLOCK_K" in constants else 1


def tile_size(name: str, constants: dict[str, Any]) -> tuple[int, int]:
    """Columns and channels of the weights that an iteration takes; none where there is no product with a weight."""
    if name == "_attention_kernel":
        return 2 * constants["BLOCK_L"], constants["C"]
    if "BLOCK_N" not in constants:
        return 0, 0
    at_once = constants.get("SEGMENTS", 2 if name in ("_qkv_kernel", "_gate_up_kernel") else 1)
    return at_once * constants["BLOCK_N"], constants["BLOCK_K"] if "BLOCK_K" in constants else constants["C"]


def weight_bytes(name: str, constants: dict[str, Any]) -> int:
    """Bytes of weights, or of keys and values, that an iteration asks for."""
    columns, channels = tile_size(name, constants)
    return 2 * columns * channels


def unrolled(loop: Loop, name: str, constants: dict[str, Any], warps: int) -> int:
    """Iterations of the source in one of the machine code, told by its matrix instructions, of 16 x 8 x 16 each."""
    columns, channels = tile_size(name, constants)
    if name == "_attention_kernel" or not columns:
        return 1
    expected = channels / 16 * max(1, columns / 8 * constants["BLOCK_M"] / 16 / warps)
    found = round(loop.count("HMMA") / expected)
    return found if found > 2 else 1  # twice as many are warps that do the same


def table(entries: Sequence[Entry]) -> str:
    """What was read, as Markdown."""
    columns = [
        "kernel", "batch", "programs", "warps", "registers", "stack, B", "shared, KB", "at a time", "waves",
        "cycles x iterations", "chain, us", "waiting loads", "in flight, KB", "before",
    ]  # fmt: skip
    lines = [
        [
            entry.kernel, entry.batch_size, entry.programs, entry.warps, entry.registers, entry.stack_bytes,
            f"{entry.shared_bytes / 1024:.0f}", entry.at_a_time, entry.waves,
            " + ".join(f"{least:,}/{cycles:,} x {iterations}" for least, cycles, iterations in entry.loops),
            f"{entry.chain_us:.1f}", entry.waiting_loads, f"{entry.in_flight_bytes / 1024:.0f}",
            f"{entry.share_before:.0%}",
        ]
        for entry in entries
    ]  # fmt: skip
    return markdown_table(columns, lines)


def plain(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """What was read, for JSON."""
    return [{**asdict(entry), "chain_us": entry.chain_us} for entry in entries]

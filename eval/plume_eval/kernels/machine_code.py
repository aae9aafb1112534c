"""Read what a kernel was compiled to: its instructions, how long each holds up its warp, and its loops.

From compute capability 7.0 on an instruction has 128 bits, the last of which tell the scheduler

    105 to 108   stall count: cycles until the warp may issue the next instruction
    110 to 112   which of six barriers it holds until its result is there; 7: none
    113 to 115   which it holds until it has read its operands; 7: none
    116 to 121   which barriers must be free before it is issued

A loop takes one warp at least the sum of its stall counts. Waiting for what is on the multiprocessor itself, such as
shared memory, comes on top by latencies that are assumed here; waiting for memory and for other warps is not counted.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

_LABEL = re.compile(r"^(\.L_x_\d+):")
_FIRST_HALF = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/")
_SECOND_HALF = re.compile(r"^/\* 0x([0-9a-f]{16}) \*/")
_BRANCH = re.compile(r"\bBRA\b.*\((\.L_x_\d+)\)")


#: Cycles from issue to result of what takes no fixed time, without memory beyond the multiprocessor; assumed.
LATENCIES = {"LDS": 30, "LDSM": 33, "LDC": 30, "SHFL": 25, "MUFU": 20, "F2F": 20, "STS": 20, "S2R": 20, "S2UR": 20}
READ_LATENCY = 10


@dataclass(frozen=True)
class Instruction:
    """One instruction: its text, such as "@P0 LDG.E R2, [R4.64]", and the upper half of its bits."""

    text: str
    bits: int

    @property
    def stall(self) -> int:
        """Cycles until the next instruction."""
        return self.bits >> 105 - 64 & 0xF

    @property
    def operation(self) -> str:
        """Its name, without a predicate or modifiers: "LDG"."""
        return re.sub(r"^@\S+\s+", "", self.text).split()[0].split(".")[0]


@dataclass(frozen=True)
class Loop:
    """An innermost loop: the instructions of one iteration."""

    body: tuple[Instruction, ...]

    @property
    def cycles(self) -> int:
        """What an iteration takes one warp at least."""
        return sum(one.stall for one in self.body)

    @property
    def cycles_with_waits(self) -> int:
        """The same with waits for shared memory and the like, of an iteration that follows others."""
        now, ends, free = 0, [], [0] * 8  # the last two are no barriers
        for _ in range(4):
            for one in self.body:
                waits = one.bits >> 116 - 64 & 0x3F
                now = max([now, *(free[barrier] for barrier in range(6) if waits >> barrier & 1)])
                result, operands = one.bits >> 110 - 64 & 7, one.bits >> 113 - 64 & 7
                free[result] = max(free[result], now + LATENCIES.get(one.operation, 0))
                free[operands] = max(free[operands], now + READ_LATENCY)
                now += one.stall
            ends.append(now)
        return ends[-1] - ends[-2]

    def count(self, *operations: str) -> int:
        """How many of its instructions are one of these."""
        return sum(one.operation in operations for one in self.body)


def disassemble(compiled: CompiledKernel) -> str:
    """What `nvdisasm`, which Triton brings along, says of a compiled kernel, with the bits of each instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.nvdisasm.path, "-hex", "-c", file.name]  # type: ignore[attr-defined]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and where labels are among them.

    Args:
        text: from `disassemble`; an instruction takes two lines, with half of its bits each.
    """
    found: list[Instruction] = []
    labels, own = {}, ""
    for line in map(str.strip, text.splitlines()):
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif half := _FIRST_HALF.match(line):
            own = half[1]
        elif half := _SECOND_HALF.match(line):
            found.append(Instruction(own, int(half[1], 16)))
    return found, labels


def loops(instructions: Sequence[Instruction], labels: dict[str, int]) -> list[Loop]:
    """The innermost loops that a kernel's own source has, in their order.

    The sine of a large angle is a loop too; it is told by its writes to the stack.
    """
    spans = []
    for end, one in enumerate(instructions):
        branch = _BRANCH.search(one.text)
        if branch and labels[branch[1]] < end:
            spans.append((labels[branch[1]], end))
    inner = [
        (begin, end)
        for begin, end in spans
        if not any(begin <= other and last <= end and (begin, end) != (other, last) for other, last in spans)
    ]
    found = [Loop(tuple(instructions[begin : end + 1])) for begin, end in sorted(inner)]
    return [one for one in found if not one.count("STL")]

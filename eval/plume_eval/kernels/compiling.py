"""Compile kernels for a GPU that is not there: what the interpreter cannot see, such as shared memory and registers.

    calls = note(lambda: gate_up(x, norm, eps, weight))        tensors on the meta device
    compiled = compile_call(calls[0])                          PTX and machine code for compute capability 9.0

`resources` tells what a program takes of a multiprocessor.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from plume_kernels.launch import Call, noted

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}

#: Shared memory that a program may have, by compute capability.
MOST_SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


def note(work: Callable[[], Any]) -> list[Call]:
    """The launches that some work asks for; none of them runs."""
    with noted() as calls:
        work()
    return calls


def compile_call(call: Call, capability: int = 90) -> CompiledKernel:
    """Compile what a launch asked for, specialised as the launch would be.

    Args:
        call: from `note`.
        capability: compute capability times ten.
    """
    names = call.kernel.arg_names
    signature, constants, attrs = {}, dict(call.constants), {}
    for place, (name, value) in enumerate(zip(names, call.args, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            attrs[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif call.kernel.params[place].do_not_specialize:
            signature[name] = "i32"
        elif value == 1:  # Triton makes a constant of it
            constants[name] = 1
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attrs[(place,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in names}
    source = ASTSource(call.kernel, ordered, {(names.index(one),): value for one, value in constants.items()}, attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=call.options)


@dataclass(frozen=True)
class Resources:
    """What a program takes: registers of a thread, its stack (spilled registers, mostly) and shared memory in bytes."""

    registers: int
    stack_bytes: int
    shared_bytes: int


def resources(compiled: CompiledKernel) -> Resources:
    """Read what compiled code takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]  # type: ignore[attr-defined]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", told)}
    return Resources(found["REG"], found["STACK"], max(found["SHARED"], compiled.metadata.shared))

"""The ops that a latent step consists of, registered with torch as `plume::qkv` and so on, and who computes them.

`plume.engine.fused.reference` defines each, and computes it wherever nothing faster is at hand: on a CPU, and for so
many rows that cuBLAS is the fastest. On a GPU the kernel of the same name in `plume_kernels` computes the rest; in
Triton's interpreter (`TRITON_INTERPRET=1`) on a CPU too. There is no backward: ops are for inference, and gradients
through them are an error.

The only file that loads kernels.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

import plume_kernels
from plume.engine.fused import reference
from plume.engine.fused.reference import num_terms, sum_dtype
from plume_kernels import tiles


@dataclass(frozen=True)
class Op:
    """One op.

    torch_op: as torch knows it. definition: what it computes.
    rows: which argument `[..., rows, D]` says how many rows there are; None where a kernel computes any number of them.
    """

    torch_op: Any
    definition: Callable[..., Any]
    rows: int | None


OPS: dict[str, Op] = {}


def _op(definition: Callable[..., Any], *, rows: str | None = None, mutates: tuple[str, ...] = ()) -> Any:
    """Register the op of a definition; what is decorated gives the shapes of its results, for tracing."""

    def register(shapes: Callable[..., Any]) -> Any:
        name = definition.__name__
        op = custom_op(f"plume::{name}", definition, mutates_args=mutates)
        op.register_fake(shapes)
        OPS[name] = Op(op, definition, list(signature(definition).parameters).index(rows) if rows else None)
        return op

    return register


@_op(reference.qkv, rows="stream", mutates=("kv",))
def qkv(stream, norm, eps, weight, bias, positions, inverse_frequencies, mask, lengths, kv):
    groups, channels = kv.shape[2], kv.shape[4]
    return weight.new_empty(stream.shape[1], len(weight) // channels - 2 * groups, channels)


@_op(reference.attention)
def attention(queries, kv, mask, lengths):
    num_splits, dtype = -(-kv.shape[3] // tiles.SPLIT), sum_dtype(kv.dtype)
    outputs = queries.new_empty(num_splits, *queries.shape, dtype=dtype)
    return outputs, queries.new_empty(num_splits, *queries.shape[:2], dtype=dtype)


@_op(reference.out, rows="stream")
def out(outputs, lse, weight, stream):
    return stream.new_empty(stream.shape[1:], dtype=lse.dtype)


@_op(reference.gate_up, rows="x")
def gate_up(x, norm, eps, weight):
    return weight.new_empty(len(x), len(weight) // 2)


@_op(reference.down, rows="inner")
def down(inner, weight, x):
    return x.new_empty(num_terms(inner, weight), *x.shape)


@_op(reference.final_norm)
def final_norm(stream, norm, eps):
    return norm.new_empty(stream.shape[1:])


@_op(reference.experts_first, rows="state", mutates=("state",))
def experts_first(stream, norm, eps, state, context, ln_weight, ln_bias, ln_eps, step, router, router_bias, weight, bias, top_k, has_shared):  # fmt: skip  # noqa: E501
    num_experts = len(router) + has_shared
    gates = state.new_empty(len(state), len(router), dtype=sum_dtype(state.dtype))
    weights = state.new_empty(len(state), num_experts, dtype=sum_dtype(state.dtype))
    return gates, weights, state.new_empty(num_experts, len(state), len(weight) // num_experts)


@_op(reference.experts_second, rows="state")
def experts_second(state, inner, weights, weight, bias):
    return torch.empty_like(state, memory_format=torch.contiguous_format)


def has_kernel(name: str, num_rows: int, like: Tensor) -> bool:
    """Whether a kernel, not the definition, computes an op of so many rows where a tensor is."""
    return OPS[name].rows is None or num_rows <= tiles.largest_rows(tiles.device_name(like))


def is_tuned(like: Tensor) -> bool:
    """Whether there is a table of tiles for the device on which a tensor is."""
    return bool(tiles.read_table(tiles.device_name(like))[1])


def _use_kernel(name: str, device: str) -> None:
    """Have a kernel compute an op on a device, as long as rows are few and numbers such as it is written for."""
    op, kernel = OPS[name], plume_kernels.kernel(name)

    def compute(*args: Any) -> Any:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        num_rows = 0 if op.rows is None else args[op.rows].shape[-2]
        if first.dtype == torch.float64 or not has_kernel(name, num_rows, first):
            return op.definition(*args)
        try:
            return kernel(*args)
        except _launch.TritonError as error:
            raise RuntimeError(f'plume::{name} does not run on this device, take backend="graph": {error}') from error

    op.torch_op.register_kernel(device)(compute)


#: The oldest Triton that has what kernels use.
LEAST_TRITON = (3, 6)


def _triton() -> tuple[int, ...] | None:
    """Version of the Triton that is installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])


_TRITON = _triton()
_launch: Any = None
if _TRITON is not None and _TRITON >= LEAST_TRITON:
    _launch = importlib.import_module("plume_kernels.launch")
    for _name in OPS:
        _use_kernel(_name, "cpu" if _launch.INTERPRETED else "cuda")


def unsupported_reason(device: torch.device, *, dependent_launch: bool = False) -> str | None:
    """Why no kernels run on a device; None where they do.

    Args:
        device: where the model is.
        dependent_launch: whether kernels are to start while those before them end.
    """
    if _TRITON is None:
        return "triton is not installed; torch's CUDA builds bring it along"
    if _launch is None:
        needed = ".".join(map(str, LEAST_TRITON))
        return f"kernels need triton {needed}, and {'.'.join(map(str, _TRITON))} is installed; newer torch brings it"
    if device.type != "cuda":
        return None if _launch.INTERPRETED else f"Triton kernels need a CUDA device, and the model is on {device.type}"
    if dependent_launch and (capability := torch.cuda.get_device_capability(device)) < (9, 0):
        return f"dependent_launch needs compute capability 9.0, and the device has {capability[0]}.{capability[1]}"
    return None


def dependent_launch(is_on: bool) -> contextlib.AbstractContextManager[None]:
    """While this lasts, kernels start while those before them end; see `plume_kernels.launch`."""
    return _launch.dependent() if is_on else contextlib.nullcontext()

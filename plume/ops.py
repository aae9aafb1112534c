"""The ops that a latent step consists of, registered with torch as `plume::qkv` and so on, and who computes them.

`plume.definitions` says what each computes, and does so wherever nothing faster is at hand: on a CPU, and where rows
are so many that cuBLAS is the fastest. On a GPU the kernel of the same name in `plume_kernels` computes the rest; in
Triton's interpreter (`TRITON_INTERPRET=1`) on a CPU too. There is no backward: ops are for inference, and gradients
through them are an error.

The only file that loads kernels.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

import plume_kernels
from plume import definitions
from plume.definitions import exact, num_terms
from plume_kernels import tiles


def _register(name: str, *, mutates: tuple[str, ...] = ()) -> Any:
    return custom_op(f"plume::{name}", getattr(definitions, name), mutates_args=mutates)


qkv = _register("qkv", mutates=("kv",))
attention = _register("attention")
out = _register("out")
gate_up = _register("gate_up")
down = _register("down")
final_norm = _register("final_norm")
experts_first = _register("experts_first", mutates=("state",))
experts_second = _register("experts_second")


@qkv.register_fake
def _(stream, norm, eps, weight, bias, positions, inverse_frequencies, mask, lengths, kv):
    groups, channels = kv.shape[2], kv.shape[4]
    return weight.new_empty(stream.shape[1], len(weight) // channels - 2 * groups, channels)


@attention.register_fake
def _(queries, kv, mask, lengths):
    num_splits, dtype = -(-kv.shape[3] // tiles.SPLIT), exact(kv.dtype)
    outputs = queries.new_empty(num_splits, *queries.shape, dtype=dtype)
    return outputs, queries.new_empty(num_splits, *queries.shape[:2], dtype=dtype)


@out.register_fake
def _(outputs, lse, weight, stream):
    return stream.new_empty(stream.shape[1:], dtype=lse.dtype)


@gate_up.register_fake
def _(x, norm, eps, weight):
    return weight.new_empty(len(x), len(weight) // 2)


@down.register_fake
def _(inner, weight, x):
    return x.new_empty(num_terms(inner, weight), *x.shape)


@final_norm.register_fake
def _(stream, norm, eps):
    return norm.new_empty(stream.shape[1:])


@experts_first.register_fake
def _(stream, norm, eps, state, context, ln_weight, ln_bias, ln_eps, step, router, router_bias, weight, bias, top_k, has_shared):  # fmt: skip  # noqa: E501
    num_experts = len(router) + has_shared
    gates = state.new_empty(len(state), len(router), dtype=exact(state.dtype))
    weights = state.new_empty(len(state), num_experts, dtype=exact(state.dtype))
    return gates, weights, state.new_empty(num_experts, len(state), len(weight) // num_experts)


@experts_second.register_fake
def _(state, inner, weights, weight, bias):
    return torch.empty_like(state, memory_format=torch.contiguous_format)


#: Which argument of an op has the rows that decide between kernel and definition.
_ROWS_OF = {"qkv": 0, "out": 3, "gate_up": 0, "down": 0, "experts_first": 3, "experts_second": 0}


def _use_kernel(name: str, device: str) -> None:
    """Have a kernel compute an op on a device, as long as rows are few and numbers such as it is written for."""
    kernel, definition = plume_kernels.kernel(name), getattr(definitions, name)
    of = _ROWS_OF.get(name)

    def compute(*args: Any) -> Any:
        first: Tensor = args[0] if args[0] is not None else args[3]
        are_few = of is None or has_kernel(name, args[of].shape[-2], first)
        if not are_few or first.dtype == torch.float64:
            return definition(*args)
        try:
            return kernel(*args)
        except _launch.TritonError as error:
            raise RuntimeError(f'plume::{name} does not run on this device, take backend="graph": {error}') from error

    globals()[name].register_kernel(device)(compute)


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
    for _name in plume_kernels.MODULES:
        _use_kernel(_name, "cpu" if _launch.INTERPRETED else "cuda")


def why_not(device: torch.device, *, dependent_launch: bool = False) -> str | None:
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
    if dependent_launch and (found := torch.cuda.get_device_capability(device)) < (9, 0):
        return f"dependent_launch needs compute capability 9.0, and the device has {found[0]}.{found[1]}"
    return None


def has_kernel(name: str, num_rows: int, like: Tensor) -> bool:
    """Whether a kernel, not the definition, computes an op of so many rows where a tensor is."""
    return name not in _ROWS_OF or num_rows <= tiles.largest_rows(tiles.device_name(like))


def dependent_launch(is_on: bool) -> contextlib.AbstractContextManager[None]:
    """While this lasts, kernels start while those before them end; see `plume_kernels.launch`."""
    return _launch.dependent() if is_on else contextlib.nullcontext()

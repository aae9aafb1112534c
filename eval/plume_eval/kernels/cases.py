"""Random arguments of every kernel at the shapes of a model: for tests, tuning and the bench.

Numbers are of the size that they have in a model, and nothing is zero that need not be: devices run faster on zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plume_kernels import tiles


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A text model and its transition adapter; the defaults are tiny.

    hidden_size D, num_heads H, num_key_value_heads G, channels C, inner_size I; num_experts E, top_k T, expert_size the
    inner size of an expert; num_terms P of the stream that comes in.
    """

    hidden_size: int = 64
    num_heads: int = 4
    num_key_value_heads: int = 2
    channels: int = 16
    inner_size: int = 128
    num_layers: int = 2
    num_experts: int = 4
    top_k: int = 2
    has_shared: bool = True
    expert_size: int = 128
    num_terms: int = 1


QWEN2_VL_2B = Shapes(hidden_size=1536, num_heads=12, channels=128, inner_size=8960, num_layers=28, expert_size=3072)
QWEN2_VL_7B = Shapes(
    hidden_size=3584,
    num_heads=28,
    num_key_value_heads=4,
    channels=128,
    inner_size=18944,
    num_layers=28,
    expert_size=7168,
)

BY_NAME = {"tiny": Shapes(), "2b": QWEN2_VL_2B, "7b": QWEN2_VL_7B}


def arguments(
    shapes: Shapes,
    lengths: Sequence[int],
    *,
    num_new: int = 1,
    num_slots: int | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, tuple[Any, ...]]:
    """Arguments of each kernel, by its name.

    Args:
        shapes: of the model.
        lengths: slots of the cache that are filled, of each row.
        num_new: new tokens of each row, n.
        num_slots: of the cache, L; None: what the longest row needs, and the last.
        mask: True at real new tokens, `[B, n]`; None: all are.
        dtype: of weights and activations.
        device: "meta" gives shapes without memory.
        seed: of the numbers.
    """
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def random(*size: int, scale: float = 1.0, exact: bool = False) -> Tensor:
        own = torch.randn(size, generator=generator, device=device) * scale
        return own if exact else own.to(dtype)

    def weight(*size: int) -> Tensor:
        return random(*size, scale=size[-1] ** -0.5)

    def norm(width: int) -> Tensor:
        return 1 + 0.2 * random(width)

    batch, width, heads, groups, channels = (
        len(lengths),
        shapes.hidden_size,
        shapes.num_heads,
        shapes.num_key_value_heads,
        shapes.channels,
    )
    rows, num_slots = batch * num_new, num_slots or max(lengths) + num_new + 1
    num_splits = -(-num_slots // tiles.SPLIT)
    filled = torch.tensor(list(lengths), device=device)
    is_real = torch.ones(batch, num_new, dtype=torch.bool, device=device) if mask is None else mask.to(device)
    stream = random(shapes.num_terms, rows, width, exact=True)
    # Behind what is filled there may be anything.
    kv = random(2, batch, groups, num_slots, channels)
    kv_after, outputs = kv, random(num_splits, rows, heads, channels, exact=True)
    lse = random(num_splits, rows, heads, exact=True)
    if device != "meta":
        slots = torch.arange(num_slots, device=device)
        kv = kv.masked_fill((slots >= filled[:, None])[:, None, :, None], torch.nan)
        kv_after = kv_after.masked_fill((slots >= (filled + is_real.sum(1))[:, None])[:, None, :, None], torch.nan)
        readable = (filled[:, None] + is_real.long().cumsum(1)).flatten()  # [M]
        is_empty = torch.arange(num_splits, device=device)[:, None] * tiles.SPLIT >= readable  # [Z, M]
        outputs = outputs.masked_fill(is_empty[..., None, None], torch.nan)
        lse = lse.masked_fill(is_empty[..., None], -torch.inf)
    positions = torch.randint(0, 2000, (rows,), generator=generator, device=device)
    frequencies = 1e6 ** (-torch.arange(0, channels, 2, device=device) / channels)
    x, num_all = random(rows, width, exact=True), shapes.num_experts + shapes.has_shared
    state, routed = random(batch, width), random(batch, shapes.num_experts, exact=True).abs()
    kept = routed.topk(shapes.top_k, dim=1)
    weights = torch.zeros_like(routed).scatter(1, kept.indices, kept.values)
    weights = torch.cat([torch.ones_like(weights[:, :1]), weights], dim=1) if shapes.has_shared else weights
    eps, total = 1e-6, (heads + 2 * groups) * channels
    router = weight(shapes.num_experts, 2 * width)
    return {
        "qkv": (
            stream, norm(width), eps, weight(total, width), random(total), positions, frequencies, is_real, filled, kv,
        ),
        "attention": (random(rows, heads, channels), kv_after, is_real, filled),
        "out": (outputs, lse, weight(width, heads * channels), stream),
        "gate_up": (x, norm(width), eps, weight(2 * shapes.inner_size, width)),
        "down": (random(rows, shapes.inner_size), weight(width, shapes.inner_size), x),
        "experts_first": (
            stream[:, :batch].contiguous(), norm(width), eps, state, random(batch, width), norm(width), random(width),
            1e-5, random(width), router, random(shapes.num_experts), weight(num_all * shapes.expert_size, width),
            random(num_all * shapes.expert_size), shapes.top_k, shapes.has_shared,
        ),
        "experts_second": (
            state, random(num_all, batch, shapes.expert_size), weights, weight(num_all * width, shapes.expert_size),
            random(num_all * width),
        ),
        "final_norm": (stream, norm(width), eps),
    }  # fmt: skip


def as_double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers in float64, for a reference."""
    return tuple(arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)

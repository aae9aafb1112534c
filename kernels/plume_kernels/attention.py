"""Decode attention, split over the cache.

For token i of a row, over the slots of one split that are filled once it is written:

    outputs = softmax(q Kᵀ / sqrt(C)) V          lse = log2 of the sum of exp(q Kᵀ / sqrt(C))

Defined by `plume.engine.fused.reference.attention`; `plume_kernels.out` adds the splits up. A split has a fixed size,
so that nothing depends on the batch. The query heads of a key/value head, and the new tokens, are rows of one product.
Lengths are read on the device: splits beyond a row's end cost an empty program, and unwritten slots are never used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plume_kernels import tiles
from plume_kernels.launch import contiguous, launch, wait
from plume_kernels.rows import num_readable


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def _attention_kernel(
    queries_ptr,  # [M, H, C]
    kv_ptr,  # [2, B, G, L, C]
    mask_ptr,  # [B, n]
    lengths_ptr,  # [B]
    outputs_ptr,  # [Z, M, H, C]
    lse_ptr,  # [Z, M, H]
    num_rows, stride_kv, stride_batch, num_slots, scale,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, NUM_NEW: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    batch, group, split = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    offs_r, offs_c, offs_l = tl.arange(0, BLOCK_R), tl.arange(0, C), tl.arange(0, BLOCK_L)
    token, head = offs_r // (H // G), group * (H // G) + offs_r % (H // G)
    mask_r = offs_r < NUM_NEW * (H // G)
    place = (batch * NUM_NEW + token) * H + head  # of a row's token and head in [M, H]
    if PDL:
        wait()

    q = tl.load(queries_ptr + place[:, None] * C + offs_c[None, :], mask=mask_r[:, None], other=0.0)
    q = q.to(tl.float32) if UPCAST else q
    readable = num_readable(mask_ptr, lengths_ptr, batch + 0 * offs_r, token, mask_r, NUM_NEW)
    end = tl.minimum(tl.minimum((split + 1) * SPLIT, num_slots), tl.max(readable, axis=0))  # never beyond the cache
    keys_ptr = kv_ptr + batch.to(tl.int64) * stride_batch + group * num_slots * C
    values_ptr = keys_ptr + stride_kv.to(tl.int64)

    best = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, C), tl.float32)
    for start in range(split * SPLIT, end, BLOCK_L):
        slots = start + offs_l
        mask_l = slots < end  # what is not filled may be NaN
        k = tl.load(keys_ptr + slots[None, :] * C + offs_c[:, None], mask=mask_l[None, :], other=0.0)
        v = tl.load(values_ptr + slots[:, None] * C + offs_c[None, :], mask=mask_l[:, None], other=0.0)
        k, v = (k.to(tl.float32), v.to(tl.float32)) if UPCAST else (k, v)
        logits = tl.dot(q, k, input_precision="ieee") * scale
        logits = tl.where(slots[None, :] < tl.minimum(readable, end)[:, None], logits, float("-inf"))
        new_best = tl.maximum(best, tl.max(logits, axis=1))
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)  # no slot so far: exp2(-inf), not NaN
        p = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(best - shift)
        total = total * decay + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        best = new_best

    has_any = total != 0  # NaN is something, which must be seen
    total = tl.where(has_any, total, 1.0)
    lse = tl.where(has_any, best + tl.log2(total), float("-inf"))
    tl.store(lse_ptr + split * num_rows * H + place, lse, mask=mask_r)
    target = outputs_ptr + split * num_rows * H * C + place[:, None] * C + offs_c[None, :]
    tl.store(target, acc / total[:, None], mask=(mask_r & has_any)[:, None])


def attention(queries: Tensor, kv: Tensor, mask: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """See `plume.engine.fused.reference.attention`.

    Outputs of splits without a slot stay unwritten; their `lse` is -inf.
    """
    (num_rows, num_heads, channels), (_, num_batch, groups, num_slots, _) = queries.shape, kv.shape
    contiguous(queries, mask, lengths, kv[0, 0])
    num_splits, num_new = triton.cdiv(num_slots, tiles.SPLIT), mask.shape[1]
    outputs = queries.new_empty(num_splits, num_rows, num_heads, channels, dtype=torch.float32)
    lse = queries.new_empty(num_splits, num_rows, num_heads, dtype=torch.float32)
    tile = tiles.Tile(num_warps=4, num_stages=2)
    launch(
        _attention_kernel,
        (num_batch * groups, num_splits),
        (
            queries, kv, mask.view(torch.uint8), lengths, outputs, lse,
            num_rows, kv.stride(0), kv.stride(1), num_slots, 1.4426950408889634 / channels**0.5,
        ),
        tile,
        H=num_heads, G=groups, C=channels, NUM_NEW=num_new, SPLIT=tiles.SPLIT,
        BLOCK_R=max(16, triton.next_power_of_2(num_new * num_heads // groups)), BLOCK_L=64,
    )  # fmt: skip
    return outputs, lse

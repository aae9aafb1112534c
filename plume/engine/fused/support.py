"""What the kernels have not been written for."""

from __future__ import annotations

import torch

from plume.engine.fused import ops
from plume.engine.layers.text import JoinedExperts
from plume.engine.layers.weights import TextWeights


def unsupported_reason(weights: TextWeights, *, dependent_launch: bool = False) -> str | None:
    """Why the kernels cannot run a text model where it is; None where they can."""
    layer, dtype, width = weights.layers[0], weights.norm.weight.dtype, len(weights.norm.weight)
    inner = len(layer.mlp.gate_proj.weight)
    if dtype not in (torch.bfloat16, torch.float32):
        return f"kernels compute in bfloat16 or float32, and the model is in {dtype}"
    if width % 64 or inner % 64:
        return f"kernels need widths that are multiples of 64; the hidden size is {width} and the MLP's {inner}"
    if weights.channels not in (16, 32, 64, 128):
        return f"kernels need heads of 16, 32, 64 or 128 channels; the model's have {weights.channels}"
    unbiased = [layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    if layer.self_attn.q_proj.bias is None or any(linear.bias is not None for linear in unbiased):
        return "kernels expect biases of queries, keys and values alone"
    return ops.unsupported_reason(weights.norm.weight.device, dependent_launch=dependent_launch)


def unsupported_experts_reason(experts: JoinedExperts) -> str | None:
    """Why the kernels cannot run a mixture of experts; None where they can."""
    adapter, weight, router = experts.adapter, experts.first.weight, experts.adapter.router.weight
    inner = len(weight) // (len(adapter.experts) + (adapter.shared_expert is not None))
    if inner % 64:
        return f"kernels need experts of a width that is a multiple of 64; the adapter's have {inner}"
    if router.dtype != weight.dtype or adapter.ln.weight.dtype != weight.dtype:
        return f"kernels need one dtype; the router is in {router.dtype}, the experts in {weight.dtype}"
    return None

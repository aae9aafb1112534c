"""The text model and the transition adapter in the ops of `plume.ops`: five per layer, three per adapter.

On a GPU each is one kernel, and the adapter's first op two. What they compute is what `plume.stack` and `plume.experts`
do; those also read prefixes, since many tokens are a matter of products that cuBLAS is good at.

The final norm of a latent step is applied by the adapter's first kernel, which spares a launch. So a state whose pass
has ended is not written yet when the rollout gets it; it is once the adapter has been called, which is what
the rollout does next. Where something looks at states before, or no such adapter follows, the norm is an op of its own.

Letters: B batch, n new tokens, D hidden size, M = B n, P terms of the residual stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plume import ops
from plume.backbone import Segment
from plume.experts import ExpertsTogether, bias_of
from plume.parts import TextParts, UnsupportedModelError
from plume.stack import StaticDecoder, TextStack
from plume.static_cache import StaticCache
from plume.transition import Adapter

#: New tokens of a row that the ops are for; more are read as prefixes are.
MOST_NEW = 8


class FusedStack(TextStack):
    """A text stack that reads the next tokens in fused ops."""

    def __init__(self, parts: TextParts, *, dependent_launch: bool = False):
        """As `TextStack`.

        Args:
            parts: from `plume.parts.text_parts`.
            dependent_launch: whether a kernel starts while the one before it ends, and asks for its weights; needs
                compute capability 9.0.

        Raises:
            UnsupportedModelError: no kernels for this model or where it is.
        """
        if reason := why_not(parts) or ops.why_not(parts.norm.weight.device, dependent_launch=dependent_launch):
            raise UnsupportedModelError(reason)
        super().__init__(parts)
        self.dependent_launch = dependent_launch

    def decoder(
        self, cache: StaticCache, read: Tensor, adapter: Adapter, *, looks_at_states: bool
    ) -> tuple[StaticDecoder, Adapter]:
        plain = StaticDecoder(self, cache, read)
        if not isinstance(adapter, ExpertsTogether) or why_not_experts(adapter):
            return plain, adapter
        thinking = FusedDecoder(self, cache, read, adapter)
        return plain if looks_at_states else thinking, thinking.think

    def read_next(self, segment: Segment, cache: StaticCache) -> Tensor:
        if len(segment) > MOST_NEW:
            return super().read_next(segment, cache)
        hidden = ops.final_norm(self.pass_through(segment, cache), self.norm, self.parts.eps)
        return hidden.unflatten(0, segment.mask.shape)

    def pass_through(self, segment: Segment, cache: StaticCache) -> Tensor:
        """Read a few tokens; the residual stream behind the last layer, `[P, M, D]`."""
        mask, eps = segment.mask.contiguous(), self.parts.eps
        positions = segment.positions[0].flatten()  # behind a prefix the three axes agree
        stream = segment.embeds.flatten(end_dim=1).contiguous()[None]
        with ops.dependent_launch(self.dependent_launch):
            for layer, kv in zip(self.layers, cache.kv, strict=True):
                queries = ops.qkv(
                    stream, layer.norm, eps, layer.qkv.weight, bias_of(layer.qkv), positions,
                    self.parts.inverse_frequencies, mask, cache.lengths, kv,
                )  # fmt: skip
                outputs, lse = ops.attention(queries, kv, mask, cache.lengths)
                x = ops.out(outputs, lse, layer.out.weight, stream)
                inner = ops.gate_up(x, layer.mlp_norm, eps, layer.gate_up.weight)
                stream = ops.down(inner, layer.down.weight, x)
        cache.lengths += mask[:, 0] if len(segment) == 1 else mask.sum(dim=1)
        return stream


class FusedDecoder(StaticDecoder):
    """A fused stack, its cache and a mixture of experts, as `plume.rollout` reads and thinks through them."""

    stack: FusedStack

    def __init__(self, stack: FusedStack, cache: StaticCache, read: Tensor, experts: ExpertsTogether):
        super().__init__(stack, cache, read)
        self.experts = experts
        self._unfinished: tuple[Tensor, Tensor] | None = None  # stream, and the state it is to become

    def feed(self, segment: Segment, *, with_layers: bool = False) -> Tensor:
        if self._read is not None or len(segment) != 1:
            return super().feed(segment, with_layers=with_layers)
        stream = self.stack.pass_through(segment, self.cache)
        state = torch.empty_like(segment.embeds)
        self._unfinished = stream, state
        return state

    def think(self, state: Tensor, step: int, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The transition adapter, as `TransitionAdapter.forward`; writes the state first if it is not written yet."""
        stream = None
        if self._unfinished is not None:
            stream, own = self._unfinished
            self._unfinished = None
            assert own.data_ptr() == state.data_ptr(), "the adapter comes right behind the pass"
        own, experts = self.experts.own, self.experts
        first, second = experts.first, experts.second
        with ops.dependent_launch(self.stack.dependent_launch):
            gates, weights, inner = ops.experts_first(
                stream, self.stack.norm, self.stack.parts.eps, state, context,
                own.ln.weight, own.ln.bias, own.ln.eps, own.step_embed.weight[step], own.router.weight, own.router.bias,
                first.weight, bias_of(first), own.top_k, own.shared_expert is not None,
            )  # fmt: skip
            return ops.experts_second(state, inner, weights, second.weight, bias_of(second)), gates


def why_not(parts: TextParts) -> str | None:
    """Why the kernels cannot run a text model; None where they can."""
    first, dtype, width = parts.layers[0], parts.norm.weight.dtype, len(parts.norm.weight)
    inner = len(first.mlp.gate_proj.weight)
    if dtype not in (torch.bfloat16, torch.float32):
        return f"kernels compute in bfloat16 or float32, and the model is in {dtype}"
    if width % 64 or inner % 64:
        return f"kernels need widths that are multiples of 64; the hidden size is {width} and the MLP's {inner}"
    if parts.channels not in (16, 32, 64, 128):
        return f"kernels need heads of 16, 32, 64 or 128 channels; the model's have {parts.channels}"
    biased = [first.self_attn.o_proj, first.mlp.gate_proj, first.mlp.up_proj, first.mlp.down_proj]
    if first.self_attn.q_proj.bias is None or any(one.bias is not None for one in biased):
        return "kernels expect biases of queries, keys and values alone"
    return None


def why_not_experts(experts: ExpertsTogether) -> str | None:
    """Why the kernels cannot run a mixture of experts; None where they can."""
    weight, first = experts.own.router.weight, experts.first.weight
    inner = len(first) // (len(experts.own.experts) + (experts.own.shared_expert is not None))
    if inner % 64:
        return f"kernels need experts of a width that is a multiple of 64; the adapter's have {inner}"
    if weight.dtype != first.dtype or experts.own.ln.weight.dtype != first.dtype:
        return f"kernels need one dtype; the router is in {weight.dtype}, the experts in {first.dtype}"
    return None

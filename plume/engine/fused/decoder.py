"""The text model and the transition adapter in the ops of `plume.engine.fused.ops`: five per layer, three per adapter.

On a GPU each is one kernel, and the adapter's first op two. They compute what `plume.engine.layers.text` computes;
that also reads prefixes, since many tokens are a matter of products that cuBLAS is good at. In a latent step the final
norm is a part of the adapter's first kernel, which saves a launch.

Letters: B batch, n new tokens, D hidden size, E routed experts, M = B n, P terms of the residual stream.
"""

from __future__ import annotations

from torch import Tensor

from plume.engine.fused import ops
from plume.engine.fused.support import unsupported_reason
from plume.engine.layers.text import JoinedExperts, StaticCache, StaticDecoder, TextLayers, bias_of
from plume.engine.layers.weights import TextWeights, UnsupportedModelError
from plume.model.interface import Adapter, Segment

#: New tokens of a row that the ops are for; more are read as prefixes are.
MOST_NEW = 8


class FusedTextLayers(TextLayers):
    """Text layers that read the next tokens in fused ops."""

    def __init__(self, weights: TextWeights, *, dependent_launch: bool = False):
        """As `TextLayers`.

        Args:
            weights: from `plume.engine.layers.weights.text_weights`.
            dependent_launch: whether a kernel starts while the one before it ends, and asks for its weights; needs
                compute capability 9.0.

        Raises:
            UnsupportedModelError: no kernels for this model or where it is.
        """
        if reason := unsupported_reason(weights, dependent_launch=dependent_launch):
            raise UnsupportedModelError(reason)
        super().__init__(weights)
        self.dependent_launch = dependent_launch

    def decoder(self, cache: StaticCache, prefix_states: Tensor) -> StaticDecoder:
        return FusedDecoder(self, cache, prefix_states)

    def has_kernels(self, num_rows: int) -> bool:
        """Whether products of so many rows are the kernels'; those of more are cuBLAS's, as without kernels."""
        return ops.has_kernel("qkv", num_rows, self.norm)

    def read_next(self, segment: Segment, cache: StaticCache) -> Tensor:
        if len(segment) > MOST_NEW or not self.has_kernels(segment.mask.numel()):
            return super().read_next(segment, cache)
        hidden = ops.final_norm(self.pass_through(segment, cache), self.norm, self.weights.eps)
        return hidden.unflatten(0, segment.mask.shape)

    def pass_through(self, segment: Segment, cache: StaticCache) -> Tensor:
        """Read a few tokens; the residual stream behind the last layer, `[P, M, D]`."""
        mask, eps = segment.mask.contiguous(), self.weights.eps
        positions = segment.positions[0].flatten()  # behind a prefix the three axes agree
        stream = segment.embeds.flatten(end_dim=1).contiguous()[None]
        with ops.dependent_launch(self.dependent_launch):
            for layer, kv in zip(self.layers, cache.kv, strict=True):
                queries = ops.qkv(
                    stream, layer.norm, eps, layer.qkv.weight, bias_of(layer.qkv), positions,
                    self.weights.inverse_frequencies, mask, cache.lengths, kv,
                )  # fmt: skip
                outputs, lse = ops.attention(queries, kv, mask, cache.lengths)
                x = ops.out(outputs, lse, layer.out.weight, stream)
                inner = ops.gate_up(x, layer.mlp_norm, eps, layer.gate_up.weight)
                stream = ops.down(inner, layer.down.weight, x)
        cache.lengths += mask[:, 0] if len(segment) == 1 else mask.sum(dim=1)
        return stream


class FusedExperts:
    """A mixture of experts in fused ops."""

    def __init__(self, experts: JoinedExperts, layers: FusedTextLayers):
        self.experts, self.layers = experts, layers

    def __call__(self, state: Tensor, step: int, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `TransitionAdapter.forward`."""
        if not self.layers.has_kernels(len(state)):
            return self.experts(state, step, context)
        return self._step(None, state, step, context)

    def after_pass(self, stream: Tensor, step: int, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The final norm and the adapter: `[P, B, D]` to state and next input `[B, D]`, and gates `[B, E]`."""
        norm = self.layers.norm
        state = norm.new_empty(stream.shape[1:])
        return state, *self._step(stream, state, step, context)

    def _step(self, stream: Tensor | None, state: Tensor, step: int, context: Tensor | None) -> tuple[Tensor, Tensor]:
        adapter, first, second = self.experts.adapter, self.experts.first, self.experts.second
        with ops.dependent_launch(self.layers.dependent_launch):
            gates, weights, inner = ops.experts_first(
                stream, self.layers.norm, self.layers.weights.eps, state, context,
                adapter.ln.weight, adapter.ln.bias, adapter.ln.eps, adapter.step_embed.weight[step],
                adapter.router.weight, adapter.router.bias, first.weight, bias_of(first), adapter.top_k,
                adapter.shared_expert is not None,
            )  # fmt: skip
            return ops.experts_second(state, inner, weights, second.weight, bias_of(second)), gates


class FusedDecoder(StaticDecoder):
    """Fused text layers and a cache; with fused experts, a latent step has no norm of its own."""

    layers: FusedTextLayers

    def latent_step(
        self, segment: Segment, adapter: Adapter, step: int, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if not isinstance(adapter, FusedExperts) or not self.layers.has_kernels(segment.mask.numel()):
            return super().latent_step(segment, adapter, step, context)
        stream = self.layers.pass_through(segment, self.cache)
        return adapter.after_pass(stream, step, context)

"""Rollouts in which something is replaced: latent inputs, steps, gates, or what the prefix left in the cache.

Letters: B batch, L prefix length, D hidden size, K latent steps, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from plume.model.backbone import CachedDecoder
from plume.model.interface import ModelInputs, Segment
from plume.model.model import PlumeModel
from plume.model.transition import TransitionAdapter

Replace = Callable[[Tensor, int], Tensor]
"""Given the latent inputs of a batch `[B, D]` and their step, what goes in instead."""


class _Replaced(TransitionAdapter):
    """An adapter whose outputs are replaced."""

    def __init__(self, adapter: TransitionAdapter, replace: Replace):
        super().__init__()
        self.adapter, self.replace = adapter, replace

    def forward(self, state: Tensor, step: int, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        next_input, gates = self.adapter(state, step, context)
        return self.replace(next_input, step), gates


class _Renumbered(TransitionAdapter):
    """An adapter that takes each step for another one."""

    def __init__(self, adapter: TransitionAdapter, steps: Sequence[int]):
        super().__init__()
        self.adapter, self.steps = adapter, steps

    def forward(self, state: Tensor, step: int, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.adapter(state, self.steps[step], context)


@contextmanager
def replaced_inputs(model: PlumeModel, replace: Replace) -> Iterator[None]:
    """Within it, latent inputs are what `replace` makes of them."""
    with _adapter(model, _Replaced(model.transition, replace)):
        yield


@contextmanager
def renumbered_steps(model: PlumeModel, steps: Sequence[int]) -> Iterator[None]:
    """Within it, step k is taken for step `steps[k]`: a list without k skips it, one with k twice repeats it."""
    with _adapter(model, _Renumbered(model.transition, steps)):
        yield


@contextmanager
def frozen_gates(model: PlumeModel, gates: Tensor) -> Iterator[None]:
    """Within it, the router of a mixture of experts gives `gates [K, E]`, whatever the input."""
    adapter: TransitionAdapter = model.transition

    def route(state: Tensor, step: int, context: Tensor | None) -> Tensor:
        return gates[step].expand(len(state), -1)

    adapter.route = route  # type: ignore[assignment]  # hides the method of the class
    try:
        yield
    finally:
        del adapter.route


@contextmanager
def _adapter(model: PlumeModel, adapter: TransitionAdapter) -> Iterator[None]:
    own = model.transition
    model.transition = adapter
    try:
        yield
    finally:
        model.transition = own


def noise(generator: torch.Generator) -> Replace:
    """Random directions of the same length."""

    def replace(inputs: Tensor, step: int) -> Tensor:
        drawn = torch.randn(inputs.shape, generator=generator).to(inputs)
        return drawn * inputs.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)

    return replace


def of_another_row(inputs: Tensor, step: int) -> Tensor:
    """Those of the row before."""
    return inputs.roll(1, dims=0)


def constant(means: Tensor) -> Replace:
    """The same for every input: `means [K, D]`."""
    return lambda inputs, step: means[step].expand_as(inputs)


class CutDecoder(CachedDecoder):
    """Hides some columns of the prefix once so many latent inputs have been read."""

    def __init__(self, model: PlumeModel, hidden: Tensor, num_steps: int):
        """Set up.

        Args:
            model: whose backbone reads.
            hidden: columns to hide, `[B, L]`.
            num_steps: latent inputs that are read before, fewer than K (the last shares its pass with the read-out); 0
                hides the columns right behind the prefix.
        """
        super().__init__(model.backbone)
        self.hidden, self.left = hidden, num_steps + 1

    def feed(self, segment: Segment, *, with_layers: bool = False) -> Tensor:
        if self.left == 0:
            assert self.mask is not None
            length = self.hidden.shape[1]
            self.mask = torch.cat([self.mask[:, :length] & ~self.hidden, self.mask[:, length:]], dim=1)
        self.left -= 1
        return super().feed(segment, with_layers=with_layers)


def shown_columns(model: PlumeModel, inputs: ModelInputs) -> Tensor:
    """Columns of what a question is about, `[B, L]`: all visual tokens, or a text before its last full stop.

    The prompt's own words behind the anchor stay, and so does a question; a start that is shown as a picture does not.
    """
    config, ids = model.backbone.config, inputs.prefix_ids
    is_visual = (ids == config.image_token_id) | (ids == config.video_token_id)
    assert model.processor is not None
    stop = model.processor.tokenizer.convert_tokens_to_ids(".")
    columns = torch.arange(ids.shape[1], device=ids.device)
    is_stop = (ids == stop) & (columns < inputs.anchor_column[:, None])
    last = torch.where(is_stop, columns, -1).amax(dim=1, keepdim=True)
    is_text = (columns <= last) & inputs.prefix_mask & ~is_visual.any(dim=1, keepdim=True)
    return is_visual | is_text

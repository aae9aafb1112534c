"""The rollout: K latent steps between the prefix and the suffix.

PLUME (arXiv 2604.02073, section 3), in the line of Coconut. The hidden state of the last position is mapped by
the transition adapter T to the next input, K times, without a token in between:

    h_0     = B(prefix)[<bot>]                  c = B(prefix)[<disc_emb>]
    h_{t+1} = B(T(h_t, t, c))                   t = 0 .. K-1, through the key/value cache
    H       = B(suffix)                         the embedding is H[<gen_emb>], normalised

The last latent input and the suffix are both known before h_K is, so they share a pass, which a causal mask
makes exact: K + 1 passes of the backbone in all. Nothing is detached: gradients run through every step, the
cache and the anchor.

Parallel latents take one pass instead: inputs p_1 .. p_K are learnt, not computed, and prefix, latents and suffix are
read together. n refinements turn the inputs into those of the sequential rollout from the front, by Jacobi iteration
(PCCoT, arXiv 2506.18582), with n + 2 passes; n = K - 1 is exact:

    h_0 = B(prefix)[<bot>]      x = T(h_0, 0, c), p_2, .., p_K
    h_1 .. h_K = B(x)           x_{k+1} = T(h_k, k, c) for k = 1 .. K-1      n times

Letters: B batch, D hidden size, K latent steps, E experts, S suffix length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plume.config import RouterContext
from plume.model import positions
from plume.model.interface import Adapter, Decoder, Segment


@dataclass
class Rollout:
    """What a rollout leaves behind; K is the largest number of steps in the batch.

    states `[B, K+1, D]`: the hidden states h_0 .. h_K; zero beyond a row's own K.
    gates `[B, K, E]`: the router's softmax at each step; zero beyond a row's own K; None without a router.
    anchor `[B, D]`: the hidden state at the anchor.
    last_state `[B, D]`: h_K of each row, K its own.
    suffix `[B, S, D]`: the hidden states of the suffix.
    suffix_layers `[layers + 1, B, S, D]`: the same at every layer, embeddings first; None unless kept.
    num_latent_steps `[B]`: K of each row; with early exit, the steps that it took.
    next_position `[B]`: the rotary position of a token that follows the longest suffix.
    """

    states: Tensor
    gates: Tensor | None
    anchor: Tensor
    last_state: Tensor
    suffix: Tensor
    suffix_layers: Tensor | None
    num_latent_steps: Tensor
    next_position: Tensor


def rollout(
    decoder: Decoder,
    adapter: Adapter,
    prefix: Segment,
    suffix_embeds: Tensor,
    suffix_mask: Tensor,
    *,
    num_latent_steps: Tensor,
    max_latent_steps: int,
    anchor_column: Tensor,
    start: Tensor,
    router_context: RouterContext = "anchor",
    keep_layers: bool = False,
    latent_inputs: Tensor | None = None,
    refinements: int = 0,
    gate: Callable[[Tensor], Tensor] | None = None,
    exit_tolerance: float | None = None,
    ends_early: bool = True,
) -> Rollout:
    """Run prefix, latent steps and suffix through the backbone.

    Rows may differ in K: all start together and run to the largest; from its own K on, a row's latent columns
    are masked, and its suffix stands where its own K puts it, so that its results are those of the row alone.

    Args:
        decoder: reads the prefix first: an empty one, or one of the engine that has read it.
        adapter: maps a state to the next input.
        prefix: its last column is `<bot>` in every row; of the engine's decoder, anchor and `<bot>` alone.
        suffix_embeds: input embeddings of the suffix, `[B, S, D]`, right-padded.
        suffix_mask: True at real suffix tokens, `[B, S]`.
        num_latent_steps: K of each row, `[B]`.
        max_latent_steps: the steps that are run, at least the largest of them; known on the host.
        anchor_column: column of the anchor in the prefix, `[B]`.
        start: rotary position of latent step 0, `[B]`.
        router_context: what the router sees beside the state.
        keep_layers: whether to return the suffix's states of all layers.
        latent_inputs: learnt inputs of parallel latents, `[M, D]` with M >= K; None takes sequential ones.
        refinements: n, of parallel latents.
        gate: says of anchors `[B, D]` which rows take their steps at all, `[B]`; None: all of them. It cannot be asked
            where latents are read in the pass of the prefix.
        exit_tolerance: of sequential latents: a row stops at the first step that changes its state by at most this
            share of its norm.
        ends_early: whether to ask the device then if all rows have stopped, and end; a CUDA graph cannot.
    """
    rows = torch.arange(len(start), device=start.device)
    run = _Run(decoder, adapter, prefix, anchor_column, start, router_context, gate, ends_early)
    if max_latent_steps == 0:
        steps = _Steps(prefix, 1, num_latent_steps)
    elif latent_inputs is None:
        steps = _take_steps(run, num_latent_steps, max_latent_steps, exit_tolerance)
    elif refinements == 0:
        latents = run.segment(latent_inputs[:max_latent_steps].expand(len(start), -1, -1), num_latent_steps)
        steps = _Steps(prefix.followed_by(latents), 1 + max_latent_steps, num_latent_steps)
    else:
        steps = _refine(run, num_latent_steps, latent_inputs[:max_latent_steps], refinements)

    pending, num_latent_steps = steps.pending, steps.num_latent_steps
    suffix_positions = positions.suffix_positions(start, num_latent_steps, suffix_embeds.shape[1])
    suffix = Segment(suffix_embeds, suffix_mask, suffix_positions)
    hidden = decoder.feed(pending.followed_by(suffix), with_layers=keep_layers)
    layers = hidden[:, :, len(pending) :] if keep_layers else None
    hidden = hidden[-1] if keep_layers else hidden
    states = [*steps.states, *hidden[:, len(pending) - steps.num_states : len(pending)].unbind(dim=1)]
    anchor = hidden[rows, anchor_column] if run.anchor is None else run.anchor

    stacked = torch.stack(states, dim=1)  # [B, K+1, D]
    is_own_state = torch.arange(len(states), device=start.device) <= num_latent_steps[:, None]  # [B, K+1]
    return Rollout(
        states=stacked.masked_fill(~is_own_state[..., None], 0),
        gates=_stack_gates(steps.gates, is_own_state[:, 1:]),
        anchor=anchor,
        last_state=stacked[rows, num_latent_steps],
        suffix=hidden[:, len(pending) :],
        suffix_layers=layers,
        num_latent_steps=num_latent_steps,
        next_position=suffix_positions[0, :, -1] + 1,
    )


@dataclass
class _Steps:
    """Latent steps up to the pass that reads the suffix.

    pending: what that pass reads before the suffix; its last `num_states` hidden states are latent states.
    num_latent_steps: of each row, `[B]`; fewer than were asked for where a row stopped early.
    states: those of earlier passes, `[B, D]` each. gates: of each step.
    """

    pending: Segment
    num_states: int
    num_latent_steps: Tensor
    states: list[Tensor] = field(default_factory=list)
    gates: list[Tensor | None] = field(default_factory=list)


@dataclass
class _Run:
    """What all ways to take latent steps need; `anchor` and `context` are there once the prefix has been read."""

    decoder: Decoder
    adapter: Adapter
    prefix: Segment
    anchor_column: Tensor
    start: Tensor
    router_context: RouterContext
    gate: Callable[[Tensor], Tensor] | None
    ends_early: bool
    anchor: Tensor | None = None
    context: Tensor | None = None

    def read_prefix(self) -> Tensor:
        """h_0, `[B, D]`."""
        hidden = self.decoder.feed(self.prefix)
        rows = torch.arange(len(hidden), device=hidden.device)
        self.anchor, state = hidden[rows, self.anchor_column], hidden[:, -1]
        self.context = {"anchor": self.anchor, "prefix_last": state, "none": None}[self.router_context]
        return state

    def gated(self, num_latent_steps: Tensor) -> Tensor:
        """K of each row, `[B]`: 0 where the gate says so."""
        assert self.anchor is not None
        return num_latent_steps if self.gate is None else num_latent_steps.where(self.gate(self.anchor), 0)

    def is_over(self, step: int, num_latent_steps: Tensor) -> bool:
        """Whether no row takes another step; the device is asked only where that may end the work early."""
        return self.ends_early and bool((step >= num_latent_steps).all())

    def segment(self, inputs: Tensor, num_latent_steps: Tensor, first_step: int = 0) -> Segment:
        """Inputs `[B, n, D]` of consecutive steps where they stand; masked beyond a row's own K."""
        steps = torch.arange(first_step, first_step + inputs.shape[1], device=inputs.device)
        places = [positions.latent_positions(self.start, first_step + step) for step in range(inputs.shape[1])]
        return Segment(inputs, steps < num_latent_steps[:, None], torch.cat(places, dim=2))


def _take_steps(run: _Run, num_latent_steps: Tensor, max_latent_steps: int, exit_tolerance: float | None) -> _Steps:
    """One pass per step; the last latent input is left for the suffix's."""
    pending, states, gates = run.prefix, [], []
    for step in range(max_latent_steps):
        if step == 0:
            state = run.read_prefix()
            num_latent_steps = run.gated(num_latent_steps)
            if run.gate is not None and run.is_over(0, num_latent_steps):
                return _Steps(pending.empty_like(), 0, num_latent_steps, [state])
            next_input, gate = run.adapter(state, step, run.context)
        else:
            state, next_input, gate = run.decoder.latent_step(pending, run.adapter, step, run.context)
        states.append(state)
        if step and exit_tolerance is not None:
            is_settled = (states[-1] - states[-2]).norm(dim=-1) <= exit_tolerance * states[-1].norm(dim=-1)
            num_latent_steps = torch.where(is_settled, num_latent_steps.clamp(max=step), num_latent_steps)
            if run.is_over(step, num_latent_steps):
                return _Steps(pending.empty_like(), 0, num_latent_steps, states, gates)
        gates.append(gate)
        pending = run.segment(next_input[:, None], num_latent_steps, step)
    return _Steps(pending, 1, num_latent_steps, states, gates)


def _refine(run: _Run, num_latent_steps: Tensor, latent_inputs: Tensor, refinements: int) -> _Steps:
    """Passes over all latents at once; their inputs become what the adapter makes of the states before them."""
    state = run.read_prefix()
    num_latent_steps = run.gated(num_latent_steps)
    first, gate = run.adapter(state, 0, run.context)
    inputs = [first, *(row.expand_as(first) for row in latent_inputs[1:])]
    gates = [gate]
    for _ in range(refinements):
        latents = run.segment(torch.stack(inputs, dim=1), num_latent_steps)
        hidden = run.decoder.feed(latents)
        run.decoder.forget(latents)
        moved = [run.adapter(hidden[:, step - 1], step, run.context) for step in range(1, len(inputs))]
        inputs, gates = [first, *(one for one, _ in moved)], [gate, *(one for _, one in moved)]
    pending = run.segment(torch.stack(inputs, dim=1), num_latent_steps)
    return _Steps(pending, len(inputs), num_latent_steps, [state], gates)


def _stack_gates(gates: list[Tensor | None], is_own_step: Tensor) -> Tensor | None:
    if not gates or gates[0] is None:
        return None
    return torch.stack(gates, dim=1).masked_fill(~is_own_step[..., None], 0)  # type: ignore[arg-type]  # all or none are None

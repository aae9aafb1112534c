"""The rollout: K latent steps between the prefix and the suffix.

PLUME (arXiv 2604.02073, section 3), in the line of Coconut. The hidden state of the last position is mapped by
the transition adapter T to the next input, K times, without a token in between:

    h_0     = B(prefix)[<bot>]                  c = B(prefix)[<disc_emb>]
    h_{t+1} = B(T(h_t, t, c))                   t = 0 .. K-1, through the key/value cache
    H       = B(suffix)                         the embedding is H[<gen_emb>], normalised

The last latent input and the suffix are both known before h_K is, so they share a pass, which a causal mask
makes exact: K + 1 passes of the backbone in all. Nothing is detached: gradients run through every step, the
cache and the anchor.

Letters: B batch, D hidden size, K latent steps, E experts, S suffix length.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        exit_tolerance: a row stops at the first step that changes its state by at most this share of its norm.
        ends_early: whether to ask the device then if all rows have stopped, and end; a CUDA graph cannot.
    """
    rows = torch.arange(len(start), device=start.device)
    pending, states, gates = prefix, [], []
    anchor = context = None

    for step in range(max_latent_steps):
        if step == 0:
            hidden = decoder.feed(prefix)
            anchor, state = hidden[rows, anchor_column], hidden[:, -1]
            context = {"anchor": anchor, "prefix_last": state, "none": None}[router_context]
            next_input, gate = adapter(state, step, context)
        else:
            state, next_input, gate = decoder.latent_step(pending, adapter, step, context)
        states.append(state)
        if step and exit_tolerance is not None:
            is_settled = (states[-1] - states[-2]).norm(dim=-1) <= exit_tolerance * states[-1].norm(dim=-1)
            num_latent_steps = torch.where(is_settled, num_latent_steps.clamp(max=step), num_latent_steps)
            if ends_early and (step >= num_latent_steps).all():
                pending = pending.empty_like()
                break
        gates.append(gate)
        is_active = step < num_latent_steps
        pending = Segment(next_input[:, None], is_active[:, None], positions.latent_positions(start, step))

    suffix_positions = positions.suffix_positions(start, num_latent_steps, suffix_embeds.shape[1])
    suffix = Segment(suffix_embeds, suffix_mask, suffix_positions)
    hidden = decoder.feed(pending.followed_by(suffix), with_layers=keep_layers)
    layers = hidden[:, :, len(pending) :] if keep_layers else None
    hidden = hidden[-1] if keep_layers else hidden
    if len(pending):
        states.append(hidden[:, len(pending) - 1])
    if anchor is None:  # K = 0: prefix and suffix were the one pass
        anchor = hidden[rows, anchor_column]

    stacked = torch.stack(states, dim=1)  # [B, K+1, D]
    steps = torch.arange(len(states), device=start.device)
    is_own_state = steps <= num_latent_steps[:, None]  # [B, K+1]
    return Rollout(
        states=stacked.masked_fill(~is_own_state[..., None], 0),
        gates=_stack_gates(gates, is_own_state[:, 1:]),
        anchor=anchor,
        last_state=stacked[rows, num_latent_steps],
        suffix=hidden[:, len(pending) :],
        suffix_layers=layers,
        num_latent_steps=num_latent_steps,
        next_position=suffix_positions[0, :, -1] + 1,
    )


def _stack_gates(gates: list[Tensor | None], is_own_step: Tensor) -> Tensor | None:
    if not gates or gates[0] is None:
        return None
    return torch.stack(gates, dim=1).masked_fill(~is_own_step[..., None], 0)  # type: ignore[arg-type]  # all or none are None

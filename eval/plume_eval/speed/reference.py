"""Latent and explicit reasoning in the style of published code: the baseline that users have today.

Written from the description of that code (README of eval/), not from its text. One input at a time; the prefix goes
through the output head and keeps a list of all layers' states; the adapter asks the device which rows chose which
expert; the suffix has a pass of its own, and one more token is decoded whose result nobody reads. The vectors are
those of `PlumeModel`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plume.model.backbone import CachedDecoder
from plume.model.interface import Segment, normalize, read_out_column
from plume.model.model import PlumeModel
from plume.model.positions import suffix_positions
from plume.model.transition import MixtureOfExperts


class OneByOne:
    """Reads one input with transformers' layers, the output head on every position."""

    def __init__(self, model: PlumeModel, batch: dict[str, Tensor]):
        self.model = model
        inputs = model.read_inputs(batch)
        prefix, self.position = model.embed_prefix(inputs)
        self.decoder = CachedDecoder(model.backbone)
        self.hidden = self._read(prefix)
        self.anchor = self.hidden[torch.arange(len(self.hidden)), inputs.anchor_column]

    def read(self, embeds: Tensor, *, head: bool = True) -> Tensor:
        """Read what follows, `[1, n, D]`; its states."""
        count = embeds.shape[1]
        positions = suffix_positions(self.position, torch.zeros_like(self.position), count)
        segment = Segment(embeds, torch.ones_like(embeds[..., 0]).bool(), positions)
        self.position = self.position + count
        self.hidden = self._read(segment, head)
        return self.hidden

    def _read(self, segment: Segment, head: bool = True) -> Tensor:
        hidden = self.decoder.feed(segment, with_layers=True)[-1]
        if head:
            self.logits = self.model.logits(hidden)
        return hidden


@torch.inference_mode()
def embed_one(model: PlumeModel, batch: dict[str, Tensor], num_latent_steps: int) -> Tensor:
    """Embedding of one input, `[1, D]`, after K latent steps."""
    config = model.config
    reader = OneByOne(model, batch)
    state = reader.hidden[:, -1]
    context = {"anchor": reader.anchor, "prefix_last": state, "none": None}[config.router_context]
    for step in range(num_latent_steps):
        state = reader.read(_next_input(model, state, step, context)[:, None], head=False)[:, -1]
    suffix = torch.tensor([config.suffix_ids], device=state.device)
    hidden = reader.read(model.embed_tokens(suffix))
    column = read_out_column(config, suffix, torch.ones_like(suffix).bool())
    read_out = hidden[torch.arange(1, device=state.device), column]
    token = reader.logits[:, -1].argmax(dim=-1, keepdim=True)
    reader.read(model.embed_tokens(token))
    return normalize(read_out)


@torch.inference_mode()
def write_one(model: PlumeModel, batch: dict[str, Tensor], num_tokens: int, stops: bool) -> tuple[Tensor, int]:
    """Embedding of one input, `[1, D]`, after a written rationale, and how many tokens it has."""
    reader = OneByOne(model, batch)
    token = torch.full_like(batch["input_ids"][:, :1], model.config.latent_end_token_id or 0)
    reader.read(model.embed_tokens(token))
    for written in range(num_tokens):
        token = reader.logits[:, -1].argmax(dim=-1, keepdim=True)
        reader.read(model.embed_tokens(token))
        if token.item() == model.config.read_out_token_id and stops:
            return normalize(reader.hidden[:, -1]), written
    return normalize(reader.hidden[:, -1]), num_tokens


def _next_input(model: PlumeModel, state: Tensor, step: int, context: Tensor | None) -> Tensor:
    adapter = model.transition
    if not isinstance(adapter, MixtureOfExperts) or model.latent_norm is not None:
        return model.adapter(state, step, context)[0]
    kept, chosen = adapter.route(state, step, context).topk(adapter.top_k, dim=-1)
    normed = adapter.ln(state)
    result = state if adapter.shared_expert is None else state + adapter.shared_expert(normed)
    result = result.clone()
    for slot in range(adapter.top_k):
        for index, expert in enumerate(adapter.experts):
            rows = chosen[:, slot] == index
            if rows.any():  # the device is asked, and the host waits
                result[rows] += kept[rows, slot, None].to(state.dtype) * expert(normed[rows])
    return result

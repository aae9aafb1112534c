"""Latent and explicit reasoning in the style of published code: the baseline that users have today.

Written from the description of that code (README of eval/), not from its text. One input at a time; the prefix goes
through the output head and keeps a list of all layers' states; the adapter asks the device which rows chose which
expert; the suffix has a pass of its own, and one more token is decoded whose result nobody reads. The vectors are
those of `PlumeModel`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plume import backbone as seam
from plume import positions, tokens
from plume.arguments import last_column
from plume.model import PlumeModel
from plume.output import unit
from plume.transition import MixtureOfExperts


class OneByOne:
    """Reads one input with transformers' layers, the output head on every position."""

    def __init__(self, model: PlumeModel, batch: dict[str, Tensor]):
        self.model = model
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        media = {name: batch.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        vision = seam.see(
            model.backbone,
            batch.get("pixel_values"),
            media["image_grid_thw"],
            batch.get("pixel_values_videos"),
            media["video_grid_thw"],
        )
        media["second_per_grid_ts"] = batch.get("second_per_grid_ts")
        rule = model.config.vision_positions
        prefix = seam.embed_prefix(model.backbone, ids, mask, vision, **media, rule=rule)
        self.place = positions.latent_start(prefix.positions, mask, model.config.latent_positions)
        self.decoder = seam.CachedDecoder(model.backbone)
        self.hidden = self._read(prefix)
        rows = torch.arange(len(ids), device=ids.device)
        self.anchor = self.hidden[rows, last_column(ids, mask, model.config.anchor_token_id, tokens.ANCHOR)]

    def read(self, embeds: Tensor, *, head: bool = True) -> Tensor:
        """Read what follows, `[1, n, D]`; its states."""
        count = embeds.shape[1]
        place = self.place + torch.arange(count, device=embeds.device)
        segment = seam.Segment(embeds, torch.ones_like(embeds[..., 0]).bool(), place.expand(3, 1, -1))
        self.place = self.place + count
        self.hidden = self._read(segment, head)
        return self.hidden

    def _read(self, segment: seam.Segment, head: bool = True) -> Tensor:
        hidden = self.decoder.feed(segment, with_layers=True)[-1]
        if head:
            self.logits = seam.logits(self.model.backbone, self.model.lm_head, hidden)
        return hidden


@torch.inference_mode()
def embed_one(model: PlumeModel, batch: dict[str, Tensor], num_latent_steps: int) -> Tensor:
    """Embedding of one input, `[1, D]`, after K latent steps."""
    config = model.config
    one = OneByOne(model, batch)
    state = one.hidden[:, -1]
    context = {"anchor": one.anchor, "prefix_last": state, "none": None}[config.router_context]
    for step in range(num_latent_steps):
        state = one.read(_next_input(model, state, step, context)[:, None], head=False)[:, -1]
    suffix = torch.tensor([config.suffix_ids], device=state.device)
    hidden = one.read(seam.embed_tokens(model.backbone, suffix))
    column = last_column(suffix, torch.ones_like(suffix).bool(), config.read_out_token_id, tokens.READ_OUT)
    read_out = hidden[torch.arange(1, device=state.device), column]
    token = one.logits[:, -1].argmax(dim=-1, keepdim=True)
    one.read(seam.embed_tokens(model.backbone, token))
    return unit(read_out)


@torch.inference_mode()
def write_one(model: PlumeModel, batch: dict[str, Tensor], num_tokens: int, stops: bool) -> tuple[Tensor, int]:
    """Embedding of one input, `[1, D]`, after a written rationale, and how many tokens it has."""
    one = OneByOne(model, batch)
    token = torch.full_like(batch["input_ids"][:, :1], model.config.latent_end_token_id or 0)
    one.read(seam.embed_tokens(model.backbone, token))
    for written in range(num_tokens):
        token = one.logits[:, -1].argmax(dim=-1, keepdim=True)
        one.read(seam.embed_tokens(model.backbone, token))
        if token.item() == model.config.read_out_token_id and stops:
            return unit(one.hidden[:, -1]), written
    return unit(one.hidden[:, -1]), num_tokens


def _next_input(model: PlumeModel, state: Tensor, step: int, context: Tensor | None) -> Tensor:
    adapter = model.transition
    if not isinstance(adapter, MixtureOfExperts):
        return adapter(state, step, context)[0]
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

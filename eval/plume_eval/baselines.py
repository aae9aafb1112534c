"""Three ways to embed on one backbone: latent steps, a single pass, an explicit chain of thought.

They share the prompt, the processor, the backbone pass and the read-out, so that what differs is the reasoning alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from plume.engine.engine import Engine
from plume.inputs.item import Item
from plume.model.interface import Segment
from plume.model.model import PlumeModel
from plume.model.positions import latent_positions

Mode = Literal["latent", "single_pass", "explicit"]
MODES = get_args(Mode)


@dataclass
class Embedded:
    """Vectors of some inputs and what they cost.

    embedding `[N, D]`: float32, unit norm.
    num_reasoning_steps `[N]`: latent steps, or tokens written before the read-out.
    is_complete `[N]`: False where an explicit rationale reached its limit without a read-out.
    written: tokens of each explicit rationale, without the read-out; empty in other modes.
    """

    embedding: Tensor
    num_reasoning_steps: Tensor
    is_complete: Tensor
    written: list[list[int]] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Sequence[Embedded]) -> Embedded:
        """Several batches as one."""
        return cls(
            torch.cat([part.embedding for part in parts]),
            torch.cat([part.num_reasoning_steps for part in parts]),
            torch.cat([part.is_complete for part in parts]),
            [tokens for part in parts for tokens in part.written],
        )


@torch.inference_mode()
def embed_batch(
    model: PlumeModel,
    batch: dict[str, Tensor],
    mode: Mode,
    *,
    num_latent_steps: int | None = None,
    max_new_tokens: int = 512,
    stops: bool = True,
    engine: Engine | None = None,
) -> Embedded:
    """Embed one batch.

    Args:
        model: in eval mode.
        batch: from the model's processor.
        mode: how to reason.
        num_latent_steps: K of the mode "latent", by default the checkpoint's, as its gate decides where it has one; of
            "explicit", by default 0, the steps to take before the rest is written.
        max_new_tokens: limit of the mode "explicit".
        stops: whether writing ends at `<gen_emb>`; otherwise exactly `max_new_tokens` are written.
        engine: runs the model instead of transformers' layers; not in the mode "explicit".
    """
    if mode == "explicit":
        return _explicit(model, batch, num_latent_steps or 0, max_new_tokens, stops)
    steps = 0 if mode == "single_pass" else num_latent_steps
    output = model(**batch, num_latent_steps=steps) if engine is None else engine(batch, steps)
    assert output.embedding is not None
    assert output.num_latent_steps is not None
    is_complete = torch.ones(len(output.embedding), dtype=torch.bool)
    return Embedded(output.embedding, output.num_latent_steps.cpu(), is_complete)


def embed(
    model: PlumeModel,
    items: Sequence[Item],
    mode: Mode,
    *,
    num_latent_steps: int | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 64,
    show_progress: bool = False,
    engine: Engine | None = None,
) -> Embedded:
    """Embed inputs in batches; arguments as in `embed_batch`."""
    assert model.processor is not None
    parts = []
    for start in tqdm(range(0, len(items), batch_size), desc=f"Encoding, {mode}", disable=not show_progress):
        batch = model.processor.encode(items[start : start + batch_size]).to(model.device)
        settings = {"num_latent_steps": num_latent_steps, "max_new_tokens": max_new_tokens, "engine": engine}
        parts.append(embed_batch(model, dict(batch), mode, **settings))
    return Embedded.joined(parts)


def _explicit(
    model: PlumeModel, batch: dict[str, Tensor], num_latent_steps: int, max_new_tokens: int, stops: bool
) -> Embedded:
    """Take K latent steps, write the rest of the rationale greedily, stop at `<gen_emb>`, read the embedding there.

    K = 0 is the explicit baseline. A row that is done feeds masked columns while the others go on; a row without a
    read-out keeps its last state.
    """
    input_ids = batch["input_ids"]
    size, device = len(input_ids), input_ids.device
    begin = torch.full((size, 1), model.config.latent_end_token_id or 0, device=device)  # <eot> is given
    inputs = model.read_inputs(batch, suffix_ids=begin, num_latent_steps=num_latent_steps)
    decoder, result = model.roll_out(inputs)

    hidden = result.suffix[:, 0]  # [B, D]
    embedding = hidden.float()
    num_tokens = torch.full((size,), num_latent_steps, device=device)
    is_writing = torch.ones(size, dtype=torch.bool, device=device)
    tokens = []
    for step in range(max_new_tokens):
        token = model.logits(hidden).argmax(dim=-1)
        tokens.append(token)
        position = latent_positions(result.next_position, step)
        written = Segment(model.embed_tokens(token[:, None]), is_writing[:, None], position)
        hidden = decoder.feed(written)[:, 0]
        embedding = torch.where(is_writing[:, None], hidden.float(), embedding)
        is_read_out = (token == model.config.read_out_token_id) & stops
        num_tokens += is_writing & ~is_read_out
        is_writing = is_writing & ~is_read_out
        if not is_writing.any():
            break
    counts = (num_tokens - num_latent_steps).tolist()
    columns = torch.stack(tokens, dim=1).tolist() if tokens else [[]] * size
    written = [row[:count] for row, count in zip(columns, counts, strict=True)]
    return Embedded(F.normalize(embedding, dim=-1), num_tokens.cpu(), ~is_writing.cpu(), written)

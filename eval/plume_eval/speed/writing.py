"""An explicit chain of thought in the engine: the same cache, layers and graphs as the rollout, one token a pass.

The strongest form of the baseline that we know how to build, so that nothing is won against a weak one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plume.engine.buffers import RolloutBuffers
from plume.engine.engine import Engine
from plume.engine.layout import lay_out
from plume.model.interface import Segment, normalize
from plume.model.positions import latent_positions

#: How many tokens are written between two looks at whether all rows are done.
_LOOK_EVERY = 16


class WritingBuffers:
    """What goes from token to token while a batch is written about, `[B, ...]`, beside the buffers of its rollout."""

    def __init__(self, engine: Engine, rollout: RolloutBuffers):
        self.engine, self.rollout = engine, rollout
        self.hidden = torch.zeros_like(rollout.prefix_states[:, 0])
        self.position = torch.zeros_like(rollout.start)
        self.is_writing = torch.ones_like(rollout.start).bool()
        self.num_tokens = torch.zeros_like(rollout.start)
        self.stops = torch.ones_like(rollout.start).bool()
        self.launch: Callable[[], None] = self.write_one

    def start(self, hidden: Tensor, position: Tensor, stops: bool) -> None:
        """Begin after `<eot>`, whose state is given."""
        size = len(hidden)
        self.hidden[:size] = hidden
        self.position[:size].copy_(position)
        self.is_writing[:size] = True
        self.is_writing[size:] = False
        self.num_tokens.zero_()
        self.stops.fill_(stops)

    def write_one(self) -> None:
        """The most likely next token of every row that is not done, and the state there."""
        model = self.engine.model
        token = model.logits(self.hidden).argmax(dim=-1)
        embeds = model.embed_tokens(token[:, None])
        segment = Segment(embeds, self.is_writing[:, None], latent_positions(self.position, 0))
        hidden = self.engine.layers.read_next(segment, self.rollout.cache)[:, 0]
        self.hidden.copy_(torch.where(self.is_writing[:, None], hidden, self.hidden))
        is_read_out = (token == model.config.read_out_token_id) & self.stops
        self.num_tokens += self.is_writing & ~is_read_out
        self.is_writing &= ~is_read_out
        self.position += 1


class Writer:
    """Writes rationales in an engine, greedily."""

    def __init__(self, engine: Engine):
        self.engine = engine

    @torch.inference_mode()
    def __call__(self, batch: dict[str, Tensor], num_tokens: int, *, stops: bool) -> tuple[Tensor, Tensor]:
        """Embed after a written rationale.

        Args:
            batch: from the processor.
            num_tokens: to write at most.
            stops: whether a row ends at `<gen_emb>`; otherwise exactly `num_tokens` are written.

        Returns:
            Embeddings `[B, D]`, and tokens written `[B]`.
        """
        with self.engine.on_device():
            return self._write(batch, num_tokens, stops)

    def _write(self, batch: dict[str, Tensor], num_tokens: int, stops: bool) -> tuple[Tensor, Tensor]:
        engine = self.engine
        engine.refresh()
        end = torch.tensor([engine.model.config.latent_end_token_id or 0])
        layout = lay_out(engine.model, batch, 0, end)
        embeds = engine.embed_prefix(layout, engine.vision_features(layout))
        size = len(embeds)
        rollout = engine.rollout_buffers(size, embeds.shape[1] + num_tokens + 1)
        writing = self._buffers(rollout)
        states = engine.read_prefix(layout, embeds, rollout)
        rollout.fill(layout, states)
        writing.start(states[:, 2], layout.start + 1, stops)
        for written in range(num_tokens):
            writing.launch()
            if stops and written % _LOOK_EVERY == _LOOK_EVERY - 1 and not writing.is_writing.any():
                break
        return normalize(writing.hidden[:size]), writing.num_tokens[:size].clone()

    def _buffers(self, rollout: RolloutBuffers) -> WritingBuffers:
        if not rollout.is_reused:
            return WritingBuffers(self.engine, rollout)
        return rollout.graphs.get_or_make("writing", lambda: self._captured(rollout))

    def _captured(self, rollout: RolloutBuffers) -> WritingBuffers:
        rollout.reset()
        buffers = WritingBuffers(self.engine, rollout)
        buffers.launch = self.engine.capture(buffers.write_one)
        return buffers

"""An explicit chain of thought in the engine: the same cache, layers and graphs as the rollout, one token a pass.

The strongest form of the baseline that we know how to build, so that nothing is won against a weak one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plume import backbone as seam
from plume import graphs
from plume.backbone import Segment
from plume.engine import Engine, Room
from plume.output import unit
from plume.plan import plan

#: How many tokens are written between two looks at whether all rows are done.
_LOOK_EVERY = 16


class Desk:
    """Where a batch is written about, beside its room: the tensors that go from token to token, `[B, ...]`."""

    def __init__(self, engine: Engine, room: Room):
        self.engine, self.room = engine, room
        self.hidden = torch.zeros_like(room.read[:, 0])
        self.place = torch.zeros_like(room.start)
        self.is_writing = torch.ones_like(room.start).bool()
        self.num_tokens = torch.zeros_like(room.start)
        self.stops = torch.ones_like(room.start).bool()
        self.launch: Callable[[], None] = self.write_one

    def start(self, hidden: Tensor, place: Tensor, stops: bool) -> None:
        """Begin after `<eot>`, whose state is given."""
        size = len(hidden)
        self.hidden[:size] = hidden
        self.place[:size].copy_(place)
        self.is_writing[:size] = True
        self.is_writing[size:] = False
        self.num_tokens.zero_()
        self.stops.fill_(stops)

    def write_one(self) -> None:
        """The most likely next token of every row that is not done, and the state there."""
        model, stack = self.engine.model, self.engine.stack
        token = seam.logits(model.backbone, model.lm_head, self.hidden).argmax(dim=-1)
        embeds = seam.embed_tokens(model.backbone, token[:, None])
        segment = Segment(embeds, self.is_writing[:, None], self.place.expand(3, 1, -1).mT)
        hidden = stack.read_next(segment, self.room.cache)[:, 0]
        self.hidden.copy_(torch.where(self.is_writing[:, None], hidden, self.hidden))
        is_read_out = (token == model.config.read_out_token_id) & self.stops
        self.num_tokens += self.is_writing & ~is_read_out
        self.is_writing &= ~is_read_out
        self.place += 1


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
        with graphs.on(self.engine.device):
            return self._write(batch, num_tokens, stops)

    def _write(self, batch: dict[str, Tensor], num_tokens: int, stops: bool) -> tuple[Tensor, Tensor]:
        engine = self.engine
        engine.refresh()
        end = torch.tensor([engine.model.config.latent_end_token_id or 0])
        laid_out = plan(engine.model, batch, 0, end)
        embeds = engine.embed(laid_out, engine.see(laid_out))
        size = len(embeds)
        room = engine.room(size, embeds.shape[1] + num_tokens + 1)
        desk = self._desk(room)
        read = engine.read(laid_out, embeds, room)
        room.furnish(laid_out, read)
        desk.start(read[:, 2], laid_out.start + 1, stops)
        for written in range(num_tokens):
            desk.launch()
            if stops and written % _LOOK_EVERY == _LOOK_EVERY - 1 and not desk.is_writing.any():
                break
        return unit(desk.hidden[:size]), desk.num_tokens[:size].clone()

    def _desk(self, room: Room) -> Desk:
        if not room.is_kept:
            return Desk(self.engine, room)
        return room.work.get("writing", lambda: self._captured(room))

    def _captured(self, room: Room) -> Desk:
        room.empty()
        desk = Desk(self.engine, room)
        desk.launch = self.engine.capture(desk.write_one)
        return desk

"""What passes between the parts of the model: inputs, their checks and defaults, segments for a decoder, the output.

Letters: B batch, L prefix length, S suffix length, n new positions, K latent steps, D hidden size, E routed experts,
V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from plume.config import PlumeConfig
from plume.tokens import ANCHOR, LATENT_START, READ_OUT

Adapter = Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor | None]]
"""Maps a state `[B, D]`, the step and the router's context to the next input `[B, D]` and the gates `[B, E]`: a
`TransitionAdapter`, or the engine's form of it."""


_HOW_TO_WRITE = (
    "write inputs with the checkpoint's processor, processor(text=[...]) or processor.apply_chat_template(messages, "
    "tokenize=True, return_dict=True), or embed them with Plume(...).encode"
)


@dataclass(frozen=True)
class Media:
    """Images and videos of a batch, as the processor packs them; None where there are none.

    pixel_values, pixel_values_videos: patches of all images, and of all videos, one after the other.
    image_grid_thw `[images, 3]`, video_grid_thw `[videos, 3]`: patches of each in time, height and width.
    second_per_grid_ts `[videos]`: seconds per temporal patch; Qwen2.5-VL spaces positions by it.
    """

    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None
    second_per_grid_ts: Tensor | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Media:
        """Those of a batch that the processor has made."""
        return cls(**{field.name: batch.get(field.name) for field in fields(cls)})


@dataclass(frozen=True)
class ModelInputs:
    """What a pass reads, checked and complete.

    prefix_ids `[B, L]`, prefix_mask `[B, L]` (True at real tokens): each row ends with `<bot>` in the last column.
    media: of all rows. suffix_ids, suffix_mask `[B, S]`: right-padded.
    num_latent_steps `[B]`: K of each row; max_latent_steps: the passes to run, known on the host.
    is_gated: whether the model's gate lets rows do without, since nobody has said how many they take.
    anchor_column `[B]`: where the anchor is in the prefix.
    """

    prefix_ids: Tensor
    prefix_mask: Tensor
    media: Media
    suffix_ids: Tensor
    suffix_mask: Tensor
    num_latent_steps: Tensor
    max_latent_steps: int
    anchor_column: Tensor
    is_gated: bool


def read_inputs(
    config: PlumeConfig,
    batch: Mapping[str, Any],
    *,
    suffix_ids: Tensor | None = None,
    suffix_mask: Tensor | None = None,
    num_latent_steps: int | Tensor | None = None,
    max_latent_steps: int | None = None,
) -> ModelInputs:
    """Check a batch, and fill in what the configuration says; arguments as in `PlumeModel.forward`.

    Args:
        config: of the model.
        batch: from the processor; without "attention_mask" nothing is padded.
        suffix_ids: see `PlumeModel.forward`.
        suffix_mask: likewise.
        num_latent_steps: likewise.
        max_latent_steps: likewise.

    Raises:
        ValueError: as `PlumeModel.forward`.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    mask = torch.ones_like(ids).bool() if mask is None else mask.bool()
    steps, max_steps = resolve_steps(config, num_latent_steps, ids, max_latent_steps)
    if not (ids[:, -1] == config.latent_start_token_id).all():
        ids, mask = padded_on_the_left(ids, mask)
        check_prefix_end(config, ids[:, -1])
    anchor_column = find_anchor(config, ids, mask)
    suffix_ids, suffix_mask = resolve_suffix(config, len(ids), ids.device, suffix_ids, suffix_mask)
    is_gated = config.is_gated(num_latent_steps)
    return ModelInputs(ids, mask, Media.of(batch), suffix_ids, suffix_mask, steps, max_steps, anchor_column, is_gated)


def padded_on_the_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows `[B, L]` with all padding before their tokens; `mask` is True at real tokens.

    sentence-transformers pads on the right where it joins the columns of a training batch.

    Example:
        >>> ids, mask = padded_on_the_left(torch.tensor([[0, 7, 8, 0]]), torch.tensor([[False, True, True, False]]))
        >>> ids.tolist()
        [[0, 0, 7, 8]]
    """
    num_behind = mask.flip(1).int().argmax(dim=1, keepdim=True)  # columns behind the last real token
    columns = (torch.arange(ids.shape[1], device=ids.device) - num_behind) % ids.shape[1]
    return ids.gather(1, columns), mask.gather(1, columns)


def check_prefix_end(config: PlumeConfig, last_ids: Tensor) -> None:
    """Raise ValueError unless the last real token of every prefix, `[B]`, is `<bot>`."""
    if not (last_ids == config.latent_start_token_id).all():
        raise ValueError(f"every prefix must end with {LATENT_START}; {_HOW_TO_WRITE}")


def resolve_suffix(
    config: PlumeConfig, num_rows: int, device: torch.device, suffix_ids: Tensor | None, suffix_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Suffix `[B, S]` and its mask; the configuration's where none is given."""
    if suffix_ids is None:
        suffix_ids = torch.tensor(config.suffix_ids, device=device).expand(num_rows, -1)
    return suffix_ids, torch.ones_like(suffix_ids).bool() if suffix_mask is None else suffix_mask.bool()


def resolve_steps(
    config: PlumeConfig, requested: int | Tensor | None, input_ids: Tensor, at_least: int | None = None
) -> tuple[Tensor, int]:
    """K per row `[B]`, and how many steps to run, on the host: the largest K, but not fewer than `at_least`."""
    if isinstance(requested, Tensor) and requested.ndim == 1:
        if len(requested) != len(input_ids):
            raise ValueError(f"num_latent_steps holds {len(requested)} numbers for {len(input_ids)} rows")
        steps = requested.to(input_ids.device, torch.long)
        lowest, highest = torch.stack(steps.aminmax()).tolist()
        config.check_num_latent_steps(lowest)
    else:
        highest = config.num_latent_steps if requested is None else requested
        highest = int(highest) if isinstance(highest, Tensor) else highest
        steps = torch.full_like(input_ids[:, 0], highest)
    highest = max(highest, at_least or 0)
    config.check_num_latent_steps(highest)
    return steps, int(highest)


def find_anchor(config: PlumeConfig, ids: Tensor, mask: Tensor) -> Tensor:
    """Column of the anchor in each prefix, `[B]`; ValueError where there is none."""
    return _column_of(ids, mask, config.anchor_token_id, f"prefix {{row}} holds no {ANCHOR}; {_HOW_TO_WRITE}")


def read_out_column(config: PlumeConfig, suffix_ids: Tensor, suffix_mask: Tensor) -> Tensor:
    """Column of `<gen_emb>` in each suffix, `[B]`; ValueError where there is none."""
    message = f"suffix {{row}} holds no {READ_OUT}, whose state is the embedding; end suffix_ids with it"
    return _column_of(suffix_ids, suffix_mask, config.read_out_token_id, message)


def _column_of(ids: Tensor, mask: Tensor, token_id: int | None, message: str) -> Tensor:
    """Column of the last `token_id` in each row, `[B]`; ValueError with `message` where a row has none."""
    columns = torch.arange(ids.shape[1], device=ids.device)
    last = torch.where((ids == token_id) & mask, columns, -1).amax(dim=1)
    if (last < 0).any():
        row = int((last < 0).nonzero()[0])
        raise ValueError(message.format(row=row))
    return last


@dataclass
class Segment:
    """Consecutive inputs of every row of a batch.

    embeds `[B, n, D]`, mask `[B, n]` (True where real), positions `[3, B, n]`.
    """

    embeds: Tensor
    mask: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return self.embeds.shape[1]

    def empty_like(self) -> Segment:
        """A segment of the same rows without positions."""
        return Segment(self.embeds[:, :0], self.mask[:, :0], self.positions[:, :, :0])

    def followed_by(self, other: Segment) -> Segment:
        """Both segments as one."""
        return Segment(
            torch.cat([self.embeds, other.embeds], dim=1),
            torch.cat([self.mask, other.mask], dim=1),
            torch.cat([self.positions, other.positions], dim=2),
        )


class Decoder(ABC):
    """A text model and its key/value cache: transformers' (`plume.model.backbone`) or the engine's."""

    @abstractmethod
    def feed(self, segment: Segment, *, with_layers: bool = False) -> Tensor:
        """Read the next segment.

        Args:
            segment: what to read.
            with_layers: return the states of every layer instead, embeddings first, `[layers + 1, B, n, D]`.

        Returns:
            Hidden states after the final norm, `[B, n, D]`.
        """

    @abstractmethod
    def forget(self, segment: Segment) -> None:
        """Drop from the cache the segment that was read last."""

    def latent_step(
        self, segment: Segment, adapter: Adapter, step: int, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Read one latent input, and map the state behind it to the next one.

        Args:
            segment: the latent input, `n = 1`.
            adapter: maps the state to the next input.
            step: counted from 0.
            context: what steers the router, `[B, D]`, or None.

        Returns:
            The state `[B, D]`, the next input `[B, D]`, and the gates `[B, E]` or None.
        """
        state = self.feed(segment)[:, -1]
        return state, *adapter(state, step, context)


@dataclass
class PlumeOutput(ModelOutput):
    """What `PlumeModel.forward` returns. K is the largest number of latent steps in the batch.

    embedding `[B, D]`: the embedding; unit norm, float32 (float64 where the model is).
    anchor_embedding `[B, D]`: the hidden state at the anchor; likewise. A space of its own.
    states `[B, K+1, D]`: hidden states h_0 .. h_K; zero beyond a row's own K.
    gates `[B, K, E]`: the router's softmax at each latent step; None without a router or without steps.
    suffix_logits `[M, V]`: next-token logits of the M labels that are not -100, row by row; None without labels.
    read_out_layers `[layers + 1, B, D]`: hidden states of all layers at `<gen_emb>`; None unless kept.
    vision_states: of the vision tower before its merger, for a second pass over the same media; None without media.
    scalars: what `PlumeModel.loss_scalars` returned; None without it.
    num_latent_steps `[B]`: K of each row; with early exit, the steps that it took.
    reconstruction_logits `[N, V]`: logits of the N labels of `reconstruction_labels` that are not -100, row by row.
    """

    embedding: Tensor | None = None
    anchor_embedding: Tensor | None = None
    states: Tensor | None = None
    gates: Tensor | None = None
    suffix_logits: Tensor | None = None
    read_out_layers: Tensor | None = None
    vision_states: Tensor | None = None
    scalars: Tensor | None = None
    num_latent_steps: Tensor | None = None
    reconstruction_logits: Tensor | None = None


def at_least_float32(x: Tensor) -> Tensor:
    """The same numbers in float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalize(hidden: Tensor) -> Tensor:
    """Hidden states as unit vectors, at least in float32, `[..., D] -> [..., D]`."""
    return F.normalize(at_least_float32(hidden), dim=-1)

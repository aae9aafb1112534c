"""The seam to the backbone: the only file that knows transformers' Qwen-VL classes.

A backbone gives three things: embeddings of a prefix with its vision features in place, the M-RoPE positions of
that prefix, and a text model that reads a growing sequence through a key/value cache. Vision enters in the
prefix alone, so the latent steps and the suffix need the text model only.

A family is added here and nowhere else: its name in `SUPPORTED`, and where it differs in `embed_prefix`. Qwen3-VL will
bring features for several layers of the prefix (deepstack), which travel in a field of `Segment` of their own that
latent steps and suffix leave empty; its interleaved M-RoPE is the text model's own affair.

Letters: B batch, L prefix length, n new positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)

SUPPORTED = ("qwen2_vl", "qwen2_5_vl")

Backbone = Any
"""A Qwen-VL model without its head, whose parts transformers leaves untyped."""


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

    def followed_by(self, other: Segment) -> Segment:
        """Both segments as one."""
        return Segment(
            torch.cat([self.embeds, other.embeds], dim=1),
            torch.cat([self.mask, other.mask], dim=1),
            torch.cat([self.positions, other.positions], dim=2),
        )


class CachedDecoder:
    """Reads a growing sequence through the text model, keeping keys and values.

    The mask always covers the whole sequence, cache included, so that padded columns and the latent columns of
    rows that need fewer steps stay hidden in every later pass, with any attention implementation.
    """

    def __init__(self, backbone: Backbone):
        self.text_model = backbone.language_model
        self.cache = DynamicCache(config=backbone.config.get_text_config())
        self.mask: Tensor | None = None

    def feed(self, segment: Segment) -> Tensor:
        """Read the next segment, and return its hidden states after the final norm, `[B, n, D]`."""
        self.mask = segment.mask if self.mask is None else torch.cat([self.mask, segment.mask], dim=1)
        output = self.text_model(
            inputs_embeds=segment.embeds,
            attention_mask=self.mask.long(),
            position_ids=segment.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state


def build(config: PreTrainedConfig) -> tuple[PreTrainedModel, nn.Linear | None]:
    """A backbone of random weights, and its output head unless that is tied to the embeddings.

    Raises:
        ValueError: the configuration is of a family that plume has not been written for.
    """
    if config.model_type not in SUPPORTED:
        raise ValueError(f"the backbone's model_type is {config.model_type!r}; plume supports {', '.join(SUPPORTED)}")
    text = config.get_text_config()
    head = None if is_tied(config) else nn.Linear(text.hidden_size, text.vocab_size, bias=False)
    return AutoModel.from_config(config), head


def load(name_or_path: str, **kwargs) -> tuple[PreTrainedModel, nn.Linear | None]:
    """Weights of a stock Qwen-VL checkpoint, as `build` returns them.

    Loaded through transformers' own class, so that its key conversion applies to every published layout.

    Raises:
        ValueError: some weights of the checkpoint are missing or do not belong to it.
    """
    loaded: Any = AutoModelForImageTextToText.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    full, info = loaded
    if full.config.model_type not in SUPPORTED:
        raise ValueError(
            f"{name_or_path} is a {full.config.model_type!r} checkpoint; plume supports {', '.join(SUPPORTED)}"
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ValueError(
                f"{name_or_path}: {kind.replace('_', ' ')} {sorted(info[kind])[:5]}; the folder is not a complete "
                f"{full.config.model_type} checkpoint"
            )
    return full.model, None if is_tied(full.config) else full.lm_head


def is_tied(config: PreTrainedConfig) -> bool:
    """Whether the output head is the embedding matrix."""
    return bool(config.tie_word_embeddings)


def embed_tokens(backbone: Backbone, ids: Tensor) -> Tensor:
    """Input embeddings of plain tokens, `[B, n] -> [B, n, D]`."""
    return backbone.get_input_embeddings()(ids)


def embed_prefix(
    backbone: Backbone,
    input_ids: Tensor,
    mask: Tensor,
    pixel_values: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    pixel_values_videos: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Tensor | None = None,
) -> Segment:
    """The left-padded prefix with its vision features in place.

    Args:
        backbone: from `build` or `load`.
        input_ids: token ids, `[B, L]`.
        mask: True at real tokens, `[B, L]`.
        pixel_values: patches of all images of the batch, one after the other.
        image_grid_thw: patches of each image in time, height and width, `[images, 3]`.
        pixel_values_videos: patches of all videos of the batch.
        video_grid_thw: patches of each video in time, height and width, `[videos, 3]`.
        second_per_grid_ts: seconds per temporal patch of each video, `[videos]`; Qwen2.5-VL spaces positions by it.
    """
    config = backbone.config
    is_image, is_video = input_ids == config.image_token_id, input_ids == config.video_token_id
    embeds = embed_tokens(backbone, input_ids)  # [B, L, D]
    if pixel_values is not None:
        features = torch.cat(backbone.get_image_features(pixel_values, image_grid_thw).pooler_output)
        embeds = embeds.masked_scatter(is_image[..., None], features.to(embeds.dtype))
    if pixel_values_videos is not None:
        features = torch.cat(backbone.get_video_features(pixel_values_videos, video_grid_thw).pooler_output)
        embeds = embeds.masked_scatter(is_video[..., None], features.to(embeds.dtype))
    timing = {} if config.model_type == "qwen2_vl" else {"second_per_grid_ts": second_per_grid_ts}
    # The kind of each token is derived here, since not every processor of transformers 5 emits it.
    positions, _ = backbone.get_rope_index(
        input_ids,
        is_image.int() + 2 * is_video.int(),
        image_grid_thw=image_grid_thw,
        video_grid_thw=video_grid_thw,
        attention_mask=mask.long(),
        **timing,
    )
    return Segment(embeds, mask, positions)


def logits(backbone: Backbone, head: nn.Linear | None, hidden: Tensor) -> Tensor:
    """Next-token logits of hidden states, `[..., D] -> [..., V]`."""
    return F.linear(hidden, backbone.get_input_embeddings().weight) if head is None else head(hidden)

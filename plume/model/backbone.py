"""The backbone: a model of transformers' Qwen-VL families, whose parts no other file calls but the engine.

A backbone gives two things: embeddings of a prefix with its vision features in place, and a text model that reads a
growing sequence through a key/value cache. Vision enters in the prefix alone, so the latent steps and the suffix need
the text model only. Positions are always given to it, never inferred (`plume.model.positions`).

To add a family:

  1. `plume.config.SUPPORTED` names it.
  2. Here: `vision_features` knows what its tower returns, and whether the merger can run again.
  3. `plume.model.positions` spaces its videos; `plume.model.vocabulary` names the rows that new tokens begin as.
  4. `plume.inputs.images` (`_FACTOR`: pixels per visual token), `plume.inputs.processor` (its image processor) and
     `plume.inputs.patches` cut its media.
  5. `plume.engine.layers.weights` says where its weights are, or raises `UnsupportedModelError`; `PlumeModel` then
     runs without the engine.
  6. `plume.random_models` makes a small one, which `tests/plume/model/test_backbones.py` compares with transformers.

Features for several layers of the prefix (Qwen3-VL's deepstack) have no way in yet: they need a field of `Segment`
that latent steps and suffix leave empty, and one in the engine's `embed_prefix` and `read_prefix`.

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
    Cache,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import __version__ as transformers_version
from transformers.cache_utils import CacheLayerMixin

from plume.config import SUPPORTED, VisionPositions
from plume.model.interface import Decoder, Media, Segment
from plume.model.positions import prefix_positions

Backbone = Any
"""A Qwen-VL model without its head, whose parts transformers leaves untyped."""


class CachedDecoder(Decoder):
    """Reads a growing sequence through the text model, keeping keys and values.

    The mask always covers the whole sequence, cache included, so that padded columns and the latent columns of
    rows that need fewer steps stay hidden in every later pass, with any attention implementation.
    """

    def __init__(self, backbone: Backbone):
        self.text_model = backbone.language_model
        self.is_checkpointing = self.text_model.training and self.text_model.gradient_checkpointing
        self.cache = DynamicCache(config=backbone.config.get_text_config())
        self.mask: Tensor | None = None
        self._read: list[ReplayableLayer] = [ReplayableLayer() for _ in self.text_model.layers]

    def feed(self, segment: Segment, *, with_layers: bool = False) -> Tensor:
        return self._read_next(segment, None, with_layers)

    def read_apart(self, segment: Segment, readable: Tensor) -> Tensor:
        """Read a segment each of whose positions sees a part of the cache only, and forget it.

        Args:
            segment: what to read.
            readable: True at what each position may read, `[B, n, cache + n]`.

        Returns:
            Hidden states after the final norm, `[B, n, D]`.

        Raises:
            ValueError: the attention implementation takes no such mask.
        """
        attention = self.text_model.config._attn_implementation
        if attention not in ("eager", "sdpa"):
            raise ValueError(f"attention {attention!r} takes no mask of its own per token; use sdpa or eager")
        mask = readable[:, None]
        if attention == "eager":
            # The least float64 is minus infinity in the softmax, which is in float32; see `_attention_mask`.
            least = max(torch.finfo(torch.float32).min, torch.finfo(segment.embeds.dtype).min)
            mask = torch.zeros_like(mask, dtype=segment.embeds.dtype).masked_fill(~mask, least)
        hidden = self._read_next(segment, mask, with_layers=False)
        self.forget(segment)
        return hidden

    def _read_next(self, segment: Segment, attention_mask: Tensor | None, with_layers: bool) -> Tensor:
        self.mask = segment.mask if self.mask is None else torch.cat([self.mask, segment.mask], dim=1)
        if self.is_checkpointing:
            self._read = [layer.next() for layer in self._read]
            self.cache = Cache(layers=list(self._read))
        output = self.text_model(
            inputs_embeds=segment.embeds,
            attention_mask=self._attention_mask(segment) if attention_mask is None else attention_mask,
            position_ids=segment.positions,
            past_key_values=self.cache,
            use_cache=not self.is_checkpointing,  # the cache is used if it is given; the flag only draws a warning
            **({"output_hidden_states": True} if with_layers else {}),
        )
        return torch.stack(output.hidden_states) if with_layers else output.last_hidden_state

    def forget(self, segment: Segment) -> None:
        assert self.mask is not None
        self.mask = self.mask[:, : self.mask.shape[1] - len(segment)]
        if self.is_checkpointing:
            self._read = [ReplayableLayer(layer.past) for layer in self._read]
        else:
            self.cache.crop(-len(segment))

    def _attention_mask(self, segment: Segment) -> Tensor:
        """What transformers makes its own mask from, or the whole mask `[B, 1, n, cache + n]` where that would fail.

        Its eager attention adds the least number of the states' dtype to what is masked and takes the softmax in
        float32. The least float64 is minus infinity there, and a row of padding, all of it masked, becomes NaN.
        """
        assert self.mask is not None
        is_eager = self.text_model.config._attn_implementation == "eager"
        if not is_eager or segment.embeds.dtype != torch.float64:
            return self.mask.long()
        new, total = len(segment), self.mask.shape[1]
        columns = torch.arange(total, device=self.mask.device)
        is_past = columns <= columns[total - new :, None]  # [n, cache + n]
        hidden = ~(is_past & self.mask[:, None])[:, None]
        return torch.zeros_like(hidden, dtype=torch.float64).masked_fill(hidden, torch.finfo(torch.float32).min)


class ReplayableLayer(CacheLayerMixin):
    """Keys and values of one layer during one pass, which may be read any number of times with the same result.

    Activation checkpointing runs a layer a second time in the backward pass. A cache that grows in place would then
    hold the pass's keys twice, and transformers therefore drops the cache, silently, when checkpointing is on; latent
    steps would see nothing but themselves. Here `update` adds nothing to what it was made with, so the layer may be
    replayed. Earlier passes are kept as they came, not joined, so that K steps keep one copy of the prefix.
    """

    def __init__(self, past: tuple[tuple[Tensor, Tensor], ...] = ()):
        super().__init__()
        self.past = past
        self.new: tuple[Tensor, Tensor] | None = None
        self.is_initialized = True

    def next(self) -> ReplayableLayer:
        """The cache of the pass after this one."""
        return ReplayableLayer(self.past if self.new is None else (*self.past, self.new))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Keys and values of all passes; the first call of a pass is the one that later passes see."""
        if self.new is None:
            self.new = (key_states, value_states)
        keys, values = zip(*self.past, (key_states, value_states), strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return sum(keys.shape[-2] for keys, _ in self.past)

    def get_max_length(self) -> int:
        return -1


def layer_names(backbone: Backbone) -> list[str]:
    """Classes of the repeated layers, of language model and vision tower."""
    return sorted({type(layer).__name__ for layer in (*backbone.language_model.layers, *backbone.visual.blocks)})


def allow_checkpointing(backbone: Backbone) -> None:
    """Let the text model keep its cache under activation checkpointing; see `ReplayableLayer`.

    Raises:
        ImportError: transformers is too old to keep it.
    """
    for layer in backbone.language_model.layers:
        if not hasattr(layer, "_can_checkpoint_with_cache"):
            raise ImportError(
                f"gradient_checkpointing needs transformers >= 5.15, which can keep the key/value cache; found "
                f"{transformers_version}; upgrade, or train without it"
            )
        layer._can_checkpoint_with_cache = True


def build_backbone(config: PreTrainedConfig) -> tuple[PreTrainedModel, nn.Linear | None]:
    """A backbone of random weights, and its output head unless that is tied to the embeddings.

    Raises:
        ValueError: the configuration is of a family that plume has not been written for.
    """
    if config.model_type not in SUPPORTED:
        raise ValueError(f"the backbone's model_type is {config.model_type!r}; plume supports {', '.join(SUPPORTED)}")
    text = config.get_text_config()
    head = None if is_tied(config) else nn.Linear(text.hidden_size, text.vocab_size, bias=False)
    return AutoModel.from_config(config), head


def load_backbone(name_or_path: str, **kwargs) -> tuple[PreTrainedModel, nn.Linear | None]:
    """Weights of a stock Qwen-VL checkpoint, as `build_backbone` returns them.

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


@dataclass
class Vision:
    """What the vision tower makes of the media of a batch.

    images, videos: features of their visual tokens, `[N, D]`; None without any.
    states: of the tower before its merger, from which `vision_features` makes the features again; None where it cannot.
    zero: a zero that depends on the tower, where it ran without media.
    """

    images: Tensor | None = None
    videos: Tensor | None = None
    states: Tensor | None = None
    zero: Tensor | None = None


def vision_features(backbone: Backbone, media: Media, *, states: Tensor | None = None, touch: bool = False) -> Vision:
    """Run the vision tower once over all media of a batch.

    Args:
        backbone: from `build_backbone` or `load_backbone`.
        media: images and videos.
        states: what an earlier call returned as such; only the merger runs then.
        touch: without media, run the tower on the smallest image, so that its parameters have (zero) gradients.
    """
    tower = backbone.visual
    packed = [
        (patches, grid)
        for patches, grid in (
            (media.pixel_values, media.image_grid_thw),
            (media.pixel_values_videos, media.video_grid_thw),
        )
        if patches is not None and grid is not None
    ]
    if not packed and not touch:
        return Vision()
    if states is None:
        patches, grids = zip(*(packed or [_smallest_image(backbone)]), strict=True)
        output = tower(torch.cat(patches).to(tower.dtype), grid_thw=torch.cat(grids))
        features, states = output.pooler_output, output.last_hidden_state
    else:
        features = tower.merger(states)
    # Qwen2.5-VL's tower leaves its states in the order of its attention windows.
    reusable = states if backbone.config.model_type == "qwen2_vl" else None
    if not packed:
        return Vision(zero=0 * features.sum(), states=reusable)
    num_image_tokens = 0 if media.pixel_values is None else len(media.pixel_values) // tower.spatial_merge_size**2
    return Vision(
        images=None if media.pixel_values is None else features[:num_image_tokens],
        videos=None if media.pixel_values_videos is None else features[num_image_tokens:],
        states=reusable,
    )


def _smallest_image(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Patches and grid of the smallest image, black."""
    vision, tower = backbone.config.vision_config, backbone.visual
    side = vision.spatial_merge_size
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.zeros(side * side, width, device=tower.device)
    return pixels, torch.tensor([[1, side, side]], device=tower.device)


def embed_prefix(
    backbone: Backbone, ids: Tensor, mask: Tensor, media: Media, vision: Vision, *, rule: VisionPositions
) -> Segment:
    """The prefix with its vision features in place.

    Args:
        backbone: from `build_backbone` or `load_backbone`.
        ids: token ids, `[B, L]`.
        mask: True at real tokens, `[B, L]`.
        media: gives the sizes of images and videos.
        vision: their features, from `vision_features`.
        rule: where text continues behind a medium, `PlumeConfig.vision_positions`.
    """
    config = backbone.config
    embeds = embed_tokens(backbone, ids)  # [B, L, D]
    for token_id, features in ((config.image_token_id, vision.images), (config.video_token_id, vision.videos)):
        if features is not None:
            embeds = embeds.masked_scatter((ids == token_id)[..., None], features.to(embeds.dtype))
    if vision.zero is not None:
        embeds = embeds + vision.zero.to(embeds.dtype)
    return Segment(embeds, mask, prefix_positions(config, ids, mask, media, rule=rule))


def logits(backbone: Backbone, head: nn.Linear | None, hidden: Tensor) -> Tensor:
    """Next-token logits of hidden states, `[..., D] -> [..., V]`."""
    return F.linear(hidden, backbone.get_input_embeddings().weight) if head is None else head(hidden)

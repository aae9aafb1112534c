"""PlumeModel: a Qwen-VL backbone, a transition adapter, and the embedding they make together.

Letters: B batch, L prefix length, S suffix length, K latent steps, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plume.config import TRANSITION_FIELDS, PlumeConfig
from plume.inputs.processor import PlumeProcessor
from plume.model import positions
from plume.model.backbone import (
    Backbone,
    CachedDecoder,
    Vision,
    allow_checkpointing,
    build_backbone,
    embed_prefix,
    embed_tokens,
    layer_names,
    logits,
    vision_features,
)
from plume.model.interface import (
    Adapter,
    Decoder,
    ModelInputs,
    PlumeOutput,
    Segment,
    normalize,
    read_inputs,
    read_out_column,
)
from plume.model.loading import PlumePreTrainedModel
from plume.model.reconstruction import Reconstruction
from plume.model.rollout import Rollout, rollout
from plume.model.transition import Gate, LatentNorm, build_adapter, scaled

_STEP_TABLE = "transition.step_embed.weight"


class PlumeModel(PlumePreTrainedModel):
    """Latent-reasoning embedder (PLUME, arXiv 2604.02073).

    A composition: `backbone` is a stock Qwen-VL model, `transition` the adapter, `lm_head` the output head where
    the backbone does not tie it to its embeddings. `processor` is kept beside them, so that one folder holds all.

    Example:
        >>> model = PlumeModel.from_backbone(getfixture("backbone_folder"), num_latent_steps=4)
        >>> from plume import Item
        >>> batch = model.processor.encode([Item.parse("a red kite"), Item.parse("rain")])
        >>> output = model(**batch)
        >>> output.embedding.shape, output.states.shape, output.gates.shape
        (torch.Size([2, 64]), torch.Size([2, 5, 64]), torch.Size([2, 4, 4]))
    """

    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PlumeConfig, backbone: Backbone | None = None, lm_head: nn.Linear | None = None):
        super().__init__(config)
        if backbone is None:
            backbone, lm_head = build_backbone(config.backbone_config)
        self.backbone = backbone
        self.lm_head = lm_head
        # Wrappers that shard by layer want the classes that are there, and all of them.
        self._no_split_modules = layer_names(backbone)
        self.transition = build_adapter(config)
        self.latent_inputs = (
            nn.Embedding(config.num_step_embeddings, config.hidden_size) if config.latents == "parallel" else None
        )
        embeddings = backbone.get_input_embeddings().weight
        self.latent_norm = LatentNorm(embeddings) if config.latent_scale == "embedding" else None
        self.gate = Gate(config.hidden_size) if config.gate_threshold is not None else None
        self.processor: PlumeProcessor | None = None
        self.loss_scalars: nn.Module | None = (
            None  # set by the trainer; called in `forward`, so that wrappers see its parameters
        )
        self.post_init()
        if config.transition == "moe" and not config.step_embedding:
            table: Any = self.transition.step_embed
            nn.init.zeros_(table.weight)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        suffix_ids: Tensor | None = None,
        suffix_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_latent_steps: int | Tensor | None = None,
        return_dict: bool = True,
        max_latent_steps: int | None = None,
        vision_states: Tensor | None = None,
        keep_layers: bool = False,
        touch_all: bool = False,
        reconstruction: Mapping[str, Any] | None = None,
        reconstruction_labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> PlumeOutput:
        """Embed a batch: prefix, latent steps, suffix.

        Args:
            input_ids: prefixes, padded on either side, `[B, L]`; each ends with `<bot>`.
            attention_mask: 1 at real tokens, `[B, L]`; None where nothing is padded.
            pixel_values: patches of all images of the batch.
            image_grid_thw: patches of each image in time, height and width, `[images, 3]`.
            pixel_values_videos: patches of all videos of the batch.
            video_grid_thw: patches of each video in time, height and width, `[videos, 3]`.
            second_per_grid_ts: seconds per temporal patch of each video, `[videos]`.
            suffix_ids: right-padded suffixes, `[B, S]`; None: the configuration's, the same for every row.
            suffix_mask: 1 at real suffix tokens, `[B, S]`.
            labels: suffix tokens to predict, -100 elsewhere, `[B, S]`.
            num_latent_steps: K, one number or one per row `[B]`; None: the configuration's, or 0 where a gate says so.
            return_dict: accepted because sentence-transformers passes it; the output is the same.
            max_latent_steps: run at least this many steps, without effect on rows that take fewer. Under ZeRO-3 and
                FSDP all processes must run the same number of passes.
            vision_states: what an earlier pass over the same media returned; the vision tower is not run again.
            keep_layers: return the hidden states of all layers at `<gen_emb>`.
            touch_all: involve, with weight zero, also the parts that this batch does not need (vision tower, adapter,
                head). Processes that train together must run the same parts, in the same order.
            reconstruction: text that is to be said from latent steps alone, in training: the fields of
                `plume.model.reconstruction.Reconstruction`.
            reconstruction_labels: its tokens to predict, -100 elsewhere, `[B, R]`.
            inputs_embeds: accepted as None because peft passes it, like the two below.
            output_attentions: as None or False.
            output_hidden_states: as None or False.

        Raises:
            ValueError: a prefix without anchor or not ending with `<bot>`, a suffix without `<gen_emb>`, a K that
                the adapter cannot run, tensors whose shapes disagree, or embeddings or attentions that are asked for.
        """
        if inputs_embeds is not None:
            raise ValueError("PlumeModel reads input_ids, which say where anchor and media are; pass no inputs_embeds")
        if output_attentions or output_hidden_states:
            raise ValueError(
                "PlumeModel returns no attentions; keep_layers=True returns the states of all layers at <gen_emb>"
            )
        inputs = self.read_inputs(
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "pixel_values": pixel_values,
                "image_grid_thw": image_grid_thw,
                "pixel_values_videos": pixel_values_videos,
                "video_grid_thw": video_grid_thw,
                "second_per_grid_ts": second_per_grid_ts,
            },
            suffix_ids=suffix_ids,
            suffix_mask=suffix_mask,
            num_latent_steps=num_latent_steps,
            max_latent_steps=max_latent_steps,
        )
        vision = vision_features(self.backbone, inputs.media, states=vision_states, touch=touch_all)
        decoder, result = self.roll_out(inputs, vision, keep_layers=keep_layers)
        said = None
        if reconstruction is not None and reconstruction_labels is not None:
            said = self._said_from_latents(decoder, inputs, result, Reconstruction(**reconstruction))
            said = said[reconstruction_labels != -100]
        rows = torch.arange(len(input_ids), device=input_ids.device)
        column = read_out_column(self.config, inputs.suffix_ids, inputs.suffix_mask)
        read_out = result.suffix[rows, column]  # [B, D]
        if touch_all:
            read_out = read_out + self._zero_through_unused_parts(read_out, inputs, head_runs=labels is not None)
        return PlumeOutput(
            embedding=normalize(read_out),
            anchor_embedding=normalize(result.anchor),
            states=result.states,
            gates=result.gates,
            suffix_logits=None if labels is None else self._suffix_logits(result.last_state, result.suffix, labels),
            read_out_layers=None if result.suffix_layers is None else result.suffix_layers[:, rows, column],
            vision_states=vision.states,
            scalars=None if self.loss_scalars is None else self.loss_scalars(),
            num_latent_steps=result.num_latent_steps,
            reconstruction_logits=None if said is None else self.logits(said),
        )

    def read_inputs(self, batch: Mapping[str, Any], **settings: Any) -> ModelInputs:
        """Check a batch from the processor; settings as in `plume.model.interface.read_inputs`."""
        return read_inputs(self.config, batch, **settings)

    def roll_out(
        self,
        inputs: ModelInputs,
        vision: Vision | None = None,
        *,
        keep_layers: bool = False,
        decoder: Decoder | None = None,
    ) -> tuple[Decoder, Rollout]:
        """Run prefix, latent steps and suffix, without reading an embedding.

        Args:
            inputs: from `read_inputs`.
            vision: features of the media; None runs the vision tower.
            keep_layers: see `forward`.
            decoder: reads the text model instead of transformers' layers over a growing cache; empty.

        Returns:
            The decoder, whose cache holds all that was read, so that more can be written; and the rollout.
        """
        decoder = CachedDecoder(self.backbone) if decoder is None else decoder
        prefix, start = self.embed_prefix(inputs, vision)
        result = rollout(
            decoder,
            self.adapter,
            prefix,
            self.embed_tokens(inputs.suffix_ids),
            inputs.suffix_mask,
            num_latent_steps=inputs.num_latent_steps,
            max_latent_steps=inputs.max_latent_steps,
            anchor_column=inputs.anchor_column,
            start=start,
            router_context=self.config.router_context,
            keep_layers=keep_layers,
            latent_inputs=self.embed_latents(inputs.max_latent_steps),
            refinements=self.config.refinements,
            gate=self.thinks if inputs.is_gated else None,
        )
        return decoder, result

    def reconfigured(self, **fields: Any) -> tuple[PlumeModel, list[str]]:
        """The same weights under another way to make latent inputs; what it needs and this model lacks begins anew.

        Args:
            fields: some of `plume.config.TRANSITION_FIELDS`.

        Returns:
            A model that shares the backbone with this one, and the names of its parts that are new.

        Raises:
            ValueError: a field that says something else, or a value that it cannot have.

        Example:
            >>> model = getfixture("model")
            >>> parallel, new = model.reconfigured(latents="parallel", refinements=1)
            >>> new
            ['latent_inputs']
        """
        self.config.check_field_names(list(fields))
        if other := [name for name in fields if name not in TRANSITION_FIELDS]:
            raise ValueError(
                f"{other[0]} belongs to the checkpoint, whose prompt and weights go with it; what may change is "
                f"{', '.join(TRANSITION_FIELDS)}"
            )
        config = PlumeConfig(**(self.config.to_dict() | fields))
        config.backbone_config = self.backbone.config
        model = PlumeModel(config, self.backbone, self.lm_head)
        nn.Module.to(model, self.device)
        for part in (model.transition, model.latent_inputs, model.latent_norm, model.gate):
            if part is not None:
                part.to(self.dtype)
        mine, its = self.state_dict(), model.state_dict()
        kept = {name: weight for name, weight in mine.items() if name in its and its[name].shape == weight.shape}
        if not config.step_embedding:
            kept.pop(_STEP_TABLE, None)
        model.load_state_dict(kept, strict=False)
        model.processor = self.processor
        new = dict.fromkeys(name.partition(".")[0] for name in its if name not in kept and name != _STEP_TABLE)
        return model.train(self.training), list(new)

    @property
    def adapter(self) -> Adapter:
        """The transition adapter, its outputs as long as `PlumeConfig.latent_scale` says."""
        return self.transition if self.latent_norm is None else scaled(self.transition, self.latent_norm)

    def thinks(self, anchor: Tensor) -> Tensor:
        """Whether the gate gives an input its latent steps, by the hidden state at its anchor, `[B, D] -> [B]`."""
        assert self.gate is not None
        return self.gate(anchor) >= self.config.gate_threshold

    def embed_prefix(self, inputs: ModelInputs, vision: Vision | None = None) -> tuple[Segment, Tensor]:
        """The prefix with its vision features in place, and the rotary position of latent step 0, `[B]`."""
        vision = vision_features(self.backbone, inputs.media) if vision is None else vision
        mask = inputs.prefix_mask
        rule = self.config.vision_positions
        prefix = embed_prefix(self.backbone, inputs.prefix_ids, mask, inputs.media, vision, rule=rule)
        last = prefix.positions[0, :, -1]
        return prefix, positions.latent_start(last, mask.sum(dim=1), self.config.latent_positions)

    def embed_latents(self, num_latent_steps: int) -> Tensor | None:
        """Learnt inputs of the first latent steps, `[K, D]`; None where latents are sequential."""
        if self.latent_inputs is None:
            return None
        return self.latent_inputs(torch.arange(num_latent_steps, device=self.latent_inputs.weight.device))

    def _zero_through_unused_parts(self, hidden: Tensor, inputs: ModelInputs, *, head_runs: bool) -> Tensor:
        """A zero that depends on the parts that this pass has not run."""
        zero = hidden.new_zeros(())
        if inputs.max_latent_steps == 0 or self.config.is_one_pass:
            zero = zero + 0 * self.adapter(hidden, 0, None)[0].sum()
        if self.latent_inputs is not None:
            zero = zero + 0 * self.latent_inputs.weight.sum()
        if self.lm_head is not None and not head_runs:
            zero = zero + 0 * self.lm_head(hidden[:1]).sum()
        return zero

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Input embeddings of plain tokens, `[B, n] -> [B, n, D]`."""
        return embed_tokens(self.backbone, ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of hidden states, `[..., D] -> [..., V]`."""
        return logits(self.backbone, self.lm_head, hidden)

    def _suffix_logits(self, last_state: Tensor, suffix: Tensor, labels: Tensor) -> Tensor:
        # Token j of the suffix is predicted one position before it: the first by the last latent state.
        before = torch.cat([last_state[:, None], suffix[:, :-1]], dim=1)  # [B, S, D]
        return self.logits(before[labels != -100])

    def _said_from_latents(
        self, decoder: Decoder, inputs: ModelInputs, result: Rollout, reconstruction: Reconstruction
    ) -> Tensor:
        """Hidden states of text that sees latent steps alone, `[B, R, D]`."""
        assert isinstance(decoder, CachedDecoder)
        steps, num_suffix = result.num_latent_steps, inputs.suffix_ids.shape[1]
        start = result.next_position - steps - num_suffix
        segment = reconstruction.segment(self.embed_tokens(reconstruction.ids), start, steps)
        length, most_steps = inputs.prefix_ids.shape[1], inputs.max_latent_steps
        return decoder.read_apart(segment, reconstruction.readable(steps, length, most_steps, num_suffix))

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.lm_head

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs
    ) -> None:
        # Where every way of switching it on ends. Layers then run twice, and the key/value cache must stand that.
        if enable:
            if gradient_checkpointing_func.keywords.get("use_reentrant"):
                raise ValueError("use_reentrant=True loses gradients that flow through the cache; set it to false")
            gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)
            allow_checkpointing(self.backbone)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

"""PlumeModel: a Qwen-VL backbone, a transition adapter, and the embedding they make together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plume import backbone as seam
from plume import card, checkpoint, positions, prompt, published, tokens
from plume.arguments import check_prefix, last_column, steps_of, suffix_of
from plume.config import PlumeConfig
from plume.output import PlumeOutput, unit
from plume.processor import MAX_PIXELS, MIN_PIXELS, PlumeProcessor, check_pixels
from plume.rollout import Rollout, rollout
from plume.trace import Trace, trace
from plume.transition import TransitionAdapter, build_adapter


class PlumeModel(PreTrainedModel):
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

    config_class = PlumeConfig
    config: PlumeConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # What a training run learns beside the model; see `loss_scalars`.
    _keys_to_ignore_on_load_unexpected = [r"^loss_scalars\."]  # noqa: RUF012

    def __init__(
        self,
        config: PlumeConfig,
        backbone: seam.Backbone | None = None,
        lm_head: nn.Linear | None = None,
    ):
        super().__init__(config)
        if backbone is None:
            backbone, lm_head = seam.build(config.backbone_config)
        self.backbone = backbone
        self.lm_head = lm_head
        # Wrappers that shard by layer want the classes that are there, and all of them.
        self._no_split_modules = seam.layer_names(backbone)
        self.transition: TransitionAdapter = build_adapter(config)
        self.processor: PlumeProcessor | None = None
        self.loss_scalars: nn.Module | None = None  # a trainer's; run in `forward`, where every wrapper expects it
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # The adapter keeps PyTorch's own initialisation; transformers' would draw from N(0, 0.02).
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str,
        *,
        dtype: torch.dtype | str = "auto",
        attn_implementation: str | None = None,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        revision: str | None = None,
        **config_fields,
    ) -> PlumeModel:
        """Start a new model from a stock Qwen-VL checkpoint: adds tokens, adapter, prompt and processor.

        Args:
            name_or_path: a folder or a Hub name, for example "Qwen/Qwen2-VL-2B-Instruct".
            dtype: of the weights; "auto" keeps the checkpoint's.
            attn_implementation: any of transformers'.
            min_pixels: smaller images are enlarged to this many pixels.
            max_pixels: larger images are reduced to this many pixels.
            revision: branch, tag or commit on the Hub.
            config_fields: fields of `PlumeConfig`.

        Raises:
            ValueError: an unknown field, limits of pixels that contradict each other, or a checkpoint that is not a
                complete Qwen-VL.
        """
        PlumeConfig.check_field_names(list(config_fields))
        check_pixels(min_pixels, max_pixels)
        hub = {} if revision is None else {"revision": revision}
        attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        checkpoint.read_config(name_or_path, **hub)  # says what is wrong with the place
        with checkpoint.naming_damaged_files(name_or_path):
            weights, head = seam.load(name_or_path, dtype=dtype, **attention, **hub)
        # A configuration that takes another in resets its attention; so this one begins with a copy.
        config = PlumeConfig(backbone_config=weights.config.to_dict(), **config_fields)
        processor = PlumeProcessor.from_backbone(
            name_or_path, config, min_pixels=min_pixels, max_pixels=max_pixels, **hub
        )
        tokens.install(weights, head, processor.tokenizer, config)
        config.suffix_ids = processor.suffix_ids(prompt.suffix(config))
        if os.path.isdir(name_or_path):  # where the weights lay here says nothing to others
            weights.config._name_or_path = ""
        config.backbone_config = weights.config
        config.dtype = weights.dtype
        model = cls(config, weights, head)
        model.transition.to(weights.dtype)
        model.processor = processor
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> Any:  # type: ignore[override]
        """Load a plume checkpoint, or a published PLUME one: a folder or a Hub name; keywords as in transformers.

        Raises:
            ValueError: there is no checkpoint, it lacks plume's fields, a file of it is damaged, or its weights are not
                exactly the model's.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        hub = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only") if k in kwargs}
        if kwargs.get("config") is None:
            if checkpoint.is_stock(pretrained_model_name_or_path, **hub) and published.is_published(
                pretrained_model_name_or_path, **hub
            ):
                return cls._from_published(pretrained_model_name_or_path, wants_info, hub, **kwargs)
            checkpoint.check_is_plume(pretrained_model_name_or_path, **hub)
        with checkpoint.naming_damaged_files(pretrained_model_name_or_path):
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
            model, info = loaded
            processor = PlumeProcessor.from_pretrained(pretrained_model_name_or_path, **hub)
        checkpoint.check_loading(pretrained_model_name_or_path, info)
        model.processor = processor.adopt(model.config)
        return (model, info) if wants_info else model

    @classmethod
    def _from_published(cls, name_or_path: Any, wants_info: bool, hub: dict, **kwargs) -> Any:
        with checkpoint.naming_damaged_files(name_or_path, may_lack_files=True):
            config, weights, processor = published.read_published(name_or_path, **hub)
        if kwargs.get("dtype", "auto") == "auto":
            kwargs["dtype"] = config.dtype
        for name in hub:
            kwargs.pop(name)
        loaded: Any = super().from_pretrained(
            None, config=config, state_dict=weights, output_loading_info=True, **kwargs
        )
        model, info = loaded
        checkpoint.check_loading(name_or_path, info)
        model.processor = processor.adopt(model.config)
        return (model, info) if wants_info else model

    def save_pretrained(  # type: ignore[override]
        self, save_directory, is_main_process: bool = True, *, max_shard_size: int | str = "5GB", **kwargs
    ) -> None:
        """Save one folder that `PlumeModel`, `AutoModel`, `SentenceTransformer` and `Plume` open.

        Args:
            save_directory: created if missing.
            is_main_process: whether this process writes what all have in common.
            max_shard_size: weights are cut into files of this size at most, in bytes or as "5GB".
            kwargs: as in transformers.
        """
        # transformers empties the state that it is given; the card, which must not ask other processes, reads it after.
        weights = dict(kwargs.get("state_dict") or {})
        super().save_pretrained(
            save_directory, is_main_process=is_main_process, max_shard_size=max_shard_size, **kwargs
        )
        if is_main_process and self.processor is not None:
            self.processor.save_pretrained(save_directory)
            checkpoint.write_sentence_transformers_files(save_directory)
            card.write_model_card(self, save_directory, weights=weights)
        if is_main_process:
            checkpoint.tidy_weight_files(save_directory)

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
            seam.allow_checkpointing(self.backbone)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

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
    ) -> PlumeOutput:
        """Embed a batch: prefix, latent steps, suffix.

        Args:
            input_ids: prefixes, left-padded, `[B, L]`; each ends with `<bot>`.
            attention_mask: 1 at real tokens, `[B, L]`; None where nothing is padded.
            pixel_values: patches of all images of the batch.
            image_grid_thw: patches of each image in time, height and width, `[images, 3]`.
            pixel_values_videos: patches of all videos of the batch.
            video_grid_thw: patches of each video in time, height and width, `[videos, 3]`.
            second_per_grid_ts: seconds per temporal patch of each video, `[videos]`.
            suffix_ids: right-padded suffixes, `[B, S]`; None: the configuration's, the same for every row.
            suffix_mask: 1 at real suffix tokens, `[B, S]`.
            labels: suffix tokens to predict, -100 elsewhere, `[B, S]`.
            num_latent_steps: K, one number or one per row `[B]`; None: the configuration's.
            return_dict: accepted because sentence-transformers passes it; the output is the same.
            max_latent_steps: run at least so many steps, without effect on rows that take fewer. Processes that
                share out the weights must run the same number of passes.
            vision_states: what an earlier pass over the same media returned; the vision tower is not run again.
            keep_layers: return the hidden states of all layers at `<gen_emb>`.
            touch_all: involve, with weight zero, also the parts that this batch does not need (vision tower, adapter,
                head). Processes that train together must run the same parts, in the same order.

        Raises:
            ValueError: a prefix without anchor or not ending with `<bot>`, a suffix without `<gen_emb>`, a K that
                the adapter cannot run, or tensors whose shapes disagree.
        """
        grids = {"image_grid_thw": image_grid_thw, "video_grid_thw": video_grid_thw}
        vision = seam.see(
            self.backbone,
            pixel_values,
            image_grid_thw,
            pixel_values_videos,
            video_grid_thw,
            states=vision_states,
            touch=touch_all,
        )
        steps, max_steps = steps_of(self.config, num_latent_steps, input_ids, max_latent_steps)
        suffix_ids, is_suffix = suffix_of(self.config, input_ids, suffix_ids, suffix_mask)
        _, result = self._roll_out(
            input_ids,
            attention_mask,
            vision,
            grids | {"second_per_grid_ts": second_per_grid_ts},
            suffix_ids,
            is_suffix,
            steps,
            max_steps,
            keep_layers,
        )
        column = last_column(suffix_ids, is_suffix, self.config.read_out_token_id, tokens.READ_OUT)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        read_out = result.suffix[rows, column]
        if touch_all:
            read_out = read_out + self._nothing(read_out, adapter_ran=max_steps > 0, head_runs=labels is not None)
        return PlumeOutput(
            embedding=unit(read_out),
            anchor_embedding=unit(result.anchor),
            states=result.states,
            gates=result.gates,
            suffix_logits=None if labels is None else self._logits(result.last_state, result.suffix, labels),
            read_out_layers=None if result.suffix_layers is None else result.suffix_layers[:, rows, column],
            vision_states=vision.states,
            scalars=None if self.loss_scalars is None else self.loss_scalars(),
            num_latent_steps=result.num_latent_steps,
        )

    def reason(
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
        num_latent_steps: int | Tensor | None = None,
    ) -> tuple[seam.CachedDecoder, Rollout]:
        """Run prefix, latent steps and suffix, without reading an embedding; arguments as in `forward`.

        Returns:
            The decoder, whose cache holds all that was read, so that more can be written; and the rollout.
        """
        grids = {"image_grid_thw": image_grid_thw, "video_grid_thw": video_grid_thw}
        vision = seam.see(self.backbone, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        return self._roll_out(
            input_ids,
            attention_mask,
            vision,
            grids | {"second_per_grid_ts": second_per_grid_ts},
            *suffix_of(self.config, input_ids, suffix_ids, suffix_mask),
            *steps_of(self.config, num_latent_steps, input_ids),
        )

    def _roll_out(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        vision: seam.Vision,
        grids: dict[str, Tensor | None],
        suffix_ids: Tensor,
        is_suffix: Tensor,
        steps: Tensor,
        max_steps: int,
        keep_layers: bool = False,
    ) -> tuple[seam.CachedDecoder, Rollout]:
        mask = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
        anchor_column = last_column(input_ids, mask, self.config.anchor_token_id, tokens.ANCHOR)
        check_prefix(self.config, input_ids)
        decoder = seam.CachedDecoder(self.backbone)
        prefix = seam.embed_prefix(self.backbone, input_ids, mask, vision, **grids, rule=self.config.vision_positions)
        result = rollout(
            decoder,
            self.transition,
            prefix,
            seam.embed_tokens(self.backbone, suffix_ids),
            is_suffix,
            num_latent_steps=steps,
            max_latent_steps=max_steps,
            anchor_column=anchor_column,
            start=positions.latent_start(prefix.positions, mask, self.config.latent_positions),
            router_context=self.config.router_context,
            keep_layers=keep_layers,
        )
        return decoder, result

    def _nothing(self, hidden: Tensor, adapter_ran: bool, head_runs: bool) -> Tensor:
        """A zero that depends on the parts that this pass has not run."""
        nothing = hidden.new_zeros(())
        if not adapter_ran:
            nothing = nothing + 0 * self.transition(hidden, 0, None)[0].sum()
        if self.lm_head is not None and not head_runs:
            nothing = nothing + 0 * self.lm_head(hidden[:1]).sum()
        return nothing

    def trace(
        self,
        inputs: Sequence[Any],
        *,
        num_latent_steps: int | None = None,
        candidates: Sequence[Any] | Tensor | None = None,
        num_words: int = 5,
        names: Sequence[str] | None = None,
    ) -> list[Trace]:
        """What happened inside the rollout of some inputs; arguments as in `plume.trace.trace`.

        Example:
            >>> model = getfixture("model")
            >>> (trace,) = model.trace(["a red kite"], num_latent_steps=2, candidates=["blue", "red"])
            >>> trace.states.shape, trace.experts.shape, trace.to_candidates.shape
            (torch.Size([3, 64]), torch.Size([2, 2]), torch.Size([3, 2]))
        """
        return trace(
            self,
            inputs,
            num_latent_steps=num_latent_steps,
            candidates=candidates,
            num_words=num_words,
            names=names,
        )

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        commit_message: str = "Upload plume checkpoint",
        revision: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
    ) -> str:
        """Upload the folder that `save_pretrained` writes; a model card that is there already is kept.

        Args:
            repo_id: "organisation/name"; created if missing.
            private: who may see a new repository.
            commit_message: of the upload.
            revision: branch to push to.
            create_pr: open a pull request instead.
            token: None takes the one that is logged in.

        Returns:
            The address of the commit.
        """
        return checkpoint.push(self, repo_id, private, commit_message, revision, create_pr, token)

    def _logits(self, last_state: Tensor, suffix: Tensor, labels: Tensor) -> Tensor:
        # Token j of the suffix is predicted one position before it: the first by the last latent state.
        before = torch.cat([last_state[:, None], suffix[:, :-1]], dim=1)  # [B, S, D]
        return seam.logits(self.backbone, self.lm_head, before[labels != -100])

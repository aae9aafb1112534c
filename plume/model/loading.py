"""How a `PlumeModel` comes from disk or the Hub, and goes back: one folder for every library that opens it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import PreTrainedModel

from plume.checkpoints import published
from plume.checkpoints.card import model_card, write_model_card
from plume.checkpoints.damage import naming_damaged_files
from plume.checkpoints.folder import (
    check_is_plume,
    check_loading,
    is_stock,
    read_config,
    tidy_weight_files,
    write_dtype,
    write_sentence_transformers_files,
)
from plume.config import PlumeConfig
from plume.inputs import prompt
from plume.inputs.images import MAX_PIXELS, MIN_PIXELS
from plume.inputs.processor import PlumeProcessor, check_pixels
from plume.model.backbone import load_backbone
from plume.model.transition import TransitionAdapter, build_adapter, step_preferences
from plume.model.vocabulary import add_to_vocabulary

_HUB_KEYWORDS = ("revision", "token", "cache_dir", "local_files_only")


class PlumePreTrainedModel(PreTrainedModel):
    """Loading and saving of `PlumeModel`, which adds what it computes."""

    config_class = PlumeConfig
    config: PlumeConfig
    base_model_prefix = ""
    # What a training run learns beside the model; see `PlumeModel.loss_scalars`.
    _keys_to_ignore_on_load_unexpected = [r"^loss_scalars\."]  # noqa: RUF012

    transition: TransitionAdapter
    processor: PlumeProcessor | None

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
    ) -> Any:
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
        read_config(name_or_path, **hub)  # says what is wrong with the place
        with naming_damaged_files(name_or_path):
            backbone, head = load_backbone(name_or_path, dtype=dtype, **attention, **hub)
        # A configuration that takes another in resets its attention; so this one begins with a copy.
        config = PlumeConfig(backbone_config=backbone.config.to_dict(), **config_fields)
        processor = PlumeProcessor.from_backbone(
            name_or_path, config, min_pixels=min_pixels, max_pixels=max_pixels, **hub
        )
        add_to_vocabulary(backbone, head, processor.tokenizer, config)
        config.suffix_ids = processor.suffix_ids(prompt.suffix(config))
        if os.path.isdir(name_or_path):  # where the weights lay here says nothing to others
            backbone.config._name_or_path = ""
        config.backbone_config = backbone.config
        config.dtype = backbone.dtype
        model: Any = cls(config, backbone, head)
        for part in (model.transition, model.latent_inputs, model.latent_norm, model.gate):
            if part is not None:
                part.to(backbone.dtype)
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
        hub = {name: kwargs[name] for name in _HUB_KEYWORDS if name in kwargs}
        if kwargs.get("config") is None:
            if is_stock(pretrained_model_name_or_path, **hub) and published.is_published(
                pretrained_model_name_or_path, **hub
            ):
                return cls._from_published(pretrained_model_name_or_path, wants_info, hub, **kwargs)
            check_is_plume(pretrained_model_name_or_path, **hub)
        with naming_damaged_files(pretrained_model_name_or_path):
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
            model, info = loaded
            processor = PlumeProcessor.from_pretrained(pretrained_model_name_or_path, **hub)
        check_loading(pretrained_model_name_or_path, info)
        model.processor = processor.adopt(model.config)
        return (model, info) if wants_info else model

    @classmethod
    def _from_published(cls, name_or_path: Any, wants_info: bool, hub: dict, **kwargs) -> Any:
        with naming_damaged_files(name_or_path, may_lack_files=True):
            config, weights, processor = published.read_published(name_or_path, **hub)
        if kwargs.get("dtype", "auto") == "auto":
            kwargs["dtype"] = config.dtype
        for name in hub:
            kwargs.pop(name)
        loaded: Any = super().from_pretrained(
            None, config=config, state_dict=weights, output_loading_info=True, **kwargs
        )
        model, info = loaded
        check_loading(name_or_path, info)
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
            write_sentence_transformers_files(save_directory)
            self.write_card(save_directory, weights=weights)
        if is_main_process:
            tidy_weight_files(save_directory)
            # transformers takes the dtype of the first weight for that of all, and would round the others when loading.
            dtypes = {weight.dtype for weight in (weights.values() if weights else self.parameters())}
            if len(dtypes) > 1:
                widest = reduce(torch.promote_types, dtypes)
                write_dtype(save_directory, str(widest).removeprefix("torch."))

    def write_card(
        self, folder: str | os.PathLike, name: str | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the model card into a saved folder, unless it holds one that somebody wrote.

        Args:
            folder: where the checkpoint is saved.
            name: what users load it by; the folder's name if not given.
            weights: of the model, where its own are shared out among processes.
        """
        adapter = _adapter_of(self.config, weights) if weights else self.transition
        text = model_card(
            self.config,
            name or Path(folder).resolve().name,
            num_parameters=sum(weight.numel() for weight in (weights.values() if weights else self.parameters())),
            max_tokens=None if self.processor is None else self.processor.max_tokens,
            gates=step_preferences(adapter, self.config.num_latent_steps),
        )
        write_model_card(folder, text)

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
        hub = HfApi(token=token)
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            hub.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / repo_id.rpartition("/")[2]
            self.save_pretrained(folder)
            if hub.file_exists(repo_id, "README.md", revision=revision):
                (folder / "README.md").unlink()  # somebody's card
            else:
                self.write_card(folder, repo_id)
            uploaded = hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        return uploaded.commit_url

    def _init_weights(self, module: nn.Module) -> None:
        # The adapter keeps PyTorch's own initialisation; transformers' would draw from N(0, 0.02).
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]


def _adapter_of(config: PlumeConfig, weights: Mapping[str, Tensor]) -> TransitionAdapter:
    """The adapter that some weights of a whole model hold."""
    prefix = "transition."
    with torch.device("meta"):
        adapter = build_adapter(config)
    adapter.load_state_dict(
        {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}, assign=True
    )
    return adapter

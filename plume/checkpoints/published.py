"""Import of the published PLUME checkpoints.

They are Qwen2-VL checkpoints of transformers 4 with the adapter's tensors beside the backbone's, and without what plume
needs to know: sizes are read from shapes, the rest follows from how those checkpoints were trained and evaluated
(latent positions count tokens, text alone has a white image before it, one fixed prompt, and images and frames of at
least 3,136 pixels, to which the published evaluation enlarges them before its processor sees them).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

from plume import tokens
from plume.config import PlumeConfig
from plume.inputs import prompt
from plume.inputs.images import MAX_PIXELS, MIN_PIXELS
from plume.inputs.processor import PlumeProcessor

_ADAPTER = "latent_moe_transition."
#: K where the trainer's state does not tell it.
DEFAULT_LATENT_STEPS = 8
#: Where files that a checkpoint lacks come from, by hidden size.
_BASES = {1536: "Qwen/Qwen2-VL-2B-Instruct", 3584: "Qwen/Qwen2-VL-7B-Instruct"}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# Optimiser states and pickled arguments are neither needed nor safe to read.
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt"]


def is_published(name_or_path: str | os.PathLike, **hub_kwargs) -> bool:
    """Whether a folder or Hub name holds a checkpoint in the published format; reads no weights."""
    return any(_ADAPTER in name for name in _tensor_names(name_or_path, hub_kwargs))


def read_published(
    name_or_path: str | os.PathLike, **hub_kwargs
) -> tuple[PlumeConfig, dict[str, Tensor], PlumeProcessor]:
    """Configuration, weights and processor of a published checkpoint.

    Args:
        name_or_path: a folder or a Hub name.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        The configuration, tensors by the names of `PlumeModel`, and the processor.

    Raises:
        ValueError: a tensor that has no place, sizes that contradict each other, a token or a file that is missing.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(name_or_path), allow_patterns=_WANTED, **hub_kwargs))
    backbone = AutoConfig.from_pretrained(folder)
    weights = _read_weights(folder, backbone)
    config = PlumeConfig(
        backbone_config=backbone,
        num_latent_steps=_num_latent_steps(folder),
        latent_positions="kv_length",
        blank_image_size=56,
        video_min_pixels=MIN_PIXELS,
        video_max_pixels=MAX_PIXELS,
        **_adapter_fields(weights, backbone, folder),
    )
    config.dtype = weights["transition.router.weight"].dtype
    processor = _read_processor(folder, config, hub_kwargs)
    if not set(tokens.SPECIAL_TOKENS) & set(processor.tokenizer.get_vocab()):
        tokens.add_special_tokens(processor.tokenizer)  # it is the base model's, whose next ids are theirs
    config.remember_ids(processor.tokenizer)
    config.suffix_ids = processor.suffix_ids(prompt.suffix(config))
    return config, weights, processor


def _tensor_names(name_or_path: str | os.PathLike, hub_kwargs: dict) -> list[str]:
    folder = Path(name_or_path)
    if folder.is_dir():
        return [name for file in sorted(folder.glob("*.safetensors")) for name in _names_in(file)]
    name = str(name_or_path)
    index = cached_file(name, _INDEX, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if index is not None:
        return list(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    cache = {key: value for key, value in hub_kwargs.items() if key in ("revision", "cache_dir")}
    single = try_to_load_from_cache(name, _SINGLE, **cache)
    if isinstance(single, str):
        return _names_in(Path(single))
    try:
        metadata = HfApi(token=hub_kwargs.get("token")).get_safetensors_metadata(
            name, revision=hub_kwargs.get("revision")
        )
    except (HfHubHTTPError, NotASafetensorsRepoError, OSError):
        return []
    return list(metadata.weight_map)


def _names_in(file: Path) -> list[str]:
    with _opened(file) as opened:
        return list(opened.keys())


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); copy it again") from None


def _read_weights(folder: Path, backbone: PreTrainedConfig) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with _opened(file) as opened:
            for published in opened.keys():  # noqa: SIM118  # not a mapping
                name = _own_name(published, folder)
                if name in weights:
                    raise ValueError(f"{folder}: {published} and another tensor are both {name}; remove one")
                weights[name] = opened.get_tensor(published)
    head = weights.get("lm_head.weight")
    if backbone.tie_word_embeddings and head is not None:
        if not torch.equal(head, weights["backbone.language_model.embed_tokens.weight"]):
            raise ValueError(
                f"{folder}: config.json ties the output head to the embeddings, but lm_head.weight differs from them; "
                "set tie_word_embeddings to false"
            )
        del weights["lm_head.weight"]
    return weights


def _own_name(published: str, folder: Path) -> str:
    """The name in `PlumeModel` of a tensor, from either layout of transformers 4."""
    if _ADAPTER in published:
        return "transition." + published.partition(_ADAPTER)[2]
    for prefix, own in (
        ("model.language_model.", "backbone.language_model."),
        ("model.visual.", "backbone.visual."),
        ("visual.", "backbone.visual."),
        ("model.", "backbone.language_model."),
        ("lm_head.", "lm_head."),
    ):
        if published.startswith(prefix):
            return own + published.removeprefix(prefix)
    raise ValueError(f"{folder}: the tensor {published} belongs to no part of a PLUME checkpoint; remove it")


def _adapter_fields(weights: dict[str, Tensor], backbone: PreTrainedConfig, folder: Path) -> dict[str, Any]:
    """Sizes of the adapter, from the shapes of its tensors."""

    def shape(name: str) -> torch.Size:
        if f"transition.{name}" not in weights:
            raise ValueError(f"{folder} has no adapter tensor {name}; the checkpoint is not complete")
        return weights[f"transition.{name}"].shape

    num_experts, doubled = shape("router.weight")
    width = backbone.get_text_config().hidden_size
    if doubled != 2 * width:
        raise ValueError(f"{folder}: the router reads {doubled} numbers; expected twice the hidden size of {width}")
    found = {int(name.split(".")[2]) for name in weights if name.startswith("transition.experts.")}
    if found != set(range(num_experts)):
        raise ValueError(f"{folder}: the router has {num_experts} rows, the experts are {sorted(found)}")
    return {
        "num_experts": num_experts,
        "top_k": min(2, num_experts),
        "shared_expert": any(name.startswith("transition.shared_expert.") for name in weights),
        "num_step_embeddings": shape("step_embed.weight")[0],
        "expert_hidden_size": shape("experts.0.fc1.weight")[0],
    }


def _num_latent_steps(folder: Path) -> int:
    """K of the last stage of the curriculum, as the trainer logged it."""
    state = folder / "trainer_state.json"
    if not state.is_file():
        return DEFAULT_LATENT_STEPS
    history = json.loads(state.read_text(encoding="utf-8")).get("log_history", [])
    logged = [entry["curriculum_latent_tokens"] for entry in history if "curriculum_latent_tokens" in entry]
    return round(logged[-1]) if logged else DEFAULT_LATENT_STEPS


def _read_processor(folder: Path, config: PlumeConfig, hub_kwargs: dict) -> PlumeProcessor:
    width = config.hidden_size
    tokenizer_from = _source(folder, ("tokenizer.json", "vocab.json"), width, hub_kwargs)
    images_from = _source(folder, ("preprocessor_config.json", "processor_config.json"), width, hub_kwargs)
    # Revision and the like belong to the checkpoint, not to the base model that files are taken from.
    return PlumeProcessor.from_backbone(tokenizer_from, config, images_from=images_from)


def _source(folder: Path, names: tuple[str, ...], width: int, hub_kwargs: dict) -> str:
    """Where one of these files is: the folder itself, or the base model."""
    if any((folder / name).is_file() for name in names):
        return str(folder)
    base = _BASES.get(width)
    knobs = {key: hub_kwargs[key] for key in ("token", "cache_dir", "local_files_only") if key in hub_kwargs}
    if base is not None:
        for name in names:
            try:
                if cached_file(base, name, _raise_exceptions_for_missing_entries=False, **knobs) is not None:
                    return base
            except OSError:
                break
    whence = f"{base}, which cannot be reached" if base else "the base model that it was trained from"
    raise ValueError(f"{folder} has no {names[0]}; copy it there from {whence}")

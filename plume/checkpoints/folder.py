"""One self-describing folder: what makes it complete, and what lets other libraries open it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from plume.checkpoints.damage import naming_damaged_files
from plume.checkpoints.place import check_place
from plume.checkpoints.published import is_published
from plume.config import SUPPORTED, PlumeConfig
from plume.version import __version__

#: Run-time knobs of `PlumeModel.forward` that sentence-transformers may pass through `encode`.
RUN_TIME_KEYWORDS = ("num_latent_steps",)

#: Instructions for common tasks, by `prompt_name`. The model reads them before the input's text.
PRESETS = {
    "retrieve": "Find content that matches the given input:",
    "classify": "Represent the given input for classification:",
    "question": "Represent the given input with the following question:",
}


def read_config(name_or_path: str | os.PathLike, **hub_kwargs) -> dict[str, Any]:
    """The fields of a checkpoint's `config.json`.

    Raises:
        ValueError: there is no checkpoint, or its configuration is damaged.
    """
    check_place(name_or_path)
    try:
        with naming_damaged_files(name_or_path):
            return PlumeConfig.get_config_dict(name_or_path, **hub_kwargs)[0]
    except OSError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"no folder at {str(name_or_path)!r}, and no such model on the Hub, or it cannot be reached ({reason})"
        ) from None


def write_dtype(folder: str | os.PathLike, dtype: str) -> None:
    """Let a saved configuration say in what its weights are to be loaded, its backbone's too."""
    file = Path(folder) / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    parts = [fields]
    while parts:
        part = parts.pop()
        if "dtype" in part:
            part["dtype"] = dtype
        parts += [value for value in part.values() if isinstance(value, dict)]
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_stock(name_or_path: str | os.PathLike, **hub_kwargs) -> bool:
    """Whether the configuration is a backbone's own, as that of the published PLUME checkpoints is.

    Raises:
        ValueError: as `read_config`.
    """
    return read_config(name_or_path, **hub_kwargs).get("model_type") in SUPPORTED


def check_is_plume(name_or_path: str | os.PathLike, **hub_kwargs) -> None:
    """Refuse a checkpoint whose configuration is not plume's.

    Raises:
        ValueError: says what the checkpoint is and how to start from it.
    """
    fields = read_config(name_or_path, **hub_kwargs)
    if (found := fields.get("model_type")) != PlumeConfig.model_type:
        if found in SUPPORTED and is_published(name_or_path, **hub_kwargs):
            raise ValueError(
                f"{name_or_path} is a checkpoint in the published PLUME format; convert it once with "
                f"`plume convert {name_or_path} DST`, or load it with PlumeModel.from_pretrained"
            )
        raise ValueError(
            f"{name_or_path} is a {found!r} checkpoint without plume's fields (num_latent_steps, transition, "
            f"prompt_template, ...); start a new model from it with PlumeModel.from_backbone({str(name_or_path)!r})"
        )
    for name in ("backbone_config", "suffix_ids", "anchor_token_id"):
        if fields.get(name) is None:
            raise ValueError(
                f"{name_or_path}/config.json has no {name!r}; save the model with PlumeModel.save_pretrained"
            )


def check_loading(name_or_path: str | os.PathLike, info: dict) -> None:
    """Refuse weights that are not exactly the model's.

    Args:
        name_or_path: for the message.
        info: transformers' `output_loading_info`.

    Raises:
        ValueError: names the tensors.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            names = sorted(map(str, info[kind]))
            raise ValueError(
                f"{name_or_path}: {len(names)} {kind.replace('_', ' ')}, for example {names[0]}; the weights do not "
                "belong to this configuration"
            )


def tidy_weight_files(folder: str | os.PathLike) -> None:
    """Give weight files the mode that any new file has here, and remove the index of an earlier save in several files.

    safetensors lets nobody but their owner read them; transformers leaves the index.
    """
    if not any(Path(folder).glob("model-*.safetensors")):
        (Path(folder) / "model.safetensors.index.json").unlink(missing_ok=True)
    sample = Path(folder) / ".mode"
    sample.touch()
    mode = sample.stat().st_mode & 0o777
    sample.unlink()
    for file in Path(folder).glob("*.safetensors"):
        file.chmod(mode)


def write_sentence_transformers_files(folder: str | os.PathLike) -> None:
    """Let `SentenceTransformer(folder)` open a saved model, with stock modules only.

    The embedding is the model's own output `embedding`; nothing is pooled or normalised again.
    """
    output = {"method": "forward", "method_output_name": "embedding"}
    modalities: dict[str, dict] = {name: dict(output) for name in ("text", "image", "video", "message")}
    modalities["message"]["format"] = "structured"
    files: dict[str, Any] = {
        "modules.json": [
            {
                "idx": 0,
                "name": "0",
                "path": "",
                "type": "sentence_transformers.base.modules.transformer.Transformer",
                "kwargs": list(RUN_TIME_KEYWORDS),
            }
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": modalities,
            "module_output_name": "sentence_embedding",
            "unpad_inputs": False,
            "processing_kwargs": {
                "text": {"truncation": False},
                "chat_template": {"add_generation_prompt": True},
            },
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "__version__": {"plume-embed": __version__},
            "prompts": PRESETS,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            "requirements": {
                "plume-embed": {"specifier": ">=0.1", "reason": "Once it is installed, import plume before loading."}
            },
        },
    }
    settings = Path(folder) / "config_sentence_transformers.json"
    if settings.is_file():  # sentence-transformers has saved prompts and truncation of its own
        files[settings.name] |= json.loads(settings.read_text(encoding="utf-8"))
    for name, content in files.items():
        (Path(folder) / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

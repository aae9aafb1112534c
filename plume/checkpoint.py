"""One self-describing folder: what makes it complete, and what lets other libraries open it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from plume.backbone import SUPPORTED
from plume.card import write_model_card
from plume.config import PlumeConfig
from plume.published import is_published
from plume.version import __version__

#: Run-time knobs of `PlumeModel.forward` that sentence-transformers may pass through `encode`.
RUN_TIME_KEYWORDS = ("num_latent_steps",)

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_LFS = b"version https://git-lfs"
_MOST_POINTER_BYTES = 1024
# What loading cannot do without, and other names of it.
_NEEDED = {
    "config.json": (),
    "model.safetensors": ("*.safetensors", "*.bin"),
    "tokenizer.json": ("vocab.json",),
    "processor_config.json": ("preprocessor_config.json",),
}
# Files of settings, whose content is an object of JSON, or a list of modules.
_SETTINGS = {
    "config",
    "config_sentence_transformers",
    "generation_config",
    "model.safetensors.index",
    "modules",
    "preprocessor_config",
    "processor_config",
    "sentence_bert_config",
    "tokenizer",
    "tokenizer_config",
    "video_preprocessor_config",
}

# Fields of the configuration that decide embeddings, besides K.
_DECISIVE = (
    "transition",
    "top_k",
    "router_context",
    "latent_positions",
    "prompt_template",
    "suffix_ids",
    "blank_image_size",
    "video_num_frames",
    "video_fps",
    "video_max_frames",
    "video_min_pixels",
    "video_max_pixels",
)
# Fields that came later count where they differ from their default, so that indexes made before them stay valid.
_DECISIVE_LATER = {"background": "white", "vision_positions": "all_axes"}

#: Instructions for common tasks, by `prompt_name`. The model reads them before the input's text.
PRESETS = {
    "retrieve": "Find content that matches the given input:",
    "classify": "Represent the given input for classification:",
    "question": "Represent the given input with the following question:",
}


def check_place(name_or_path: str | os.PathLike) -> None:
    """Refuse a path that leads nowhere, or to a folder that is no checkpoint; names on the Hub are not looked up.

    Raises:
        ValueError: says what is there and what was expected.
    """
    expected = "expected a folder that save_pretrained wrote, or a Hub name such as you/kite"
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise ValueError(f"a checkpoint is {name_or_path!r}; {expected}")
    text = os.fspath(name_or_path)
    if os.path.isdir(text):
        if not os.path.isfile(os.path.join(text, "config.json")):
            empty = "is an empty folder" if not os.listdir(text) else "holds no config.json"
            raise ValueError(f"{text} {empty}; {expected}")
    elif os.path.exists(text):
        raise ValueError(f"{text} is a file; {expected}")
    elif isinstance(name_or_path, os.PathLike) or not _HUB_NAME.fullmatch(text):
        raise ValueError(f"no folder at {text!r}; {expected}")


@contextmanager
def naming_damaged_files(name_or_path: str | os.PathLike, may_lack_files: bool = False) -> Iterator[None]:
    """Where loading fails because a file of the folder is damaged or missing, say which one.

    Args:
        name_or_path: a folder, or a Hub name, whose files are not looked at.
        may_lack_files: whether what is missing comes from elsewhere, as for published checkpoints.

    Raises:
        ValueError: names the file, and says what to do.
    """
    folder = Path(name_or_path)
    files = sorted(file for file in folder.glob("*") if file.is_file()) if folder.is_dir() else []
    for file in files:  # some of them would be read without an error
        if _is_pointer(file):
            raise ValueError(
                f"{file} is a Git LFS pointer in the place of the file; run `git lfs pull` where it was cloned"
            )
    try:
        yield
    except Exception as error:
        for file in files:
            if reason := _damage(file):
                raise ValueError(f"{file} {reason}") from error
        for expected, others in _NEEDED.items() if files and not may_lack_files else ():
            if not any(file.match(name) for file in files for name in (expected, *others)):
                raise ValueError(f"{folder} holds no {expected}; copy it again") from error
        if isinstance(error, SafetensorError):  # of a download
            raise ValueError(f"the weights of {name_or_path} are damaged ({error}); remove the download") from error
        raise


def _is_pointer(file: Path) -> bool:
    """Whether Git put a few lines in the place of a large file."""
    try:
        return file.stat().st_size <= _MOST_POINTER_BYTES and file.read_bytes().startswith(_LFS)
    except OSError:
        return False  # loading says why


def _damage(file: Path) -> str | None:
    """What is wrong with a file of a checkpoint, and what to do; None where nothing can be seen."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        elif file.suffix == ".json":
            content = json.loads(file.read_text(encoding="utf-8"))
            expected = list if file.name == "modules.json" else dict
            if file.name.removesuffix(".json") in _SETTINGS and not isinstance(content, expected):
                return f"is damaged (it holds a {type(content).__name__}); copy it again"
    except (SafetensorError, ValueError) as error:
        return f"is damaged ({error}); copy it again"
    return None


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
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"no folder at {str(name_or_path)!r}, and no such model on the Hub, or it cannot be reached ({reason})"
        ) from None


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


def fingerprint(model: PreTrainedModel) -> str:
    """Tells checkpoints apart: a digest of what decides their embeddings.

    That is some fields of the configuration (not the default K, which a caller may change, nor the dtype), the pixel
    budget, and 64 values of each weight, evenly spaced, which every training step moves.
    """
    config, processor = model.config, getattr(model, "processor", None)
    fields: dict[str, Any] = {name: getattr(config, name) for name in _DECISIVE}
    fields |= {name: value for name, old in _DECISIVE_LATER.items() if (value := getattr(config, name)) != old}
    fields["backbone"] = config.backbone_config.model_type
    fields["pixels"] = None if processor is None else sorted(dict(processor.image_processor.size).items())
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        count = min(64, len(flat))
        places = torch.arange(count, device=flat.device) * (len(flat) - 1) // max(count - 1, 1)
        # Rounded, so that a checkpoint in bfloat16 is the same one when it is loaded as float32.
        digest.update(name.encode() + flat[places].bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


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
        },
    }
    settings = Path(folder) / "config_sentence_transformers.json"
    if settings.is_file():  # sentence-transformers has saved prompts and truncation of its own
        files[settings.name] |= json.loads(settings.read_text(encoding="utf-8"))
    for name, content in files.items():
        (Path(folder) / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def push(
    model: PreTrainedModel,
    repo_id: str,
    private: bool | None,
    commit_message: str,
    revision: str | None,
    create_pr: bool,
    token: str | None,
) -> str:
    """Upload a saved model; see `PlumeModel.push_to_hub`."""
    hub = HfApi(token=token)
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        hub.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / repo_id.rpartition("/")[2]
        model.save_pretrained(folder)
        if hub.file_exists(repo_id, "README.md", revision=revision):
            (folder / "README.md").unlink()  # somebody's card
        else:
            write_model_card(model, folder, repo_id)  # type: ignore[arg-type]
        uploaded = hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return uploaded.commit_url

"""Files of a checkpoint that are damaged or missing: which one, and what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

_LFS = b"version https://git-lfs"
_MOST_POINTER_BYTES = 1024
# What loading cannot do without, and other names of it.
_NEEDED = {
    "config.json": ("adapter_config.json",),
    "model.safetensors": ("*.safetensors", "*.bin"),
    "tokenizer.json": ("vocab.json",),
    "processor_config.json": ("preprocessor_config.json",),
}
# Files of settings, whose content is an object of JSON, or a list of modules.
_SETTINGS = {
    "adapter_config",
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

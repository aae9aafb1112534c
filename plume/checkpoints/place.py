"""Where a checkpoint is: a folder, or a name on the Hub. It is asked before anything is imported or downloaded."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from plume.terminal import did_you_mean

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_EXPECTED = "expected a folder that save_pretrained wrote, or a Hub name such as you/kite"


def check_place(name_or_path: str | os.PathLike) -> None:
    """Refuse a path that leads nowhere, or to a folder that is no checkpoint; names on the Hub are not looked up.

    A name such as `runs/kite` may be either. It is a path where there is a folder `runs`.

    Raises:
        ValueError: says what is there and what was expected.
    """
    if not isinstance(name_or_path, (str, os.PathLike)) or not os.fspath(name_or_path):
        raise ValueError(f"a checkpoint is {name_or_path!r}; {_EXPECTED}")
    text = os.fspath(name_or_path)
    place = Path(text)
    if place.is_dir():
        if not _is_checkpoint(place):
            raise ValueError(f"{text} {_without_config(place)}; {_EXPECTED}")
    elif place.exists():
        raise ValueError(f"{text} is a file; {_EXPECTED}")
    elif isinstance(name_or_path, os.PathLike) or not _HUB_NAME.fullmatch(text) or _begins_like_a_path(place):
        inside = [str(path) for path in _checkpoints_in(place.parent)]
        raise ValueError(f"no folder at {text!r}; {did_you_mean(str(place), inside, _EXPECTED)}")


def stay_offline_without_network(name_or_path: str) -> None:
    """Where the Hub's name cannot be looked up, have its library look into its cache at once, not retry for a minute.

    For commands: it changes the environment, before that library is imported.
    """
    if Path(name_or_path).is_dir() or getproxies() or "HF_HUB_OFFLINE" in os.environ:
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, None)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _begins_like_a_path(place: Path) -> bool:
    return len(place.parts) > 1 and Path(place.parts[0]).is_dir()


def _without_config(folder: Path) -> str:
    if inside := [str(path) for path in _checkpoints_in(folder)]:
        return f"holds no config.json, but {', '.join(inside[:4])} {'does' if len(inside) == 1 else 'do'}"
    return "holds no config.json" if any(folder.iterdir()) else "is an empty folder"


def _checkpoints_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _is_checkpoint(path))


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a model, or a LoRA adapter, which names the model that it belongs to."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))

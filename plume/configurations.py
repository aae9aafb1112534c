"""The YAML files that come with plume, by name: `configs/` of a clone, or their copies in an installed package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from plume.terminal import did_you_mean

_HOMES = (Path(__file__).parent / "_configs", Path(__file__).parent.parent / "configs")

Use = Literal["train", "eval", "accelerate"]


def find_config(use: Use, name_or_path: str | Path) -> Path:
    """A configuration: a file, or one that comes with plume, such as "demo" for training.

    Args:
        use: what it is for.
        name_or_path: a path, or a name without suffix, such as "demo" or "hops/latent".

    Raises:
        ValueError: there is neither; names the nearest one.

    Example:
        >>> find_config("train", "demo").name
        'demo.yaml'
    """
    path = Path(name_or_path)
    if path.exists() and not path.is_dir():  # also what a shell hands over as a file
        return path
    known = {
        file.relative_to(home / use).with_suffix("").as_posix(): file
        for home in _HOMES[::-1]
        for file in sorted((home / use).rglob("*.yaml"))
    }
    if str(name_or_path) in known:
        return known[str(name_or_path)]
    near = did_you_mean(str(name_or_path), known, f"those that come with plume are {', '.join(sorted(known))}")
    raise ValueError(f"{name_or_path} is no file of settings; {near}")

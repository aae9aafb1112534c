"""`plume-train soup MODEL MODEL ... --out FOLDER`: one model whose weights are the mean of several.

Models that began from the same weights may average to a better one than any of them (model soups, arXiv 2203.05482);
Qwen3-VL-Embedding-2B went from 71.5 to 73.2 by its last two stages (arXiv 2601.04720). Whether they do depends on the
data: `--data` measures each of them and the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plume.checkpoints.folder import read_config
from plume.model.model import PlumeModel
from plume.terminal import Parser, say
from plume_train.callbacks import named_evaluation

#: Of a configuration, what may differ between models that are averaged.
_FREE = {"_name_or_path", "num_latent_steps", "transformers_version", "dtype"}


def soup(argv: Sequence[str]) -> int:
    """Average models that have the same architecture and tokenizer.

    Args:
        argv: the command line behind `soup`.

    Returns:
        0, the exit code.

    Raises:
        ValueError: models that cannot be averaged, with what differs; a folder that is not empty.
    """
    options = _parse(argv)
    if options.out.exists() and any(options.out.iterdir()):
        raise ValueError(f"{options.out} is not empty; choose another folder")
    weights = _weights(options)
    for name in options.models:
        _check_is_whole(name)
    measure = None
    if options.data:
        arguments = {"file": options.data, "modes": ["latent", "single_pass"], "limit": options.limit}
        measure = named_evaluation("plume_eval.pairs:PairsEvaluation", arguments)
    model, total = PlumeModel.from_pretrained(options.models[0], dtype=torch.float32).eval(), {}
    for name, weight in zip(options.models, weights, strict=True):
        other = model if name == options.models[0] else PlumeModel.from_pretrained(name, dtype=torch.float32).eval()
        _check_alike(options.models[0], model, name, other)
        if measure:
            _report(name, other, measure)
        for key, value in other.state_dict().items():
            total[key] = value.double() * weight + total.get(key, 0)
    dtype = _dtype(options.models[0])
    model.load_state_dict({key: value.float() for key, value in total.items()})
    if measure:
        _report("their mean", model, measure)
    model.to(dtype).save_pretrained(options.out)  # type: ignore[call-arg]
    say(f"written: {options.out}, K = {model.config.num_latent_steps} as in {options.models[0]}")
    return 0


def _weights(options: Any) -> list[float]:
    given = options.weights or [1.0] * len(options.models)
    if len(given) != len(options.models) or min(given) < 0 or sum(given) <= 0:
        raise ValueError(
            f"--weights are {' '.join(f'{weight:g}' for weight in given)}; expected {len(options.models)} numbers of "
            "at least 0, one for each model, not all of them 0"
        )
    return [weight / sum(given) for weight in given]


def _check_is_whole(name: str) -> None:
    if (Path(name) / "adapter_config.json").exists() and not (Path(name) / "config.json").exists():
        raise ValueError(
            f"{name} holds LoRA's factors, whose mean is not the mean of what they add; "
            f"`plume-train merge {name} FOLDER` makes a plain model of it"
        )


def _check_alike(first: str, model: PlumeModel, name: str, other: PlumeModel) -> None:
    """Refuse models whose weights do not mean the same."""
    one, two = (_comparable(found.config.to_dict()) for found in (model, other))
    if different := sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key)):
        key = different[0]
        raise ValueError(
            f"{key} is {one.get(key)!r} in {first} and {two.get(key)!r} in {name}; they cannot be averaged"
        )
    assert model.processor is not None
    assert other.processor is not None
    if model.processor.tokenizer.get_vocab() != other.processor.tokenizer.get_vocab():
        raise ValueError(f"{first} and {name} have different tokenizers; they cannot be averaged")


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """What two configurations must have in common, nested parts with their path."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in _FREE:
            continue
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": one for inner, one in _comparable(value).items()}
        else:
            found[key] = value
    return found


def _dtype(name: str) -> torch.dtype:
    told = read_config(name).get("dtype")
    dtype = getattr(torch, str(told).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _report(name: str, model: PlumeModel, measure: Any) -> None:
    with torch.inference_mode():
        found: dict[str, float | Tensor] = measure(model, 0, model.config.num_latent_steps)
    latent, single = (float(found[f"recall_at_1_{mode}"]) for mode in ("latent", "single_pass"))
    say(f"{name}: recall@1 {latent:.3f} with K = {model.config.num_latent_steps}, {single:.3f} in a single pass")


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(prog="plume-train soup", description="Write one model whose weights are the mean of several.")
    parser.add_argument("models", nargs="+", help="folders or Hub names; K is the first one's")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--weights", type=float, nargs="+", help="one for each model (equal)")
    parser.add_argument("--data", help="held-out pairs, .jsonl: measures recall@1 of each model and of the mean")
    parser.add_argument("--limit", type=int, default=1000, help="pairs to measure on at most (1000)")
    options = parser.parse_args(argv)
    if len(options.models) < 2:
        parser.error(f"one model is named ({options.models[0]}); expected two or more")
    return options

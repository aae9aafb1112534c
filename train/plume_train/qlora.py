"""A frozen base in four bits under LoRA (QLoRA, arXiv 2305.14314), by bitsandbytes: `base_dtype: nf4`."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from plume_train.config import PlumeTrainingArguments, SettingsError


def check_qlora(args: PlumeTrainingArguments) -> None:
    """Refuse what four bits cannot be trained with.

    Raises:
        SettingsError: names the setting.
    """
    if not args.lora_rank:
        raise SettingsError("base_dtype=nf4 is for LoRA, beside weights that do not learn; set lora_rank")
    if not find_spec("bitsandbytes"):
        raise SettingsError("base_dtype=nf4 needs bitsandbytes; pip install 'plume-embed[qlora]'")


def quantize(model: Any, args: PlumeTrainingArguments) -> None:
    """Turn the weights that LoRA stands beside into four bits, one layer after the other, on the run's device."""
    bnb: Any = import_module("bitsandbytes")
    count = 0
    layers = {name: layer for name, layer in model.named_modules() if re.fullmatch(args.lora_targets, name)}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            continue
        narrow = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        narrow.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")  # type: ignore
        narrow.bias = layer.bias
        _replace(model, name, narrow.to(args.device))
        count += 1
    if not count:
        raise SettingsError(
            f"base_dtype=nf4 packs the linear layers whose names lora_targets matches, and {args.lora_targets!r} "
            "matches none; give a regular expression of whole names"
        )
    model.is_loaded_in_4bit = True  # by which peft knows them


def dequantize(model: Any) -> None:
    """Turn them into bfloat16 again, with what four bits have left of them."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return
    bnb: Any = import_module("bitsandbytes")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            whole = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            weight: Any = layer.weight
            values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to("cpu", torch.bfloat16)
            whole.weight = nn.Parameter(values, requires_grad=False)
            whole.bias = layer.bias
            _replace(model, name, whole)
    model.is_loaded_in_4bit = False


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)

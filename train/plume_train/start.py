"""The model that a run starts from, and which of its parts learn."""

from __future__ import annotations

from typing import Any

import torch

from plume.checkpoints.folder import read_config
from plume.config import TRANSITION_FIELDS, PlumeConfig
from plume.model.model import PlumeModel
from plume_train.config import PlumeTrainingArguments, SettingsError
from plume_train.qlora import check_qlora, quantize


def load_model(args: PlumeTrainingArguments) -> PlumeModel:
    """A plume checkpoint, or a stock one with a new adapter.

    `plume_config` may give a plume checkpoint another way to make latent inputs; parts that it lacks begin anew.

    Raises:
        SettingsError: `plume_config` contradicts the plume checkpoint it starts from.
    """
    model = _load(args)
    if args.base_dtype == "nf4":
        check_qlora(args)
        quantize(model, args)
    return model


def _load(args: PlumeTrainingArguments) -> PlumeModel:
    assert isinstance(args.plume_config, dict)
    dtype = "bfloat16" if args.base_dtype == "nf4" else args.base_dtype
    if read_config(args.model).get("model_type") != PlumeConfig.model_type:
        return PlumeModel.from_backbone(args.model, dtype=dtype, **args.plume_config)
    model = PlumeModel.from_pretrained(args.model, dtype=dtype)
    changed = {name: value for name, value in args.plume_config.items() if getattr(model.config, name, None) != value}
    for name, value in changed.items():
        if name not in TRANSITION_FIELDS:
            raise SettingsError(
                f"plume_config.{name}={value!r}, but the checkpoint {args.model} was made with "
                f"{getattr(model.config, name, None)!r}; remove it from plume_config, or start from a stock backbone"
            )
    if not changed:
        return model
    try:
        model, new = model.reconfigured(**changed)
    except ValueError as error:
        raise SettingsError(f"plume_config: {error}") from None
    if new:
        args.tell(f"plume_config changes the checkpoint {args.model}; what it lacked begins anew: {', '.join(new)}")
    return model


def freeze(model: PlumeModel, args: PlumeTrainingArguments) -> None:
    """Leave only what the settings name to be trained."""
    tower = model.backbone.visual
    tower.requires_grad_(args.train_vision)
    tower.merger.requires_grad_(args.train_merger or args.train_vision)
    if model.gate is not None:  # learnt from a trained model, by `plume-train gate`
        model.gate.requires_grad_(False)


def widen_what_learns(model: Any) -> None:
    """Give the parameters that learn at least float32, whatever the frozen ones have."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))

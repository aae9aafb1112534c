"""LoRA on the language model, by peft; the transition adapter and the new token rows learn in full.

The vision tower has no LoRA unless `lora_targets` names its layers, and is trained only where the settings say so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plume.model import PlumeModel
from plume.tokens import SPECIAL_TOKENS
from plume_train.config import PlumeTrainingArguments

if TYPE_CHECKING:
    from plume_train.trainer import PlumeTrainer

#: Folder of the unmerged adapter, beside the merged model.
ADAPTER_FOLDER = "adapter"


def add_lora(model: PlumeModel, args: PlumeTrainingArguments) -> Any:
    """A peft model around `model`, in which LoRA, adapter and new token rows are trainable.

    Raises:
        ValueError: `lora_targets` matches no layer.
    """
    from peft import LoraConfig, get_peft_model

    assert model.processor is not None
    whole = [name for name in ("transition",) if any(True for _ in model.transition.parameters())]
    if args.train_merger or args.train_vision:
        whole.append("backbone.visual" if args.train_vision else "backbone.visual.merger")
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_targets,
        modules_to_save=whole or None,
        trainable_token_indices={
            "embed_tokens": sorted(model.processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
        },
    )
    return get_peft_model(model, config)


def merged(trainer: PlumeTrainer) -> PlumeModel:
    """The plain model that the trained LoRA comes to."""
    wrapped: Any = trainer.accelerator.unwrap_model(trainer.model)
    return wrapped.merge_and_unload()

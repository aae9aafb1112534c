"""LoRA on the language model, by peft; the transition adapter and the new token rows learn in full.

The vision tower has no LoRA unless `lora_targets` names its layers, and is trained only where the settings say so.
A checkpoint of such a run holds what is trained and nothing else; the end of the run is a plain, merged model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from plume.checkpoints.folder import tidy_weight_files, write_dtype
from plume.model.model import PlumeModel
from plume.terminal import Parser
from plume.tokens import SPECIAL_TOKENS
from plume_train.config import PlumeTrainingArguments, SettingsError
from plume_train.progress import PROGRESS_FILE
from plume_train.qlora import dequantize
from plume_train.saving import RunError, begun_with
from plume_train.start import freeze, load_model, widen_what_learns

#: Folder of the unmerged weights, beside the merged model.
ADAPTER_FOLDER = "adapter"


def add_lora(model: PlumeModel, args: PlumeTrainingArguments) -> Any:
    """A peft model around `model`, in which LoRA, transition adapter and new token rows are trainable.

    Raises:
        SettingsError: `lora_targets` matches no layer, or weights are shared out among processes.
    """
    from peft import LoraConfig, get_peft_model

    if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise SettingsError(
            "lora_rank does not work with ZeRO-3 or FSDP, under which single token rows cannot learn; use ddp.yaml or "
            "zero2.yaml"
        )
    assert model.processor is not None
    rows = sorted(model.processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
    new = {"transition": model.transition, "latent_inputs": model.latent_inputs, "latent_norm": model.latent_norm}
    whole = [name for name, part in new.items() if part is not None and any(True for _ in part.parameters())]
    if args.train_merger or args.train_vision:
        whole.append("backbone.visual" if args.train_vision else "backbone.visual.merger")
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_targets,
        modules_to_save=whole or None,
        trainable_token_indices={"embed_tokens": rows} | ({} if model.lm_head is None else {"lm_head": rows}),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise SettingsError(f"lora_targets={args.lora_targets!r}: {error}") from None


def save_merged(model: Any, folder: Path) -> None:
    """Save the plain model that a trained LoRA comes to, in the memory that the model has and of one file.

    Weights that something is added to are float32, so that it is not rounded away; the others keep their dtype.

    Args:
        model: of peft, on the CPU, without what else wraps it; its LoRA is taken off.
        folder: to write.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {
        f"{name.removeprefix('base_model.model.').removesuffix('.token_adapter')}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and name.startswith("base_model.model.")
    }
    plain: PlumeModel = model.unload()
    plain.loss_scalars = None
    dequantize(plain)
    plain.save_pretrained(folder, max_shard_size="500MB")
    left = set(layers)
    for file in sorted(folder.glob("model*.safetensors")):
        weights = load_file(file)
        if touched := {name: merged_weight(layers[name], weights[name]) for name in weights if name in layers}:
            beside = file.with_suffix(".part")  # the file is what the other weights are read from
            save_file(weights | touched, beside, metadata={"format": "pt"})
            beside.replace(file)
            left -= touched.keys()
    if left:
        raise RunError(f"{sorted(left)[0]} has learnt something, and no file of the model holds it")
    write_dtype(folder, "float32")
    tidy_weight_files(folder)


def merged_weight(layer: Any, weight: Tensor) -> Tensor:
    """What a weight comes to with what a layer of peft has learnt beside it, in float32."""
    (name,) = layer.active_adapters
    if hasattr(layer, "get_delta_weight"):
        return weight.float() + layer.get_delta_weight(name).to("cpu", torch.float32)
    rows = torch.tensor(layer.token_indices[name])
    return weight.float().index_copy(0, rows, layer.trainable_tokens_delta[name].to("cpu", torch.float32))


def merge(argv: Sequence[str]) -> int:
    """Merge a checkpoint of a LoRA run into a plain model.

    Args:
        argv: the checkpoint, a folder inside that of its run, and the folder to write.

    Returns:
        0, the exit code.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    parser = Parser(prog="plume-train merge", description=merge.__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("checkpoint", type=Path, help="for example runs/mine/checkpoint-500")
    parser.add_argument("folder", type=Path, help="where the merged model goes")
    known = parser.parse_args(list(argv))
    if not (known.checkpoint / "adapter_config.json").exists():
        raise RunError(
            f"{known.checkpoint} holds no adapter_config.json; expected a checkpoint of a run with lora_rank"
        )
    if known.folder.exists() and any(known.folder.iterdir()):
        raise RunError(f"{known.folder} is not empty; choose another folder")
    args = begun_with(known.checkpoint.resolve().parent)
    # As the run has built it, so that what learns is not rounded to the dtype of what does not.
    bare = load_model(args)
    freeze(bare, args)
    model = add_lora(bare, args)
    widen_what_learns(model)
    set_peft_model_state_dict(model, load_peft_weights(str(known.checkpoint), device="cpu"))
    config = model.get_base_model().config
    if args.target_steps is not None:
        config.document_latent_steps = args.target_steps
    state = json.loads((known.checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))
    config.num_latent_steps = state["num_latent_steps"]
    save_merged(model, known.folder)
    return 0

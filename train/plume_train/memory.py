"""What a run will need of a device's memory, said before it starts: derived from shapes, and not measured.

    weights      every parameter in its dtype
    gradients    of what learns, in its dtype
    optimiser    two moments of Adam in float32; none for plain SGD, one for anything that keeps a momentum
    activations  what one pass keeps for its backward: per token and layer about 8 D + 4 I numbers of the compute dtype
                 (inputs of norms, attention and products), or D with activation checkpointing and one layer in full;
                 and the logits of the suffix, twice in float32

ZeRO-1 shares the optimiser out among processes, ZeRO-2 the gradients too, ZeRO-3 and FSDP2 all three. A run that keeps
the vision tower's activations, long attention without a fused kernel, or fragments of memory, needs more.

Letters: D hidden size, I size of the MLP, V vocabulary.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate import DistributedType

from plume_train.trainer import sampler_of

if TYPE_CHECKING:
    from plume_train.trainer import PlumeTrainer

_GIB = 2**30
#: Rows whose lengths are looked at.
_NUM_ROWS = 8
#: Optimisers that keep no moments, or one; all others are taken to keep two.
_MOMENTS = {"sgd": 0, "rmsprop": 1, "adagrad": 1, "lion_32bit": 1, "adafactor": 0}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = {"weights": self.weights, "gradients": self.gradients, "optimiser": self.optimizer}
        parts["activations of a pass"] = self.activations
        # With three digits of the whole.
        size, unit, digits = (_GIB, "GiB", 2) if self.total >= _GIB else (_GIB >> 10, "MiB", 0)
        listed = ", ".join(f"{name} {count / size:.{digits}f}" for name, count in parts.items())
        return f"about {self.total / size:.{digits}f} {unit} on each device ({listed})"


def expected_memory(
    model: torch.nn.Module,
    text_config: Any,
    *,
    num_rows: int,
    num_tokens: int,
    num_labels: int,
    compute_dtype: torch.dtype,
    checkpointing: bool,
    moments: int,
    shares: tuple[int, int, int] = (1, 1, 1),
) -> Memory:
    """The memory of a step.

    Args:
        model: with what learns and what is frozen.
        text_config: of the language model.
        num_rows: of a pass.
        num_tokens: of its longest row: prefix, latent steps and suffix.
        num_labels: supervised tokens of the pass.
        compute_dtype: of the passes.
        checkpointing: whether layers are recomputed.
        moments: that the optimiser keeps of each parameter.
        shares: processes that share weights, gradients and the optimiser's state.

    Example:
        >>> from torch import nn
        >>> shapes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 10}
        >>> config = type("Config", (), shapes)
        >>> limits = {"num_rows": 1, "num_tokens": 4, "num_labels": 0, "moments": 2, "checkpointing": False}
        >>> memory = expected_memory(nn.Linear(4, 4, bias=False), config, compute_dtype=torch.float32, **limits)
        >>> memory.weights, memory.gradients, memory.optimizer, memory.activations
        (64.0, 64.0, 128.0, 4096)
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    width, inner = text_config.hidden_size, text_config.intermediate_size
    per_layer, itemsize = 8 * width + 4 * inner, compute_dtype.itemsize
    layers = text_config.num_hidden_layers
    per_token = width * layers + per_layer if checkpointing else per_layer * layers
    return Memory(
        weights=sum(parameter.nbytes for parameter in model.parameters()) / shares[0],
        gradients=sum(parameter.nbytes for parameter in learning) / shares[1],
        optimizer=moments * sum(4 * parameter.numel() for parameter in learning) / shares[2],
        activations=num_rows * num_tokens * per_token * itemsize + 2 * num_labels * text_config.vocab_size * 4,
    )


def tell_memory(trainer: PlumeTrainer) -> None:
    """Say what a run will need beside what the device has, from the lengths of its first rows; a warning if it is more.

    The other side of a pair, and the gradients that GradCache keeps, are small beside a pass.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if not args.should_save:
        return
    dataset: Any = trainer.train_dataset
    curriculum = trainer.curriculum
    draws = next(iter(sampler_of(args, dataset.records, curriculum, num_steps=1)))[:_NUM_ROWS]
    batch = trainer.collate([dataset[draw] for draw in draws])
    passes = [inputs["inputs"] for micro_batches in batch["passes"].values() for inputs in micro_batches]
    num_rows = args.micro_batch_size or args.per_device_train_batch_size
    # The longest row decides, with the most latent steps that any stage takes.
    suffixes = max(inputs["suffix_ids"].shape[1] for inputs in passes)
    steps = max(curriculum.num_latent_steps(stage) for stage in curriculum.stages)
    num_tokens = max(inputs["input_ids"].shape[1] for inputs in passes) + suffixes + steps
    if args.micro_batch_tokens:
        num_rows = min(num_rows, max(args.micro_batch_tokens // num_tokens, 1))
    world, stage = args.world_size, 0
    if accelerator.distributed_type == DistributedType.FSDP:
        stage = 3
    elif accelerator.state.deepspeed_plugin is not None:
        stage = accelerator.state.deepspeed_plugin.zero_stage
    memory = expected_memory(
        trainer.model,  # type: ignore[arg-type]
        trainer.bare_model.backbone.config.get_text_config(),
        num_rows=num_rows,
        num_tokens=num_tokens,
        num_labels=num_rows * suffixes,
        compute_dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
        checkpointing=bool(args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)),
        moments=next((count for name, count in _MOMENTS.items() if str(args.optim).startswith(name)), 2),
        shares=(world if stage == 3 else 1, world if stage >= 2 else 1, world if stage >= 1 else 1),
    )
    if args.device.type == "cuda":
        free, has = torch.cuda.mem_get_info(args.device)[1], "the device has"
    else:
        free, has = psutil.virtual_memory().available, "this machine has free"
    text = f"expected memory: {memory}; {has} {free / _GIB:.2f} GiB"
    args.tell(text)
    if memory.total > free:
        warnings.warn(
            f"plume: {text}. The run will probably not fit; lower micro_batch_size, set gradient_checkpointing, "
            "lora_rank with base_dtype=bfloat16, or share it out with zero2.yaml",
            stacklevel=2,
        )

"""What training takes of memory: derived for recipes from shapes, and measured for one that two CPU cores can run.

python train/memory.py              the table of recipes alone
python train/memory.py --measure    and LoRA at the shapes of Qwen2-VL-2B, one step of two short rows; half an hour
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plume import PlumeModel
from plume.random_models import SHAPES_2B, SHAPES_7B, SHORT_STRINGS, random_model, save_tiny_backbone
from plume.terminal import Parser, run_script
from plume_eval.report import markdown_table, write_report
from plume_train.config import LORA_TARGETS
from plume_train.memory import expected_memory

_GIB = 2**30
WORDS = ("red", "kite", "blue", "bird")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run of so many devices; see `train/README.md`.

    lora_rank: 0 trains the language model in full. shares: processes that share weights, gradients and optimiser.
    rows: of a pass; tokens: of each, as 256 visual ones with a question, a rationale and eight latent steps.
    """

    name: str
    has_gib: float
    shapes: Any
    lora_rank: int
    base_dtype: str
    rows: int
    tokens: int = 700
    labels: int = 200
    moments: int = 2
    shares: tuple[int, int, int] = (1, 1, 1)


RECIPES = (
    Recipe(name="24 GB: 2B, LoRA", has_gib=24, shapes=SHAPES_2B, lora_rank=16, base_dtype="bfloat16", rows=8),
    Recipe(name="24 GB: 7B, QLoRA", has_gib=24, shapes=SHAPES_7B, lora_rank=16, base_dtype="nf4", rows=8),
    Recipe(name="80 GB: 2B in full", has_gib=80, shapes=SHAPES_2B, lora_rank=0, base_dtype="float32", rows=16),
    Recipe(name="80 GB: 7B, LoRA", has_gib=80, shapes=SHAPES_7B, lora_rank=16, base_dtype="bfloat16", rows=16),
    Recipe(
        name="eight of 80 GB: 2B in full, ZeRO-2",
        has_gib=80,
        shapes=SHAPES_2B,
        lora_rank=0,
        base_dtype="bfloat16",
        rows=32,
        moments=3,  # two, and a float32 copy of the weights
        shares=(1, 8, 8),
    ),
)


def derived(recipe: Recipe) -> dict[str, Any]:
    """Bytes of a step on each device, from shapes alone."""
    is_packed = recipe.base_dtype == "nf4"
    model = shaped(recipe.shapes, "meta", torch.bfloat16 if is_packed else getattr(torch, recipe.base_dtype))
    packed = [layer.weight for name, layer in model.named_modules() if is_packed and re.fullmatch(LORA_TARGETS, name)]
    if recipe.lora_rank:
        learns = with_lora(model, recipe.lora_rank)
    else:
        model.backbone.visual.requires_grad_(False)
        model.backbone.visual.merger.requires_grad_(True)
        learns = model
    memory = expected_memory(
        learns,
        model.backbone.config.get_text_config(),
        num_rows=recipe.rows,
        num_tokens=recipe.tokens,
        num_labels=recipe.rows * recipe.labels,
        compute_dtype=torch.bfloat16,
        checkpointing=True,
        moments=recipe.moments,
        shares=recipe.shares,
    )
    # Half a byte each, and a float32 for 64 of them.
    memory = replace(
        memory, weights=memory.weights - sum(one.nbytes - one.numel() * (1 / 2 + 4 / 64) for one in packed)
    )
    parts = {name: getattr(memory, name) for name in ("weights", "gradients", "optimizer", "activations", "total")}
    return {"recipe": recipe.name, "has_gib": recipe.has_gib, "rows": recipe.rows, "tokens": recipe.tokens} | {
        name: size / _GIB for name, size in parts.items()
    }


def shaped(shapes: Any, device: str, dtype: torch.dtype) -> PlumeModel:
    """A model of random weights, or of none on "meta"."""
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_backbone(folder, WORDS)
        small = PlumeModel.from_backbone(folder, num_latent_steps=8, **SHORT_STRINGS)
    return random_model(small, shapes, device, dtype)


def with_lora(model: PlumeModel, rank: int) -> nn.Module:
    """LoRA on the language model, and what learns in full, as `plume_train.lora` puts them."""
    from peft import LoraConfig, get_peft_model

    whole = ["transition", "backbone.visual.merger"]
    config = LoraConfig(r=rank, target_modules=LORA_TARGETS, modules_to_save=whole)
    wrapped: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    for weight in wrapped.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.float32)
    return wrapped


def measured(base_dtype: str) -> dict[str, Any]:
    """Peak memory of a process that trains LoRA at the shapes of Qwen2-VL-2B on this CPU, one step of two rows."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        shaped(SHAPES_2B, "cpu", torch.bfloat16).save_pretrained(folder / "model")
        rows = [
            {"query": {"text": f"red {word}", "rationale": "It is red. It is so."}, "target": word}
            for word in WORDS[1:3]
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        command = [
            *(sys.executable, "-m", "plume_train", "--model", folder / "model", "--train_file", folder / "rows.jsonl"),
            *("--output_dir", folder / "out", "--lora_rank", 16, "--base_dtype", base_dtype, "--bf16", "true"),
            *("--per_device_train_batch_size", 2, "--max_steps", 1, "--curriculum", "direct", "--num_segments", 8),
            *("--use_cpu", "true", "--gradient_checkpointing", "true", "--save_strategy", "no"),
        ]
        began = time.perf_counter()
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"the run failed: {done.stderr[-2000:]}")
        told = [line for line in done.stderr.splitlines() if "expected memory" in line]
        log = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        return {
            "base_dtype": base_dtype,
            "expected": told[-1].partition("expected memory: ")[2] if told else "",
            "peak_gib_until_the_step": next(line["peak_memory_gib"] for line in log if "peak_memory_gib" in line),
            "peak_gib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / _GIB,
            "minutes": (time.perf_counter() - began) / 60,
        }


def main() -> None:
    """Derive, measure, write."""
    parser = Parser(description=str(__doc__))
    parser.add_argument("--measure", action="store_true", help="also run LoRA at 2B on this CPU")
    parser.add_argument("--base-dtype", nargs="+", default=["nf4", "bfloat16", "float32"], help="of the frozen weights")
    parser.add_argument("--out", type=Path, default=Path("eval/results"))
    options = parser.parse_args()
    found = [derived(recipe) for recipe in RECIPES]
    columns = ["recipe", "rows of a pass", "tokens", "weights", "gradients", "optimiser", "activations", "GiB in all"]
    rows = [
        [one["recipe"], one["rows"], one["tokens"]]
        + [f"{one[name]:.1f}" for name in ("weights", "gradients", "optimizer", "activations", "total")]
        for one in found
    ]
    text = f"Derived from shapes, on each device, with activation checkpointing:\n\n{markdown_table(columns, rows)}"
    runs: list[dict[str, Any]] = []
    for base_dtype in options.base_dtype if options.measure else ():
        # A process of its own, since the system keeps one peak for all children.
        told = subprocess.run(
            [sys.executable, __file__, "--one", base_dtype], capture_output=True, text=True, check=False
        )
        if told.returncode:
            raise ValueError(told.stderr[-3000:])
        runs.append(json.loads(told.stdout.splitlines()[-1]))
    if runs:
        table = markdown_table(
            ["base_dtype", "expected", "peak GiB until the step", "peak GiB of the run", "minutes"],
            [
                [one["base_dtype"], one["expected"]]
                + [f"{one[name]:.1f}" for name in ("peak_gib_until_the_step", "peak_gib", "minutes")]
                for one in runs
            ],
        )
        text += (
            f"\n\nMeasured on a CPU, LoRA of rank 16 at the shapes of Qwen2-VL-2B, two short rows, one step:\n\n{table}"
        )
    write_report(
        options.out,
        "train_memory",
        "Memory of training",
        " ".join(["train/memory.py", *sys.argv[1:]]),
        text,
        {"derived": found, "measured": runs},
    )
    print(text)  # noqa: T201


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measured(sys.argv[2])))  # noqa: T201
    else:
        run_script("memory.py", main)

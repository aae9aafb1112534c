"""`plume-train --help`: plume's own settings in groups, read from the source of `config.py`; it answers at once."""

from __future__ import annotations

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

_USAGE = """\
plume-train [--config FILE] [--SETTING VALUE ...]   train; a flag wins over the same key in the YAML file, which is one
                                                    of yours, or comes with plume: demo, lora, paper, published
plume-train check DATA [--SETTING VALUE ...]        look at training data before a GPU is paid for
plume-train rationales DATA --out FILE ...          write the rationales that pairs lack, with any model on a server
plume-train mine DATA --model M --out FILE          hard negatives, and groups of rows for batches
plume-train vectors DATA --model M --out FOLDER     vectors to mine from, and to learn from as of a bigger embedder
plume-train gate MODEL --data PAIRS --out FOLDER    teach a trained model which queries need latent steps
plume-train merge CHECKPOINT FOLDER                 merge a checkpoint of a LoRA run into a plain model
plume-train soup MODEL MODEL ... --out FOLDER       one model whose weights are the mean of several
plume-train accelerate NAME                         where a configuration of accelerate is: single, ddp, zero2, ...
"""

#: Where each group of `PlumeTrainingArguments` begins.
_GROUPS = {
    "model": "Model, data and folder",
    "curriculum": "Curriculum",
    "num_negatives": "Objective",
    "train_vision": "What learns, and in what",
    "evaluation": "While it runs",
}

#: Those of transformers that most runs set.
_OF_TRANSFORMERS = """\
  --output_dir PATH, --seed N, --use_cpu, --disable_tqdm, --report_to tensorboard|wandb|trackio
  --max_steps N or --num_train_epochs X, --per_device_train_batch_size N, --gradient_accumulation_steps N
  --learning_rate X, --lr_scheduler_type NAME, --warmup_steps N, --optim NAME, --weight_decay X, --max_grad_norm X
  --bf16, --gradient_checkpointing, --dataloader_num_workers N
  --logging_steps N, --save_strategy steps|epoch|no, --save_steps N, --save_total_limit N
  --resume_from_checkpoint auto|no|FOLDER
"""


def settings_help() -> str:
    """The text of `--help`."""
    width = min(shutil.get_terminal_size((120, 0)).columns, 120)
    lines = [_USAGE]
    for name, kind, default, what in _own_settings():
        if name in _GROUPS:
            lines += ["", _GROUPS[name]]
        flag = f"  --{name} {kind}".rstrip() + (f" = {default}" if default else "")
        what = re.split(r"[;.] ", what)[0].rstrip(".")  # the whole is in the source, and in --help-all
        lines += textwrap.wrap(f"{flag:<36}  {what}", width, subsequent_indent=" " * 6, break_on_hyphens=False)
    lines += ["", "Of transformers (`--help-all` lists every setting)", _OF_TRANSFORMERS]
    return "\n".join(lines)


def _own_settings() -> Iterator[tuple[str, str, str, str]]:
    """Name, kind, default and docstring of every field of `PlumeTrainingArguments`."""
    tree = ast.parse(Path(__file__).with_name("config.py").read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments")).body
    for setting, text in pairwise(body):
        if isinstance(setting, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            default = ast.unparse(setting.value) if setting.value else ""
            # What has no short form is named in the docstring.
            default = "" if default.startswith("field") or default.isupper() else default.strip("'")
            default = "" if default == "None" else default
            name = ast.unparse(setting.target)
            yield name, _kind(setting.annotation), default, " ".join(str(text.value.value).split())


def _kind(annotation: ast.expr) -> str:
    text = ast.unparse(annotation).removesuffix(" | None")
    if text.startswith("Literal"):
        return "|".join(ast.literal_eval(text.removeprefix("Literal")))
    shown = {"int": "N", "float": "X", "str": "TEXT", "bool": "", "list[str]": "TEXT ...", "list[float]": "X ..."}
    return {**shown, "list[int]": "N ...", "dict | str": "JSON"}[text]

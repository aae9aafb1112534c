"""Checkpoints that an interruption cannot harm, and the run that they belong to.

A checkpoint is written under another name and renamed when it is whole; so what is called `checkpoint-N` is whole, and
the ones before it are deleted only then. `run.json` beside them says with what settings the run began: the same command
goes on with it, another one is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import get_last_checkpoint

from plume_train.config import PlumeTrainingArguments

UNFINISHED = "unfinished"
# How torch.save says that a file could not be written to its end.
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "unexpected pos", "file write failed", "No space left")
RUN_FILE = "run.json"

# What may differ between the start of a run and its continuation: what changes no result.
_FREE = {
    "output_dir",
    "resume_from_checkpoint",
    "disable_tqdm",
    "evaluate_every",
    "evaluation",
    "evaluation_arguments",
    "num_cached_images",
    "run_name",
    "project",
    "local_rank",
    "ddp_backend",
    "ddp_timeout",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
}
_FREE_STARTS = ("logging_", "log_", "report_", "save_", "push_", "hub_", "eval_", "trackio_", "include_", "_")


class RunError(RuntimeError):
    """A run that cannot begin, go on or save; says what to do, and that nothing is lost."""


def remember_run(args: PlumeTrainingArguments, num_rows: int) -> None:
    """Write `run.json`, or compare with it where the folder already holds a run.

    Args:
        args: of the run.
        num_rows: rows that it trains on.

    Raises:
        RunError: the folder cannot be written to, or it holds checkpoints of another run.
    """
    folder = args.output_folder
    wanted = settings_of(args) | {"num_rows": num_rows}
    file = folder / RUN_FILE
    if folder.is_dir() and get_last_checkpoint(str(folder)) is not None:
        if args.resume_from_checkpoint in (None, "no"):
            raise RunError(
                f"{folder} holds checkpoints, but resume_from_checkpoint is off; set it to auto to go on, choose "
                "another output_dir, or remove the folder"
            )
        begun = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        changed = [name for name in sorted(wanted) if begun.get(name, wanted[name]) != wanted[name]]
        if changed:
            listed = "; ".join(f"{name} was {begun[name]!r}, now {wanted[name]!r}" for name in changed[:5])
            raise RunError(
                f"{folder} holds checkpoints of a run with other settings: {listed}. Start it with the same settings "
                "to go on, choose another output_dir, or remove the folder"
            )
        return
    if not args.should_save:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{folder} cannot be written to ({error.strerror}); choose another output_dir") from None


def settings_of(args: PlumeTrainingArguments) -> dict[str, Any]:
    """All that decides the result of a run."""
    names = [one.name for one in fields(args) if one.name not in _FREE and not one.name.startswith(_FREE_STARTS)]
    known = {name: getattr(args, name) for name in names} | {"world_size": args.world_size}
    return json.loads(json.dumps(known, default=str))


def checkpoint_to_resume(args: PlumeTrainingArguments) -> Path | None:
    """The checkpoint that the settings ask for; None to begin.

    Raises:
        RunError: it does not exist, or is not a checkpoint of this trainer.
    """
    asked = args.resume_from_checkpoint
    if asked in (None, "no"):
        return None
    folder = args.output_folder
    found = asked if asked != "auto" else get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        return None
    needed = ("trainer_state.json", "progress.json", *(() if _is_deepspeed(Path(found)) else ("scheduler.pt",)))
    if missing := [name for name in needed if not (Path(found) / name).exists()]:
        raise RunError(
            f"{found} is no checkpoint that training can go on from: it holds no {missing[0]}; expected "
            "resume_from_checkpoint to be auto, no, or a folder checkpoint-N of a run without save_only_model"
        )
    return Path(found)


def _is_deepspeed(checkpoint: Path) -> bool:
    return (checkpoint / "latest").exists()


def begun_with(folder: Path) -> PlumeTrainingArguments:
    """The settings that the run in a folder began with, as far as `plume-train` has them itself.

    Raises:
        RunError: no run began there.
    """
    file = folder / RUN_FILE
    if not file.exists():
        raise RunError(f"{folder} holds no {RUN_FILE}; expected the folder of a run")
    known = json.loads(file.read_text(encoding="utf-8"))
    own = {name: value for name, value in known.items() if name in PlumeTrainingArguments.__annotations__}
    return PlumeTrainingArguments(**own, output_dir=str(folder), report_to="none", use_cpu=True)


@contextmanager
def whole_or_nothing(folder: Path, is_writer: bool) -> Iterator[Path]:
    """Yields a folder to write into, whose entries are moved to `folder` at the end.

    Files take the place of files of the same name one by one; folders appear whole.

    Raises:
        RunError: it could not be written; what `folder` held is untouched.
    """
    unfinished = folder / UNFINISHED
    # The inner folder bears the final name, which model cards repeat.
    inner = unfinished / folder.resolve().name
    try:
        if is_writer:
            shutil.rmtree(unfinished, ignore_errors=True)
            inner.mkdir(parents=True)
        yield inner
    except (OSError, SafetensorError) as error:
        raise _not_saved(folder, unfinished, str(error)) from error
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _TORCH_CANNOT_WRITE):
            raise
        raise _not_saved(folder, unfinished, str(error)) from error


def move_into(unfinished: Path, folder: Path) -> None:
    """Move what `whole_or_nothing` yielded into its place, replacing what has the same name."""
    for entry in sorted(unfinished.iterdir()):
        place = folder / entry.name
        if entry.is_dir() and place.exists():
            shutil.rmtree(place)
        os.replace(entry, place)
    shutil.rmtree(unfinished.parent)


def _not_saved(folder: Path, unfinished: Path, why: str) -> RunError:
    shutil.rmtree(unfinished, ignore_errors=True)
    last = get_last_checkpoint(str(folder)) if folder.exists() else None
    kept = f"the last good checkpoint, {last}, is untouched" if last else "there is no earlier checkpoint"
    return RunError(
        f"saving in {folder} failed: {why}; {kept}. Make sure that the disk has space and the folder can be written "
        "to, and start the same command again"
    )

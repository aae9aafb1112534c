"""Checkpoints that an interruption cannot harm, and the run that they belong to.

A checkpoint is written under another name, with checksums, and renamed once it is on the disk; so what is called
`checkpoint-N` is whole, and the ones before it are deleted only then. What a disk or a copy damages later is noticed by
the checksums, and the run goes on from the newest checkpoint that is whole. `run.json` beside them says with what
settings and data the run began: the same command goes on with it, another one is refused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import get_last_checkpoint

from plume.checkpoints.folder import tidy_weight_files
from plume_train.config import PlumeTrainingArguments
from plume_train.objective.gather import is_distributed

UNFINISHED = "unfinished"
# How torch.save says that a file could not be written to its end.
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "unexpected pos", "file write failed", "No space left")
RUN_FILE = "run.json"
LOG_FILE = "log.jsonl"
_FINISHED = "finished"
CHECKSUMS_FILE = "checksums.json"
_BLOCK_BYTES = 1 << 24

_REMEDY = "choose another output_dir, or set overwrite=true, which replaces it"
# What a run writes beside its checkpoints, and what somebody may have put into the folder before.
_WRITTEN = (LOG_FILE, "training.png", "README.md", "config.json", "modules.json", "tokenizer.json", "adapter")

# What may differ between the start of a run and its continuation: what changes no result.
_FREE = {
    "output_dir",
    "overwrite",
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


def check_output(args: PlumeTrainingArguments) -> None:
    """Refuse an output folder that holds a run or a model of other settings, before any row is read.

    Raises:
        RunError: says what is there, and how to keep or to replace it.
    """
    folder = args.output_folder
    if args.overwrite or not folder.is_dir():
        return
    begun = read_run(folder) if (folder / RUN_FILE).exists() else None
    if checkpoints(folder) and args.resume_from_checkpoint in (None, "no"):
        raise RunError(
            f"{folder} holds checkpoints, but resume_from_checkpoint is off; set it to auto to go on, {_REMEDY}"
        )
    if begun is None and not checkpoints(folder):
        if _holds_model(folder):
            raise RunError(f"{folder} holds a model that was not trained there; {_REMEDY}")
        if taken := [name for name in _WRITTEN if (folder / name).exists()]:
            raise RunError(f"{folder} holds a {taken[0]} that no run has written there; {_REMEDY}")
    if begun is not None and _holds_work(folder):
        _check_same(folder, begun, settings_of(args))


Standing = Literal["new", "unfinished", "finished", "replaced"]
"""Of a run in its folder: whether the folder holds nothing of it, its checkpoints or its model, or work to replace."""


def standing_of(args: PlumeTrainingArguments, run: dict[str, Any]) -> Standing:
    """How far a run is, by what its folder holds; writes nothing.

    Args:
        args: of the run.
        run: its settings and data, of `settings_of` and the digests of the rows.

    Raises:
        RunError: the folder holds a run with other settings or data.
    """
    folder = args.output_folder
    begun = read_run(folder) if (folder / RUN_FILE).exists() else None
    if not _holds_work(folder):
        return "new"
    is_finished = begun is not None and begun.get(_FINISHED, True) and _holds_model(folder)
    asked = args.resume_from_checkpoint
    is_other = begun is None or bool(_changed(begun, run)) or is_finished
    # A checkpoint that is asked for by name may be one of those that would be replaced.
    if args.overwrite and (asked in (None, "no") or (asked == "auto" and is_other)):
        return "replaced"
    if begun is not None:
        _check_same(folder, begun, run)
    # Without run.json, which somebody may delete, checkpoints count as the run's own.
    return "finished" if is_finished and asked in (None, "auto", "no") else "unfinished"


def begin_run(args: PlumeTrainingArguments, run: dict[str, Any], standing: Standing) -> None:
    """Write `run.json`; first remove what the run replaces, so that nothing is lost before it can begin.

    Raises:
        RunError: the folder cannot be written to.
    """
    folder = args.output_folder
    if not args.should_save or (standing == "unfinished" and (folder / RUN_FILE).exists()):
        return
    if standing == "replaced":
        _remove_work(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_run(folder, run | {_FINISHED: False})
    except OSError as error:
        raise RunError(f"{folder} cannot be written to ({error.strerror}); choose another output_dir") from None


def note_finished(folder: Path) -> None:
    """Let the model in the folder count as that of its run; another one may have been there before."""
    if (folder / RUN_FILE).exists():
        _write_run(folder, read_run(folder) | {_FINISHED: True})


def _write_run(folder: Path, content: dict[str, Any]) -> None:
    beside = folder / f"{RUN_FILE}.part"
    beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _to_disk(beside)
    beside.replace(folder / RUN_FILE)


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").exists() and any(folder.glob("model*.safetensors"))


def _holds_work(folder: Path) -> bool:
    """Whether anything would be lost; a run that failed before its first step leaves nothing but `run.json`."""
    return _holds_model(folder) or bool(checkpoints(folder)) or (folder / LOG_FILE).exists()


def _changed(begun: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [name for name in sorted(wanted) if begun.get(name, wanted[name]) != wanted[name]]


def _check_same(folder: Path, begun: dict[str, Any], wanted: dict[str, Any]) -> None:
    if changed := _changed(begun, wanted):
        listed = "; ".join(f"{name} was {begun[name]!r}, now {wanted[name]!r}" for name in changed[:5])
        raise RunError(
            f"{folder} holds the work of a run with other settings or data: {listed}. Start it with the same ones to "
            f"go on, {_REMEDY}"
        )


def _remove_work(folder: Path) -> None:
    """Remove what a run would go on from; a model stays until there is another one to take its place."""
    for path in checkpoints(folder):
        shutil.rmtree(path, ignore_errors=True)
    for path in [*(folder / name for name in (RUN_FILE, LOG_FILE, "training.png")), *folder.glob("bad_rows*.txt")]:
        path.unlink(missing_ok=True)


def read_run(folder: Path) -> dict[str, Any]:
    """What `run.json` says.

    Raises:
        RunError: it is damaged.
    """
    file = folder / RUN_FILE
    try:
        settings = dict(json.loads(file.read_text(encoding="utf-8")))
        if settings.get("optimizer_reset") == "moments":  # an older name of what is the same for AdamW
            settings["optimizer_reset"] = "full"
        return settings
    except (ValueError, TypeError, OSError) as error:
        raise RunError(
            f"{file} is damaged ({error}); it says with what settings and data the run began: copy it back, or delete "
            "it to go on with those that are set now"
        ) from None


def settings_of(args: PlumeTrainingArguments) -> dict[str, Any]:
    """All that decides the result of a run; an evaluation does where stages wait for it."""
    free = {name for name in _FREE if args.advance != "explicit_recall" or not name.startswith("evaluat")}
    names = [field.name for field in fields(args) if field.name not in free and not field.name.startswith(_FREE_STARTS)]
    known = {name: getattr(args, name) for name in names} | {"world_size": args.world_size}
    return json.loads(json.dumps(known, default=str))


def checkpoint_to_resume(args: PlumeTrainingArguments) -> Path | None:
    """The checkpoint that the settings ask for, "auto" the newest that is whole; None to begin. A collective call.

    Raises:
        RunError: it does not exist, is damaged, or is not a checkpoint of this trainer; or none of several is whole.
    """
    asked = args.resume_from_checkpoint
    if asked in (None, "no"):
        return None
    # One process reads the files, which may be gigabytes, and the others follow it.
    answer: list[Any] = [_choose(args.output_folder, str(asked)) if args.process_index == 0 else None]
    if is_distributed():
        answer = broadcast_object_list(answer)
    chosen, damaged = answer[0]
    if chosen is None and damaged:
        raise RunError(
            f"no checkpoint that training can go on from: {'; '.join(damaged)}. Expected resume_from_checkpoint to be "
            "auto, no, or a folder checkpoint-N of a run without save_only_model; copy the files back, or remove the "
            "folder to begin anew"
        )
    if damaged and args.should_save:
        warnings.warn(f"plume: {'; '.join(damaged)}. The run goes on from {chosen}", stacklevel=3)
    return chosen


def _choose(folder: Path, asked: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and what is wrong with those that come before it."""
    candidates = checkpoints(folder)[::-1] if asked == "auto" else [Path(asked)]
    damaged = []
    for checkpoint in candidates:
        if (reason := damage(checkpoint)) is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint} {reason}")
    return None, damaged


def checkpoints(folder: Path) -> list[Path]:
    """Folders checkpoint-N of a run, the newest last."""
    found = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def damage(checkpoint: Path) -> str | None:
    """Why training cannot go on from a checkpoint, with the file; None where it is whole."""
    if not checkpoint.is_dir():
        return "is no folder"
    needed = ["trainer_state.json", "progress.json"]
    if not (checkpoint / "latest").exists():  # DeepSpeed keeps its own files
        needed.append("scheduler.pt")
        if not any(checkpoint.glob("optimizer*")):
            needed.append("optimizer.pt")
    if missing := [name for name in needed if not (checkpoint / name).exists()]:
        return f"holds no {missing[0]}"
    if not any(checkpoint.glob("rng_state*.pth")):
        return "holds no rng_state.pth"
    if not (checkpoint / CHECKSUMS_FILE).exists():  # of an earlier version of this trainer
        return next((why for file in sorted(checkpoint.rglob("*")) if (why := _visible_damage(file))), None)
    try:
        expected = dict(json.loads((checkpoint / CHECKSUMS_FILE).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        return f"has a damaged {CHECKSUMS_FILE} ({error})"
    if unlisted := [name for name in needed if name not in expected]:
        return f"has a damaged {CHECKSUMS_FILE}, which does not list {unlisted[0]}"
    for name, checksum in expected.items():
        try:
            if _checksum(checkpoint / name) != checksum:
                return f"has a damaged {name}, which is not what was written"
        except OSError as error:
            return f"has a {name} that cannot be read ({error.strerror})"
    return None


def _visible_damage(file: Path) -> str | None:
    """What is wrong with a file that has no checksum, as far as its format tells."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        elif file.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(file) as archive:
                if (member := archive.testzip()) is not None:
                    return f"has a damaged {file.name} ({member} is not what was written)"
    except (ValueError, SafetensorError, zipfile.BadZipFile, OSError) as error:
        return f"has a damaged {file.name} ({error})"
    return None


def write_checksums(checkpoint: Path) -> None:
    """Note what the files of a checkpoint hold; `move_into` waits until they are on the disk."""
    names = sorted(str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file())
    sums = {name: _checksum(checkpoint / name) for name in names if name != CHECKSUMS_FILE}
    (checkpoint / CHECKSUMS_FILE).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def _checksum(file: Path) -> str:
    value = 0
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def _to_disk(place: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def state_of(folder: Path | None) -> str:
    """What a run that is stopped leaves."""
    if folder is None or not (found := checkpoints(folder)):
        return "nothing was saved"
    return f"the last checkpoint is {found[-1]}; start the same command again to go on from it"


def reason(error: Exception) -> str:
    """An error in a line or a few; one of a data-loader worker without the worker's traceback."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return text


def begun_with(folder: Path) -> PlumeTrainingArguments:
    """The settings that the run in a folder began with, as far as `plume-train` has them itself.

    Raises:
        RunError: no run began there.
    """
    file = folder / RUN_FILE
    if not file.exists():
        raise RunError(f"{folder} holds no {RUN_FILE}; expected the folder of a run")
    known = read_run(folder)
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
    """Move what `whole_or_nothing` yielded into its place, once it is on the disk, replacing what has the same name.

    Weights replace all weights: another number of files has other names, and those of before would be loaded instead.
    """
    for inner in (unfinished, *(path for path in unfinished.iterdir() if path.is_dir())):
        tidy_weight_files(inner)
    for file in sorted(unfinished.rglob("*")):
        _to_disk(file)
    names = {entry.name for entry in unfinished.iterdir()}
    old = set(folder.glob("model*.safetensors")) | {folder / "model.safetensors.index.json"}
    for entry in sorted(unfinished.iterdir()):
        place = folder / entry.name
        if entry.is_dir() and place.exists():
            shutil.rmtree(place)
        os.replace(entry, place)
    if any(name.startswith("model") and name.endswith(".safetensors") for name in names):
        for file in old:
            if file.name not in names:
                file.unlink(missing_ok=True)
    _to_disk(folder)
    shutil.rmtree(unfinished.parent)


def _not_saved(folder: Path, unfinished: Path, why: str) -> RunError:
    shutil.rmtree(unfinished, ignore_errors=True)
    last = get_last_checkpoint(str(folder)) if folder.exists() else None
    kept = f"the last good checkpoint, {last}, is untouched" if last else "there is no earlier checkpoint"
    return RunError(
        f"saving in {folder} failed: {why}; {kept}. Make sure that the disk has space and the folder can be written "
        "to, and start the same command again"
    )

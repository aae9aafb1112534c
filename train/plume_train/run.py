"""One training run, from settings to a saved checkpoint."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import set_seed

from plume.model.model import PlumeModel
from plume_train.callbacks import Evaluate, named_evaluation
from plume_train.config import PlumeTrainingArguments, SettingsError
from plume_train.data.collate import StagedRecords
from plume_train.data.records import Records
from plume_train.data.rows import RecordFormat
from plume_train.data.vectors import VectorStore
from plume_train.lora import ADAPTER_FOLDER, add_lora, save_merged
from plume_train.memory import tell_memory
from plume_train.pictures import draw_run, read_log
from plume_train.saving import (
    LOG_FILE,
    begin_run,
    check_output,
    checkpoint_to_resume,
    move_into,
    note_finished,
    settings_of,
    standing_of,
    whole_or_nothing,
)
from plume_train.start import freeze, load_model, widen_what_learns
from plume_train.trainer import PlumeTrainer, sampler_of


def train(args: PlumeTrainingArguments, evaluate: Evaluate | None = None) -> PlumeModel:
    """Train, and save the model in `args.output_dir`.

    A run that was interrupted goes on from its last checkpoint when started again with the same settings.

    Args:
        args: the settings.
        evaluate: called every `args.evaluate_every` steps.

    Returns:
        The trained model; its `num_latent_steps` is that of the last stage.
    """
    model = train_and_save(args, evaluate)
    return PlumeModel.from_pretrained(args.output_folder).eval() if model is None else model


def train_and_save(args: PlumeTrainingArguments, evaluate: Evaluate | None = None) -> PlumeModel | None:
    """As `train`; None where the model is in the folder alone, as that of LoRA is, merged."""
    _check_processes(args)
    args.check()
    args.check_data()
    check_output(args)
    set_seed(args.seed)
    records = load_records(args, args.train_file)
    curriculum = args.build_curriculum()
    if unknown := sorted(set(args.task_weights or {}) - set(records.tasks)):
        known = ", ".join(sorted(set(records.tasks)))
        raise SettingsError(f"task_weights names {unknown[0]!r}, which is no task of the data; they are {known}")
    for useless in args.without_effect(records) if args.should_save else []:
        warnings.warn(f"plume: {useless}", stacklevel=3)
    held_out = load_records(args, args.validation_file) if args.validation_file else None
    if args.max_steps < 0:
        batches = sampler_of(args, records, curriculum, num_steps=1).batches_per_pass()
        args.max_steps = math.ceil(args.num_train_epochs * batches / args.gradient_accumulation_steps)
    if args.teacher_vectors and args.ranking_weight:
        _check_teacher(args, records)
    run = settings_of(args) | {"num_rows": len(records), "data_digest": records.digest}
    if held_out is not None:
        run["validation_digest"] = held_out.digest
    standing = standing_of(args, run)
    if standing == "finished":
        args.tell(
            f"{args.output_folder} holds the model of this run, which is finished; set overwrite=true to train it "
            "again, or choose another output_dir"
        )
        return None
    checkpoint = checkpoint_to_resume(args) if standing != "replaced" else None
    if standing != "replaced":
        begin_run(args, run, standing)
    if evaluate is None and args.evaluation:
        evaluate = named_evaluation(args.evaluation, args.evaluation_arguments)  # type: ignore[arg-type]

    model: Any = load_model(args)
    for stage in curriculum.stages:
        model.config.check_num_latent_steps(curriculum.num_latent_steps(stage))
    model.config.num_latent_steps = curriculum.num_latent_steps(curriculum.stages[-1])
    if args.target_steps is not None:
        model.config.check_num_latent_steps(args.target_steps)
        model.config.document_latent_steps = args.target_steps
    if args.per_step_weight and model.config.document_steps() < model.config.num_latent_steps:
        raise SettingsError(
            f"per_step_weight contrasts both sides after every step, and targets take "
            f"{model.config.document_steps()} of {model.config.num_latent_steps}; drop it, or set target_steps "
            "to the latter"
        )
    is_quantised = args.matryoshka_precisions != ["float32"]  # then also at their full length
    if args.matryoshka_dims and max(args.matryoshka_dims) >= model.config.hidden_size + is_quantised:
        raise SettingsError(
            f"matryoshka_dims {args.matryoshka_dims} must be shorter than an embedding, {model.config.hidden_size}"
        )
    freeze(model, args)
    if args.lora_rank:
        model = add_lora(model, args)
    widen_what_learns(model)

    validation = StagedRecords(held_out) if held_out is not None else None
    trainer = PlumeTrainer(model, args, StagedRecords(records), curriculum, evaluate, validation)
    tell_memory(trainer)
    if standing == "replaced":
        begin_run(args, run, standing)
        trainer.accelerator.wait_for_everyone()
    for read in (records, held_out):
        if read is not None and read.bad_rows:
            _list_bad_rows(args, read.bad_rows)
    if checkpoint is not None:
        trainer.go_on_from(checkpoint)
        args.tell(f"going on from {checkpoint}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return finish(trainer)


def _check_teacher(args: PlumeTrainingArguments, records: Records) -> None:
    """Refuse vectors that know none of the rows; a warning where they lack many, by a sample."""
    store = VectorStore(args.teacher_vectors or "")
    step = max(len(records) // 500, 1)
    sample = [records[index] for index in range(0, len(records), step)]
    known = (
        store.find("query", [one.query for one in sample])[1] & store.find("target", [one.target for one in sample])[1]
    )
    if not known.any():
        raise SettingsError(
            f"teacher_vectors: {args.teacher_vectors} knows none of {len(sample)} rows that were looked up; write them "
            f"with `plume-train vectors {' '.join(args.train_file)} --out {args.teacher_vectors} --model ...`"
        )
    if known.mean() < 0.9 and args.should_save:
        warnings.warn(
            f"plume: teacher_vectors knows {known.mean():.0%} of the rows, by a sample; the others learn no ranking",
            stacklevel=4,
        )


def _check_processes(args: PlumeTrainingArguments) -> None:
    """Refuse one process where several were meant."""
    if args.n_gpu > 1:
        raise SettingsError(
            f"{args.n_gpu} GPUs are visible to one process, which cannot share out a batch of images; start one "
            "process per GPU with `accelerate launch -m plume_train ...`, or set CUDA_VISIBLE_DEVICES to one"
        )
    # `accelerate launch --cpu` tells one process where the others would meet, and starts none of them.
    is_one = not any(name.endswith(("RANK", "WORLD_SIZE", "PMI_SIZE")) for name in os.environ)
    if is_one and "MASTER_ADDR" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        raise SettingsError(
            "`accelerate launch --cpu` starts one process, whatever --num_processes says; on a CPU write "
            "`ACCELERATE_USE_CPU=true accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 2 "
            "-m plume_train ... --use_cpu true`"
        )


def finish(trainer: PlumeTrainer) -> PlumeModel | None:
    """Save the trained model as one plain folder, list bad rows, draw the summary; see `train_and_save`."""
    args = trainer.args
    trainer.bare_model.config.num_latent_steps = trainer.stage_steps(args.max_steps - 1)
    if trainer.progress.is_held:
        warnings.warn(
            f"plume: no latent stage was trained: recall after the written rationale reached "
            f"{trainer.progress.best_recall:.3f}, and explicit_recall={args.explicit_recall} was asked for, in time "
            "for the stages behind it; raise max_steps, or lower it",
            stacklevel=2,
        )
    if args.lora_rank:
        trainer.save_whole(args.output_folder / ADAPTER_FOLDER)
        trainer.let_go()
        model = None
        if args.should_save:
            with whole_or_nothing(args.output_folder, True) as unfinished:
                save_merged(trainer.accelerator.unwrap_model(trainer.model).cpu(), unfinished)
                move_into(unfinished, args.output_folder)
    else:
        trainer.save_whole(args.output_folder)
        model = trainer.bare_model.eval()
        model.loss_scalars = None
        if args.should_save:  # of a run that this one has replaced
            shutil.rmtree(args.output_folder / ADAPTER_FOLDER, ignore_errors=True)
    if trainer.bad_rows:
        _list_bad_rows(args, trainer.bad_rows)
        skipped = len(set(trainer.bad_rows))
        warnings.warn(f"plume: {skipped} rows were skipped while training; see bad_rows.txt", stacklevel=2)
    if args.should_save:
        picture = args.output_folder / "training.png"
        note_finished(args.output_folder)
        where = f"the model is in {args.output_folder}"
        args.tell(f"{where}, its curves in {picture}" if _draw(trainer, picture) else where)
    trainer.accelerator.wait_for_everyone()
    return model


def _draw(trainer: PlumeTrainer, picture: Path) -> bool:
    """Draw the run; says why where it cannot be drawn."""
    args, stages = trainer.args, [(step, trainer.stage_steps(step)) for step in trainer.progress.borders]
    if not find_spec("matplotlib"):
        args.tell(f"{picture} is not drawn: matplotlib is not installed; pip install 'plume-embed[plot]'")
        return False
    if not draw_run(read_log(args.output_folder / LOG_FILE), stages, picture):
        args.tell(f"{picture} is not drawn: nothing was logged; lower logging_steps")
        return False
    return True


def load_records(args: PlumeTrainingArguments, data: list[str]) -> Records:
    """Rows of some files."""
    return Records(
        data,
        row_format=RecordFormat(
            media_root=Path(args.media_root) if args.media_root else None,
            media_root_only=args.media_root_only,
            needs_target=args.needs_target,
            unclosed_answer=args.unclosed_answer,
        ),
        on_bad_row=args.on_bad_row,
        max_labels=args.max_labels,
        show_progress=args.shows_bars,
    )


def _list_bad_rows(args: PlumeTrainingArguments, bad_rows: list[str]) -> None:
    """Add to the list, each row once."""
    name = "bad_rows.txt" if args.process_index == 0 else f"bad_rows_{args.process_index}.txt"
    report = args.output_folder / name
    report.parent.mkdir(parents=True, exist_ok=True)
    known = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
    lines = [" ".join(row.splitlines()).encode("utf-8", "backslashreplace").decode() for row in bad_rows]
    report.write_text("".join(f"{line}\n" for line in dict.fromkeys([*known, *lines])), encoding="utf-8")

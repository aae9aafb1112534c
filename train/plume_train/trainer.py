"""The trainer: the objective of PLUME on transformers' Trainer."""

from __future__ import annotations

import copy
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer

from plume.model.interface import at_least_float32
from plume.model.model import PlumeModel
from plume_train.alarms import Alarms
from plume_train.callbacks import Console, Evaluate, EvaluationHook, LogFile, StageChange, Validation
from plume_train.config import PlumeTrainingArguments, SettingsError
from plume_train.curriculum import Curriculum
from plume_train.data.collate import SUPERVISED, Batch, PairCollator, StagedRecords
from plume_train.data.records import Records
from plume_train.data.sampler import StagedBatchSampler
from plume_train.data.vectors import VectorStore
from plume_train.metrics import Meter
from plume_train.objective.gather import is_distributed, num_processes, total
from plume_train.objective.gradcache import Step, leveled
from plume_train.objective.objective import Objective
from plume_train.progress import Progress
from plume_train.saving import LOG_FILE, RunError, checkpoints, move_into, whole_or_nothing, write_checksums


class PlumeTrainer(Trainer):
    """Trains a `PlumeModel` through a curriculum."""

    args: PlumeTrainingArguments

    def __init__(
        self,
        model: Any,
        args: PlumeTrainingArguments,
        dataset: StagedRecords,
        curriculum: Curriculum,
        evaluate: Evaluate | None = None,
        validation: StagedRecords | None = None,
    ):
        """Set up.

        Args:
            model: a `PlumeModel` with its processor, or a peft model around one.
            args: the settings; `max_steps` must be set.
            dataset: the rows.
            curriculum: the stages.
            evaluate: called every `args.evaluate_every` steps; what it returns is logged.
            validation: held-out rows.
        """
        bare = bare_model(model)
        assert bare.processor is not None
        self.curriculum = curriculum
        self.progress = Progress(curriculum, args.max_steps)
        num_experts = bare.config.num_experts if bare.config.transition == "moe" else None
        self.objective = Objective(args, num_experts, dataset.records.tasks)
        bare.loss_scalars = self.objective.build_scalars()
        self.collate = PairCollator(
            bare.processor,
            bare.config,
            curriculum,
            micro_batch_size=args.micro_batch_size,
            micro_batch_tokens=args.micro_batch_tokens,
            num_negatives=args.num_negatives,
            labels=dataset.records.labels,
            right_labels=dataset.records.right_labels,
            share=(args.process_index, args.world_size),
            target_steps=bare.config.document_latent_steps,
            teacher_roles=SUPERVISED
            if args.distillation_weight
            else ("query",)
            if self.objective.ranks_by_written
            else (),
            teacher_vectors=VectorStore(args.teacher_vectors) if args.teacher_vectors and args.ranking_weight else None,
            touch_all=args.world_size > 1,
            last_state_predicts=args.last_state_predicts,
            reconstruct=args.reconstruct if args.reconstruct_weight else None,
            reconstruct_sees=args.reconstruct_sees,
            on_bad_row=args.on_bad_row,
            num_cached_images=args.num_cached_images,
        )
        super().__init__(model=model, args=args, train_dataset=dataset, data_collator=self.collate)  # type: ignore[arg-type]
        if is_distributed() and self.accelerator.distributed_type == DistributedType.NO:
            raise RunError(
                "several processes were started, but accelerate keeps them apart, so each would train a model of its "
                "own; on a CPU set use_cpu=true"
            )
        # Before the weights are shared out; afterwards none can be built that is not.
        is_copied = evaluate is not None and self._shares_out_weights() and args.should_save
        self._without_weights = without_weights(bare) if is_copied else None
        embeddings: Any = bare.get_input_embeddings().weight
        some = at_least_float32(embeddings.detach()[:4096])
        self.meter = Meter(args.device, None if self._shares_out_weights() else some.norm(dim=-1).mean())
        self.bad_rows: list[str] = []
        self._where: list[str] = []
        self._saving_in: str | None = None
        self._batches_per_pass: int | None = None
        self.pop_callback(ProgressCallback)
        self.pop_callback(PrinterCallback)
        self.add_callback(Console(args))
        self.add_callback(LogFile(args.output_folder / LOG_FILE))
        is_plain = args.contrastive_loss == "info_nce" and not (args.hardness or args.same_side_negatives)
        num_candidates = args.per_device_train_batch_size * args.world_size * (1 + args.num_negatives)
        self.add_callback(Alarms(num_candidates if is_plain and not args.max_labels else None))
        self.add_callback(StageChange(args.optimizer_reset, self.progress.stage_at))
        if validation is not None:
            self.add_callback(
                Validation(
                    self.progress,
                    partial(self.measure_rows, validation),
                    self.log_beside,
                    every=args.validate_every,
                    ends_stages=args.advance == "settled",
                    patience=args.settle_patience,
                    tolerance=args.settle_tolerance,
                )
            )
        if evaluate is not None and args.evaluate_every:
            self.add_callback(
                EvaluationHook(
                    evaluate,
                    args.evaluate_every,
                    whole_model=self.whole_model,
                    stage_steps=self.stage_steps,
                    log=self.log_beside,
                    barrier=self.accelerator.wait_for_everyone,
                    see_recall=self._see_recall if args.advance == "explicit_recall" else None,
                )
            )
        if args.advance == "explicit_recall":
            if evaluate is None or not args.evaluate_every:
                raise SettingsError(
                    "advance=explicit_recall needs an evaluation, whose recall decides; set evaluation: "
                    "plume_eval.pairs:PairsEvaluation, its arguments with modes: [explicit], and evaluate_every"
                )
            try:
                self.progress.hold_explicit_stage()
            except ValueError as error:
                raise SettingsError(f"advance=explicit_recall does not suit the curriculum: {error}") from None

    def _see_recall(self, step: int, recall: float) -> None:
        if self.progress.note_recall(step, recall, self.args.explicit_recall):
            self.args.tell(f"explicit recall is {recall:.3f} at step {step}; the latent stages begin")

    def _shares_out_weights(self) -> bool:
        plugin = self.accelerator.state.deepspeed_plugin
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    @property
    def bare_model(self) -> PlumeModel:
        """The model without what wraps it."""
        return bare_model(self.accelerator.unwrap_model(self.model))

    def whole_model(self) -> PlumeModel | None:
        """The model with all its weights, on the first process; None on the others. A collective call.

        Where weights are shared out, a copy that takes as much memory as a model on one device.
        """
        if not self._shares_out_weights():
            return self.bare_model if self.args.should_save else None
        weights: Any = self.accelerator.get_state_dict(self.model_wrapped)
        if not self.args.should_save:
            return None
        assert self._without_weights is not None
        model = copy.deepcopy(self._without_weights)
        model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
        model.config.num_latent_steps = self.bare_model.config.num_latent_steps
        return model.to(self.args.device)  # type: ignore[arg-type]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one batch; returns the loss, without gradients."""
        model.train()
        batch = self.prepare_batch(inputs)
        self._where = batch["where"]
        self.bad_rows += batch["bad_rows"]
        step = self._step(model)
        step.scale = 1 / self.current_gradient_accumulation_steps
        step.observe, step.check = self.meter.see_pass, self._stop_if_not_finite
        is_one_pass = all(len(passes) == 1 for passes in batch["passes"].values())
        parts = step.direct(batch) if is_one_pass else step.cached(batch)
        loss = self.objective.weighted(parts).to(self.args.device)
        self.meter.see_step(batch, parts, loss)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return loss * step.scale

    def _step(self, model: nn.Module) -> Step:
        tower = self.bare_model.backbone.visual
        return Step(
            model=model,
            objective=self.objective,
            accelerator=self.accelerator,
            autocast=self.compute_loss_context_manager,
            vision_is_frozen=not any(
                p.requires_grad for p in [*tower.patch_embed.parameters(), *tower.blocks.parameters()]
            ),
        )

    def prepare_batch(self, batch: Any) -> Batch:
        """The batch on this process's device, with as many passes as on any other; a collective call."""
        return leveled(self._prepare_inputs(batch))  # type: ignore[arg-type]

    def measure_rows(self, rows: StagedRecords, stage: int) -> dict[str, float]:
        """Loss terms of all of some rows at a stage, means over their batches; a collective call.

        Args:
            rows: held-out rows.
            stage: index in the curriculum.
        """
        args, tasks = self.args, rows.records.tasks
        size = args.per_device_train_batch_size * args.world_size
        batches = StagedBatchSampler(
            tasks=tasks,
            curriculum=replace(self.curriculum, mix_earlier=0.0, random_steps=False),
            num_steps=sum(math.ceil(tasks.count(task) / size) for task in set(tasks)),
            batch_size=args.per_device_train_batch_size,
            num_processes=args.world_size,
            rank=args.process_index,
            stage_at=lambda _: stage,
        )
        model: Any = self.model_wrapped
        model.eval()
        step, measured = self._step(model), []
        for draws in batches:
            batch = self.collate([rows[draw] for draw in draws])
            self.bad_rows += batch["bad_rows"]
            parts = step.measure(self.prepare_batch(batch))
            measured.append(parts | {"loss": self.objective.weighted(parts).to(args.device)})
        model.train()
        names = dict.fromkeys(name for parts in measured for name in parts)
        means = {name: torch.stack([parts[name] for parts in measured if name in parts]).mean() for name in names}
        everywhere = total(torch.stack(list(means.values()))) / num_processes()
        return dict(zip(means, everywhere.tolist(), strict=True))

    def _stop_if_not_finite(self, parts: dict[str, Tensor]) -> None:
        if not parts or torch.isfinite(torch.stack(list(parts.values())).sum()):
            return
        values = ", ".join(f"{name} {value.item():g}" for name, value in parts.items())
        raise self._broken(f"the loss of step {self.state.global_step + 1} is no number ({values})")

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With fp16 the scaler skips steps whose gradients overflow; anywhere else they mean that something broke.
        if norm is not None and not self.args.fp16 and not torch.isfinite(torch.as_tensor(norm)):
            raise self._broken(f"the gradient of step {self.state.global_step + 1} is no number")
        return norm

    def _broken(self, what: str) -> RunError:
        rows = ", ".join(self._where)
        return RunError(
            f"{what}. Its rows on process {self.args.process_index}: {rows}. All checkpoints are as they were before "
            "it; look at these rows, lower learning_rate, or set max_grad_norm, and start the same command again"
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of the settings, rising again after changes of stage where that is asked for."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.args.rewarmup_steps and isinstance(scheduler, LambdaLR):
            scheduler.lr_lambdas = [self._rewarmed(rate) for rate in scheduler.lr_lambdas]
        return scheduler

    def _rewarmed(self, rate: Any) -> Any:
        def rewarmed(step: int) -> float:
            since = self.progress.steps_in_stage(step)
            return rate(step) * (1.0 if since is None else min(1.0, (since + 1) / self.args.rewarmup_steps))

        return rewarmed

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what was observed since the last log, and the stage."""
        if "loss" in logs:
            logs |= self.meter.take()
            last = max(self.state.global_step - 1, 0)
            logs |= {"stage": self.progress.stage_at(last), "num_latent_steps": self.stage_steps(last)}
        # The Trainer takes the whole run for one epoch, since its loader gives all batches of it.
        epoch, self.state.epoch = self.state.epoch, self.passes_over_data(self.state.global_step)
        super().log(logs, *args, **kwargs)
        self.state.epoch = epoch

    def passes_over_data(self, step: int) -> float:
        """How often the data have been seen after so many optimiser steps."""
        if self._batches_per_pass is None:
            assert isinstance(self.train_dataset, StagedRecords)
            sampler = sampler_of(self.args, self.train_dataset.records, self.curriculum, num_steps=1)
            self._batches_per_pass = sampler.batches_per_pass()
        return step * self.args.gradient_accumulation_steps / self._batches_per_pass

    def stage_steps(self, step: int) -> int:
        """K of the stage of a step."""
        return self.curriculum.num_latent_steps(self.curriculum.stages[self.progress.stage_at(step)])

    def log_beside(self, numbers: dict[str, float]) -> None:
        """Log numbers that are not the training's own, without taking the place of its log at this step."""
        due = self.control.should_log
        self.log(numbers)
        self.control.should_log = due

    def get_train_dataloader(self) -> DataLoader:
        """Batches of the whole run; each process draws its own part, so nothing is sharded a second time."""
        assert isinstance(self.train_dataset, StagedRecords)
        workers = self.args.dataloader_num_workers
        ahead = workers * (self.args.dataloader_prefetch_factor or 2)
        self.progress.lead = ahead // self.args.gradient_accumulation_steps + 2
        sampler = replace(
            sampler_of(self.args, self.train_dataset.records, self.curriculum, self.args.max_steps),
            stage_at=self.progress.stage_at,
        )
        return DataLoader(
            self.train_dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]
            collate_fn=self.collate,
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0,
            multiprocessing_context=self.args.dataloader_multiprocessing_context if workers else None,
            in_order=self.args.dataloader_in_order,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving_in or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, but whole or not at all, and the old ones are deleted last."""
        folder = Path(super()._get_output_dir(trial))
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        # What is saved in the middle of a run is to be used with the K that it has been trained at.
        config, steps = self.bare_model.config, self.stage_steps(max(self.state.global_step - 1, 0))
        last_steps, config.num_latent_steps = config.num_latent_steps, steps
        self.accelerator.wait_for_everyone()
        try:
            with whole_or_nothing(folder, self.args.should_save) as unfinished:
                self.accelerator.wait_for_everyone()
                self._saving_in = str(unfinished)
                super()._save_checkpoint(model, trial)
                scalars = self._loss_scalars()
                checkpoint = unfinished / f"checkpoint-{self.state.global_step}"
                if self.args.should_save:
                    self.progress.save(checkpoint, steps, scalars)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    write_checksums(checkpoint)
                    move_into(unfinished, folder)
        finally:
            self._saving_in = None
            self.args.save_total_limit = limit
            config.num_latent_steps = last_steps
        if self.args.should_save and limit:
            _delete_old_checkpoints(folder, limit)
        self.accelerator.wait_for_everyone()

    def _loss_scalars(self) -> list[list[float]]:
        """What the loss has learnt, for checkpoints of LoRA runs, which hold no other weights."""
        scalars: Any = self.bare_model.loss_scalars
        if scalars is None or not self.args.lora_rank:
            return []
        values: Any = scalars.values.detach()
        return (values.full_tensor() if isinstance(values, DTensor) else values).tolist()

    def go_on_from(self, checkpoint: Path) -> None:
        """Take over what a checkpoint holds beside weights, optimiser and generators; before `train`."""
        scalars: Any = self.bare_model.loss_scalars
        if (learnt := self.progress.load(checkpoint)) and scalars is not None:
            scalars.values.data.copy_(torch.tensor(learnt))

    def let_go(self) -> None:
        """Free what only training needs: gradients and the optimiser's state."""
        self.model.zero_grad()  # type: ignore[union-attr]
        self.optimizer = self.lr_scheduler = None
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
        self.accelerator._optimizers.clear()
        self.accelerator._schedulers.clear()

    def save_whole(self, folder: Path) -> None:
        """Save the model; files that are there already are replaced once everything is written."""
        with whole_or_nothing(folder, self.args.should_save) as unfinished:
            self.accelerator.wait_for_everyone()
            self.save_model(str(unfinished))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                move_into(unfinished, folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Only a checkpoint needs what the loss has learnt; with LoRA nothing but the adapter is saved anyway.
        if self._saving_in is None and self.bare_model.loss_scalars is not None and not self.args.lora_rank:
            whole = self.bare_model.state_dict() if state_dict is None else state_dict
            state_dict = {name: weight for name, weight in whole.items() if not name.startswith("loss_scalars.")}
        super()._save(output_dir, state_dict)
        if self.args.should_save and output_dir is not None:
            # It is a pickle that nothing reads; `run.json` holds the settings.
            Path(output_dir, "training_args.bin").unlink(missing_ok=True)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the Trainer's estimate knows neither two sides nor latent steps."""
        return 0


def sampler_of(
    args: PlumeTrainingArguments, records: Records, curriculum: Curriculum, num_steps: int
) -> StagedBatchSampler:
    """The order of the rows of a run, on this process."""
    return StagedBatchSampler(
        tasks=records.tasks,
        groups=records.groups,
        instruction_dropout=args.instruction_dropout,
        curriculum=curriculum,
        num_steps=num_steps,
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        num_processes=args.world_size,
        rank=args.process_index,
        seed=args.data_seed if args.data_seed is not None else args.seed,
        task_weights=args.task_weights,  # type: ignore[arg-type]
        mixing_temperature=args.mixing_temperature,
    )


def bare_model(model: Any) -> PlumeModel:
    """The `PlumeModel` inside a peft model."""
    return model if isinstance(model, PlumeModel) else model.get_base_model()


def without_weights(model: PlumeModel) -> PlumeModel:
    """A copy whose parameters have shapes and no memory."""
    shapes = {id(one): getattr(one, "ds_shape", one.shape) for one in model.parameters()}
    empty = {key: nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False) for key, shape in shapes.items()}
    return copy.deepcopy(model, empty)  # type: ignore[arg-type]


def _delete_old_checkpoints(folder: Path, limit: int) -> None:
    for old in checkpoints(folder)[:-limit]:
        shutil.rmtree(old, ignore_errors=True)

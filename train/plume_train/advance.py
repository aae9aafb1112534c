"""Where a run stands in its curriculum, and what may move it on: the schedule, or a validation loss that has settled.

A stage ends at its share of the steps. With `advance=settled` it ends before that once the loss on held-out rows has
not improved for some validations. Data-loader workers prepare batches ahead of time, so a decision takes effect a few
steps later, at the first batch that nobody has begun; the borders are saved with every checkpoint.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from plume.gather import num_processes, total
from plume_train.collate import StagedRecords
from plume_train.curriculum import Curriculum
from plume_train.sampler import StagedBatchSampler

if TYPE_CHECKING:
    from plume_train.trainer import PlumeTrainer

PROGRESS_FILE = "progress.json"
_SAVED = ("borders", "stage", "best", "num_waited")


class Progress:
    """The first step of every stage, and how the validation loss of the current one has done."""

    def __init__(self, curriculum: Curriculum, num_steps: int):
        self.borders = [curriculum.first_step(stage, num_steps) for stage in range(len(curriculum.stages))]
        self.lead = 0
        """Steps that batches may have been prepared ahead."""
        self.stage = 0
        self.best = math.inf
        self.num_waited = 0

    def stage_at(self, step: int) -> int:
        """Index of the stage of a step."""
        return sum(step >= border for border in self.borders[1:])

    def steps_in_stage(self, step: int) -> int | None:
        """Steps since the last change of stage; None in the first."""
        stage = self.stage_at(step)
        return None if stage == 0 else step - self.borders[stage]

    def note_validation(self, step: int, loss: float, patience: int, tolerance: float) -> bool:
        """Take a validation loss into account.

        Args:
            step: steps that were taken.
            loss: of the held-out rows.
            patience: validations in a row without improvement after which a stage has settled.
            tolerance: what counts as an improvement, relative to the best loss.

        Returns:
            Whether the stage will end earlier than it would have.
        """
        if self.stage_at(step) != self.stage:
            self.stage, self.best = self.stage_at(step), math.inf
        if math.isinf(self.best) or loss < self.best - tolerance * abs(self.best):
            self.best, self.num_waited = loss, 0
            return False
        self.num_waited += 1
        following, start = self.stage + 1, step + self.lead
        if self.num_waited < patience or following >= len(self.borders) or start >= self.borders[following]:
            return False
        # Later stages keep their lengths and begin earlier; the last one gets what is left.
        saved = self.borders[following] - start
        self.borders[following:] = [border - saved for border in self.borders[following:]]
        return True

    def save(self, folder: Path, num_latent_steps: int, loss_scalars: list[float]) -> None:
        """Write into a checkpoint, with its K and, where the weights do not hold it, what the loss has learnt."""
        state = {name: getattr(self, name) for name in _SAVED}
        state |= {"num_latent_steps": num_latent_steps, "loss_scalars": loss_scalars}
        (folder / PROGRESS_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> list[float]:
        """Go on from a checkpoint; returns what the loss had learnt."""
        state = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        for name in _SAVED:
            setattr(self, name, state[name])
        return state["loss_scalars"]


class Validation(TrainerCallback):
    """Measures the loss on held-out rows at the current stage, and may end the stage."""

    def __init__(self, trainer: PlumeTrainer, rows: StagedRecords):
        self.trainer = trainer
        self.rows = rows

    def on_step_end(self, args, state, control, **kwargs) -> None:
        args, step = self.trainer.args, state.global_step
        if step % args.validate_every and step != state.max_steps:
            return
        progress = self.trainer.progress
        stage_before = progress.stage_at(step - 1)
        numbers = self.measure(stage_before)
        if args.advance == "settled" and progress.stage_at(step) == stage_before:
            numbers["stage_settled"] = float(
                progress.note_validation(step, numbers["loss"], args.settle_patience, args.settle_tolerance)
            )
        self.trainer.log_beside({f"validation_{name}": value for name, value in numbers.items()})

    def measure(self, stage: int) -> dict[str, float]:
        """Loss terms of all held-out rows at a stage, means over their batches; a collective call."""
        trainer = self.trainer
        args, tasks = trainer.args, self.rows.records.tasks
        size = args.per_device_train_batch_size * args.world_size
        batches = StagedBatchSampler(
            tasks=tasks,
            curriculum=replace(trainer.curriculum, mix_earlier=0.0, random_steps=False),
            num_steps=sum(math.ceil(tasks.count(task) / size) for task in set(tasks)),
            batch_size=args.per_device_train_batch_size,
            num_processes=args.world_size,
            rank=args.process_index,
            stage_at=lambda _: stage,
        )
        measured = []
        with trainer.model_for_measuring() as step:
            for draws in batches:
                batch = trainer.collate([self.rows[draw] for draw in draws])
                trainer.bad_rows += batch["bad_rows"]
                parts = step.measure(trainer.prepare_batch(batch))
                measured.append(parts | {"loss": trainer.objective.weighted(parts).to(args.device)})
        names = dict.fromkeys(name for parts in measured for name in parts)
        means = {name: torch.stack([parts[name] for parts in measured if name in parts]).mean() for name in names}
        everywhere = total(torch.stack(list(means.values()))) / num_processes()
        return dict(zip(means, everywhere.tolist(), strict=True))

"""The trainer: the objective of PLUME on transformers' Trainer."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from plume.losses import balance_loss, in_batch_recall, info_nce, suffix_cross_entropy
from plume.model import PlumeModel, PlumeOutput
from plume_train.collate import PairCollator, StagedRecords
from plume_train.config import PlumeTrainingArguments
from plume_train.curriculum import Curriculum
from plume_train.sampler import StagedBatchSampler

Evaluate = Callable[[PlumeModel, int], dict[str, float]]
"""Given the model and the step, returns numbers for the log."""


class PlumeTrainer(Trainer):
    """Trains a `PlumeModel` through a curriculum."""

    args: PlumeTrainingArguments

    def __init__(
        self,
        model: PlumeModel,
        args: PlumeTrainingArguments,
        dataset: StagedRecords,
        curriculum: Curriculum,
        evaluate: Evaluate | None = None,
    ):
        """Set up.

        Args:
            model: with its processor.
            args: the settings; `max_steps` must be set.
            dataset: the rows.
            curriculum: the stages.
            evaluate: called every `args.evaluate_every` steps; what it returns is logged.
        """
        assert model.processor is not None
        collator = PairCollator(
            model.processor,
            model.config,
            curriculum,
            last_state_predicts=args.last_state_predicts,
            num_cached_images=args.num_cached_images,
        )
        super().__init__(model=model, args=args, train_dataset=dataset, data_collator=collator)
        self.model_accepts_loss_kwargs = False  # the loss is a mean, so accumulation must divide it
        self.curriculum = curriculum
        self.adapter_routes = model.config.transition == "moe"
        self.num_experts = model.config.num_experts
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        self.add_callback(LogFile(args.output_folder / "log.jsonl"))
        if evaluate is not None and args.evaluate_every:
            self.add_callback(EvaluationHook(evaluate, args.evaluate_every, self))

    def compute_loss(
        self, model, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of all terms, method and weights as in `plume.losses`."""
        weights, parts = self.args.loss_weights, {}
        sides = {name: model(**inputs[name]) for name in ("query", "target") if name in inputs}
        for name, output in sides.items():
            side = inputs[name]
            parts[f"cross_entropy_{name}"] = suffix_cross_entropy(output.suffix_logits, side["labels"])
            if (gates := self._gates(output)) is not None:
                parts[f"balance_{name}"] = balance_loss(gates, side["num_latent_steps"])
        if "target" in sides:
            query, target = sides["query"], sides["target"]
            keys = {name: inputs[name] for name in ("query_keys", "target_keys")}
            temperature = self.args.temperature
            parts["contrastive"] = info_nce(query.embedding, target.embedding, temperature, **keys)
            parts["anchor_contrastive"] = info_nce(query.anchor_embedding, target.anchor_embedding, temperature, **keys)
            with torch.no_grad():
                recall = in_batch_recall(query.embedding, target.embedding, keys["target_keys"])
                self._parts["recall_in_batch"].append(recall)

        loss = sum(getattr(weights, _term(name)) * value for name, value in parts.items())
        for name, value in parts.items():
            self._parts[name].append(value.detach())
        return (loss, sides) if return_outputs else loss

    def _gates(self, output: PlumeOutput) -> Tensor | None:
        if output.gates is None and self.adapter_routes and self.args.world_size > 1:
            # Rows of other processes may take steps; all processes must meet in the same collectives.
            assert output.embedding is not None
            return output.embedding.new_zeros(len(output.embedding), 1, self.num_experts)
        return output.gates

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each term since the last log, and the stage."""
        for name, values in self._parts.items():
            logs[name] = round(torch.stack(values).mean().item(), 5)
        self._parts.clear()
        index = self.curriculum.stage_at(max(self.state.global_step - 1, 0), self.args.max_steps)
        stage = self.curriculum.stages[index]
        logs |= {"stage": index, "num_latent_steps": self.curriculum.num_latent_steps(stage)}
        super().log(logs, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of the whole run; each process draws its own part, so nothing is sharded a second time."""
        assert isinstance(self.train_dataset, StagedRecords)
        sampler = StagedBatchSampler(
            tasks=self.train_dataset.records.tasks,
            curriculum=self.curriculum,
            num_steps=self.args.max_steps,
            batch_size=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            num_processes=self.args.world_size,
            rank=self.args.process_index,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )
        return DataLoader(
            self.train_dataset,
            batch_sampler=sampler,  # type: ignore[arg-type]
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def floating_point_ops(self, inputs: dict) -> int:
        """Not counted: the Trainer's estimate knows neither two sides nor latent steps."""
        return 0


def _term(name: str) -> str:
    """The weight's name of a part: both sides share one."""
    return name.removesuffix("_query").removesuffix("_target")


class LogFile(TrainerCallback):
    """Writes every log as a line of JSON."""

    def __init__(self, file: Path):
        self.file = file

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


class EvaluationHook(TrainerCallback):
    """Calls an evaluation every so many steps, and at the end."""

    def __init__(self, evaluate: Evaluate, every: int, trainer: PlumeTrainer):
        self.evaluate = evaluate
        self.every = every
        self.trainer = trainer

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.is_world_process_zero and (
            state.global_step % self.every == 0 or state.global_step == state.max_steps
        ):
            assert model is not None
            model.eval()
            with torch.inference_mode():
                numbers = self.evaluate(model, state.global_step)
            model.train()
            self.trainer.log(numbers)

"""What a run does beside its steps: log file, evaluation, the optimiser at a change of stage."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import ProgressCallback, TrainerCallback

from plume.model import PlumeModel
from plume_train.config import SettingsError

if TYPE_CHECKING:
    from plume_train.trainer import PlumeTrainer

Evaluate = Callable[[PlumeModel, int, int], dict[str, float]]
"""Given the model, the step and the latent steps of the stage, returns numbers for the log."""

OptimizerReset = Literal["none", "moments", "full"]


def named_evaluation(name: str, arguments: dict[str, Any]) -> Evaluate:
    """The evaluation that the settings name: what "module:name" returns when called with the arguments.

    Raises:
        SettingsError: there is no such module or name.
    """
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(f"evaluation={name!r} cannot be found ({error}); expected 'module:name'") from None
    return factory(**arguments)


class LogFile(TrainerCallback):
    """Writes every log as a line of JSON; a resumed run forgets what came after its checkpoint."""

    def __init__(self, file: Path):
        self.file = file

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.is_world_process_zero or not self.file.exists():
            return
        lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines() if state.global_step else []
        steps = [_step_of(line) for line in lines]
        kept = [
            line + "\n"
            for line, step in zip(lines, steps, strict=True)
            if step is not None and step <= state.global_step
        ]
        if damaged := steps.count(None):
            warnings.warn(f"plume: {damaged} lines of {self.file} are damaged and left out", stacklevel=2)
        self.file.write_text("".join(kept), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


def _step_of(line: str) -> int | None:
    """The step that a line of the log is of; None where it was cut or damaged."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


#: What a person wants to follow; the log file and the trackers get everything.
_TOLD = ("loss", "contrastive", "recall_in_batch", "grad_norm", "learning_rate", "num_latent_steps", "pairs_per_second")


class ShortProgress(ProgressCallback):
    """A progress bar, and of every log the numbers that fit into a line."""

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            logs = {name: logs[name] for name in _TOLD if name in logs}
        super().on_log(args, state, control, logs=logs, **kwargs)


class EvaluationHook(TrainerCallback):
    """Calls an evaluation every so many steps, and at the end, on the first process."""

    def __init__(self, evaluate: Evaluate, every: int, trainer: PlumeTrainer):
        self.evaluate = evaluate
        self.every = every
        self.trainer = trainer

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        if state.is_world_process_zero:
            bare = self.trainer.bare_model
            was_training = bare.training
            bare.eval()
            with torch.inference_mode():
                numbers = self.evaluate(bare, state.global_step, self.trainer.stage_steps(state.global_step - 1))
            bare.train(was_training)
            self.trainer.log_beside(numbers)
        self.trainer.accelerator.wait_for_everyone()


class StageChange(TrainerCallback):
    """Resets the optimiser where a stage begins, except the first."""

    def __init__(self, reset: OptimizerReset, stage_at: Callable[[int], int]):
        self.reset: OptimizerReset = reset
        self.stage_at = stage_at

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        step = state.global_step
        if self.reset == "none" or not step:
            return
        if self.stage_at(step) != self.stage_at(step - 1):
            assert optimizer is not None
            reset_optimizer(optimizer, self.reset)


def reset_optimizer(optimizer: Any, how: OptimizerReset) -> None:
    """Forget what an optimiser has learnt about its parameters, but not the learning rate.

    Args:
        optimizer: any of torch's, or a wrapper with its `state`.
        how: "moments" sets every floating tensor of the state to zero, step counts included, as the published code
            does; "full" drops the state, as a new optimiser would begin. For AdamW both come to the same.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if how == "full":
        inner.state.clear()
        return
    for state in inner.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value.zero_()

"""What a run does beside its steps: log file, evaluation, the optimiser at a change of stage."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import TrainerCallback

from plume.model.model import PlumeModel
from plume_train.config import PlumeTrainingArguments, SettingsError
from plume_train.progress import Progress
from plume_train.saving import RunError

Evaluate = Callable[[PlumeModel, int, int], dict[str, float]]
"""Given the model, the step and the latent steps of the stage, returns numbers for the log."""

#: What an evaluation calls recall@1 after the model's own written rationale; `plume_eval.pairs` does.
EXPLICIT_RECALL = "recall_at_1_explicit"

Log = Callable[[dict[str, float]], None]
"""Logs numbers that are not the training's own."""

OptimizerReset = Literal["none", "full"]


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

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == state.max_steps and args.logging_strategy != "no":
            control.should_log = True  # also the steps since the last log

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


class Console(TrainerCallback):
    """A progress bar in a terminal, and a line of every log; the log file and the trackers get everything."""

    def __init__(self, args: PlumeTrainingArguments):
        self.args = args
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self.args.shows_bars:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if line := log_line(logs or {}, self.args.loss_weights):
            self.args.tell(f"step {state.global_step}/{state.max_steps}  {line}")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if self.bar is not None:
            self.bar.close()


def log_line(logs: Mapping[str, Any], weights: Mapping[str, float]) -> str:
    """What a person wants to follow of a log: the loss and the terms that it is made of, recall, the pace.

    Args:
        logs: numbers by name.
        weights: of the terms of the loss, by name without the side that they are of.

    Example:
        >>> logs = {"loss": 2.5, "contrastive": 2.0, "balance": 5.0, "recall_in_batch": 0.5, "num_latent_steps": 4}
        >>> log_line(logs, {"contrastive": 1.0, "balance": 0.1})
        'loss 2.5 (contrastive 2, 0.1 x balance 5)  recall in batch 0.5  K = 4'
    """
    if "train_runtime" in logs:
        seconds = logs["train_runtime"]
        time = f"{seconds / 60:.1f} minutes" if seconds > 60 else f"{seconds:.0f} seconds"
        return f"trained in {time}, mean loss {logs['train_loss']:.4g}"
    prefix = "validation_" if "validation_loss" in logs else ""
    if f"{prefix}loss" not in logs:  # of an evaluation
        return "  ".join(f"{name} {value:.4g}" for name, value in logs.items() if name not in ("epoch", "step"))
    names = {name.removeprefix(prefix): name for name in logs if name.startswith(prefix)}
    shown = []
    for name, full in names.items():
        weight = weights.get(name.removesuffix("_query").removesuffix("_target"))
        if weight and logs[full]:  # a batch of one stage lacks some terms
            times = "" if weight == 1 else f"{weight:g} x "
            shown.append(f"{times}{name.replace('_', ' ')} {logs[full]:.4g}")
    parts = [f"{prefix.replace('_', ' ')}loss {logs[f'{prefix}loss']:.4g} ({', '.join(shown)})"]
    for name, form in (
        ("recall_in_batch", "recall in batch {:.3g}"),
        ("teacher_forced_recall", "teacher-forced recall {:.3g}"),
        ("grad_norm", "gradient {:.3g}"),
        ("learning_rate", "learning rate {:.2g}"),
        ("num_latent_steps", "K = {}"),
        ("pairs_per_second", "{:.3g} pairs/s"),
    ):
        if name in logs:
            parts.append(form.format(logs[name]))
    return "  ".join(parts)


class EvaluationHook(TrainerCallback):
    """Calls an evaluation every so many steps, and at the end, on the first process."""

    def __init__(
        self,
        evaluate: Evaluate,
        every: int,
        *,
        whole_model: Callable[[], PlumeModel | None],
        stage_steps: Callable[[int], int],
        log: Log,
        barrier: Callable[[], None],
        see_recall: Callable[[int, float], None] | None = None,
    ):
        """Set up.

        Args:
            evaluate: what to call.
            every: steps between calls.
            whole_model: gives the model with all its weights, on the first process; called on every one.
            stage_steps: gives K of the stage of a step.
            log: logs what the evaluation returns.
            barrier: waits for the other processes.
            see_recall: called on every process with the step and `recall_at_1_explicit` of the numbers.
        """
        self.evaluate, self.every, self.see_recall = evaluate, every, see_recall
        self.whole_model, self.stage_steps, self.log, self.barrier = whole_model, stage_steps, log, barrier

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        told: list[float | None] = [None]
        if (model := self.whole_model()) is not None:
            was_training = model.training
            model.eval()
            with torch.inference_mode():
                numbers = self.evaluate(model, state.global_step, self.stage_steps(state.global_step - 1))
            model.train(was_training)
            self.log(numbers)
            told = [numbers.get(EXPLICIT_RECALL)]
        self.barrier()
        if self.see_recall is None:
            return
        (recall,) = broadcast_object_list(told)
        if recall is None:
            raise RunError(
                f"advance=explicit_recall needs {EXPLICIT_RECALL}, which the evaluation did not give; name the mode "
                '"explicit" in evaluation_arguments'
            )
        self.see_recall(state.global_step, recall)


class Validation(TrainerCallback):
    """Measures the loss on held-out rows at the current stage, and may end the stage."""

    def __init__(
        self,
        progress: Progress,
        measure: Callable[[int], dict[str, float]],
        log: Log,
        *,
        every: int,
        ends_stages: bool,
        patience: int,
        tolerance: float,
    ):
        """Set up.

        Args:
            progress: of the run.
            measure: gives the loss terms of the held-out rows at a stage; a collective call.
            log: logs them.
            every: steps between validations.
            ends_stages: whether a stage ends once its loss has settled.
            patience: see `Progress.note_validation`.
            tolerance: likewise.
        """
        self.progress, self.measure, self.log = progress, measure, log
        self.every, self.ends_stages, self.patience, self.tolerance = every, ends_stages, patience, tolerance

    def on_step_end(self, args, state, control, **kwargs) -> None:
        step = state.global_step
        if step % self.every and step != state.max_steps:
            return
        stage = self.progress.stage_at(step - 1)
        numbers = self.measure(stage)
        if self.ends_stages and self.progress.stage_at(step) == stage:
            has_settled = self.progress.note_validation(step, numbers["loss"], self.patience, self.tolerance)
            numbers["stage_settled"] = float(has_settled)
        self.log({f"validation_{name}": value for name, value in numbers.items()})


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
            reset_optimizer(optimizer)


def reset_optimizer(optimizer: Any) -> None:
    """Drop what an optimiser has learnt about its parameters, but not the learning rate.

    Args:
        optimizer: any of torch's, or a wrapper with one inside.
    """
    getattr(optimizer, "optimizer", optimizer).state.clear()

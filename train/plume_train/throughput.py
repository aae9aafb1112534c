"""How many pairs per second a training step takes, and how much memory, against a loop over rows.

The published trainer runs one row and one side at a time. The baseline here does so too, but with this package's own
forward pass, which is kinder to it: K + 1 instead of K + 2 passes, and no logits over the prefix.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from plume.model.model import PlumeModel
from plume_train.config import PlumeTrainingArguments
from plume_train.curriculum import Curriculum
from plume_train.data.collate import PairCollator
from plume_train.data.rows import Record
from plume_train.data.sampler import Draw
from plume_train.metrics import peak_memory_gib
from plume_train.objective.gradcache import Step
from plume_train.objective.objective import Objective

#: Name of a method to run a batch: rows of one pass (None: all), GradCache, activation checkpointing.
METHODS: dict[str, tuple[int | None, bool, bool]] = {
    "loop over rows": (1, False, False),
    "batch": (None, False, False),
    "batch, checkpointing": (None, False, True),
    "GradCache, passes of 4": (4, True, False),
}


def pairs_per_second(
    model: PlumeModel,
    records: Sequence[Record],
    args: PlumeTrainingArguments,
    *,
    methods: Mapping[str, tuple[int | None, bool, bool]] = METHODS,
    num_runs: int = 5,
    num_warm_up: int = 1,
    bf16: bool = False,
    save: Callable[[list[dict[str, Any]]], Any] = lambda results: None,
) -> list[dict[str, Any]]:
    """Forward, backward and optimiser step of one batch, at every stage of the curriculum.

    The methods take turns, so that a noisy machine disturbs them alike. Data are prepared before.

    Args:
        model: on its device; its weights are changed.
        records: the rows of the batch.
        args: objective and curriculum.
        methods: as `METHODS`.
        num_runs: timed runs of each method.
        num_warm_up: runs of each before.
        bf16: whether passes run under bfloat16 autocast.
        save: is handed the results of the stages so far, after each.

    Returns:
        For every stage and method: "stage", "num_latent_steps", "method", the median "seconds" of a step,
        "pairs_per_second", "speed_up" over the first method, and "peak_memory_gib" (of the device; None on a CPU).
        Times are None where the device has too little memory for the method.
    """
    curriculum, objective = args.build_curriculum(), Objective(args, model.config.num_experts)
    device, results = model.device, []
    model.train().backbone.visual.requires_grad_(False)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.0)
    accelerator = Accelerator(cpu=device.type == "cpu")
    for stage in _distinct(curriculum):
        steps = curriculum.num_latent_steps(curriculum.stages[stage])
        batches = {name: _batch(model, records, args, stage, steps, method[0]) for name, method in methods.items()}
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        memory: dict[str, float] = {}
        too_large: set[str] = set()
        for run in range(num_warm_up + num_runs):
            for name, (_, is_cached, checkpoints) in methods.items():
                if name in too_large:
                    continue
                if checkpoints:
                    model.gradient_checkpointing_enable()
                else:
                    model.gradient_checkpointing_disable()
                step = Step(
                    model=model,
                    objective=objective,
                    accelerator=accelerator,
                    autocast=(lambda: torch.autocast(device.type, torch.bfloat16)) if bf16 else nullcontext,
                    vision_is_frozen=True,
                )
                _wait(device)
                peak_memory_gib(device)
                begin = time.perf_counter()
                try:
                    step.cached(batches[name]) if is_cached else step.direct(batches[name])
                except torch.OutOfMemoryError:
                    too_large.add(name)
                    optimizer.zero_grad()
                    continue
                optimizer.step()
                optimizer.zero_grad()
                _wait(device)
                if run >= num_warm_up:
                    seconds[name].append(time.perf_counter() - begin)
                    memory[name] = max(memory.get(name, 0.0), peak_memory_gib(device))
        first = next(iter(seconds))
        for name, values in seconds.items():
            median = None if name in too_large else statistics.median(values)
            results.append(
                {
                    "stage": stage,
                    "num_latent_steps": steps,
                    "method": name,
                    "seconds": median,
                    "pairs_per_second": median and len(records) / median,
                    "speed_up": statistics.median(seconds[first]) / median
                    if median and first not in too_large
                    else None,
                    "peak_memory_gib": memory[name] if device.type == "cuda" and median else None,
                }
            )
        results.sort(key=lambda one: one["num_latent_steps"])
        save(results)
    return results


def _distinct(curriculum: Curriculum) -> list[int]:
    """One stage for every number of latent steps; the ends first, so that a run that is cut short has them."""
    steps = [curriculum.num_latent_steps(stage) for stage in curriculum.stages]
    found = [index for index, count in enumerate(steps) if count not in steps[:index]]
    return [*found[:1], *found[:0:-1]]


def _batch(
    model: PlumeModel, records: Sequence[Record], args: PlumeTrainingArguments, stage: int, steps: int, size: int | None
) -> Any:
    assert model.processor is not None
    curriculum = replace(args.build_curriculum(), random_steps=False)
    collate = PairCollator(model.processor, model.config, curriculum, micro_batch_size=size)
    batch = collate([(record, Draw(index, stage, steps, steps, stage)) for index, record in enumerate(records)])
    return _to(batch, model.device)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _to(one, device) for name, one in value.items()}
    return [_to(one, device) for one in value] if isinstance(value, list) else value


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

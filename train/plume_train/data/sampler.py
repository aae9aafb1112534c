"""Batches of one task each, handed out together with the stage of the curriculum.

In-batch negatives of another task are too easy, so every global batch is drawn from one task, and the batches of each
task are spread over the whole of every pass. The stage travels with the index: data-loader workers, which prefetch,
always prepare a row for the step at which it will be used.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from plume_train.curriculum import Curriculum


class Draw(NamedTuple):
    """One row of a batch, and how it is to be prepared."""

    row: int
    """Index of the row."""
    stage: int
    """Index of its stage."""
    num_steps: int
    """K, its latent steps."""
    most_steps: int
    """The largest K of the batch, on all processes: as many steps are run."""
    current_stage: int
    """Stage of the run, which the row's is except where earlier ones are mixed in."""
    is_instructed: bool = True
    """Whether the row keeps the instructions of its sides."""


@dataclass(frozen=True, kw_only=True)
class StagedBatchSampler:
    """Batch sampler of a whole training run; a pure function of its fields.

    Yields, for each batch of one process, a list of `Draw`.
    """

    tasks: Sequence[str]
    """Task of each row; equal names meet in a batch."""
    curriculum: Curriculum
    num_steps: int
    """Optimiser steps of the run."""
    batch_size: int
    """Rows of a batch of one process."""
    accumulation: int = 1
    """Batches per optimiser step."""
    num_processes: int = 1
    rank: int = 0
    seed: int = 0
    groups: Sequence[int | str | None] = ()
    """Group of each row; rows of one stay together, as far as a batch holds them. None: of none."""
    instruction_dropout: float = 0.0
    """Probability that a row loses its instructions."""
    task_weights: Mapping[str, float] = field(default_factory=dict)
    """How often a task is seen, relative to once per pass; tasks that are not named have 1."""
    mixing_temperature: float = 1.0
    """T; a task of n rows is seen in proportion to n^(1/T). 1: as it is; larger: tasks become more alike."""
    stage_at: Callable[[int], int] | None = None
    """Stage of a step; None: the curriculum's, by shares of `num_steps`."""

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def batches_per_pass(self) -> int:
        """Batches of all processes in which every task is seen as often as its weight says."""
        return len(self._epoch(self.batch_size * self.num_processes, 0))

    def __iter__(self) -> Iterator[list[Draw]]:
        batches = self._global_batches()
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for step in range(self.num_steps):
            for micro_step in range(self.accumulation):
                current = (
                    self.curriculum.stage_at(step, self.num_steps) if self.stage_at is None else self.stage_at(step)
                )
                rng = random.Random(f"{self.seed}/{step}/{micro_step}")
                stages = [(row, self.curriculum.draw_stage(current, rng)) for row in next(batches)]
                # Rows at one stage share their K: contrast between vectors of unequal K is not what inference asks.
                steps = {stage: self.curriculum.draw_steps(stage, rng) for stage in sorted({s for _, s in stages})}
                most = max(steps.values())
                draws = [Draw(row, stage, steps[stage], most, current) for row, stage in stages]
                if self.instruction_dropout:
                    draws = [draw._replace(is_instructed=rng.random() >= self.instruction_dropout) for draw in draws]
                yield draws[mine]

    def _global_batches(self) -> Iterator[list[int]]:
        size = self.batch_size * self.num_processes
        epoch = 0
        while True:
            yield from self._epoch(size, epoch)
            epoch += 1

    def _epoch(self, size: int, epoch: int) -> list[list[int]]:
        """One pass over the data in batches of one task; the last batch of a task is filled up from the same task."""
        rng = random.Random(f"{self.seed}/{epoch}")
        by_task: dict[str, list[int]] = defaultdict(list)
        for index, task in enumerate(self.tasks):
            by_task[task].append(index)
        placed: list[tuple[float, list[int]]] = []
        for task, rows in sorted(by_task.items()):
            rng.shuffle(rows)
            chosen = self._packed(self._weighted(self._grouped(rows), task, by_task, rng), size)
            # Filled up with rows that are not there yet, as long as the task has some.
            missing = -len(chosen) % size
            there = set(chosen)
            spare = [row for row in rows if row not in there] if missing else []
            chosen += rng.sample(spare, min(missing, len(spare)))
            while missing := -len(chosen) % size:
                chosen += rng.sample(rows, min(missing, len(rows)))
            rows = chosen
            batches = [rows[start : start + size] for start in range(0, len(rows), size)]
            # Evenly over the pass, from a random phase, so that tasks alternate as their sizes allow.
            phase = rng.random()
            placed += [((place + phase) / len(batches), batch) for place, batch in enumerate(batches)]
        if not placed:
            raise ValueError("every task has weight 0; expected at least one to be seen")
        return [batch for _, batch in sorted(placed, key=lambda pair: pair[0])]

    def _grouped(self, rows: list[int]) -> list[int]:
        """Shuffled rows with those of a group together, where its first one is; a row of no group stays alone."""
        if not self.groups:
            return rows
        members: dict[Any, list[int]] = {}
        for row in rows:
            group = self.groups[row]
            members.setdefault(("row", row) if group is None else group, []).append(row)
        return [row for of_group in members.values() for row in of_group]

    def _packed(self, rows: list[int], size: int) -> list[int]:
        """Grouped rows in an order that cuts few groups at the borders of batches: rows of none fill batches up."""
        if not self.groups:
            return rows
        group_of = self.groups
        runs = [list(run) for _, run in groupby(rows, key=lambda row: (group_of[row], group_of[row] is None and row))]
        alone = [run[0] for run in runs if self.groups[run[0]] is None]
        packed: list[int] = []
        for run in (run for run in runs if self.groups[run[0]] is not None):
            room = -len(packed) % size
            if room and len(run) > room:
                packed += [alone.pop() for _ in range(min(room, len(alone)))]
            packed += run
        return packed + alone

    def _weighted(self, rows: list[int], task: str, by_task: Mapping[str, list[int]], rng: random.Random) -> list[int]:
        """The rows of a task in one pass: all of them, several times, or another part in every pass."""
        weight = self.task_weights.get(task, 1.0)
        if self.mixing_temperature != 1:
            total = sum(map(len, by_task.values()))
            flat = {name: len(of) ** (1 / self.mixing_temperature) for name, of in by_task.items()}
            weight *= flat[task] / sum(flat.values()) * total / len(rows)
        if weight == 1:
            return list(rows)
        # Whole copies, then a part; at least one row, so that no task is lost unless its weight is 0.
        wanted = max(round(len(rows) * weight), 1) if weight else 0
        copies = [row for _ in range(wanted // len(rows)) for row in self._grouped(rng.sample(rows, len(rows)))]
        rest = rng.sample(rows, len(rows)) if self.groups else rng.sample(rows, wanted % len(rows))
        return copies + self._grouped(rest)[: wanted % len(rows)]

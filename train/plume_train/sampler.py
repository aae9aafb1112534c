"""Batches of one task each, handed out together with the stage of the curriculum.

In-batch negatives of another task are too easy, so every global batch is drawn from one data set, and the batches of
each data set are spread over the whole of every pass. The stage travels with the index: data-loader workers, which
prefetch, always prepare a row for the step at which it will be used.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from plume_train.curriculum import Curriculum

StagedIndex = tuple[int, int]
"""Index of a row, index of a stage."""


@dataclass(frozen=True, kw_only=True)
class StagedBatchSampler:
    """Batch sampler of a whole training run; a pure function of its fields.

    Yields, for each micro-batch of one process, a list of `StagedIndex`.
    """

    tasks: Sequence[str]
    """Task of each row; equal names meet in a batch."""
    curriculum: Curriculum
    num_steps: int
    """Optimiser steps of the run."""
    batch_size: int
    """Rows of a micro-batch of one process."""
    accumulation: int = 1
    """Micro-batches per optimiser step."""
    num_processes: int = 1
    rank: int = 0
    seed: int = 0

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def __iter__(self) -> Iterator[list[StagedIndex]]:
        batches = self._global_batches()
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for step in range(self.num_steps):
            current = self.curriculum.stage_at(step, self.num_steps)
            for micro_step in range(self.accumulation):
                rng = random.Random(f"{self.seed}/{step}/{micro_step}")
                staged = [(index, self.curriculum.draw_stage(current, rng)) for index in next(batches)]
                yield staged[mine]

    def _global_batches(self) -> Iterator[list[int]]:
        epoch = 0
        while True:
            yield from _epoch(self.tasks, self.batch_size * self.num_processes, f"{self.seed}/{epoch}")
            epoch += 1


def _epoch(tasks: Sequence[str], size: int, seed: str) -> list[list[int]]:
    """One pass over the data in batches of one task; the last batch of a task is filled up from the same task."""
    rng = random.Random(seed)
    by_task: dict[str, list[int]] = defaultdict(list)
    for index, task in enumerate(tasks):
        by_task[task].append(index)
    placed: list[tuple[float, list[int]]] = []
    for _, rows in sorted(by_task.items()):
        rng.shuffle(rows)
        while len(rows) % size:
            rows += rng.sample(rows, min(size - len(rows) % size, len(rows)))
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        # Evenly over the pass, from a random phase, so that tasks alternate as their sizes allow.
        phase = rng.random()
        placed += [((place + phase) / len(batches), batch) for place, batch in enumerate(batches)]
    return [batch for _, batch in sorted(placed, key=lambda pair: pair[0])]

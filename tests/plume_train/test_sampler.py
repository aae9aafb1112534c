"""Batches: one task each, all rows, equal on every process count, the stage of their step."""

from __future__ import annotations

import functools
import operator
from collections import Counter

import pytest

from plume_train.curriculum import PAPER, Curriculum
from plume_train.sampler import StagedBatchSampler

TASKS = ["a"] * 20 + ["b"] * 8 + ["c"] * 3


def sampler(**changes):
    settings = {
        "tasks": TASKS,
        "curriculum": Curriculum(stages=PAPER, num_segments=8),
        "num_steps": 40,
        "batch_size": 4,
    }
    return StagedBatchSampler(**{**settings, **changes})


def test_every_batch_is_of_one_task_and_full():
    for batch in sampler():
        assert len(batch) == 4
        assert len({TASKS[index] for index, *_ in batch}) == 1


def test_a_pass_shows_every_row():
    batches = list(sampler(num_steps=8))  # 5 + 2 + 1 batches are one pass
    assert {index for batch in batches for index, *_ in batch} == set(range(len(TASKS)))
    most = Counter(index for batch in batches for index, *_ in batch).most_common(1)[0][1]
    assert most == 2  # only a filled-up batch repeats a row


def test_tasks_are_spread_over_the_pass():
    tasks = ["a"] * 16 + ["b"] * 16
    order = [tasks[batch[0][0]] for batch in sampler(num_steps=8, tasks=tasks)]
    assert "aaa" not in "".join(order)
    assert "bbb" not in "".join(order)


def test_the_stage_of_a_batch_is_that_of_its_step():
    stages = [batch[0][1] for batch in sampler(num_steps=40, accumulation=2)]
    curriculum = Curriculum(stages=PAPER, num_segments=8)
    assert stages == [curriculum.stage_at(step, 40) for step in range(40) for _ in range(2)]


@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_share_one_global_batch(num_processes):
    parts = [
        list(sampler(batch_size=8 // num_processes, num_processes=num_processes, rank=rank))
        for rank in range(num_processes)
    ]
    whole = list(sampler(batch_size=8))
    for step, batch in enumerate(whole):
        assert functools.reduce(operator.iadd, (part[step] for part in parts), []) == batch


def test_it_is_a_function_of_its_seed():
    assert list(sampler()) == list(sampler())
    assert list(sampler()) != list(sampler(seed=1))

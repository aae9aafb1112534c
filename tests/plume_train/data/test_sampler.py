"""Batches: one task each, all rows, equal on every process count, the stage of their step."""

from __future__ import annotations

import functools
import operator
from collections import Counter

import pytest

from plume_train.curriculum import PAPER, Curriculum
from plume_train.data.sampler import StagedBatchSampler

TASKS = ["a"] * 20 + ["b"] * 8 + ["c"] * 3


def sampler(**changes):
    settings = {
        "tasks": TASKS,
        "curriculum": Curriculum(stages=PAPER, num_segments=8),
        "num_steps": 40,
        "batch_size": 4,
    }
    return StagedBatchSampler(**{**settings, **changes})


def test_rows_of_a_group_meet_and_groups_change_places():
    """Of task a, groups of four and rows of none; also where a task is seen more than once in a pass."""
    groups = [row // 4 if row < 12 else None for row in range(20)] + [None] * 8 + ["c"] * 3
    orders = []
    for weights in ({}, {"a": 2.0}):
        batches = [[draw.row for draw in batch] for batch in sampler(groups=groups, task_weights=weights, num_steps=16)]
        of_a = [tuple(groups[row] for row in batch) for batch in batches if TASKS[batch[0]] == "a"]
        assert all(len(set(batch)) == 1 for batch in of_a)  # a batch holds one whole group, or rows of none
        assert {batch[0] for batch in of_a} == {0, 1, 2, None}
        orders.append(of_a)
    assert orders[0][:5] != orders[0][5:10]
    # Rows of no group fill up what a group does not fit into: none is cut by the border of a batch.
    mixed = [row // 3 if row < 18 else None for row in range(40)]
    for weights in ({}, {"a": 0.5}, {"a": 1.5}):
        several = sampler(tasks=["a"] * 40, groups=mixed, batch_size=8, task_weights=weights, num_steps=10)
        batches = [[draw.row for draw in batch] for batch in several]
        cut = sum(0 < sum(mixed[row] == group for row in batch) < 3 for batch in batches for group in range(6))
        assert cut <= (0 if not weights else len(batches) // 2)
    assert [draw.row for batch in sampler(groups=[]) for draw in batch] == [
        draw.row for batch in sampler() for draw in batch
    ]


def test_instructions_are_dropped_as_often_as_asked_on_all_processes_alike():
    draws = [draw for batch in sampler(instruction_dropout=0.25, num_steps=200) for draw in batch]
    assert sum(not draw.is_instructed for draw in draws) / len(draws) == pytest.approx(0.25, abs=0.05)
    halves = [sampler(instruction_dropout=0.25, batch_size=2, num_processes=2, rank=rank) for rank in range(2)]
    for whole, *parts in zip(sampler(instruction_dropout=0.25), *halves, strict=True):
        assert whole == [*parts[0], *parts[1]]
    assert all(draw.is_instructed for batch in sampler() for draw in batch)


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


@pytest.mark.parametrize(("weights", "expected"), [({"b": 3}, 6), ({"b": 0.5}, 1), ({"b": 0.01}, 1), ({"c": 5}, 2)])
def test_a_weight_says_how_often_a_task_is_seen(weights, expected):
    one_pass = sampler(num_steps=100, task_weights=weights)._epoch(4, 0)
    assert sum(TASKS[batch[0]] == "b" for batch in one_pass) == expected
    assert all(len({TASKS[row] for row in batch}) == 1 for batch in one_pass)


def test_a_part_of_a_task_is_another_part_in_every_pass():
    batches = [sampler(task_weights={"b": 0.5})._epoch(4, epoch) for epoch in range(12)]
    seen = {row for one_pass in batches for batch in one_pass for row in batch if TASKS[row] == "b"}
    assert seen == {row for row, task in enumerate(TASKS) if task == "b"}


def test_a_high_temperature_makes_tasks_alike():
    counts = Counter(TASKS[batch[0]] for batch in sampler(mixing_temperature=1e9)._epoch(4, 0))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_random_steps_are_drawn_for_a_batch_and_only_in_the_latent_stage():
    curriculum = Curriculum(stages=PAPER, num_segments=8, random_steps=True)
    draws = list(sampler(curriculum=curriculum, num_steps=200))
    assert all(len({draw.num_steps for draw in batch}) == 1 for batch in draws)
    last = [batch[0].num_steps for batch in draws if batch[0].stage == 4]
    assert set(last) == set(range(1, 9))
    assert {batch[0].num_steps for batch in draws if batch[0].stage == 2} == {4}


def test_every_process_knows_the_most_steps_of_the_whole_batch():
    curriculum = Curriculum(stages=PAPER, num_segments=8, mix_earlier=0.7)
    parts = [list(sampler(batch_size=2, num_processes=2, rank=rank, curriculum=curriculum)) for rank in range(2)]
    for one, other in zip(*parts, strict=True):
        assert {draw.most_steps for draw in one + other} == {max(draw.num_steps for draw in one + other)}


def test_a_weight_of_zero_leaves_a_task_out_and_small_ones_fill_batches_with_other_rows():
    tasks = {TASKS[batch[0]] for batch in sampler(task_weights={"b": 0})._epoch(4, 0)}
    assert tasks == {"a", "c"}
    (batch,) = [batch for batch in sampler(task_weights={"b": 0.01})._epoch(4, 0) if TASKS[batch[0]] == "b"]
    assert len(set(batch)) == 4

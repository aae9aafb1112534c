"""Batches by tokens: everything once, like lengths together, within the budget."""

from __future__ import annotations

import random

import pytest

from plume.embedder.encode import plan_batches


@pytest.mark.parametrize("max_rows", [1, 3, 32])
@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
def test_every_input_is_in_one_batch_within_rows_and_tokens(max_rows, max_tokens):
    lengths = [random.randint(1, 400) for _ in range(200)]
    batches = plan_batches(lengths, max_rows, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    for batch in batches:
        assert len(batch) <= max_rows
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens


def test_one_long_page_does_not_stall_twenty_captions():
    lengths = [20] * 10 + [1200] + [20] * 10
    batches = plan_batches(lengths, max_rows=32, max_tokens=2000)
    assert [len(batch) for batch in batches] == [1, 20]
    cost = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert cost == sum(lengths)


def test_nothing_makes_no_batch():
    assert plan_batches([], 8, 100) == []

"""Which inputs share a pass: like lengths together, so that one long page does not stall twenty captions."""

from __future__ import annotations

from collections.abc import Sequence


def plan_batches(lengths: Sequence[int], max_rows: int, max_tokens: int) -> list[list[int]]:
    """Group inputs by length within a budget of rows and of tokens, padding included.

    Args:
        lengths: tokens of each input.
        max_rows: inputs per batch at most.
        max_tokens: rows times the longest row of a batch at most; an input beyond it has a batch of its own.

    Returns:
        Indices of the inputs, each exactly once, the longest batch first, so that memory peaks at once.

    Example:
        >>> plan_batches([3, 900, 3, 4, 880], max_rows=8, max_tokens=1000)
        [[1], [4], [3, 0, 2]]
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # stable: equals keep their order
        if not batches or len(batches[-1]) == max_rows or (len(batches[-1]) + 1) * longest > max_tokens:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


def join_batches(batches: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    """Batches that follow each other with the same number of rows, joined, so that one call can run them all.

    Returns:
        Rows per batch, and the indices of such a run; only the last batch of a run may have fewer rows.

    Example:
        >>> join_batches([[4], [0], [1, 2], [3, 5], [6]])
        [(1, [4, 0]), (2, [1, 2, 3, 5, 6])]
    """
    runs: list[tuple[int, list[int]]] = []
    for batch in batches:
        if runs and len(batch) <= runs[-1][0] and len(runs[-1][1]) % runs[-1][0] == 0:
            runs[-1][1].extend(batch)
        else:
            runs.append((len(batch), list(batch)))
    return runs

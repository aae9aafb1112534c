"""Prepares batches before the model wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from plume.inputs import Item

T = TypeVar("T")


class Ahead:
    """Prepares the next batch in a thread, while the model runs on this one.

    Worth it for media: tokenising text holds Python's lock, so that a thread would only be in the way.
    """

    def __init__(
        self, thread: ThreadPoolExecutor, prepare: Callable[[Sequence[Item]], Any], batches: Sequence[Sequence[Item]]
    ):
        self._thread, self._prepare = thread, prepare
        self._batches = iter(batches)
        self._start()

    def take(self, items: Sequence[Item]) -> Any:
        """A batch: the one that is prepared, if it is the one whose turn it is."""
        expected = self._batch
        if (
            expected is None
            or len(items) != len(expected)
            or any(a is not b for a, b in zip(items, expected, strict=True))
        ):
            return self._prepare(items)
        ready = self._next.result()
        self._start()
        return ready

    def _start(self) -> None:
        self._batch = next(self._batches, None)
        if self._batch is not None:
            self._next: Future[Any] = self._thread.submit(self._prepare, self._batch)


def one_ahead(thread: ThreadPoolExecutor, made: Iterator[T]) -> Iterator[T]:
    """What an iterator makes, the next of it being made in a thread meanwhile.

    Example:
        >>> list(one_ahead(ThreadPoolExecutor(1), iter("abc")))
        ['a', 'b', 'c']
    """
    end: Any = object()
    waiting = thread.submit(next, made, end)
    while (one := waiting.result()) is not end:
        waiting = thread.submit(next, made, end)
        yield one


class Loaded(NamedTuple):
    """An input that is checked and loaded.

    rank: sentence-transformers runs the highest first. ahead: prepares its batch, where anybody does.
    """

    item: Item
    rank: int
    ahead: Ahead | None = None

"""A cache that drops what was used least recently, bounded in number and in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class LRUCache(Generic[T]):
    """Values by key, within a bound of number and one of memory.

    Example:
        >>> squares = LRUCache(max_items=2)
        >>> [squares.get_or_make(n, lambda n=n: n * n) for n in (1, 2, 3)]
        [1, 4, 9]
        >>> squares.get(1), squares.get(3)
        (None, 9)
    """

    def __init__(
        self,
        max_items: float = float("inf"),
        max_bytes: float = float("inf"),
        size_of: Callable[[T], int] = lambda value: 0,
    ):
        """Start empty.

        Args:
            max_items: values at most.
            max_bytes: their memory at most.
            size_of: memory of a value in bytes; it does not change.
        """
        self._entries: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._max_items, self._max_bytes, self._size_of = max_items, max_bytes, size_of
        #: Memory of all values.
        self.num_bytes = 0
        #: How often a value was there.
        self.num_hits = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        return (value for value, _ in self._entries.values())

    def get(self, key: Hashable) -> T | None:
        """The value of a key, which counts as using it; None without one."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        self.num_hits += 1
        return self._entries[key][0]

    def put(self, key: Hashable, value: T) -> T:
        """Store a value, unless it is larger than the whole cache, and return it."""
        size = self._size_of(value)
        self._drop(key)
        if size <= self._max_bytes:
            self._entries[key] = value, size
            self.num_bytes += size
        while len(self._entries) > self._max_items or self.num_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))
        return value

    def get_or_make(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made if there is none."""
        value = self.get(key)
        return self.put(key, make()) if value is None else value

    def clear(self) -> None:
        """Drop all values."""
        self._entries.clear()
        self.num_bytes = 0

    def _drop(self, key: Hashable) -> None:
        if key in self._entries:
            self.num_bytes -= self._entries.pop(key)[1]

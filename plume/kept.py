"""Things that are kept for as long as there is room, the least recently used ones going first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """What was made for some keys, within a bound of number and of memory.

    Example:
        >>> squares = Kept(most=2)
        >>> [squares.get(n, lambda n=n: n * n) for n in (1, 2, 3)]
        [1, 4, 9]
        >>> squares.find(1), squares.find(3)
        (None, 9)
    """

    def __init__(
        self, most: float = float("inf"), most_bytes: float = float("inf"), num_bytes: Callable[[T], int] = lambda _: 0
    ):
        """Start empty.

        Args:
            most: how many are kept.
            most_bytes: and how much memory of theirs.
            num_bytes: memory of one; it does not change.
        """
        self._kept: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._most, self._most_bytes, self._size_of = most, most_bytes, num_bytes
        #: Memory of all that is kept.
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[T]:
        return (one for one, _ in self._kept.values())

    def find(self, key: Hashable) -> T | None:
        """What is kept for a key, which counts as using it."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: Hashable, value: T) -> T:
        """Keep something, unless it is larger than the whole bound."""
        size = self._size_of(value)
        self._drop(key)
        if size <= self._most_bytes:
            self._kept[key] = value, size
            self.num_bytes += size
        while len(self._kept) > self._most or self.num_bytes > self._most_bytes:
            self._drop(next(iter(self._kept)))
        return value

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is kept for a key, made if it is not there."""
        found = self.find(key)
        return self.put(key, make()) if found is None else found

    def emptied(self) -> Kept[T]:
        """The same bounds, with nothing in it."""
        return Kept(self._most, self._most_bytes, self._size_of)

    def _drop(self, key: Hashable) -> None:
        if key in self._kept:
            self.num_bytes -= self._kept.pop(key)[1]

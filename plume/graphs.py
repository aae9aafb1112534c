"""CUDA graphs: what is launched once is replayed at the cost of one launch, on the same memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


def why_not(device: torch.device) -> str | None:
    """Why nothing can be captured on this device; None where it can."""
    return None if device.type == "cuda" else f"CUDA graphs need a CUDA device, and the model is on {device.type}"


def new_pool(device: torch.device) -> Any:
    """Memory for the intermediate results of graphs, no two of which run at once."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def capture(work: Callable[[], T], pool: Any) -> Callable[[], T]:
    """Capture what `work` launches.

    Args:
        work: reads tensors that stay where they are, and asks nothing of the device. It runs twice before, so that
            libraries have chosen their kernels and allocated their workspaces.
        pool: from `new_pool`.

    Returns:
        A function that launches all of it again, and returns the same tensors with their new contents.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = work()

    def replay() -> T:
        graph.replay()
        return output

    return replay


class Kept(Generic[T]):
    """Things made for one shape each; the most recently used ones are kept, within a bound."""

    def __init__(self, most: int, most_bytes: float = float("inf"), num_bytes: Callable[[T], int] = lambda _: 0):
        """Start empty.

        Args:
            most: how many are kept.
            most_bytes: and how much memory of theirs; the newest one is kept in any case.
            num_bytes: memory of one.
        """
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self._most, self._most_bytes, self._num_bytes = most, most_bytes, num_bytes

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[T]:
        return iter(self._kept.values())

    def __contains__(self, shape: Hashable) -> bool:
        return shape in self._kept

    def get(self, shape: Hashable, make: Callable[[], T]) -> T:
        """The one for this shape, made if it is not there."""
        if shape not in self._kept:
            self._kept[shape] = make()
        self._kept.move_to_end(shape)
        while len(self._kept) > 1 and (len(self._kept) > self._most or self._total() > self._most_bytes):
            self._kept.popitem(last=False)
        return self._kept[shape]

    def _total(self) -> int:
        return sum(self._num_bytes(one) for one in self._kept.values())

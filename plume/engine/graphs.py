"""CUDA graphs: what is launched once is replayed at the cost of one launch, on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


def unsupported_reason(device: torch.device) -> str | None:
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
    # Another thread may allocate pinned memory meanwhile, which the default mode takes for a mistake.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = work()
    return Replay(graph, work, output)


@dataclass
class Replay(Generic[T]):
    """A graph, what it returns, and the work, whose tensors must live as long as it does."""

    graph: Any
    work: Callable[[], T]
    output: T

    def __call__(self) -> T:
        self.graph.replay()
        return self.output

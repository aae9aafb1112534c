"""CUDA graphs: what is launched once is replayed at the cost of one launch, on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

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

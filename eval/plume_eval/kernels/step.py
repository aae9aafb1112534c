"""One latent step, adapter and all layers, in every implementation that the engine has; and where its time goes.

A step is what a rollout of nine steps takes beyond one of a single step, divided by eight: the suffix and what happens
once per rollout cancel out.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from plume.engine.engine import Engine
from plume.engine.fused import ops
from plume.model.model import PlumeModel

#: Of the longer of the two rollouts that are compared.
MOST_STEPS = 9

#: Settings of the engine, by the name of the implementation.
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "eager": {"backend": "eager"},
    "graph": {"backend": "graph"},
    "triton": {"backend": "triton"},
    "dependent": {"backend": "triton", "dependent_launch": True},
    "compiled": {"backend": "graph"},
}

RolloutClock = Callable[[Callable[[], Any], Callable[[], Any]], float]
"""Microseconds of the second function, with the first one called before each run, out of the time."""


def event_clock(before: Callable[[], Any], work: Callable[[], Any], *, num_runs: int = 15) -> float:
    """Median by CUDA events."""
    times = []
    for _ in range(num_runs + 3):
        before()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    return statistics.median(times[3:])


class Steps:
    """Rollouts of some rows behind a context of so many tokens, in one implementation."""

    def __init__(
        self,
        model: PlumeModel,
        implementation: str,
        num_rows: int,
        context: int,
        clock: RolloutClock = event_clock,
        compile_backend: str = "inductor",
    ):
        self.engine = Engine(model, **IMPLEMENTATIONS[implementation])
        self.implementation = implementation
        self._check()
        if implementation == "compiled":  # plain operations once more, whose kernels torch.compile makes
            engine: Any = self.engine
            engine.layers.read_next = torch.compile(engine.layers.read_next, backend=compile_backend, dynamic=False)
            engine.adapter = torch.compile(engine.adapter, backend=compile_backend)
        suffix = len(model.config.suffix_ids or ())
        self.buffers = self.engine.rollout_buffers(num_rows, context + MOST_STEPS + suffix)
        self.num_rows, self.context, self.clock = num_rows, context, clock
        if self.engine.has_graphs and not self.buffers.is_reused:
            raise RuntimeError(
                f"{implementation} could not be run: {num_rows} rows are more than a graph is captured for"
            )
        self.buffers.cache.kv.normal_()
        self.buffers.prefix_states.normal_()

    def _check(self) -> None:
        if self.engine.backend != IMPLEMENTATIONS[self.implementation]["backend"]:
            raise RuntimeError(f"{self.implementation} could not be run: the engine fell back to {self.engine.backend}")

    def _reset(self, steps: int) -> None:
        self.buffers.cache.lengths.fill_(self.context)
        self.buffers.start.fill_(self.context)
        self.buffers.num_latent_steps.fill_(steps)

    @torch.inference_mode()
    def step_us(self) -> float:
        """Microseconds of one step."""
        whole = {}
        for steps in (1, MOST_STEPS):
            launch, reset = self.engine.rollout_launcher(self.buffers, steps), partial(self._reset, steps)
            reset()
            self._check()  # capturing may fail
            launch()  # where nothing is captured this is the first time
            whole[steps] = self.clock(reset, launch)
        return (whole[MOST_STEPS] - whole[1]) / (MOST_STEPS - 1)


@contextlib.contextmanager
def left_out(name: str) -> Iterator[None]:
    """While this lasts, an op does nothing and returns what it returned the first time."""
    op, results = getattr(ops, name), {}

    def skip(*args: Any) -> Any:
        shapes = tuple(arg.shape if isinstance(arg, torch.Tensor) else None for arg in args)
        if shapes not in results:
            results[shapes] = op(*args)
        return results[shapes]

    setattr(ops, name, skip)
    try:
        yield
    finally:
        setattr(ops, name, op)


def shares(model: PlumeModel, num_rows: int, context: int, clock: RolloutClock = event_clock) -> dict[str, float]:
    """Microseconds by which a step of the kernels is shorter without each of its ops."""
    with torch.inference_mode():
        whole = Steps(model, "triton", num_rows, context, clock).step_us()
        found = {}
        for name in ("qkv", "attention", "out", "gate_up", "down", "experts_first", "experts_second"):
            with left_out(name):
                found[name] = whole - Steps(model, "triton", num_rows, context, clock).step_us()
    return found


def node_us(num_nodes: int = 1144) -> float:
    """Microseconds per node of a graph of so many kernels that do next to nothing."""
    x = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    x.add_(1)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(num_nodes):
            x.add_(1)
    return event_clock(lambda: None, graph.replay) / num_nodes

"""Time, memory, energy and launches of one piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Work = Callable[[], Any]


@dataclass
class Timing:
    """What was measured of one case; times in milliseconds, in the order in which they were taken.

    peak_memory_bytes: what the call allocated beyond what was held before: weights, caches and graphs. joules: of all
    runs, the whole device's.
    """

    times_ms: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    joules: float | None = None

    def percentile(self, share: float) -> float:
        """A time that this share of the runs stayed below (linear between runs)."""
        return float(torch.tensor(self.times_ms, dtype=torch.double).quantile(share))

    @property
    def median_ms(self) -> float:
        """Of all runs."""
        return self.percentile(0.5)


def timed(work: Work, device: torch.device, timing: Timing) -> None:
    """Run once and note what it took."""
    energy = _energy(device)
    before, held = energy() if energy else 0.0, 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    timing.times_ms.append(1000 * (time.perf_counter() - begin))
    if device.type == "cuda":
        own = torch.cuda.max_memory_allocated(device) - held
        timing.peak_memory_bytes = max(timing.peak_memory_bytes or 0, own)
    if energy:
        timing.joules = (timing.joules or 0.0) + energy() - before


def num_launches(work: Work, device: torch.device) -> int:
    """Kernels that a GPU runs for this work; on a CPU, operations that are no mere views."""
    if device.type != "cuda":
        with _Counter() as counter:
            work()
        return counter.count
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events() or ())


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        aliases = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        self.count += not aliases
        return func(*args, **(kwargs or {}))


def _energy(device: torch.device) -> Callable[[], float] | None:
    """A counter of joules, where the driver's library is there to ask."""
    if device.type != "cuda":
        return None
    try:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000

"""How many threads a CPU is good for."""

from __future__ import annotations

import os

import psutil
import torch


def num_physical_cores() -> int:
    """Physical cores that this process may use: two threads of one core only get in each other's way."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical, logical = psutil.cpu_count(logical=False), psutil.cpu_count()
    if not physical or not logical:
        return allowed
    return max(1, min(allowed, round(allowed * physical / logical)))


def use_physical_cores() -> None:
    """As many threads as physical cores, for a whole program; `OMP_NUM_THREADS` has its way where it is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_physical_cores())

"""Whether every kernel computes its definition, at the shapes and in the dtype in which it is timed.

The reference is the definition in float64. In float32 a kernel may err by 1e-5 of the norm; in bfloat16 twice as much
as the definition itself does there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from plume.engine.fused import ops, reference
from plume_eval.kernels.cases import Shapes, arguments, as_double
from plume_eval.kernels.comparing import clone, errors, outcome
from plume_kernels import MODULES


@dataclass(frozen=True)
class Check:
    """One result of a kernel on one batch: its error and what it may be, as shares of the norm."""

    name: str
    part: str
    num_rows: int
    num_new: int
    error: float
    allowed: float

    @property
    def is_green(self) -> bool:
        """Whether it is right; NaN is not."""
        return self.error <= self.allowed


def check_all(
    shapes: Shapes, batches: Sequence[tuple[int, int]], *, dtype: torch.dtype, device: str, context: int = 300
) -> list[Check]:
    """Hold every op, as a device computes it, against its definition.

    Args:
        shapes: of the model.
        batches: rows and new tokens of each.
        dtype: of weights and activations.
        device: where.
        context: filled slots of the longest row; the others have fewer.
    """
    found = []
    for num_rows, num_new in batches:
        lengths = [1 + (context - 1) * (row + 1) // num_rows for row in range(num_rows)]
        cases = arguments(shapes, lengths, num_new=num_new, dtype=dtype, device=device, seed=num_rows)
        for name in MODULES:
            own, rounded, exact = clone(cases[name]), clone(cases[name]), as_double(clone(cases[name]))
            expected = outcome(name, getattr(reference, name)(*exact), exact)
            usual = errors(name, outcome(name, getattr(reference, name)(*rounded), rounded), expected)
            for part, error in errors(name, outcome(name, getattr(ops, name)(*own), own), expected).items():
                allowed = 1e-5 if dtype == torch.float32 else max(2 * usual[part], 1e-5)
                found.append(Check(name, part, num_rows, num_new, error, allowed))
    return found

"""Backward through a batch that does not fit into memory at once (GradCache, arXiv 2101.06983).

The batch terms of the objective need the vectors of all rows, but their gradient reaches the model only through those
vectors. So:

    1. run every pass without a graph, keep its vectors, and the state of the random generators before it;
    2. batch terms of all vectors, on all processes; its gradient with respect to the vectors;
    3. run every pass again, with a graph and the same random numbers; back-propagate
       <gradient of 2, vectors> + row terms, pass by pass.

One pass of activations is alive at a time. Balance needs no special case: the sum of gates of a pass is one of its
vectors. A frozen vision tower is run in 1 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from sentence_transformers.base.losses.gradcache import RandContext
from torch import Tensor

from plume.model.interface import PlumeOutput
from plume_train.data.collate import Batch, Pass, Role
from plume_train.objective.gather import most
from plume_train.objective.objective import Objective, Representations

Observe = Callable[[Role, PlumeOutput, Pass], None]


@dataclass(kw_only=True)
class Step:
    """Forward and backward of one batch on one process.

    Example: `parts = Step(...).direct(batch)`, or `.cached(batch)`; gradients are then in the parameters.
    """

    model: Any
    """The model, wrapped as it is trained."""
    objective: Objective
    accelerator: Accelerator
    autocast: Callable[[], AbstractContextManager]
    """Context of every pass."""
    scale: float = 1.0
    """Factor of the gradient: one over the accumulated batches."""
    vision_is_frozen: bool = False
    """Whether the vision tower before its merger has no trainable parameter."""
    observe: Observe | None = None
    """Sees every output once, without gradients."""
    check: Callable[[dict[str, Tensor]], None] | None = None
    """Sees the terms before they are back-propagated; may raise."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """The terms so far, without gradients."""

    def direct(self, batch: Batch) -> dict[str, Tensor]:
        """All passes, then one backward pass; returns the terms."""
        with self._casts_kept():
            parts = self._run_all(batch)
        self._keep(parts)
        self._backward(self.objective.weighted(parts) * self.scale)
        return self.parts

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """The terms alone, without gradients."""
        with torch.no_grad():
            return self._run_all(batch)

    def _run_all(self, batch: Batch) -> dict[str, Tensor]:
        num_rows = self.objective.num_rows(batch)
        parts: dict[str, Tensor] = {}
        representations: dict[Role, list[Representations]] = {}
        for role, micro_batch in _passes(batch):
            output = self._run(**micro_batch["inputs"])
            self._observe(role, output, micro_batch)
            written = self._write(output, micro_batch)
            representations.setdefault(role, []).append(self.objective.represent(output, micro_batch, written))
            self._add(parts, self.objective.row_terms(output, micro_batch, num_rows.get(role), written), role)
        return parts | self.objective.batch_terms(representations, batch)

    def cached(self, batch: Batch) -> dict[str, Tensor]:
        """All passes twice, each with a backward pass of its own; returns the terms."""
        passes = _passes(batch)
        num_rows = self.objective.num_rows(batch)
        replays, representations, frozen = [], {}, []
        for role, micro_batch in passes:
            replays.append(RandContext(*micro_batch["inputs"].values()))
            with torch.no_grad():
                output = self._run(**{**micro_batch["inputs"], "labels": None, "reconstruction_labels": None})
                self._observe(role, output, micro_batch)
                written = self._write(output, micro_batch) if self.objective.ranks_by_written else None
                vectors = self.objective.represent(output, micro_batch, written)
            representations.setdefault(role, []).append({name: value.detach() for name, value in vectors.items()})
            frozen.append(output.vision_states if self.vision_is_frozen else None)

        leaves = [
            vector.requires_grad_()
            for side in representations.values()
            for one in side
            for name, vector in one.items()
            if name != "teacher"
        ]
        batch_terms = self.objective.batch_terms(representations, batch)
        self._keep(batch_terms)
        if batch_terms:
            self.objective.weighted(batch_terms).backward(inputs=leaves)

        cached = {role: iter(side) for role, side in representations.items()}
        with self._many_backwards() as backward:
            for index, (role, micro_batch) in enumerate(passes):
                with backward.hold(is_last=index == len(passes) - 1), replays[index]:
                    output = self._run(**micro_batch["inputs"], vision_states=frozen[index])
                    row_terms: dict[str, Tensor] = {}
                    written = self._write(output, micro_batch)
                    new = self.objective.row_terms(output, micro_batch, num_rows.get(role), written)
                    self._add(row_terms, new, role)
                    self._keep(row_terms)
                    again = self.objective.represent(output, micro_batch)
                    loss = self.objective.weighted(row_terms)
                    for name, vector in next(cached[role]).items():
                        if vector.grad is not None:
                            loss = loss + (again[name] * vector.grad).sum()
                    backward(loss * self.scale)
        return self.parts

    def _run(self, **inputs) -> PlumeOutput:
        with self.autocast():
            return self.model(**inputs)

    def _write(self, output: PlumeOutput, micro_batch: Pass) -> PlumeOutput | None:
        """The explicit pass over the rows of a pass, where there is one."""
        if "teacher" not in micro_batch:
            return None
        inputs = {name: one for name, one in micro_batch["inputs"].items() if not name.startswith("reconstruction")}
        return self._run(**{**inputs, **micro_batch["teacher"], "vision_states": output.vision_states})

    def _casts_kept(self) -> AbstractContextManager:
        """While this lasts, passes share what autocast makes of the weights; else each keeps a copy until backward.

        torch forgets its copies when the outermost context ends, whether or not that one casts. Under FSDP, weights are
        gathered for a layer at a time, and copies would keep them all.
        """
        if self.accelerator.distributed_type == DistributedType.FSDP:
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, enabled=False)

    def _observe(self, role: Role, output: PlumeOutput, micro_batch: Pass) -> None:
        if self.observe is not None:
            with torch.no_grad():
                self.observe(role, output, micro_batch)

    def _add(self, parts: dict[str, Tensor], new: dict[str, Tensor], role: Role) -> None:
        for name, value in new.items():
            name = f"{name}_{role}"
            parts[name] = parts[name] + value if name in parts else value

    def _keep(self, parts: dict[str, Tensor]) -> None:
        for name, value in parts.items():
            self.parts[name] = self.parts.get(name, torch.zeros_like(value)) + value.detach()
        if self.check is not None:
            self.check(self.parts)

    def _backward(self, loss: Tensor) -> None:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.accelerator.backward(loss, scale_wrt_gas=False)
        else:
            self.accelerator.backward(loss)

    @contextmanager
    def _many_backwards(self) -> Iterator[_Backward]:
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            yield _Backward(self.accelerator, self.model)
            return
        # One reduction for all passes; without it ZeRO-2 and 3 count every gradient twice or refuse.
        self.model.set_gradient_accumulation_boundary(True)
        with self.model.coalesce_grad_reduction():
            yield _EngineBackward(self.accelerator, self.model)
        self.model.step()


@dataclass
class _Backward:
    """One of several backward passes of a step; gradients are averaged over processes in the last."""

    accelerator: Accelerator
    model: Any

    def __call__(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def hold(self, is_last: bool) -> AbstractContextManager:
        """Context of a pass, forward and backward."""
        if is_last or not self.accelerator.sync_gradients:
            return nullcontext()  # while batches are accumulated, the trainer holds gradients back itself
        return self.accelerator.no_sync(self.model)


class _EngineBackward(_Backward):
    """The same where DeepSpeed's engine reduces gradients."""

    def __call__(self, loss: Tensor) -> None:
        self.model.backward(loss, scale_wrt_gas=False)

    def hold(self, is_last: bool) -> AbstractContextManager:
        return nullcontext()


def leveled(batch: Batch) -> Batch:
    """The batch with as many passes as on any other process, further ones being empty; a collective call."""
    passes = batch["passes"]
    counts = most(torch.tensor([len(of_role) for of_role in passes.values()], device=batch["is_pair"].device)).tolist()
    return {
        **batch,
        "passes": {
            role: [*of_role, *(batch["filler"][role] for _ in range(count - len(of_role)))]
            for (role, of_role), count in zip(passes.items(), counts, strict=True)
        },
    }


def _passes(batch: Batch) -> list[tuple[Role, Pass]]:
    return [(role, micro_batch) for role, passes in batch["passes"].items() for micro_batch in passes]

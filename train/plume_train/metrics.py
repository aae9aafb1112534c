"""What a training run says of itself: means of everything that was observed between two logs.

Beside the loss terms: recall within the batch, called `teacher_forced_recall` where vectors are read behind words of
the data, since it is near 1 long before the model can write them; what the router does (entropy of its gates as a share
of the largest possible, load of each expert); what the latent states do (norm, also as a multiple of an embedding's,
cosine between one and the next); rows and tokens per second; peak memory. Losses and recall are also told by task.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from plume.model.interface import PlumeOutput
from plume_train.data.collate import SUPERVISED, Batch, Pass, Role
from plume_train.objective.gather import is_distributed, num_processes
from plume_train.objective.losses import in_batch_recall


class Meter:
    """Collects observations of steps, and gives their means."""

    def __init__(self, device: torch.device, embedding_norm: Tensor | None = None):
        """Set up.

        Args:
            device: of what is observed.
            embedding_norm: mean norm of a token's embedding when training began; None where it is not known.
        """
        self.device = device
        self.embedding_norm = embedding_norm
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._vectors: dict[Role, list[Tensor]] = defaultdict(list)
        self._start = time.perf_counter()
        self._rows = self._tokens = 0

    def see_pass(self, role: Role, output: PlumeOutput, micro_batch: Pass) -> None:
        """Take note of one pass of the model."""
        assert output.embedding is not None
        assert output.states is not None
        if role not in SUPERVISED:
            return
        self._vectors[role].append(output.embedding.detach())
        counts = micro_batch["counts"] > 0
        if output.gates is not None and counts.any():
            gates = output.gates[counts].float()  # [b, K, E]
            gates = gates[gates.sum(dim=-1) > 0]  # steps that were taken
            if len(gates):
                entropy = -(gates * gates.clamp(min=1e-9).log()).sum(dim=-1).mean() / math.log(gates.shape[-1])
                self._values["gate_entropy"].append(entropy)
                for expert, load in enumerate(gates.mean(dim=0)):
                    self._values[f"expert_load_{expert}"].append(load)
        states = output.states[counts].float()
        if states.shape[1] > 1 and len(states):
            taken = states.abs().sum(dim=-1) > 0  # [b, K+1]
            norm = states.norm(dim=-1)[taken].mean()
            self._values["state_norm"].append(norm)
            if self.embedding_norm is not None:
                self._values["state_norm_ratio"].append(norm / self.embedding_norm.to(norm.device))
            both = taken[:, 1:] & taken[:, :-1]
            if both.any():
                cosine = F.cosine_similarity(states[:, 1:], states[:, :-1], dim=-1)
                self._values["step_cosine"].append(cosine[both].mean())

    def see_step(self, batch: Batch, parts: dict[str, Tensor], loss: Tensor) -> None:
        """Take note of a batch once its loss is known."""
        for name, value in parts.items():
            self._values[name].append(value.detach())
        told = {"loss": loss.detach()}
        if self._vectors["target"] and batch["target_keys"] is not None:
            query, target = (torch.cat(self._vectors[role])[batch["places"][role]] for role in SUPERVISED)
            name = "teacher_forced_recall" if batch["is_forced"] else "recall_in_batch"
            told[name] = in_batch_recall(query, target, batch["target_keys"], batch["is_pair"])
            self._values[name].append(told[name])
        if batch["task"]:
            for name, value in told.items():
                self._values[f"{name}/{batch['task']}"].append(value)
        self._vectors.clear()
        self._rows += len(batch["where"])
        self._tokens += int(batch["num_tokens"])

    def take(self) -> dict[str, float]:
        """Means over all processes since the last call; a collective call."""
        means = {name: torch.stack(values).float().mean() for name, values in sorted(self._values.items())}
        seconds = time.perf_counter() - self._start
        counts = [float(self._rows), float(self._tokens), peak_memory_gib(self.device)]
        # A process whose places were all empty has observed less; it must still speak of the same things.
        names = _everywhere(list(means))
        known = torch.tensor([name in means for name in names], dtype=torch.float32, device=self.device)
        zero = torch.zeros((), device=self.device)
        sums = torch.stack([means.get(name, zero) for name in names]) if names else torch.zeros(0, device=self.device)
        rest = torch.tensor(counts, device=self.device)
        if is_distributed():
            packed = torch.cat([sums, known, rest])
            dist.all_reduce(packed)
            sums, known, rest = packed.split([len(names), len(names), 3])
        result = dict(zip(names, (sums / known.clamp(min=1)).tolist(), strict=True))
        rows, tokens, memory = rest.tolist()
        result |= {
            "pairs_per_second": rows / seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gib": memory / num_processes(),
        }
        self._values.clear()
        self._start, self._rows, self._tokens = time.perf_counter(), 0, 0
        return {name: float(f"{value:.5g}") for name, value in result.items()}


def peak_memory_gib(device: torch.device) -> float:
    """The most memory in use: of the device since the last call, or, on a CPU, of the process since it began."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _everywhere(names: list[str]) -> list[str]:
    """Names that any process knows."""
    if not is_distributed():
        return names
    lists: list[list[str]] = [[] for _ in range(num_processes())]
    dist.all_gather_object(lists, names)
    return sorted({name for micro_batch in lists for name in micro_batch})

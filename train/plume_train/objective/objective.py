"""The objective of a step, split the way that GradCache needs it.

    L = row terms of every pass + batch terms of all passes

A *row term* is a sum over rows: cross-entropy, distillation. A *batch term* needs the vectors of the whole batch on all
processes: contrast, balance, uniformity. It is a function of a few small tensors per pass, which `represent` picks out,
so that the passes themselves can be run twice instead of kept.

Letters: B rows of a pass, D hidden size, K latent steps, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from plume.model.interface import PlumeOutput, at_least_float32
from plume_train.config import PlumeTrainingArguments
from plume_train.data.collate import SUPERVISED, Batch, Pass, Role
from plume_train.objective.extra_losses import (
    alignment_loss,
    distillation_loss,
    matryoshka_loss,
    per_step_loss,
    ranking_loss,
    sigmoid_loss,
    uniformity_loss,
)
from plume_train.objective.gather import num_processes, total
from plume_train.objective.losses import Contrast, NegativeRules, balance_loss, info_nce, suffix_cross_entropy

Run = Callable[..., PlumeOutput]
Representations = dict[str, Tensor]
"""What batch terms need of a pass: embedding, anchor `[B, D]`, gate_total `[E]`, states `[B, K, D]`, scalars, and
teacher, vectors `[B, T]` without gradients that the ranking is learnt from."""

_OF_A_SIDE = re.compile(f"_({'|'.join(get_args(Role))})$")

#: SigLIP's first scale and bias.
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0
#: The largest factor that similarities may be multiplied by, as in CLIP.
MAX_SCALE = 100.0


class LossScalars(nn.Module):
    """What the loss learns: factors of similarities, for embedding and anchor, and the bias of the sigmoid loss.

    For all tasks alike, or (T of them) for each its own.
    """

    def __init__(self, scale: float, bias: float = 0.0, num_tasks: int = 1):
        super().__init__()
        log_scale = torch.tensor(scale).log().item()
        self.values = nn.Parameter(torch.tensor([[log_scale, log_scale, bias]] * num_tasks))

    def forward(self) -> Tensor:
        """Both factors and the bias, `[T, 3]`."""
        return torch.cat([self.values[:, :2].exp().clamp(max=MAX_SCALE), self.values[:, 2:]], dim=1)


class Objective:
    """The terms that the settings ask for, each times its weight."""

    def __init__(self, args: PlumeTrainingArguments, num_experts: int | None, tasks: Iterable[str] = ()):
        """Set up.

        Args:
            args: weights and options of all terms.
            num_experts: E, or None where nothing routes.
            tasks: those of the data, which may have a temperature each.
        """
        self.args = args
        self.tasks = {task: place for place, task in enumerate(sorted(set(tasks)))} if args.temperature_per_task else {}
        self.num_experts = num_experts
        self.weights = args.loss_weights

    def build_scalars(self) -> LossScalars | None:
        """What the loss learns; None where its numbers are fixed."""
        num_tasks = max(len(self.tasks), 1)
        if self.args.contrastive_loss == "sigmoid":
            return LossScalars(SIGMOID_SCALE, SIGMOID_BIAS, num_tasks)
        is_learnt = self.args.learn_temperature or self.args.temperature_per_task
        return LossScalars(1 / self.args.temperature, num_tasks=num_tasks) if is_learnt else None

    @property
    def ranks_by_written(self) -> bool:
        """Whether the written reasoning of the same model teaches how candidates rank."""
        return bool(self.weights["ranking"]) and self.args.teacher_vectors is None

    def represent(self, output: PlumeOutput, micro_batch: Pass, written: PlumeOutput | None = None) -> Representations:
        """What batch terms need of a pass.

        Args:
            output: of the pass.
            micro_batch: of the pass.
            written: of the explicit pass over the same rows, where there is one.
        """
        assert output.embedding is not None
        assert output.anchor_embedding is not None
        assert output.states is not None
        representations = {"embedding": output.embedding, "anchor": output.anchor_embedding}
        if self.num_experts is not None:
            counted = micro_batch["counts"][:, None, None]
            representations["gate_total"] = (
                output.embedding.new_zeros(self.num_experts)
                if output.gates is None
                else (at_least_float32(output.gates) * counted).sum(dim=(0, 1))
            )
        if self.weights["per_step"]:
            representations["states"] = output.states[:, 1:]
        if output.scalars is not None:
            representations["scalars"] = output.scalars
        if (taught := micro_batch.get("teacher_vectors")) is not None:
            representations["teacher"] = taught
        elif self.ranks_by_written and written is not None and written.embedding is not None:
            representations["teacher"] = written.embedding.detach()
        return representations

    def row_terms(
        self,
        output: PlumeOutput,
        micro_batch: Pass,
        num_rows: Tensor | None,
        written: PlumeOutput | None = None,
    ) -> dict[str, Tensor]:
        """Terms that are sums over the rows of a pass.

        Args:
            output: of the pass.
            micro_batch: of the pass.
            num_rows: places with labels on this side of the batch, on all processes; None for hard negatives.
            written: of the explicit pass over the same rows, where there is one.
        """
        inputs, counts, parts = micro_batch["inputs"], micro_batch["counts"], {}
        if "labels" in inputs:
            assert output.suffix_logits is not None
            assert num_rows is not None
            parts["cross_entropy"] = suffix_cross_entropy(output.suffix_logits, inputs["labels"], num_rows, counts)
        if output.reconstruction_logits is not None:
            assert num_rows is not None
            labels = inputs["reconstruction_labels"]
            parts["reconstruct"] = suffix_cross_entropy(output.reconstruction_logits, labels, num_rows, counts)
        if written is not None and (teacher := micro_batch.get("teacher")) is not None:
            assert num_rows is not None
            assert output.read_out_layers is not None
            assert written.read_out_layers is not None
            assert written.suffix_logits is not None
            if self.weights["distillation"]:
                parts["distillation"] = distillation_loss(
                    output.read_out_layers, written.read_out_layers, counts, num_rows
                )
            parts["teacher_cross_entropy"] = suffix_cross_entropy(
                written.suffix_logits, teacher["labels"], num_rows, counts
            )
        return {name: value * num_processes() for name, value in parts.items()}

    def num_rows(self, batch: Batch) -> dict[Role, Tensor]:
        """Places with labels on each side of the batch, on all processes; a collective call."""
        return {role: total(batch["num_supervised"][role]) for role in SUPERVISED if role in batch["passes"]}

    def batch_terms(self, representations: dict[Role, list[Representations]], batch: Batch) -> dict[str, Tensor]:
        """Terms that need all rows of all processes; a collective call.

        Args:
            representations: what `represent` returned for each pass of each side.
            batch: gives places, keys and masks.
        """
        parts: dict[str, Tensor] = {}
        sides: dict[Role, Representations] = {
            role: _joined(passes, batch["places"][role]) for role, passes in representations.items()
        }
        supervised = [sides[role] for role in SUPERVISED if role in sides]
        if self.num_experts is not None:
            gates = torch.stack([side["gate_total"] for side in supervised]).sum(dim=0)
            parts["balance"] = balance_loss(gates, batch["num_gates"])
        if "target" in sides:
            parts |= self._contrast(sides, batch)
        if self.weights["uniformity"]:
            spread = [uniformity_loss(side["embedding"], batch["is_pair"]) for side in supervised]
            parts["uniformity"] = torch.stack(spread).mean()
        return parts

    def weighted(self, parts: dict[str, Tensor]) -> Tensor:
        """The sum of some terms, each times its weight; all sides of a term share one."""
        terms = [self.weights[_OF_A_SIDE.sub("", name)] * value for name, value in parts.items()]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def _contrast(self, sides: dict[Role, Representations], batch: Batch) -> dict[str, Tensor]:
        query, target, negative = sides["query"], sides["target"], sides.get("negative")
        names = ("query_keys", "target_keys", "is_negative", "negative_keys", "right_keys")
        columns = {name: batch[name] for name in names}
        if not self.args.mask_duplicates:
            columns["query_keys"] = None
            if not batch["has_labels"]:  # among which the own one must be known
                columns["target_keys"] = None
        contrast = Contrast.of(batch["is_pair"], **columns, has_labels=batch["has_labels"])
        scales = self._scales(sides, batch["task"])
        rules = NegativeRules(
            margin=self.args.false_negative_margin,
            duplicate=self.args.duplicate_similarity,
            hardness=self.args.hardness,
            same_side=self.args.same_side_negatives,
        )

        parts: dict[str, Tensor] = {}
        for name, kind, scale in (("contrastive", "embedding", scales[0]), ("anchor_contrastive", "anchor", scales[1])):
            if not self.weights[name]:
                continue
            negatives = None if negative is None else negative[kind]
            if self.args.contrastive_loss == "sigmoid":
                parts[name] = sigmoid_loss(query[kind], target[kind], scale, scales[2], contrast, negatives)
            else:
                parts[name] = info_nce(query[kind], target[kind], 1 / scale, contrast, negatives, rules)

        negatives = None if negative is None else negative["embedding"]
        if self.weights["matryoshka"]:
            parts["matryoshka"] = matryoshka_loss(
                query["embedding"],
                target["embedding"],
                self.args.matryoshka_dims,
                1 / scales[0],
                contrast,
                negatives,
                rules,
                self.args.matryoshka_precisions,  # type: ignore[arg-type]
            )
        if self.weights["alignment"]:
            keys = columns["query_keys"], columns["target_keys"]
            of_batch = Contrast.of(batch["is_pair"], *keys, right_keys=columns["right_keys"])
            parts["alignment"] = alignment_loss(
                query["embedding"], target["embedding"], query["anchor"], target["anchor"], 1 / scales[0], of_batch
            )
        if self.weights["ranking"] and "teacher" in query:
            parts["ranking"] = self._ranking(sides, batch, columns)
        if self.weights["per_step"] and batch["most_steps"]:
            whole = batch["is_pair"] & batch["takes_all_steps"]
            keys = columns["query_keys"], columns["target_keys"]
            contrast = Contrast.of(whole, *keys, right_keys=columns["right_keys"])
            parts["per_step"] = per_step_loss(query["states"], target["states"], self.args.temperature, contrast)
        return parts

    def _ranking(self, sides: dict[Role, Representations], batch: Batch, columns: dict[str, Any]) -> Tensor:
        """By the vectors of another embedder, or by written queries among the vectors that targets have anyway."""
        query, target, negative = sides["query"], sides["target"], sides.get("negative")
        is_taught, is_negative = batch["is_taught"], columns["is_negative"]
        assert is_taught is not None
        if is_negative is not None and batch["is_taught_negative"] is not None:
            is_negative = is_negative & batch["is_taught_negative"]
        known = {**columns, "is_negative": is_negative}
        contrast = Contrast.of(batch["is_pair"] & is_taught, **known, has_labels=batch["has_labels"])
        of_teacher = "embedding" if self.ranks_by_written else "teacher"
        return ranking_loss(
            query["embedding"],
            target["embedding"],
            query["teacher"],
            target[of_teacher],
            self.args.ranking_temperature,
            contrast,
            None if negative is None else negative["embedding"],
            None if negative is None else negative[of_teacher],
        )

    def _scales(self, sides: dict[Role, Representations], task: str) -> Any:
        """Factors and bias of a task; the mean over tasks for one that the training data do not have."""
        learnt = [side["scalars"] for side in sides.values() if "scalars" in side]
        if not learnt:
            return 1 / self.args.temperature, 1 / self.args.temperature, 0.0
        by_task = torch.stack(learnt).mean(dim=0)  # [T, 3]
        return (by_task[self.tasks[task]] if task in self.tasks else by_task.mean(dim=0)).unbind()


def _joined(passes: list[Representations], places: Tensor) -> Representations:
    """One side from its passes: rows at their places, gates summed, scalars averaged (every pass must use them)."""
    joins = {"gate_total": _sum, "scalars": _mean}
    return {
        name: joins[name](parts) if name in joins else torch.cat(parts).index_select(0, places)
        for name, parts in ((name, [one[name] for one in passes]) for name in passes[0])
    }


def _sum(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(dim=0)


def _mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).mean(dim=0)

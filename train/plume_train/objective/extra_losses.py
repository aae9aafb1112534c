"""Optional terms of the objective, each off by default and each from a paper of its own.

All follow the conventions of `plume_train.objective.losses`: float32, and averaged over processes the value over the
joined batch. Distillation is a sum over rows, of this process alone.

Letters: B rows of this process, D hidden size, K latent steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from plume.model.interface import at_least_float32, normalize
from plume_train.config import Precision
from plume_train.objective.gather import gather_rows, num_processes, total
from plume_train.objective.losses import Contrast, NegativeRules, info_nce


def sigmoid_loss(
    query: Tensor,
    target: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    contrast: Contrast,
    negative: Tensor | None = None,
) -> Tensor:
    """Contrast that asks of every pair alone whether it is right (SigLIP, arXiv 2303.15343, equation 1).

    Args:
        query: unit vectors, `[B, D]`.
        target: unit vectors; row i is the positive of query i.
        scale: similarities are multiplied by it; SigLIP learns it from 10.
        bias: added to the logits; SigLIP learns it from -10, the share of negatives.
        contrast: which columns count.
        negative: hard negatives, `[H, D]`.
    """
    query, target = at_least_float32(query), at_least_float32(target)
    logits = scale * query @ gather_rows(target).T + bias  # [B, N]
    sign = -torch.ones_like(logits).scatter(1, contrast.own[:, None], value=-1.0)
    per_row = -(F.logsigmoid(sign * logits) * contrast.allowed_targets).sum(dim=1)
    if negative is not None:
        assert contrast.allowed_negatives is not None
        logits = scale * query @ gather_rows(at_least_float32(negative)).T + bias
        per_row = per_row - (F.logsigmoid(-logits) * contrast.allowed_negatives).sum(dim=1)
    return contrast.mean(per_row)


def matryoshka_loss(
    query: Tensor,
    target: Tensor,
    dims: Sequence[int],
    temperature: float | Tensor,
    contrast: Contrast,
    negative: Tensor | None = None,
    rules: NegativeRules | None = None,
    precisions: Sequence[Precision] = ("float32",),
) -> Tensor:
    """InfoNCE on the first d numbers of the vectors, mean over d in `dims` (arXiv 2205.13147) and over precisions.

    What is quantised is as vectors in an index are, with the gradient of those that are not (Qwen3-VL-Embedding, arXiv
    2601.04720).
    """
    losses = []
    for dim, precision in product(dims, precisions):
        short = [None if x is None else quantized(normalize(x[:, :dim]), precision) for x in (query, target, negative)]
        assert short[0] is not None
        assert short[1] is not None
        losses.append(info_nce(short[0], short[1], temperature, contrast, short[2], rules))
    return torch.stack(losses).mean()


def quantized(vectors: Tensor, precision: Precision) -> Tensor:
    """Unit vectors as a precision leaves them, unit again; gradients pass as if it had not, `[B, D] -> [B, D]`.

    "int8" has 127 steps up to the largest number of a vector, "binary" keeps signs.

    Example:
        >>> quantized(torch.tensor([[0.6, -0.8]]), "binary")
        tensor([[ 0.7071, -0.7071]])
    """
    if precision == "float32":
        return vectors
    plain = vectors.detach()
    if precision == "binary":
        coarse = torch.where(plain >= 0, 1.0, -1.0).to(plain.dtype)
    else:
        step = plain.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        coarse = (plain / step).round() * step
    return vectors + (normalize(coarse) - plain)


def per_step_loss(
    query_states: Tensor, target_states: Tensor, temperature: float | Tensor, contrast: Contrast
) -> Tensor:
    """InfoNCE after every latent step, and a penalty where a step makes it worse (GIRCSE, arXiv 2509.24291).

    After step k the vector is the mean of the first k latent states. Trained with a random K, any K works at inference.

    Args:
        query_states: latent states h_1 .. h_K, `[B, K, D]`; every row takes all K.
        target_states: the same of the targets.
        temperature: logits are divided by it.
        contrast: which columns count.
    """
    counts = torch.arange(1, query_states.shape[1] + 1, device=query_states.device)[:, None]  # [K, 1]
    query, target = (
        F.normalize(at_least_float32(states).cumsum(dim=1) / counts, dim=-1) for states in (query_states, target_states)
    )
    losses = torch.stack(
        [info_nce(query[:, k], target[:, k], temperature, contrast) for k in range(query_states.shape[1])]
    )
    # The penalty is not a sum over rows, so it needs the losses of all processes.
    everywhere = total(losses) / num_processes()
    logs = everywhere.clamp(min=1e-12).log()
    penalty = F.relu(logs[1:] - logs[:-1]).mean() if len(logs) > 1 else losses.sum() * 0
    return losses.mean() + penalty


def alignment_loss(
    query: Tensor,
    target: Tensor,
    query_anchor: Tensor,
    target_anchor: Tensor,
    temperature: float | Tensor,
    contrast: Contrast,
) -> Tensor:
    """InfoNCE between the embedding of one side and the anchor embedding of the other, mean of both directions.

    Only with it may a corpus be stored as anchor embeddings, which need no latent step, and searched with embeddings.
    """
    crossed = (
        info_nce(query, target_anchor, temperature, contrast),
        info_nce(query_anchor, target, temperature, contrast),
    )
    return (crossed[0] + crossed[1]) / 2


def uniformity_loss(vectors: Tensor, is_real: Tensor) -> Tensor:
    """Log of the mean Gaussian potential between the vectors of a side (arXiv 2005.10242, t = 2).

    Args:
        vectors: unit vectors, `[B, D]`.
        is_real: rows that count, `[B]`.
    """
    everyone, counts = gather_rows(at_least_float32(vectors)), gather_rows(is_real)  # [N, D], [N]
    distance = 2 - 2 * everyone @ everyone.T
    pairs = (counts[:, None] & counts[None]).triu(diagonal=1)
    potential = (torch.exp(-2 * distance) * pairs).sum() / pairs.sum().clamp(min=1)
    return potential.clamp(min=1e-12).log() * pairs.any()


def ranking_loss(
    query: Tensor,
    target: Tensor,
    teacher_query: Tensor,
    teacher_target: Tensor,
    temperature: float,
    contrast: Contrast,
    negative: Tensor | None = None,
    teacher_negative: Tensor | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of the candidates' softmax from a teacher's, mean of both directions.

    The teacher is the written reasoning of the same model (LaSER, arXiv 2603.01425, with weight 10) or a bigger
    embedder (WeMM, arXiv 2608.24053). What one learns is how the others rank, where contrast says only which is right.

    Args:
        query: unit vectors, `[B, D]`.
        target: unit vectors; row i is the positive of query i.
        teacher_query: the teacher's unit vectors of the same queries, `[B, T]`; no gradient flows into them.
        teacher_target: likewise of the targets.
        temperature: similarities of both are divided by it.
        contrast: rows and columns of which both are known.
        negative: hard negatives, `[H, D]`: further columns for every query.
        teacher_negative: likewise, `[H, T]`.
    """
    student, teacher = (
        [at_least_float32(vectors) for vectors in of if vectors is not None]
        for of in ((query, target, negative), (teacher_query, teacher_target, teacher_negative))
    )
    teacher = [vectors.detach() for vectors in teacher]
    columns = [[gather_rows(vectors) for vectors in of] for of in (student, teacher)]
    losses = []
    for row, others in ((0, 1), (1, 0)):
        logits, expected = ([rows[row] @ of[others].T] for rows, of in zip((student, teacher), columns, strict=True))
        allowed = [contrast.allowed_targets if row == 0 else contrast.allowed]
        if negative is not None and row == 0:
            assert contrast.allowed_negatives is not None
            logits.append(student[0] @ columns[0][2].T)
            expected.append(teacher[0] @ columns[1][2].T)
            allowed.append(contrast.allowed_negatives)
        mask = torch.cat(allowed, dim=1)
        found, wanted = (
            (torch.cat(of, dim=1) / temperature).masked_fill(~mask, -torch.inf).log_softmax(dim=1)
            for of in (logits, expected)
        )
        difference = torch.where(mask, wanted - found, 0.0)
        losses.append(contrast.mean((wanted.exp() * difference).sum(dim=1)))
    return torch.stack(losses).mean()


def distillation_loss(student: Tensor, teacher: Tensor, counts: Tensor, num_rows: Tensor) -> Tensor:
    """Smooth L1 between the states at `<gen_emb>` of latent and of written reasoning (CODI, arXiv 2502.21074).

    Mean over layers, rows and dimensions, each layer divided by the standard deviation of the teacher's states.

    Args:
        student: states of all layers after latent steps, `[layers, B, D]`.
        teacher: the same after the written rationale; no gradient flows into it.
        counts: how often each row counts, `[B]`.
        num_rows: how many that are, in all that the mean runs over.
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    spread = teacher.std(dim=-1, keepdim=True).clamp(min=1e-6)  # [layers, B, 1], of a row alone: batch-invariant
    error = F.smooth_l1_loss(student, teacher, reduction="none") / spread
    return (error.mean(dim=(0, 2)) * counts).sum() / num_rows.clamp(min=1)

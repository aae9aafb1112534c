"""The training objective: suffix cross-entropy, InfoNCE on two embeddings, balance of the router.

PLUME (arXiv 2604.02073, equations 6 and 8):

    L = CE(query) + CE(target) + w_gen NCE(embedding) + w_anchor NCE(anchor) + w_balance (BAL(query) + BAL(target))

The published code balances every single gate; here, as in equation 6, the mean over batch and steps is balanced.
Similarities, softmax and sums are in float32 (or float64) whatever the model's dtype.

Letters: B rows of this process, N rows of all processes, D hidden size, K latent steps, E experts, S suffix length,
V vocabulary, M supervised suffix tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms. The paper gives none; these are the published scripts'."""

    cross_entropy: float = 1.0
    """Of the suffix cross-entropy of each side."""
    contrastive: float = 1.0
    """w_gen, of InfoNCE on the embedding."""
    anchor_contrastive: float = 1.0
    """w_anchor, of InfoNCE on the anchor embedding."""
    balance: float = 0.1
    """w_balance, of the router's balance on each side."""


def suffix_cross_entropy(suffix_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the suffix: mean over the tokens of a row, then over the rows that have any.

    Args:
        suffix_logits: logits of the labels that are not -100, row by row, `[M, V]`.
        labels: `[B, S]`.

    Returns:
        A scalar; zero, but connected to the logits, where nothing is supervised.
    """
    supervised = labels != -100
    row = supervised.nonzero()[:, 0]  # [M]
    per_token = F.cross_entropy(_exact(suffix_logits), labels[supervised], reduction="none")
    per_row = supervised.sum(dim=1).clamp(min=1).to(per_token.dtype)  # [B]
    num_rows = supervised.any(dim=1).sum().clamp(min=1)
    return (per_token / per_row[row]).sum() / num_rows


def balance_loss(gates: Tensor, num_latent_steps: Tensor) -> Tensor:
    """Mean squared distance of the experts' mean gate from uniform (equation 6).

    Args:
        gates: softmax of the router over all experts, `[B, K, E]`, zero at steps that a row does not take.
        num_latent_steps: K of each row, `[B]`.

    Returns:
        A scalar in [0, (E - 1) / E²].

    Example:
        >>> balance_loss(torch.full((2, 3, 4), 0.25), torch.tensor([3, 3])).item()
        0.0
    """
    gates = _exact(gates)
    num_gates = num_latent_steps.sum().to(gates.dtype)
    total = gates.sum(dim=(0, 1))  # [E]
    if _is_distributed():
        total = torch.stack(list(all_gather(total))).sum(dim=0)
        dist.all_reduce(num_gates)
    return (total / num_gates.clamp(min=1) - 1 / gates.shape[-1]).square().mean()


def info_nce(
    query: Tensor,
    target: Tensor,
    temperature: float,
    *,
    is_pair: Tensor | None = None,
    query_keys: Tensor | None = None,
    target_keys: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE with in-batch negatives from all processes.

    The mean of query-to-target and target-to-query cross-entropy over all true pairs of all processes. Each process
    returns its share times the number of processes, so that averaging gradients over processes, as DDP does, gives
    the gradient of that mean.

    Args:
        query: unit vectors, `[B, D]`.
        target: unit vectors; row i is the positive of query i.
        temperature: logits are divided by it.
        is_pair: False where a row has no true pair: it is neither an anchor nor a negative, `[B]`.
        query_keys: integers that are equal where the content is, `[B]`. A negative whose target, or whose query,
            equals the row's own is left out of the denominator: it would be a false negative.
        target_keys: the same of the targets.

    Returns:
        A scalar; zero, but connected to the vectors, where there is no pair anywhere.
    """
    query, target = _exact(query), _exact(target)
    size, device = len(query), query.device
    is_pair = torch.ones(size, dtype=torch.bool, device=device) if is_pair is None else is_pair

    all_query, all_target = gather_rows(query), gather_rows(target)  # [N, D]
    all_pairs = gather_rows(is_pair)
    excluded = ~all_pairs[None].expand(size, -1)  # [B, N]
    for keys in (query_keys, target_keys):
        if keys is not None:
            excluded = excluded | (keys[:, None] == gather_rows(keys)[None])
    own = torch.arange(size, device=device) + _rows_before(size)
    excluded = excluded.scatter(1, own[:, None], value=False)  # the positive always counts

    total = query.new_zeros(())
    for mine, others in ((query, all_target), (target, all_query)):
        scores = (mine @ others.T / temperature).masked_fill(excluded, -torch.inf)  # [B, N]
        total = total + (F.cross_entropy(scores, own, reduction="none") * is_pair).sum() / 2
    return total * _num_processes() / all_pairs.sum().clamp(min=1)


def in_batch_recall(query: Tensor, target: Tensor, target_keys: Tensor) -> Tensor:
    """Share of the rows of this process whose nearest target has the right content; a scalar, for logs."""
    nearest = (query @ target.T).argmax(dim=1)
    return (target_keys[nearest] == target_keys).float().mean()


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes, in the order of ranks, `[B, ...] -> [N, ...]`; B may differ between processes.

    Floating tensors carry gradients back to the process that they came from.
    """
    if not _is_distributed():
        return rows
    sizes = _sizes(len(rows))
    padded = F.pad(rows, [0, 0] * (rows.ndim - 1) + [0, max(sizes) - len(rows)])
    if rows.is_floating_point():
        gathered = list(all_gather(padded))
    else:
        whole = padded.long().contiguous()
        gathered = [torch.empty_like(whole) for _ in sizes]
        dist.all_gather(gathered, whole)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)]).to(rows.dtype)


def _sizes(size: int) -> list[int]:
    sizes: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(sizes, size)
    return sizes


def _rows_before(size: int) -> int:
    return sum(_sizes(size)[: dist.get_rank()]) if _is_distributed() else 0


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _num_processes() -> int:
    return dist.get_world_size() if _is_distributed() else 1


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

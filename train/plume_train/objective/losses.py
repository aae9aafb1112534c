"""The training objective: suffix cross-entropy, InfoNCE on two embeddings, balance of the router.

PLUME (arXiv 2604.02073, equations 6 and 8):

    L = CE(query) + CE(target) + w_gen NCE(embedding) + w_anchor NCE(anchor) + w_balance BAL

The published code balances every single gate; here, as in equation 6, the mean over batch, sides and steps is balanced.
Similarities, softmax and sums are in float32 (or float64) whatever the model's dtype.

Contrast and balance see the rows of all processes. What a process returns, averaged over processes, is the value over
the joined batch; so averaging gradients, as DDP, DeepSpeed and FSDP do, gives the gradient of that value. Cross-entropy
is a sum over rows, of this process alone.

Letters: B rows of this process, N rows of all processes, D hidden size, E experts, S suffix length, V vocabulary,
M supervised suffix tokens, H hard negatives of this process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from plume.model.interface import at_least_float32
from plume_train.objective.gather import gather_rows, num_processes, rows_before, total


def suffix_cross_entropy(
    suffix_logits: Tensor, labels: Tensor, num_rows: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the suffix: mean over the tokens of a row, then over the rows that have any.

    Args:
        suffix_logits: logits of the labels that are not -100, row by row, `[M, V]`.
        labels: `[B, S]`.
        num_rows: rows with labels of all that the mean runs over, where this is a part of it; None: of this one.
        counts: how often each row counts, `[B]`; None: once.

    Returns:
        A scalar; zero, but connected to the logits, where nothing is supervised.
    """
    supervised = labels != -100
    row = supervised.nonzero()[:, 0]  # [M]
    per_token = F.cross_entropy(at_least_float32(suffix_logits), labels[supervised], reduction="none")
    per_row = supervised.sum(dim=1).clamp(min=1).to(per_token.dtype)  # [B]
    counts = row.new_ones(len(labels)) if counts is None else counts
    num_rows = (supervised.any(dim=1) * counts).sum() if num_rows is None else num_rows
    return (per_token * (counts / per_row)[row]).sum() / num_rows.clamp(min=1)


def balance_loss(gate_total: Tensor, num_gates: Tensor) -> Tensor:
    """Mean squared distance of the experts' mean gate from uniform (equation 6), over all processes.

    Args:
        gate_total: the router's softmax over all experts, summed over rows and steps, `[E]`.
        num_gates: how many softmaxes that are.

    Returns:
        A scalar in [0, (E - 1) / E²]; zero where no step was taken.

    Example:
        >>> balance_loss(torch.full((2, 3, 4), 0.25).sum(dim=(0, 1)), torch.tensor(6)).item()
        0.0
    """
    gate_total, num_gates = total(at_least_float32(gate_total)), total(num_gates)  # [E]
    mean = gate_total / num_gates.clamp(min=1)
    return (mean - 1 / len(gate_total)).square().mean() * (num_gates > 0)


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Which columns count for which rows of a contrastive loss, over all processes; made once for a batch.

    allowed `[B, N]`: pairs of a row with every row, the own one included.
    allowed_targets `[B, N]`: which of these targets count for queries: the same, or with label columns the own alone.
    allowed_negatives `[B, all H]`: the same for hard negatives; None without any.
    is_pair `[B]`: rows that are anchors.
    own `[B]`: column of a row's own target.
    num_pairs: anchors of all processes.
    """

    allowed: Tensor
    allowed_targets: Tensor
    allowed_negatives: Tensor | None
    is_pair: Tensor
    own: Tensor
    num_pairs: Tensor

    @classmethod
    def of(
        cls,
        is_pair: Tensor,
        query_keys: Tensor | None = None,
        target_keys: Tensor | None = None,
        is_negative: Tensor | None = None,
        negative_keys: Tensor | None = None,
        has_labels: bool = False,
        right_keys: Tensor | None = None,
    ) -> Contrast:
        """Find the columns; a collective call.

        Args:
            is_pair: False where a row has no true pair: it is neither an anchor nor a negative, `[B]`.
            query_keys: integers that are equal where the content is, `[B]`. A negative whose target, or whose query,
                equals the row's own is left out of the denominator: it would be a false negative.
            target_keys: the same of the targets.
            is_negative: False at empty places among the hard negatives, `[H]`.
            negative_keys: the same of the hard negatives.
            has_labels: whether all targets of the task are among the hard negatives, so that for queries those of the
                batch are not needed beside them, where some would stand several times.
            right_keys: keys of the labels that are right for a query, `[B, R]`: none of them is a negative of it, and
                it is none of theirs.
        """
        all_pairs = gather_rows(is_pair)
        allowed = all_pairs[None].repeat(len(is_pair), 1)  # [B, N]
        for keys in (query_keys, target_keys):
            if keys is not None:
                allowed &= keys[:, None] != gather_rows(keys)[None]
        forwards = allowed
        if right_keys is not None and target_keys is not None:
            allowed = allowed & ~(target_keys[:, None, None] == gather_rows(right_keys)[None]).any(dim=2)
            forwards = allowed & ~(right_keys[:, :, None] == gather_rows(target_keys)[None, None]).any(dim=1)
        own = torch.arange(len(is_pair), device=is_pair.device) + rows_before(is_pair)
        # The positive always counts.
        allowed, forwards = (mask.scatter(1, own[:, None], value=True) for mask in (allowed, forwards))
        negatives = None
        if is_negative is not None:
            negatives = gather_rows(is_negative)[None].repeat(len(is_pair), 1)
            if target_keys is not None and negative_keys is not None:
                others = gather_rows(negative_keys)
                negatives &= target_keys[:, None] != others[None]
                if right_keys is not None:
                    negatives &= ~(right_keys[:, :, None] == others[None, None]).any(dim=1)
        own_alone = torch.zeros_like(allowed).scatter(1, own[:, None], value=True)
        return cls(
            allowed=allowed,
            allowed_targets=own_alone if has_labels else forwards,
            allowed_negatives=negatives,
            is_pair=is_pair,
            own=own,
            num_pairs=all_pairs.sum(),
        )

    def mean(self, per_row: Tensor) -> Tensor:
        """Mean over the anchors of all processes: this one's share times their number, `[B] -> []`."""
        return (per_row * self.is_pair).sum() * num_processes() / self.num_pairs.clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class NegativeRules:
    """Which candidates are no negatives, and how much the others count, by how similar they are.

    margin: a candidate that is more similar to a row than the row's own pair by more than this is taken for a false
        negative (Qwen3-VL-Embedding, arXiv 2601.04720, with 0.1); None keeps all.
    duplicate: two queries, or two targets, with a cosine above this are taken for the same, and so are no negatives of
        each other (WeMM, arXiv 2608.24053; 0.95 to 0.99); None: only those of equal content are.
    hardness: times its cosine, added to the logit of a negative: harder ones weigh more (LLaVE, arXiv 2503.04812, with
        9 at a temperature of 0.02).
    same_side: other queries are negatives of a query too, and other targets of a target (arXiv 2601.04720).
    """

    margin: float | None = None
    duplicate: float | None = None
    hardness: float = 0.0
    same_side: bool = False


def info_nce(
    query: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    contrast: Contrast | None = None,
    negative: Tensor | None = None,
    rules: NegativeRules | None = None,
) -> Tensor:
    """Symmetric InfoNCE with in-batch negatives from all processes.

    The mean of query-to-target and target-to-query cross-entropy over all true pairs of all processes.

    Args:
        query: unit vectors, `[B, D]`.
        target: unit vectors; row i is the positive of query i.
        temperature: logits are divided by it.
        contrast: which columns count; None: all.
        negative: hard negatives, `[H, D]`: further columns for every query, and not anchors themselves.
        rules: which of them count by their similarity; None: all alike. No gradient flows through what they decide.

    Returns:
        A scalar; zero, but connected to the vectors, where there is no pair anywhere.
    """
    query, target, rules = at_least_float32(query), at_least_float32(target), rules or NegativeRules()
    contrast = contrast or Contrast.of(torch.ones(len(query), dtype=torch.bool, device=query.device))
    queries, targets = gather_rows(query), gather_rows(target)
    negatives = None if negative is None else gather_rows(at_least_float32(negative))
    allowed = contrast.allowed
    if rules.duplicate is not None:
        allowed = allowed & ~((query @ queries.T > rules.duplicate) | (target @ targets.T > rules.duplicate))
        allowed = allowed.scatter(1, contrast.own[:, None], value=True)
    positive = (query * target).sum(dim=1).detach()  # [B]

    def logits(rows: Tensor, columns: Tensor, allowed: Tensor, own: Tensor | None) -> Tensor:
        """Scaled similarities, `[B, columns]`; own: column of each row's pair, to which no rule applies."""
        cosine = rows @ columns.T
        seen, scaled = cosine.detach(), cosine / temperature
        is_negative = torch.ones_like(allowed) if own is None else torch.ones_like(allowed).scatter(1, own[:, None], 0)
        if rules.margin is not None:
            allowed = allowed & ~(is_negative & (seen > positive[:, None] + rules.margin))
        if rules.hardness:
            scaled = scaled + rules.hardness * seen * is_negative
        return scaled.masked_fill(~allowed, -torch.inf)

    forwards = [logits(query, targets, allowed & contrast.allowed_targets, contrast.own)]  # [B, N]
    backwards = [logits(target, queries, allowed, contrast.own)]
    if rules.same_side:
        others = allowed.scatter(1, contrast.own[:, None], value=False)
        forwards.append(logits(query, queries, others, None))
        backwards.append(logits(target, targets, others, None))
    if negatives is not None:
        assert contrast.allowed_negatives is not None
        allowed_negatives = contrast.allowed_negatives
        if rules.duplicate is not None:
            allowed_negatives = allowed_negatives & (target @ negatives.T <= rules.duplicate)
        forwards.append(logits(query, negatives, allowed_negatives, None))
    losses = [
        contrast.mean(F.cross_entropy(torch.cat(side, dim=1), contrast.own, reduction="none"))
        for side in (forwards, backwards)
    ]
    return torch.stack(losses).mean()


def in_batch_recall(query: Tensor, target: Tensor, target_keys: Tensor, is_pair: Tensor) -> Tensor:
    """Share of the true pairs of this process whose nearest target has the right content; a scalar, for logs."""
    scores = (query @ target.T).masked_fill(~is_pair[None], -torch.inf)
    hit = target_keys[scores.argmax(dim=1)] == target_keys
    return (hit & is_pair).sum() / is_pair.sum().clamp(min=1)

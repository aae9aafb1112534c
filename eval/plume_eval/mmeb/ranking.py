"""The best candidates of each query, in bounded memory, and the metrics of what was found.

Candidates are ordered by score. Among equal scores the order counts against the model: candidates that are no label
come first, then labels of lower grade, then in the order of the pool. A model that gives every input the same vector
therefore scores 0; with a stable sort alone it would score 100 wherever the label is listed first, as it is in MMEB's
image tasks.

Letters: Q queries, N candidates, D hidden size, k candidates kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: Cutoffs of the metrics, as MMEB reports them.
CUTOFFS = (1, 5, 10)
#: Scores that are held at once, at most.
BLOCK = 2**23
#: Candidates that are held in float64 at once, at most.
_PART = 2**14

Labels = Mapping[int, int]
"""Grade of each label of a query, by the place of the candidate; greater than 0."""


@dataclass(frozen=True)
class Ranking:
    """The best candidates of each query, the best first.

    candidates `[Q, k]`: their numbers; -1 where a pool holds fewer.
    scores `[Q, k]`: float32; NaN where a pool holds fewer.
    is_tied `[Q]`: whether a candidate that is no label has the score of the query's best label.
    """

    candidates: np.ndarray
    scores: np.ndarray
    is_tied: np.ndarray


def rank(
    queries: Tensor,
    candidates: Tensor,
    labels: Sequence[Labels],
    pools: Sequence[Sequence[int]] | None = None,
    *,
    num_kept: int = max(CUTOFFS),
    block: int = BLOCK,
) -> Ranking:
    """Rank the candidates of each query by dot product.

    Args:
        queries: unit vectors `[Q, D]`.
        candidates: unit vectors `[N, D]`, on the same device.
        labels: of each query.
        pools: the candidates of each query; None: all of them.
        num_kept: k.
        block: scores that are held at once, at most; at least those of one query are.

    Raises:
        ValueError: vectors that are not finite, a query without a label, or a label outside its pool or of a grade
            below 1.
    """
    for name, vectors in (("query", queries), ("candidate", candidates)):
        if not torch.isfinite(vectors).all():
            row = int((~torch.isfinite(vectors)).any(dim=1).nonzero()[0])
            raise ValueError(f"the vector of {name} {row} is not finite")
    for row, of_query in enumerate(labels):
        if not of_query:
            raise ValueError(f"query {row} has no label; leave it out and say so")
        if bad := [grade for grade in of_query.values() if grade < 1]:
            raise ValueError(f"query {row} has a label of grade {bad[0]}; expected at least 1")
        if pools is not None and not set(of_query) <= set(pools[row]):
            raise ValueError(f"query {row} has a label that its pool does not hold")
    found = np.full((len(queries), num_kept), -1)
    scores = np.full((len(queries), num_kept), np.nan, dtype=np.float32)
    is_tied = np.zeros(len(queries), dtype=bool)
    step = max(block // max(len(candidates), 1), 1) if pools is None else 1
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        if pools is None:
            pool, grades = np.arange(len(candidates)), labels[rows]
            among = candidates
        else:
            pool = np.asarray(pools[start])
            places = {candidate: place for place, candidate in enumerate(pools[start])}
            grades = [{places[candidate]: grade for candidate, grade in labels[start].items()}]
            among = candidates[torch.as_tensor(pool, device=candidates.device)]
        products = _products(queries[rows], among)  # [q, n]
        kept, best, is_tied[rows] = _best(products, grades, min(num_kept, len(pool)))
        found[rows, : kept.shape[1]], scores[rows, : kept.shape[1]] = pool[kept], best
    return Ranking(found, scores, is_tied)


def _products(queries: Tensor, candidates: Tensor) -> Tensor:
    """Dot products in float32, summed in float64: equal vectors get equal scores, wherever they stand, `[q, n]`."""
    parts = candidates.split(_PART)
    return torch.cat([(queries.double() @ part.double().T).float() for part in parts], dim=1)


def _best(products: Tensor, labels: Sequence[Labels], num_kept: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of the best candidates, `[q, k]`, their scores, `[q, k]`, and which queries have a tie, `[q]`."""
    size = products.shape[1]
    last = products.topk(num_kept, dim=1).values[:, -1:]
    rows, places = (axis.cpu().numpy() for axis in torch.nonzero(products >= last, as_tuple=True))  # k, more with ties
    near = products[products >= last].cpu().numpy()
    flat = np.array([row * size + place for row, one in enumerate(labels) for place in one])
    of_label = np.array([grade for one in labels for grade in one.values()])
    at = np.minimum(np.searchsorted(rows * size + places, flat), len(rows) - 1)
    is_near = rows[at] * size + places[at] == flat
    grades = np.zeros(len(rows), dtype=int)
    grades[at[is_near]] = of_label[is_near]
    order = np.lexsort((places, grades, -near, rows))
    begin = np.searchsorted(rows, np.arange(len(labels)))
    kept = order[begin[:, None] + np.arange(num_kept)]

    of_labels = products.flatten()[torch.as_tensor(flat, device=products.device)].cpu().numpy()
    owner = np.repeat(np.arange(len(labels)), [len(one) for one in labels])
    best = np.full(len(labels), -np.inf, dtype=np.float32)
    np.maximum.at(best, owner, of_labels)
    equal = (products == torch.as_tensor(best, device=products.device)[:, None]).sum(dim=1).cpu().numpy()
    is_tied = equal > np.bincount(owner, of_labels == best[owner], len(labels))
    return places[kept], near[kept], is_tied


def measure(found: np.ndarray, labels: Sequence[Labels]) -> dict[str, np.ndarray]:
    """Metrics of each query: `hit@k`, `recall@k`, `ndcg_linear@k`, `ndcg_exponential@k`, `mrr@` of all kept ones.

    They are trec_eval's (pytrec-eval-terrier), whose normalised gain is the linear one. It is given places for scores,
    since it would order equal scores by name. A label counts once, with its highest grade.

    Args:
        found: candidates of each query, the best first, -1 for none, `[Q, k]`.
        labels: of each query.

    Example:
        >>> measure(np.array([[2, 0, 1]]), [{0: 1}])["mrr@3"].tolist()
        [0.5]
    """
    import pytrec_eval

    names = [f"{name}.{','.join(map(str, CUTOFFS))}" for name in ("success", "recall", "ndcg_cut")]
    run = {
        str(row): {str(candidate): float(-place) for place, candidate in enumerate(kept) if candidate >= 0}
        for row, kept in enumerate(found.tolist())
    }
    gains = {"linear": lambda grade: grade, "exponential": lambda grade: 2**grade - 1}
    result: dict[str, np.ndarray] = {}
    for kind, gain in gains.items():
        wanted = {str(row): {str(c): gain(grade) for c, grade in one.items()} for row, one in enumerate(labels)}
        each = pytrec_eval.RelevanceEvaluator(wanted, {*names, "recip_rank"}).evaluate(run)
        rows = [each[str(row)] for row in range(len(labels))]

        def column(name: str, rows: list = rows) -> np.ndarray:
            return np.array([row[name] for row in rows])

        result |= {f"ndcg_{kind}@{k}": column(f"ndcg_cut_{k}") for k in CUTOFFS}
        if kind == "linear":
            result |= {f"hit@{k}": column(f"success_{k}") for k in CUTOFFS}
            result |= {f"recall@{k}": column(f"recall_{k}") for k in CUTOFFS}
            result[f"mrr@{found.shape[1]}"] = column("recip_rank")
    return result

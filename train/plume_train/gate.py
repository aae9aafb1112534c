"""`plume-train gate MODEL --data PAIRS --out FOLDER`: teach a trained model which queries need latent steps.

A gate looks at the anchor, which has been read before the first step, and says whether steps will help (TWN, arXiv
2605.14448). What it learns from costs no labels: for each query the contrastive loss of its embedding after K steps
and after none, among the targets of its task; steps helped where the loss fell. The model does not change, so the gate
is a logistic regression on anchor embeddings, fitted by scikit-learn.

What is told is measured on queries that the gate has not seen: recall@1 as ever more of them think, those first that
the gate is surest of. Beside it a rule without training: those first whose two nearest targets, without a step, are
most alike. A gate that is no better than chance is said to be so, and is written only on request.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from plume import Plume
from plume.inputs.item import Item
from plume.terminal import Parser, is_watched, say
from plume_train.data.read import add_row_flags, read_rows
from plume_train.data.records import Records
from plume_train.data.rows import Record
from plume_train.mine import Pairs
from plume_train.vectors import to_input

#: Shares of the queries that think, at which recall is told.
SHARES = tuple(step / 10 for step in range(11))

#: Of the pairs, those that the curve is measured on.
HELD_OUT = 0.3

#: At which contrastive losses are taken; the paper's.
TEMPERATURE = 0.02


@dataclass(frozen=True)
class Measured:
    """What is known of a query; ranks and losses are those of its target among all of the task.

    is_right: whether its target comes first, without steps and with all. loss: likewise. spread: by how much the
    nearest target is ahead of the second, without a step.
    """

    is_right: tuple[bool, bool]
    loss: tuple[float, float]
    spread: float


@dataclass(frozen=True)
class Point:
    """Recall@1 where this share of the queries thinks: by the gate, by the rule without training, by chance."""

    share: float
    mean_latent_steps: float
    gate: float
    rule: float
    chance: float


def gate(argv: Sequence[str]) -> int:
    """Fit a gate, tell its curve, and write the model with it.

    Args:
        argv: the command line behind `gate`.

    Returns:
        0, or 1 if the gate is no better than chance, and nothing was written.

    Raises:
        ValueError: data or a model that cannot be used.
    """
    options = _parse(argv)
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit is {options.limit}; expected 1 or more")
    if options.out.exists() and any(options.out.iterdir()):
        raise ValueError(f"{options.out} is not empty; choose another folder")
    plume = Plume(options.model)
    steps = plume.plume_config.num_latent_steps
    if plume.plume_config.is_one_pass or not steps:
        raise ValueError(f"{options.model} takes its steps in one pass, or none, so that there is nothing to decide")
    records = read_rows(options.data, options)
    anchors, measured = measure(plume, records, limit=options.limit, batch_size=options.batch_size)
    helps = np.array([before - after > options.least_gain for before, after in (one.loss for one in measured)])
    order = np.random.default_rng(0).permutation(len(measured))
    count = round(HELD_OUT * len(measured))
    held_out, rest = order[:count], order[count:]
    if not len(held_out) or len(rest) < 2:
        raise ValueError(
            f"{options.data} holds {len(measured)} pairs, too few to fit a gate and measure it; give some hundred"
        )
    if helps[rest].all() or not helps[rest].any():
        every = "every" if helps[rest].all() else "no"
        raise ValueError(f"latent steps help {every} query of {options.data}, so that a gate has nothing to tell apart")
    weight, bias = fit(anchors[rest], helps[rest])
    scores = anchors @ weight + bias
    points = curve([measured[row] for row in held_out], scores[held_out], steps)
    say(f"latent steps help {helps.mean():.0%} of {len(measured)} queries; on {count} that the gate has not seen:")
    say(f"{'think':>7}  {'mean K':>6}  {'gate':>6}  {'rule':>6}  {'chance':>6}   recall@1", keep=" ")
    for point in points:
        told = (point.gate, point.rule, point.chance)
        say(f"{point.share:7.0%}  {point.mean_latent_steps:6.1f}  {'  '.join(f'{one:6.3f}' for one in told)}", keep=" ")
    ahead = float(np.mean([point.gate - point.chance for point in points]))
    if ahead <= 0 and not options.anyway:
        say("the gate is no better than chance, and nothing was written; --anyway writes it", err=True)
        return 1
    threshold = float(np.quantile(scores[held_out], 1 - options.share))
    _save(plume, weight, bias, 1 / (1 + np.exp(-threshold)), options.out)
    (options.out / "gate.json").write_text(
        json.dumps({"command": "plume-train gate", "data": str(options.data), "num_queries": count,
                    "share": options.share, "curve": [asdict(point) for point in points]}, indent=1) + "\n",
        encoding="utf-8",
    )  # fmt: skip
    say(f"written: {options.out}; {options.share:.0%} of such queries take K = {steps}, the others none, where no K is "
        "asked for")  # fmt: skip
    return 0


def measure(
    plume: Plume, records: Records, *, limit: int | None = None, batch_size: int = 32
) -> tuple[np.ndarray, list[Measured]]:
    """Embed the pairs without and with steps.

    Args:
        plume: the model; targets take the steps that it gives documents.
        records: rows with targets.
        limit: the first so many rows; None: all.
        batch_size: inputs per pass.

    Returns:
        Anchor embeddings of the queries `[N, D]`, and what is known of each; task by task.
    """
    by_task: dict[str, list[int]] = defaultdict(list)
    for row, task in enumerate(records.tasks[:limit]):
        by_task[task].append(row)
    anchors: list[Tensor] = []
    found: list[Measured] = []
    bar = tqdm(total=len(records.tasks[:limit]), desc="Embedding", unit=" rows", disable=not is_watched())
    for _, rows in sorted(by_task.items()):
        parts: list[list[Tensor]] = [[], [], []]
        keys: list[tuple[int, int]] = []
        targets: list[np.ndarray] = []
        for batch in _batches(records, rows, batch_size):
            queries = [Item.parse(to_input(record.query)) for record in batch]
            without, anchor = _embed(plume, queries, 0)
            for part, vectors in zip(
                parts, (without, _embed(plume, queries, plume.plume_config.num_latent_steps)[0], anchor), strict=True
            ):
                part.append(vectors)
            sides = [record.target for record in batch if record.target is not None]
            inputs = [to_input(side) for side in sides]
            targets.append(plume.encode_document(inputs, batch_size=batch_size, show_progress_bar=False))
            keys += [(record.query.key, side.key) for record, side in zip(batch, sides, strict=True)]
            bar.update(len(batch))
        without, with_steps, anchor = (torch.cat(part) for part in parts)
        target = np.concatenate(targets)
        query_keys, target_keys = zip(*keys, strict=True)
        told = [Pairs.of(query.numpy(), target, query_keys, target_keys) for query in (without, with_steps)]
        found += [
            Measured((one[0], two[0]), (one[1], two[1]), one[2])
            for one, two in zip(_standings(told[0]), _standings(told[1]), strict=True)
        ]
        anchors.append(anchor)
    bar.close()
    return torch.cat(anchors).numpy(), found


def fit(anchors: np.ndarray, helps: np.ndarray) -> tuple[np.ndarray, float]:
    """Weight `[D]` and bias of the logistic regression that tells which queries steps help."""
    from sklearn.linear_model import LogisticRegression

    # Unit vectors of many numbers differ by little, so that weights must be let grow.
    fitted = LogisticRegression(C=100.0, max_iter=2000).fit(anchors, helps)
    return fitted.coef_[0], float(fitted.intercept_[0])


def curve(measured: Sequence[Measured], scores: np.ndarray, num_latent_steps: int) -> list[Point]:
    """Recall@1 at each share of queries that think.

    Args:
        measured: queries.
        scores: of the gate, `[N]`; the highest think first.
        num_latent_steps: K of those that do.
    """
    right = np.array([one.is_right for one in measured], dtype=float)  # [N, 2]
    orders = {"gate": np.argsort(-scores, kind="stable"),
              "rule": np.argsort([one.spread for one in measured], kind="stable")}  # fmt: skip
    points = []
    for share in SHARES:
        count = round(share * len(measured))
        recall = {}
        for name, order in orders.items():
            thinks = np.zeros(len(measured), dtype=int)
            thinks[order[:count]] = 1
            recall[name] = float(right[np.arange(len(right)), thinks].mean())
        chance = float((right[:, 0].mean() * (len(right) - count) + right[:, 1].mean() * count) / len(right))
        points.append(Point(share, share * num_latent_steps, chance=chance, **recall))
    return points


def _standings(pairs: Pairs) -> list[tuple[bool, float, float]]:
    """Of each row: whether its target comes first, its loss, and how far the nearest target is ahead of the second.

    A target that is as near as another does not come first. Targets of equal queries are passed over.
    """
    found: list[tuple[bool, float, float]] = []
    for scores, own in pairs.scores():
        best = scores.amax(dim=1)
        joined = torch.cat([own[:, None], scores], dim=1)
        loss = torch.logsumexp(joined / TEMPERATURE, dim=1) - own / TEMPERATURE
        top = joined.topk(min(2, joined.shape[1]), dim=1).values
        found += zip((own > best).tolist(), loss.tolist(), (top[:, 0] - top[:, -1]).tolist(), strict=True)
    return found


def _embed(plume: Plume, items: list[Item], num_latent_steps: int) -> tuple[Tensor, Tensor]:
    """Embeddings and anchor embeddings, `[b, D]` each."""
    model = plume.plume_model
    assert model.processor is not None
    batch: Any = model.processor.encode(items)
    engine = plume.engine
    with torch.inference_mode():
        output = (
            model(**batch.to(model.device), num_latent_steps=num_latent_steps)
            if engine is None
            else engine(batch, num_latent_steps)
        )
    assert output.embedding is not None
    assert output.anchor_embedding is not None
    return output.embedding.float().cpu(), output.anchor_embedding.float().cpu()


def _batches(records: Records, rows: Sequence[int], size: int) -> Iterator[list[Record]]:
    for start in range(0, len(rows), size):
        yield [records[row] for row in rows[start : start + size]]


def _save(plume: Plume, weight: np.ndarray, bias: float, threshold: float, out: Path) -> None:
    model, _ = plume.plume_model.reconfigured(gate_threshold=float(threshold))
    assert model.gate is not None
    with torch.no_grad():
        model.gate.weight.copy_(torch.from_numpy(weight))
        model.gate.bias.fill_(bias)
    model.save_pretrained(out)


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="plume-train gate",
        description="Teach a trained model which queries need its latent steps; the others then take none, unless a "
        "caller says how many.",
    )
    parser.add_argument("model", help="a plume checkpoint: folder or Hub name")
    parser.add_argument("--data", required=True, help="pairs that the model was not trained on, easy ones among them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model with its gate")
    parser.add_argument("--share", type=float, default=0.5, help="of the queries that are to think (0.5)")
    parser.add_argument(
        "--least-gain", type=float, default=0.0, help="fall of the contrastive loss from which on steps helped (0)"
    )
    parser.add_argument("--limit", type=int, help="pairs to look at, the first ones")
    parser.add_argument("--batch-size", type=int, default=32, help="inputs per pass (32)")
    add_row_flags(parser)
    parser.add_argument("--anyway", action="store_true", help="write a gate that is no better than chance, too")
    options = parser.parse_args(argv)
    if not 0 < options.share < 1:
        parser.error(f"--share is {options.share:g}; expected a number between 0 and 1")
    return options

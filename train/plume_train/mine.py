"""`plume-train mine DATA --model M --out FILE`: hard negatives, and groups of rows that are hard for each other.

Within each task, the other targets that are nearest to a query by a model's own vectors, K as configured: texts,
images, video and mixtures alike. Which of them to take is decided by sentence-transformers' `mine_hard_negatives`,
which here sees keys for texts and vectors that are there already.

    negatives     the nearest targets that are no positives of an equal query, and not so near that they may be right
                  themselves: below 95 % of the own pair's cosine (NV-Retriever, arXiv 2407.15831)
    margin        cosine of the own pair minus that of the nearest other target: a row that has a clear one at K = 0
                  need not reason (`plume-train rationales --max-margin`)
    batch_group   rows that are among the nearest of each other, as many as asked for (B3, arXiv 2505.11293, which cuts
                  the graph of such pairs by METIS; here groups grow from the best connected rows): trained in one
                  batch, each is a hard negative of the others

Letters: R rows of a task, T its distinct targets, D length of a vector.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from plume.terminal import Parser, counted, is_watched, say
from plume_train.data.read import add_row_flags, check_writable, read_rows
from plume_train.data.records import Records
from plume_train.data.rows import is_negative_column
from plume_train.data.vectors import VectorStore
from plume_train.vectors import WINDOW, embed_records

#: Distinct targets of a task from which on FAISS searches them, where it is installed.
FAISS_FROM = 200_000

_CHUNK = 1024


@dataclass
class Mined:
    """What was found for a row.

    negatives: rows whose targets they are, the hardest first. scores: their cosines. margin: see above; 2 where the
    task has no other target. group: its number, None for a row of none.
    """

    negatives: list[int]
    scores: list[float]
    margin: float
    group: int | None = None


def mine(argv: Sequence[str]) -> int:
    """Write the rows with what was found for them.

    Args:
        argv: the command line behind `mine`.

    Returns:
        0, or 1 if something could not be embedded.

    Raises:
        ValueError: data or a model that cannot be used.
    """
    options = _parse(argv)
    records = read_rows(options.data, options)
    check_writable(records, options.data)
    if any(name in records.raw(0) for name in ("qry", "pos")):
        raise ValueError(
            f"{options.data} holds rows of UME-sft, which have no place for negatives; write them as plume's"
        )
    num_bad = 0
    if options.vectors:
        store = VectorStore(options.vectors)
    else:
        folder = options.out.with_suffix(".vectors")
        store, num_bad = embed_records(
            records,
            folder,
            options.model,
            num_latent_steps=options.num_latent_steps,
            document_latent_steps=options.document_latent_steps,
            batch_size=options.batch_size,
        )
        say(f"vectors: {folder}")
    by_task: dict[str, list[int]] = defaultdict(list)
    for row, task in enumerate(records.tasks):
        by_task[task].append(row)
    found: dict[int, Mined] = {}
    num_groups = 0
    for task, rows in sorted(by_task.items()):
        of_task = _mine_task(records, rows, store, options, first_group=num_groups)
        found |= of_task
        num_groups += len({one.group for one in of_task.values() if one.group is not None})
        _report(task, rows, of_task, options.num_negatives)
    _write(options.out, records, found)
    media = Path(options.media_root or Path(options.data).parent)
    say(f"{counted(len(records), 'row')}: {options.out}" + (f", {counted(num_groups, 'group')}" if num_groups else ""))
    if options.out.parent.resolve() != media.resolve():
        say(f"media paths are as they were; train with --media_root {media}")
    return 1 if num_bad else 0


def _mine_task(
    records: Records, rows: list[int], store: VectorStore, options: Any, first_group: int
) -> dict[int, Mined]:
    """What is found for the rows of a task; those without vectors get nothing."""
    queries, targets, kept, query_keys, target_keys = [], [], [], [], []
    for start in range(0, len(rows), WINDOW):
        window = [records[row] for row in rows[start : start + WINDOW]]
        query, has_query = store.find("query", [record.query for record in window])
        target, has_target = store.find("target", [record.target for record in window])
        has_both = has_query & has_target
        queries.append(query[has_both])
        targets.append(target[has_both])
        for row, record, has in zip(rows[start : start + WINDOW], window, has_both, strict=True):
            if has and record.target is not None:
                kept.append(row)
                query_keys.append(record.query.key)
                target_keys.append(record.target.key)
    if not kept:
        return {}
    pairs = Pairs.of(np.concatenate(queries), np.concatenate(targets), query_keys, target_keys)
    margins = pairs.margins()
    negatives = pairs.negatives(
        num_negatives=options.num_negatives,
        range_min=options.range_min,
        range_max=options.range_max,
        relative_margin=options.relative_margin,
        sampling=options.sampling,
    )
    groups: list[int | None] = [None] * len(kept)
    if options.group_size:
        groups = pairs.groups(options.group_size, skip=options.range_min)
    # A negative is written as the target of the first row that has it.
    return {
        row: Mined(
            [kept[pairs.first_row[place]] for place, _ in of_row],
            [score for _, score in of_row],
            margin,
            None if group is None else first_group + group,
        )
        for row, of_row, margin, group in zip(kept, negatives, margins, groups, strict=True)
    }


@dataclass
class Pairs:
    """The pairs of a task.

    query `[R, D]`, targets `[T, D]`: unit vectors. own `[R]`: the target of each row. query_key `[R]`: equal where
    queries are. first_row `[T]`: the first row with a target. positives: targets of all rows of a query, by its key.
    """

    query: Tensor
    targets: Tensor
    own: Tensor
    query_key: Tensor
    first_row: list[int]
    positives: dict[int, list[int]]

    @classmethod
    def of(cls, query: np.ndarray, target: np.ndarray, query_keys: Sequence[int], target_keys: Sequence[int]) -> Pairs:
        """From the vectors and keys of each row."""
        places: dict[int, int] = {}
        own = [places.setdefault(key, len(places)) for key in target_keys]
        first: dict[int, int] = {}
        for row, place in enumerate(own):
            first.setdefault(place, row)
        first_row = list(first.values())
        numbers: dict[int, int] = {}
        query_key = [numbers.setdefault(key, len(numbers)) for key in query_keys]
        positives: dict[int, list[int]] = defaultdict(list)
        for key, place in zip(query_key, own, strict=True):
            positives[key].append(place)
        unique = torch.from_numpy(target[first_row])
        return cls(torch.from_numpy(query), unique, torch.tensor(own), torch.tensor(query_key), first_row, positives)

    def scores(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows at a time: cosines to all targets `[r, T]`, -2 for positives of equal queries, and to their own."""
        for start in range(0, len(self.query), _CHUNK):
            scores = self.query[start : start + _CHUNK] @ self.targets.T
            own = scores.gather(1, self.own[start : start + _CHUNK, None])[:, 0]
            for row, key in enumerate(self.query_key[start : start + _CHUNK].tolist()):
                scores[row, self.positives[key]] = -2.0
            yield scores, own

    def margins(self) -> list[float]:
        """Cosine of each row's pair minus that of the nearest target that is no positive; 2 where there is none."""
        found: list[float] = []
        for scores, own in self.scores():
            best = scores.amax(dim=1)
            found += torch.where(best > -2, own - best, torch.full_like(own, 2.0)).tolist()
        return found

    def negatives(
        self,
        *,
        num_negatives: int,
        range_min: int,
        range_max: int | None,
        relative_margin: float | None,
        sampling: Literal["top", "random"],
    ) -> list[list[tuple[int, float]]]:
        """Targets and their cosines for each row, the hardest first; arguments as of `mine_hard_negatives`."""
        from datasets import Dataset
        from datasets.utils.logging import disable_progress_bar
        from sentence_transformers.util import mine_hard_negatives

        if len(self.targets) < 2 or num_negatives == 0:
            return [[] for _ in self.own]
        disable_progress_bar()
        quiet = nullcontext() if is_watched() else redirect_stderr(io.StringIO())  # its bars have no switch
        keys = [str(key) for key in self.query_key.tolist()]
        dataset = Dataset.from_dict({"query": keys, "target": [str(own) for own in self.own.tolist()]})
        with quiet:
            mined: Any = mine_hard_negatives(
                dataset,
                _Known(self, keys),  # type: ignore[arg-type]
                num_negatives=num_negatives,
                range_min=range_min,
                range_max=range_max,
                relative_margin=relative_margin,
                sampling_strategy=sampling,
                output_format="labeled-list",
                output_scores=True,
                use_faiss=len(self.targets) >= FAISS_FROM and find_spec("faiss") is not None,
                faiss_batch_size=_CHUNK,
                verbose=False,
            )
        found: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for row in mined:
            # The first of a list is the positive.
            told = zip(row["target"][1:], row["scores"][1:], strict=True)
            found[row["query"]] = [(int(place), round(score, 5)) for place, score in told]
        return [found[key] for key in keys]

    def groups(self, size: int, skip: int = 0, num_near: int = 100) -> list[int | None]:
        """Groups of rows that are among the nearest of each other; None for rows that are left over.

        Args:
            size: rows of a group.
            skip: nearest targets of a row that are passed over, since they may be right themselves.
            num_near: targets behind them that are looked at.
        """
        near = self._near(skip, min(num_near, len(self.targets)))
        rows_of: dict[int, list[int]] = defaultdict(list)
        for row, own in enumerate(self.own.tolist()):
            if len(rows_of[own]) < num_near:  # of a label that thousands of rows share
                rows_of[own].append(row)
        places = [set(of_row) for of_row in near]
        own, keys = self.own.tolist(), self.query_key.tolist()
        mutual: list[list[int]] = [
            [other for place in of_row for other in rows_of[place] if own[row] in places[other] and other != row]
            for row, of_row in enumerate(near)
        ]
        groups: list[int | None] = [None] * len(own)
        number = 0
        # From the best connected row on, each group takes those that are near to most of its members.
        for start in sorted(range(len(own)), key=lambda row: -len(mutual[row])):
            if groups[start] is not None:
                continue
            members, weight = [start], defaultdict(int)
            taken_queries, taken_targets = {keys[start]}, {own[start]}
            while len(members) < size:
                for other in mutual[members[-1]]:
                    weight[other] += 1
                free = [
                    other
                    for other in weight
                    if groups[other] is None and keys[other] not in taken_queries and own[other] not in taken_targets
                ]
                if not free:
                    break
                best = max(free, key=lambda other: (weight[other], -other))
                members.append(best)
                taken_queries.add(keys[best])
                taken_targets.add(own[best])
            if len(members) == size:
                for member in members:
                    groups[member] = number
                number += 1
        return groups

    def _near(self, skip: int, num_near: int) -> list[list[int]]:
        """The nearest targets of each row that are no positives of it, the nearest first."""
        found: list[list[int]] = []
        count = min(skip + num_near, len(self.targets))
        for all_scores, _ in self.scores():
            scores, places = all_scores.topk(count, dim=1)
            for of_row, best in zip(places[:, skip:].tolist(), scores[:, skip:].tolist(), strict=True):
                found.append([place for place, score in zip(of_row, best, strict=True) if score > -2])
        return found


class _Known:
    """What sentence-transformers' miner asks of a model, answered from vectors that are there."""

    device = "cpu"

    def __init__(self, pairs: Pairs, keys: list[str]):
        self._pairs = pairs
        self._row = {key: row for row, key in enumerate(keys)}

    def encode_query(self, keys: list[str], **kwargs: Any) -> np.ndarray:
        return self._pairs.query[[self._row[key] for key in keys]].numpy()

    def encode_document(self, places: list[str], **kwargs: Any) -> np.ndarray:
        return self._pairs.targets[[int(place) for place in places]].numpy()

    def similarity(self, queries: Any, targets: Any) -> Tensor:
        return torch.as_tensor(queries) @ torch.as_tensor(targets).T

    def similarity_pairwise(self, queries: Any, targets: Any) -> Tensor:
        return (torch.as_tensor(queries) * torch.as_tensor(targets)).sum(dim=1)

    def get_embedding_dimension(self) -> int:
        return self._pairs.query.shape[1]


def _write(out: Path, records: Records, found: dict[int, Mined]) -> None:
    """All rows, with what was found for them; what they said before of the same is replaced."""
    unfinished = out.with_name(out.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as lines:
        for index in range(len(records)):
            row = records.raw(index)
            for name in list(row):
                if name in ("negatives", "negative_scores", "margin", "batch_group") or is_negative_column(name):
                    row.pop(name)
            if (mined := found.get(index)) is not None:
                row["margin"] = round(mined.margin, 5)
                if mined.negatives:
                    row["negatives"] = [_target_of(records.raw(other)) for other in mined.negatives]
                    row["negative_scores"] = mined.scores
                if mined.group is not None:
                    row["batch_group"] = mined.group
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    unfinished.replace(out)


def _target_of(row: Any) -> Any:
    """The target of a row as a negative: without what it would have to write."""
    side = row["target"] if "target" in row else {
        name: row[f"target_{name}"] for name in ("text", "image", "video", "instruction") if row.get(f"target_{name}")
    }  # fmt: skip
    side = side[0] if isinstance(side, list) else side
    if isinstance(side, dict):
        side = {name: value for name, value in side.items() if name not in ("rationale", "answer")}
    return side


def _report(task: str, rows: list[int], found: dict[int, Mined], wanted: int) -> None:
    """What a person wants to know of a task."""
    told = [f"{task or 'rows'}: {len(rows)}"]
    if missing := len(rows) - len(found):
        told.append(f"{missing} without vectors")
    if found:
        scores = [one.scores[0] for one in found.values() if one.scores]
        short = sum(len(one.negatives) < wanted for one in found.values())
        margins = np.array([one.margin for one in found.values()])
        told.append(f"{(margins > 0).mean():.0%} have their target first, by {np.median(margins):.3f} in the middle")
        if scores:
            told.append(f"hardest negatives at {np.median(scores):.3f}")
        if short and wanted:
            told.append(f"{short} have fewer than {wanted} negatives")
        if groups := sum(one.group is not None for one in found.values()):
            told.append(f"{groups} in groups")
    say("  " + "; ".join(told))


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="plume-train mine",
        description="Write rows with hard negatives, the targets of other rows of their task that a model takes for "
        "right, and with the margin by which it finds their own; train with num_negatives.",
    )
    parser.add_argument("data", help="rows, .jsonl, in plume's format or in columns")
    parser.add_argument("--out", type=Path, required=True, help="file .jsonl for the rows with negatives")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="what embeds: a plume checkpoint, or any model of sentence-transformers")
    source.add_argument("--vectors", help="a folder of `plume-train vectors` instead")
    parser.add_argument("--num-latent-steps", type=int, help="K of queries (the checkpoint's)")
    parser.add_argument("--document-latent-steps", type=int, help="K of targets (the checkpoint's, or that of queries)")
    parser.add_argument("--num-negatives", type=int, default=5, help="for each row at most (5)")
    parser.add_argument("--range-min", type=int, default=0, help="nearest targets to pass over (0)")
    parser.add_argument("--range-max", type=int, help="nearest targets to look at")
    parser.add_argument("--relative-margin", type=_margin, default=0.05, metavar="X|none",
                        help="how far below the own pair negatives must be, as a share; or none (0.05)")  # fmt: skip
    parser.add_argument("--sampling", choices=("top", "random"), default="top", help="which of them (top)")
    parser.add_argument("--group-size", type=int, default=0, help="rows of a batch_group; a batch or a part of it (0)")
    parser.add_argument("--batch-size", type=int, default=32, help="inputs per pass of the model (32)")
    add_row_flags(parser)
    options = parser.parse_args(argv)
    if options.out.suffix != ".jsonl" or options.out.resolve() == Path(options.data).resolve():
        parser.error(f"--out is {options.out}; expected a file .jsonl that is not the data")
    if options.num_negatives < 0 or options.range_min < 0 or options.group_size < 0 or options.group_size == 1:
        parser.error("--num-negatives and --range-min are at least 0, --group-size 0 or at least 2")
    return options


def _margin(text: str) -> float | None:
    return None if text == "none" else float(text)

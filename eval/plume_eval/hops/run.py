"""Evaluates a checkpoint on a hops data set."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from plume.engine.engine import Engine
from plume.inputs.item import Item
from plume.model.model import PlumeModel
from plume_eval.baselines import Mode, embed
from plume_eval.hops.make import SHOWN, TargetForm
from plume_eval.metrics import Estimate, bootstrap, mean_reciprocal_rank, ranks, recall_at_1
from plume_eval.pairs import read_side

#: Answers by one hop are reasoned; rules are what answers without.
_ONE_HOP = "one hop"


class HopsTask:
    """A split of a data set: questions, and the symbols to choose from."""

    def __init__(self, folder: str | Path, limit: int | None = None, split: str = "test"):
        """Read a folder that `plume-eval hops make` wrote.

        Args:
            folder: holds `task.json` and the rows.
            limit: number of questions; None is all.
            split: "test", "validation" or "train".

        Raises:
            FileNotFoundError: the folder holds no data set.
        """
        self.folder = Path(folder)
        if not (self.folder / "task.json").is_file():
            families = sorted(file.parent.name for file in self.folder.glob("*/task.json"))
            remedy = (
                f"but {', '.join(families)} below it do; name one of them"
                if families
                else f"make a data set with `plume-eval hops make --task page --out {folder}`"
            )
            raise FileNotFoundError(f"{folder} holds no task.json; {remedy}")
        self.settings = json.loads((self.folder / "task.json").read_text(encoding="utf-8"))
        self.symbols: list[str] = self.settings["symbols"]
        self.rows = _read(self.folder / f"{split}.jsonl")[:limit]

    @property
    def paths(self) -> np.ndarray:
        """Index of the symbol met at each hop, the start first, `[Q, hops + 1]`; -1 where there is none."""
        index = {name: place for place, name in enumerate(self.symbols)}
        paths = np.full((len(self.rows), max(row["num_hops"] for row in self.rows) + 1), -1)
        for row, path in zip(self.rows, paths, strict=True):
            path[: len(row["path"])] = [index.get(name, -1) for name in row["path"]]
        return paths

    @property
    def answers(self) -> np.ndarray:
        """Index of the right symbol, `[Q]`."""
        return np.array([self.symbols.index(row["path"][-1]) for row in self.rows])

    @property
    def num_hops(self) -> np.ndarray:
        """Hops of each question, `[Q]`."""
        return np.array([row["num_hops"] for row in self.rows])

    @property
    def forms(self) -> np.ndarray:
        """Form of each question, `[Q]`."""
        return np.array([row["form"] for row in self.rows])

    @property
    def starts(self) -> np.ndarray:
        """Whether each question names its start or shows it, `[Q]`."""
        return np.array(["shown" if SHOWN in row["query"]["text"] else "named" for row in self.rows])

    def queries(self) -> list[Item]:
        """The questions with what they are about."""
        return [_item(row["query"], self.folder) for row in self.rows]

    def candidates(self, form: TargetForm) -> list[Item]:
        """Every symbol, by name or as a picture."""
        if form == "name":
            return [Item.parse(name) for name in self.symbols]
        return [Item.parse(self.folder / "media" / "symbols" / f"{name}.png") for name in self.symbols]

    def rules(self) -> dict[str, np.ndarray]:
        """Which questions each rule answers rightly without following the path, `[Q]`.

        "one hop" is such a rule for questions of more hops only.
        """
        names = list(self.rows[0]["guesses"])
        right = {
            name: np.array([row["guesses"][name] == row["path"][-1] for row in self.rows], dtype=float)
            for name in names
        }
        if _ONE_HOP in right:
            right[_ONE_HOP] *= self.num_hops > 1
        counts = np.bincount(self.answers, minlength=len(self.symbols))
        return right | {"most frequent answer": (self.answers == counts.argmax()).astype(float)}

    @property
    def target_forms(self) -> tuple[TargetForm, ...]:
        """How candidates can be given."""
        return ("name", "picture") if (self.folder / "media" / "symbols").is_dir() else ("name",)

    @property
    def choices(self) -> np.ndarray | None:
        """Which symbols each question offers, `[Q, symbols]`; None where it offers none in particular."""
        if not any("choices" in row for row in self.rows):
            return None
        return np.array([[name in row.get("choices", self.symbols) for name in self.symbols] for row in self.rows])

    @property
    def has_control(self) -> bool:
        """Whether there are captions."""
        return (self.folder / "control_test.jsonl").is_file()

    def captions(self) -> tuple[list[Item], list[Item]]:
        """The control: captions, and the pictures of what they name."""
        rows = _read(self.folder / "control_test.jsonl")
        return [_item(row["query"], self.folder) for row in rows], [_item(row["target"], self.folder) for row in rows]


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _item(side: Any, folder: Path) -> Item:
    return Item.parse(read_side(side, folder, "a row"))


def evaluate(
    model: PlumeModel,
    task: HopsTask,
    mode: Mode = "latent",
    *,
    num_latent_steps: int | None = None,
    num_target_steps: int | None = None,
    forms: tuple[TargetForm, ...] | None = None,
    batch_size: int = 64,
    show_progress: bool = False,
    engine: Engine | None = None,
) -> dict:
    """Recall@1 and MRR with 95 % bootstrap intervals, over all candidates, for each form of the target.

    Queries and candidates are embedded in the same way.

    Args:
        model: a checkpoint in eval mode.
        task: the questions.
        mode: how to reason.
        num_latent_steps: K of the mode "latent"; None is the checkpoint's.
        num_target_steps: K of the candidates; None is the checkpoint's own, or that of the queries.
        forms: how candidates are given; None: in all ways that the data set has.
        batch_size: inputs per pass.
        show_progress: whether to draw progress bars.
        engine: runs the model instead of transformers' layers.

    Returns:
        Plain numbers: `recall_at_1` and `mrr` by form of the target; `by_hops`, `by_form` and `by_start`, recall@1 by
        form of the target and number of hops, form of the question, or whether it names its start or shows it;
        `hard_errors`, the share of the wrong answers that are hard negatives (on the path, or one hop further);
        `of_choices`, recall@1 among the symbols that a question offers, all and by form of the question; `right`, a
        digit per question; `best_rule`, what answers best without following the path (`best_rule`); `num_hops` of each
        question; `num_queries`, `reasoning_steps` (mean per query) and `num_incomplete` (explicit rationales that
        reached the limit); `num_layers` that see what a question is about: of the text model, and of the vision tower
        where something is seen.
    """
    settings = {"batch_size": batch_size, "show_progress": show_progress, "engine": engine}
    queries = embed(model, task.queries(), mode, num_latent_steps=num_latent_steps, **settings)
    if num_target_steps is None and mode == "latent":
        num_target_steps = model.config.document_steps(num_latent_steps)
    target_steps = num_latent_steps if num_target_steps is None else num_target_steps
    result: dict = {
        "mode": mode,
        "num_queries": len(task.rows),
        "num_hops": task.num_hops.tolist(),
        "num_candidates": len(task.symbols),
        "num_layers": _num_layers(model, task),
        "reasoning_steps": queries.num_reasoning_steps.float().mean().item(),
        "num_incomplete": int((~queries.is_complete).sum()),
        "recall_at_1": {},
        "mrr": {},
        "by_hops": {},
        "by_form": {},
        "by_start": {},
        "hard_errors": {},
        "of_choices": {},
        "right": {},
        "best_rule": best_rule(task),
    }
    for form in forms or task.target_forms:
        candidates = embed(model, task.candidates(form), mode, num_latent_steps=target_steps, **settings)
        scores = (queries.embedding @ candidates.embedding.T).cpu().numpy()
        rank = ranks(scores, task.answers)
        if task.choices is not None:
            among = ranks(np.where(task.choices, scores, -2.0), task.answers)
            result["of_choices"][form] = {"all": asdict(recall_at_1(among)), **_by(among == 1, task.forms)}
        result["recall_at_1"][form] = asdict(recall_at_1(rank))
        result["right"][form] = "".join("1" if place == 1 else "0" for place in rank)
        result["mrr"][form] = asdict(mean_reciprocal_rank(rank))
        result["by_hops"][form] = _by(rank == 1, task.num_hops)
        result["by_form"][form] = _by(rank == 1, task.forms)
        result["by_start"][form] = _by(rank == 1, task.starts)
        result["hard_errors"][form] = _share_of_hard_errors(task, scores, rank)
    return result


def _share_of_hard_errors(task: HopsTask, scores: np.ndarray, rank: np.ndarray) -> float | None:
    best = scores.argmax(axis=1)
    wrong = [place for place in range(len(rank)) if rank[place] > 1]
    hard = [task.symbols[best[place]] in task.rows[place]["hard_negatives"] for place in wrong]
    return float(np.mean(hard)) if hard else None


def _num_layers(model: PlumeModel, task: HopsTask) -> int:
    config = model.config.backbone_config
    sees = any("image" in row["query"] or "video" in row["query"] for row in task.rows)
    return config.get_text_config().num_hidden_layers + (config.vision_config.depth if sees else 0)


def best_rule(task: HopsTask) -> dict:
    """The rule with the highest recall@1 over all questions, and what it and the best of each number of hops reach."""
    rules = task.rules()
    best = max(rules, key=lambda name: rules[name].mean())
    by_hops = {}
    for hops in np.unique(task.num_hops):
        chosen = task.num_hops == hops
        name = max(rules, key=lambda rule: rules[rule][chosen].mean())
        by_hops[str(hops)] = {"rule": name, "recall_at_1": float(rules[name][chosen].mean())}
    return {"rule": best, "recall_at_1": float(rules[best].mean()), "by_hops": by_hops}


def evaluate_control(
    model: PlumeModel,
    task: HopsTask,
    mode: Mode = "latent",
    *,
    num_latent_steps: int | None = None,
    batch_size: int = 64,
) -> dict:
    """Recall@1 of pictures by their captions, which needs no reasoning; arguments as in `evaluate`."""
    steps = (num_latent_steps, model.config.document_steps(num_latent_steps) if mode == "latent" else num_latent_steps)
    vectors = [
        embed(model, side, mode, num_latent_steps=count, batch_size=batch_size).embedding
        for side, count in zip(task.captions(), steps, strict=True)
    ]
    rank = ranks((vectors[0] @ vectors[1].T).cpu().numpy(), np.arange(len(vectors[0])))
    return {"num_queries": len(rank), "recall_at_1": asdict(recall_at_1(rank))}


def _by(is_right: np.ndarray, label: np.ndarray) -> dict[str, dict]:
    return {str(value): asdict(bootstrap(is_right[label == value])) for value in np.unique(label)}


def hops_columns(counts: Iterable[int | str]) -> list[str]:
    """Headings of columns by number of hops."""
    return [f"{count} hop{'' if str(count) == '1' else 's'}" for count in counts]


def hops_table(results: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table: one row per result of `evaluate`, one column per number of hops."""
    hops = list(dict.fromkeys(count for one in results for form in one["by_hops"].values() for count in form))
    rows = []
    for one in results:
        for form, counts in one["by_hops"].items():
            cells = [str(Estimate(**counts[count])) if count in counts else "" for count in hops]
            rows.append([one["mode"], form, *cells, str(Estimate(**one["recall_at_1"][form]))])
    rule = results[0]["best_rule"]
    shown = [f"{rule['by_hops'][count]['recall_at_1']:.3f}" if count in rule["by_hops"] else "" for count in hops]
    rows.append([f"best rule ({rule['rule']})", "", *shown, f"{rule['recall_at_1']:.3f}"])
    return ["mode", "target", *hops_columns(hops), "all"], rows

"""Evaluates a checkpoint on a hops data set."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from plume.engine.engine import Engine
from plume.inputs.item import Item
from plume.model.model import PlumeModel
from plume_eval.baselines import Mode, embed
from plume_eval.hops.make import TargetForm
from plume_eval.metrics import mean_reciprocal_rank, ranks, recall_at_1


class HopsTask:
    """The test half of a data set: questions about pages, and the symbols to choose from."""

    def __init__(self, folder: str | Path, limit: int | None = None):
        """Read a folder that `plume-eval hops make` wrote.

        Args:
            folder: holds `task.json` and `test.jsonl`.
            limit: number of questions; None is all.

        Raises:
            FileNotFoundError: the folder holds no data set.
        """
        self.folder = Path(folder)
        if not (self.folder / "task.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no task.json; make a data set with `plume-eval hops make --task page --out {folder}`"
            )
        self.settings = json.loads((self.folder / "task.json").read_text(encoding="utf-8"))
        self.symbols: list[str] = self.settings["symbols"]
        lines = (self.folder / "test.jsonl").read_text(encoding="utf-8").splitlines()
        self.rows = [json.loads(line) for line in lines[:limit]]

    @property
    def paths(self) -> np.ndarray:
        """Index of the symbol met at each hop, the start first, `[Q, hops + 1]`."""
        return np.array([[self.symbols.index(name) for name in row["path"]] for row in self.rows])

    def queries(self) -> list[Item]:
        """The questions with their pages."""
        texts = [row["qry"]["conversations"][0]["value"].removeprefix("<image>\n") for row in self.rows]
        images = [self.folder / row["qry"]["image"][0] for row in self.rows]
        return [Item.parse({"text": text, "image": image}) for text, image in zip(texts, images, strict=True)]

    def candidates(self, form: TargetForm) -> list[Item]:
        """Every symbol, by name or as a picture."""
        if form == "name":
            return [Item.parse(name) for name in self.symbols]
        return [Item.parse(self.folder / "images" / "symbols" / f"{name}.png") for name in self.symbols]


def evaluate(
    model: PlumeModel,
    task: HopsTask,
    mode: Mode = "latent",
    *,
    num_latent_steps: int | None = None,
    forms: tuple[TargetForm, ...] = ("name", "picture"),
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
        forms: how candidates are given.
        batch_size: inputs per pass.
        show_progress: whether to draw progress bars.
        engine: runs the model instead of transformers' layers.

    Returns:
        Plain numbers: `recall_at_1` and `mrr` by form, `num_queries`, `reasoning_steps` (mean per query) and
        `num_incomplete` (explicit rationales that reached the limit).
    """
    settings = {
        "num_latent_steps": num_latent_steps,
        "batch_size": batch_size,
        "show_progress": show_progress,
        "engine": engine,
    }
    queries = embed(model, task.queries(), mode, **settings)
    labels = task.paths[:, -1]
    result: dict = {
        "mode": mode,
        "num_queries": len(labels),
        "num_candidates": len(task.symbols),
        "reasoning_steps": queries.num_reasoning_steps.float().mean().item(),
        "num_incomplete": int((~queries.is_complete).sum()),
        "recall_at_1": {},
        "mrr": {},
    }
    for form in forms:
        candidates = embed(model, task.candidates(form), mode, **settings)
        rank = ranks((queries.embedding @ candidates.embedding.T).cpu().numpy(), labels)
        result["recall_at_1"][form] = asdict(recall_at_1(rank))
        result["mrr"][form] = asdict(mean_reciprocal_rank(rank))
    return result

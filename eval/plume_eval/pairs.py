"""Retrieval on held-out pairs, for use during training: each query among all distinct targets.

Named in a training configuration, it is called while training goes on:

    evaluation: plume_eval.pairs:PairsEvaluation
    evaluation_arguments: {file: held_out.jsonl, modes: [latent, single_pass, explicit]}
    evaluate_every: 500
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plume.inputs.item import Item
from plume.model.model import PlumeModel
from plume_eval.baselines import MODES, Mode, embed
from plume_eval.metrics import mean_reciprocal_rank, ranks, recall_at_1

_MEDIA = {"image": "image", "images": "image", "video": "video", "videos": "video"}
_IGNORED = {"text", "instruction", "rationale", "answer"}


class PairsEvaluation:
    """Recall@1 and mean reciprocal rank of pairs, for each way of reasoning.

    "latent" takes the latent steps of the stage that training has reached; "explicit" takes them and writes the rest.
    Of a model with a gate, "latent_gated" is what it comes to where queries take their steps as the gate decides.
    """

    def __init__(
        self,
        file: str | Path,
        modes: Sequence[Mode] = ("latent", "single_pass"),
        num_latent_steps: Sequence[int] = (),
        *,
        limit: int | None = 1000,
        batch_size: int = 32,
        max_new_tokens: int = 512,
    ):
        """Read the pairs.

        Args:
            file: JSONL rows with "query" and "target", each a text or an object with any of text, image and video;
                paths are relative to the file's folder. Rationales and answers are not looked at.
            modes: ways to reason.
            num_latent_steps: further K of "latent" to measure, whatever the stage; their names end with the K.
            limit: the first so many pairs; None: all.
            batch_size: inputs per batch.
            max_new_tokens: limit of the mode "explicit".

        Raises:
            ValueError: an unknown mode, or a row without query and target.
        """
        if unknown := [mode for mode in modes if mode not in MODES]:
            raise ValueError(f"there is no mode {unknown[0]!r}; expected some of {', '.join(MODES)}")
        self.modes = list(modes)
        self.num_latent_steps = list(num_latent_steps)
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.queries: list[Any] = []
        self.targets: list[Any] = []
        self.labels: list[int] = []
        known: dict[str, int] = {}
        path = Path(file)
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip() or (limit is not None and len(self.queries) == limit):
                continue
            row = json.loads(line)
            if "query" not in row or "target" not in row:
                raise ValueError(f"{path.name}:{number}: no 'query' and 'target'; see train/README.md for the format")
            query, target = (
                read_side(row[name], path.parent, f"{path.name}:{number}: {name!r}") for name in ("query", "target")
            )
            key = json.dumps(target, sort_keys=True, default=str)
            if key not in known:
                known[key] = len(known)
                self.targets.append(target)
            self.queries.append(query)
            self.labels.append(known[key])

    def __call__(self, model: PlumeModel, step: int, num_latent_steps: int) -> dict[str, float]:
        """Numbers for the training log.

        Args:
            model: in eval mode.
            step: of the training.
            num_latent_steps: K of the stage.
        """
        numbers = {}
        runs: list[tuple[Mode, str, int | None]] = [(mode, "", num_latent_steps) for mode in self.modes]
        is_trained = num_latent_steps == model.config.num_latent_steps  # the K that a gate decides about
        if model.config.gate_threshold is not None and "latent" in self.modes and is_trained:
            runs.append(("latent", "_gated", None))
        for count in self.num_latent_steps:
            runs.append(("latent", f"_k{count}", count))
        for mode, ending, taken in runs:
            query, target = (
                embed(
                    model,
                    self._items(model, inputs),
                    mode,
                    num_latent_steps=steps,
                    batch_size=self.batch_size,
                    max_new_tokens=self.max_new_tokens,
                ).embedding
                for inputs, steps in (
                    (self.queries, taken),
                    (self.targets, model.config.document_steps(taken)),
                )
            )
            rank = ranks((query @ target.T).cpu().numpy(), np.array(self.labels))
            numbers[f"recall_at_1_{mode}{ending}"] = recall_at_1(rank).mean
            numbers[f"mrr_{mode}{ending}"] = mean_reciprocal_rank(rank).mean
        return numbers

    def _items(self, model: PlumeModel, inputs: Sequence[Any]) -> list[Item]:
        assert model.processor is not None
        return [model.processor.parse(raw, f"input {index}") for index, raw in enumerate(inputs)]


def read_side(side: Any, root: Path, where: str) -> Any:
    """What `Item.parse` takes: media before text, paths made absolute."""
    if isinstance(side, str):
        return side
    if unknown := set(side) - set(_MEDIA) - _IGNORED:
        raise ValueError(f"{where} has the unknown key {sorted(unknown)[0]!r}; expected text, image or video")
    media = {_MEDIA[name]: value for name, value in side.items() if name in _MEDIA and value}
    found: dict[str, Any] = {}
    for kind in sorted(media):  # images before videos, as the trainer puts them
        value = media[kind]
        paths = [str(root / one) for one in (value if isinstance(value, list) else [value])]
        found[kind] = paths if isinstance(value, list) else paths[0]
    return found | {name: side[name] for name in ("instruction", "text") if side.get(name)}

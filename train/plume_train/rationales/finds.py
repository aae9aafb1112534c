"""Whether an answer finds its target among others, by any embedder: for targets that no words can be compared with."""

from __future__ import annotations

import threading
from collections import defaultdict
from random import Random

import numpy as np

from plume_train.data.records import Records
from plume_train.data.rows import Side
from plume_train.rationales.answers import Answer, RejectedError, is_short
from plume_train.rationales.questions import Question
from plume_train.vectors import open_embedder, to_input

#: Other targets of the task that the own one must be nearer than.
NUM_OTHERS = 100


class Finder:
    """Embeds answers and targets, one at a time, since embedders are no place for several threads."""

    def __init__(self, model: str, records: Records, seed: int = 0):
        """Open the embedder.

        Args:
            model: a plume checkpoint, or any model of sentence-transformers that takes what targets hold.
            records: the rows, whose targets are the others.
            seed: of their choice.
        """
        self._embed, _ = open_embedder(model)
        self._records = records
        rows: dict[str, list[int]] = defaultdict(list)
        for row, task in enumerate(records.tasks):
            rows[task].append(row)
        self._chosen = {task: Random(seed).sample(of, min(len(of), NUM_OTHERS)) for task, of in rows.items()}
        self._others: dict[str, tuple[list[int], np.ndarray]] = {}
        self._lock = threading.Lock()

    def check(self, answer: Answer, question: Question) -> None:
        """Refuse an answer that other targets are nearer to; one of a few words has been compared already.

        Raises:
            RejectedError: the reason.
        """
        goal = question.goal
        if goal is None or is_short(goal):
            return
        with self._lock:
            keys, others = self._others_of(self._records.tasks[question.row])
            written = self._embed("query", [answer.text or answer.rationale])[0]
            own = self._embed("target", [to_input(goal)])[0]
        if np.isnan(own).any():
            return  # the embedder cannot read this target, which is no fault of the answer
        others = others[[key != goal.key for key in keys]]
        if len(others) and not (written @ own >= (others @ written).max()):
            raise RejectedError("the answer finds other targets before its own")

    def _others_of(self, task: str) -> tuple[list[int], np.ndarray]:
        if task not in self._others:
            targets = (self._records[row].target for row in self._chosen[task])
            sides: dict[int, Side] = {side.key: side for side in targets if side is not None}
            self._others[task] = (
                list(sides),
                np.nan_to_num(self._embed("target", [to_input(side) for side in sides.values()])),
            )
        return self._others[task]

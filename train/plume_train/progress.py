"""Where a run stands in its curriculum, and what may move it on: the schedule, a validation loss, or recall.

A stage ends at its share of the steps. With `advance=settled` it ends before that once the loss on held-out rows has
not improved for some validations. With `advance=explicit_recall` the explicit stage ends when retrieval after the
model's own written rationale is good enough, however long that takes, and the others share what is left. Data-loader
workers prepare batches ahead of time, so a decision takes effect a few
steps later, at the first batch that nobody has begun; the borders are saved with every checkpoint.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from plume_train.curriculum import Curriculum

PROGRESS_FILE = "progress.json"
_SAVED = ("borders", "stage", "best", "num_waited", "best_recall", "is_held")


class Progress:
    """The first step of every stage, and how the validation loss of the current one has done."""

    def __init__(self, curriculum: Curriculum, num_steps: int):
        self.borders = [curriculum.first_step(stage, num_steps) for stage in range(len(curriculum.stages))]
        self.lead = 0
        """Steps that batches may have been prepared ahead."""
        self.stage = 0
        self.best = math.inf
        self.num_waited = 0
        self.num_steps, self._shares = num_steps, [stage.share for stage in curriculum.stages]
        self._ratios = [stage.ratio for stage in curriculum.stages]
        self.best_recall = 0.0
        self.is_held = False
        """Whether the explicit stage goes on until its recall is good enough."""

    def hold_explicit_stage(self) -> None:
        """Begin no latent stage before `note_recall` allows it.

        Raises:
            ValueError: the run does not begin with an explicit stage and go on with another.
        """
        if self._ratios[0] != 0 or len(self._ratios) == 1:
            raise ValueError("its first stage must be explicit (ratio 0) and not the only one")
        self.borders[1:] = [self.num_steps] * (len(self.borders) - 1)
        self.is_held = True

    def note_recall(self, step: int, recall: float, least: float) -> bool:
        """Take recall after the model's own written rationale into account.

        Args:
            step: steps that were taken.
            recall: of held-out pairs.
            least: what ends the explicit stage.

        Returns:
            Whether the explicit stage ends on its account.
        """
        self.best_recall = max(self.best_recall, recall)
        start = step + self.lead
        left, whole = self.num_steps - start, sum(self._shares[1:])
        if not self.is_held or recall < least or left < len(self._shares):  # too late for stages to begin
            return False
        self.is_held = False
        before = [sum(self._shares[1:stage]) for stage in range(1, len(self._shares))]
        self.borders[1:] = [start + round(left * share / whole) for share in before]
        return True

    def stage_at(self, step: int) -> int:
        """Index of the stage of a step."""
        return sum(step >= border for border in self.borders[1:])

    def steps_in_stage(self, step: int) -> int | None:
        """Steps since the last change of stage; None in the first."""
        stage = self.stage_at(step)
        return None if stage == 0 else step - self.borders[stage]

    def note_validation(self, step: int, loss: float, patience: int, tolerance: float) -> bool:
        """Take a validation loss into account.

        Args:
            step: steps that were taken.
            loss: of the held-out rows.
            patience: validations in a row without improvement after which a stage has settled.
            tolerance: what counts as an improvement, relative to the best loss.

        Returns:
            Whether the stage will end earlier than it would have.
        """
        if self.stage_at(step) != self.stage:
            self.stage, self.best = self.stage_at(step), math.inf
        if math.isinf(self.best) or loss < self.best - tolerance * abs(self.best):
            self.best, self.num_waited = loss, 0
            return False
        self.num_waited += 1
        following, start = self.stage + 1, step + self.lead
        if self.num_waited < patience or following >= len(self.borders) or start >= self.borders[following]:
            return False
        # Later stages keep their lengths and begin earlier; the last one gets what is left.
        saved = self.borders[following] - start
        self.borders[following:] = [border - saved for border in self.borders[following:]]
        return True

    def save(self, folder: Path, num_latent_steps: int, loss_scalars: list[list[float]]) -> None:
        """Write into a checkpoint, with its K and, where the weights do not hold it, what the loss has learnt."""
        state = {name: getattr(self, name) for name in _SAVED}
        state |= {"num_latent_steps": num_latent_steps, "loss_scalars": loss_scalars}
        (folder / PROGRESS_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> list[list[float]]:
        """Go on from a checkpoint; returns what the loss had learnt."""
        state = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
        for name in _SAVED:  # an earlier version saved fewer
            setattr(self, name, state.get(name, getattr(self, name)))
        return state["loss_scalars"]

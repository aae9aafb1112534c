"""The curriculum: how much of the rationale is latent, as a function of how far training is.

PLUME (arXiv 2604.02073, section 3; Coconut's stages). The rationale has S segments; c latent steps stand for one
segment; M = S c is the largest K. A stage with replacement ratio r asks for n = round(M r) latent steps, at least one
if r > 0. They replace k = min(n // c, S) whole segments, earliest first, with k c latent steps, or n once nothing is
left. Everything follows from the step count, so a resumed run lands in the right stage. No tensors here.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of training."""

    ratio: float
    """Share of the rationale that is latent, in [0, 1]."""
    share: float
    """Share of all training steps, in (0, 1]."""
    drop_answer: bool = False
    """Whether the written answer is left out, so that nothing is written at all once ratio is 1."""

    def __post_init__(self):
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"a stage's ratio must lie in [0, 1]; received {self.ratio}")
        if not 0 < self.share <= 1:
            raise ValueError(f"a stage's share must lie in (0, 1]; received {self.share}")


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Stages, and the size of a segment.

    Example:
        >>> curriculum = Curriculum(stages=PAPER, num_segments=8)
        >>> [curriculum.num_latent_steps(stage) for stage in curriculum.stages]
        [0, 2, 4, 6, 8]
        >>> curriculum.stage_at(599, 1000), curriculum.stage_at(600, 1000)
        (0, 1)
    """

    stages: tuple[Stage, ...]
    num_segments: int
    """S, segments of a rationale."""
    steps_per_segment: int = 1
    """c, latent steps that stand for one segment; 0 leaves segments out without any, which trains a single pass."""

    whole_sentences: bool = False
    """Whether a rationale with fewer sentences than segments leaves the last ones empty, instead of being cut."""

    mix_earlier: float = 0.0
    """Probability that a row is trained at an earlier stage, each equally likely (Coconut's `uniform_prob`)."""

    random_steps: bool = False
    """Whether batches of fully latent stages take a K drawn from 1 .. M, so that any K works at inference."""

    def __post_init__(self):
        total = sum(stage.share for stage in self.stages)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of the stages must sum to 1; received {total:g}")
        if not 0 <= self.mix_earlier < 1:
            raise ValueError(f"mix_earlier must lie in [0, 1); received {self.mix_earlier}")
        if self.num_segments < 1 or self.steps_per_segment < 0:
            raise ValueError(
                "num_segments must be at least 1 and steps_per_segment at least 0; "
                f"received {self.num_segments} and {self.steps_per_segment}"
            )

    @property
    def max_latent_steps(self) -> int:
        """M, the latent steps of a stage that replaces everything."""
        return self.num_segments * self.steps_per_segment

    def stage_at(self, step: int, num_steps: int) -> int:
        """Index of the stage of a training step.

        Args:
            step: optimiser steps already taken.
            num_steps: optimiser steps of the whole training.
        """
        return sum(step >= self.first_step(stage, num_steps) for stage in range(1, len(self.stages)))

    def first_step(self, stage: int, num_steps: int) -> int:
        """The step at which a stage begins: the first whose share of the run is that of the stages before."""
        return math.ceil(sum(earlier.share for earlier in self.stages[:stage]) * num_steps - 1e-6)

    def collapsed(self, num_steps: int) -> list[str]:
        """What is lost of the stages: those that nothing tells from the one before, and those without a step.

        Args:
            num_steps: optimiser steps of the whole training.
        """
        lost = []
        for index, stage in enumerate(self.stages):
            end = num_steps if index + 1 == len(self.stages) else self.first_step(index + 1, num_steps)
            if end == self.first_step(index, num_steps):
                lost.append(f"stage {index} (ratio {stage.ratio:g}) gets no step of {num_steps}; train longer")
            elif index and self._trains(stage) == self._trains(self.stages[index - 1]):
                lost.append(
                    f"stage {index} (ratio {stage.ratio:g}) is the same as stage {index - 1}, K = "
                    f"{self.num_latent_steps(stage)}; raise num_segments, or name fewer stages"
                )
        return lost

    def _trains(self, stage: Stage) -> tuple[int, int, bool]:
        return self.num_latent_steps(stage), self.num_replaced_segments(stage), stage.drop_answer

    def draw_stage(self, current: int, rng: random.Random) -> int:
        """Index of the stage of one row while the run is at stage `current`."""
        return rng.randrange(current) if current and rng.random() < self.mix_earlier else current

    def draw_steps(self, stage: int, rng: random.Random) -> int:
        """K of one row, or of a batch that shares it, at a stage."""
        steps = self.num_latent_steps(self.stages[stage])
        return rng.randint(1, steps) if self.random_steps and steps and self.stages[stage].ratio == 1 else steps

    def num_latent_steps(self, stage: Stage) -> int:
        """K of a stage: c for each segment that it replaces; all that it asks for where no segment is left."""
        replaced = self.num_replaced_segments(stage)
        return self._asked(stage) if replaced == self.num_segments else replaced * self.steps_per_segment

    def num_replaced_segments(self, stage: Stage) -> int:
        """Segments that the latent steps of a stage stand for."""
        if self.steps_per_segment == 0:
            return round(self.num_segments * stage.ratio)
        return min(self._asked(stage) // self.steps_per_segment, self.num_segments)

    def _asked(self, stage: Stage) -> int:
        """n; halves round to even, as in the published code."""
        return max(round(self.max_latent_steps * stage.ratio), int(stage.ratio > 0 and self.max_latent_steps > 0))


#: The paper's: five epochs, three of them explicit, one for the three middle stages, one fully latent.
PAPER = (
    Stage(ratio=0.0, share=0.6),
    Stage(ratio=0.25, share=0.2 / 3),
    Stage(ratio=0.5, share=0.2 / 3),
    Stage(ratio=0.75, share=0.2 / 3),
    Stage(ratio=1.0, share=0.2, drop_answer=True),
)
#: The published multi-node script's: it starts from a model that already writes rationales.
PUBLISHED = (
    Stage(ratio=0.25, share=1 / 6),
    Stage(ratio=0.5, share=1 / 6),
    Stage(ratio=0.75, share=1 / 6),
    Stage(ratio=1.0, share=1 / 4),
    Stage(ratio=1.0, share=1 / 4, drop_answer=True),
)
#: Explicit chain of thought only; fully latent from the first step (the paper's ablation); nothing at all.
EXPLICIT = (Stage(ratio=0.0, share=1.0),)
DIRECT = (Stage(ratio=1.0, share=1.0, drop_answer=True),)

PRESETS = {"paper": PAPER, "published": PUBLISHED, "explicit": EXPLICIT, "direct": DIRECT}

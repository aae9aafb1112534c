"""Signs that a run goes wrong while its loss looks well: each is said once, with what to do about it."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

#: Logs in a row that must show a sign, and steps before which it is not looked for: beginnings are always odd.
LOGS_IN_A_ROW, FIRST_STEP = 3, 100

#: Cosine between consecutive latent states above which they say nothing new (of their collapse: arXiv 2509.20317).
ALIKE = 0.98
#: States longer than embeddings by more than this hardly change in the layers. Not measured on large models.
LENGTH_RATIO = 100.0
#: Share of the router's mass that one expert has.
COLLAPSED = 0.9
#: Share of the contrastive loss of a guess.
GUESSING = 0.98


def signs(logs: Mapping[str, Any], num_candidates: int | None) -> dict[str, str]:
    """What a log shows to be wrong, by name, with what to do.

    Args:
        logs: numbers by name, as `plume_train.metrics` gives them.
        num_candidates: targets among which a query is told apart, about; None where the loss does not tell it.

    Example:
        >>> list(signs({"step_cosine": 0.99, "expert_load_0": 0.3, "expert_load_1": 0.7}, 32))
        ['states alike']
    """
    found: dict[str, str] = {}
    if (cosine := logs.get("step_cosine", 0.0)) > ALIKE:
        found["states alike"] = (
            f"latent states hardly differ from step to step (step_cosine {cosine:.3f}), so that more add little; "
            "have each say its sentence (reconstruct_weight: 0.5), or take fewer; compare K = 0 in an evaluation"
        )
    if (ratio := logs.get("state_norm_ratio", 0.0)) > LENGTH_RATIO:
        found["states long"] = (
            f"latent states are {ratio:.0f} times as long as embeddings, so that layers change them little; try "
            "plume_config: {latent_scale: embedding}"
        )
    loads = [value for name, value in logs.items() if name.startswith("expert_load_")]
    if len(loads) > 1 and max(loads) > COLLAPSED:
        found["router collapsed"] = (
            f"one expert takes {max(loads):.0%} of the router's mass; raise balance_weight, or lower learning_rate"
        )
    guess = math.log(max(num_candidates or 2, 2))
    if num_candidates and "recall_in_batch" in logs and logs.get("contrastive", 0.0) > GUESSING * guess:
        found["contrast without signal"] = (
            f"the contrastive loss is that of a guess among {num_candidates} ({logs['contrastive']:.2f}); start from a "
            "model that has been trained explicitly, use larger batches, or lower learning_rate"
        )
    return found


class Alarms(TrainerCallback):
    """Warns of `signs`, once each, where several logs in a row show them."""

    def __init__(self, num_candidates: int | None):
        self.num_candidates = num_candidates
        self._in_a_row: Counter[str] = Counter()
        self._said: set[str] = set()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or "loss" not in (logs or {}) or state.global_step < FIRST_STEP:
            return
        found = signs(logs or {}, self.num_candidates)
        self._in_a_row = Counter({name: self._in_a_row[name] + 1 for name in found})
        for name, text in found.items():
            if self._in_a_row[name] == LOGS_IN_A_ROW and name not in self._said:
                self._said.add(name)
                warnings.warn(f"plume: step {state.global_step}: {text}", stacklevel=2)

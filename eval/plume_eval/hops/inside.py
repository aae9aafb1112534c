"""What the latent states of a hops question hold: does step k know hop k?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import reduce

from plume.model.model import PlumeModel
from plume_eval.hops.run import HopsTask


@dataclass
class Inside:
    """Means over questions.

    held `[K+1, hops+1]`: probability that the output head gives, among the symbols, to the symbol met at each hop, over
    the questions that have that hop; NaN where none has.
    gates `[K, E]`: the router's softmax; None without a router.
    """

    held: np.ndarray
    gates: np.ndarray | None


@torch.inference_mode()
def look_inside(model: PlumeModel, task: HopsTask, limit: int = 256) -> Inside:
    """Read every latent state through the output head (a logit lens restricted to the symbols).

    Args:
        model: a checkpoint in eval mode.
        task: the questions.
        limit: how many of them.
    """
    assert model.processor is not None
    output = model(**model.processor.encode(task.queries()[:limit]))
    ids = model.processor.tokenizer.convert_tokens_to_ids(task.symbols)
    logits = model.logits(output.states)[..., ids]  # [B, K+1, symbols]
    probability = logits.float().softmax(dim=-1)
    paths = torch.from_numpy(task.paths[:limit])[:, None].expand(-1, probability.shape[1], -1)  # [B, K+1, hops+1]
    held = probability.gather(-1, paths.clamp(min=0)).masked_fill(paths < 0, torch.nan).nanmean(dim=0)
    gates = None if output.gates is None else reduce(output.gates, "b step expert -> step expert", "mean").numpy()
    return Inside(held.numpy(), gates)

"""What the settings of the engine that change vectors cost in quality: int8, and stopping early."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from plume.engine.engine import Engine
from plume.model.model import PlumeModel
from plume_eval.baselines import embed
from plume_eval.hops.run import HopsTask, evaluate

#: Relative changes of a state at which reasoning stops.
TOLERANCES = (0.1, 0.2, 0.4, 0.8)


def compare_settings(
    model: PlumeModel, task: HopsTask, *, batch_size: int = 64, show_progress: bool = False
) -> list[dict[str, Any]]:
    """Quality of transformers' layers and of the engine with each setting, on one task.

    Returns:
        For each: `setting`, what `plume_eval.hops.run.evaluate` returns, and `lowest_cosine` and `mean_cosine` of
        queries to those of transformers' layers.
    """
    engines: dict[str, Engine | None] = {"transformers": None, "engine": Engine(model)}
    if model.device.type == "cpu":
        engines["engine, int8"] = Engine(model, int8=True)
    for tolerance in TOLERANCES if model.config.latents == "sequential" else ():
        engines[f"engine, exit_tolerance = {tolerance}"] = Engine(model, exit_tolerance=tolerance)
    expected: torch.Tensor | None = None
    found = []
    for name, engine in engines.items():
        vectors = embed(model, task.queries(), "latent", batch_size=batch_size, engine=engine).embedding.cpu()
        expected = vectors if expected is None else expected
        cosine = cosine_similarity(vectors, expected)
        quality = evaluate(model, task, "latent", batch_size=batch_size, engine=engine, show_progress=show_progress)
        agreement = {"lowest_cosine": cosine.min().item(), "mean_cosine": cosine.mean().item()}
        found.append({"setting": name, **quality, **agreement})
    return found

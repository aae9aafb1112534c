"""The model card of a checkpoint, written from its configuration and weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plume.transition import MixtureOfExperts
from plume.version import __version__

if TYPE_CHECKING:
    from plume.model import PlumeModel

_MARK = "<!-- Written by plume from the checkpoint itself; delete this line to keep your own text. -->"

_ADAPTERS = {
    "moe": "mixture of experts with a semantic anchor (PLUME)",
    "mlp": "one residual MLP",
    "projector": "projector (CODI)",
    "identity": "none: the hidden state itself is the next input (Coconut)",
}


def write_model_card(
    model: PlumeModel,
    folder: str | os.PathLike,
    name: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write `README.md`, unless the folder holds one that somebody wrote.

    Args:
        model: the checkpoint.
        folder: where it is saved.
        name: what users load it by; the folder's name if not given.
        weights: of the model, where its own are shared out among processes.
    """
    path = Path(folder) / "README.md"
    if path.exists() and _MARK not in path.read_text(encoding="utf-8"):
        return
    path.write_text(model_card(model, name or Path(folder).resolve().name, weights), encoding="utf-8")


def model_card(model: PlumeModel, name: str, weights: Mapping[str, Tensor] | None = None) -> str:
    """The text of the card.

    Args:
        model: the checkpoint.
        name: what users load it by.
        weights: of the model, where its own are shared out among processes.
    """
    config = model.config
    steps = config.num_latent_steps
    parameters = sum(one.numel() for one in (weights.values() if weights else model.parameters()))
    backbone = config.backbone_config
    return f"""\
---
library_name: plume-embed
pipeline_tag: feature-extraction
tags:
- plume
- sentence-transformers
- feature-extraction
- multimodal
- latent-reasoning
---

{_MARK}

# {name}

Embeds text, images, video and document pages into one space of unit vectors of length {config.hidden_size}. Before it
reads the embedding, the model takes {steps} latent steps: hidden states that go back into the model instead of written
reasoning (PLUME, arXiv 2604.02073).

```python
from plume import Plume

model = Plume("{name}")
vectors = model.encode(["a red kite", "a kite that is red", "the price of tea"])
print(model.similarity(vectors[:1], vectors[1:]))
```

After `import plume` the checkpoint opens with `AutoModel` and `SentenceTransformer` as well. A path, a PIL image, a
video, a PDF page or any mixture of them is an input too.

| | |
|---|---|
| backbone | {backbone.model_type}, {backbone.get_text_config().num_hidden_layers} layers |
| parameters | {parameters:,} |
| latent steps | {steps} by default; `num_latent_steps=0` is a single pass{_most(config.max_latent_steps)} |
| transition adapter | {_ADAPTERS[config.transition]} |
| positions of latent steps | `{config.latent_positions}` |
| video | {_video(config)} |
| saved by | plume-embed {__version__} |

{_router(model, weights)}
## Intended use

Search, clustering, classification by nearest neighbour, and retrieval across modalities. Both sides of a comparison
must be embedded by this checkpoint, with the same instructions and pixel budgets.

## Limits

- How well it does on your data is not known from this card: measure it before you rely on it.
- Inputs longer than {model.processor.tokenizer.model_max_length if model.processor else "the model's limit"} tokens are
  refused, not truncated.
- Latent steps have no agreed interpretation; `plume trace` shows what can be seen of them. Each costs one pass of the
  text model, so where a single pass is as good, use `num_latent_steps=0`.
- The model inherits the biases and the licence of its backbone and of its training data.
"""


def _router(model: PlumeModel, weights: Mapping[str, Tensor] | None) -> str:
    """What can be read from the router's weights alone: whom each step prefers before it has seen an input."""
    adapter, steps = model.transition, model.config.num_latent_steps
    if not isinstance(adapter, MixtureOfExperts) or steps == 0:
        return ""
    if weights:
        own = {name.removeprefix("transition."): x for name, x in weights.items() if name.startswith("transition.")}
        with torch.device("meta"):
            adapter = MixtureOfExperts(model.config)
        adapter.load_state_dict(own, assign=True)
    with torch.no_grad():
        state = adapter.router.weight.new_zeros(1, model.config.hidden_size)
        gates = torch.cat([adapter.route(state, step, None) for step in range(steps)])
    experts = gates.shape[1]
    lines = [
        "## What the router learnt",
        "",
        f"Each step keeps {model.config.top_k} of {experts} experts. The table shows the router's gates per step where "
        "state and anchor\nare zero, that is, what the step alone prefers; inputs move it. `plume trace` shows it for "
        "yours.",
        "",
        "| step | " + " | ".join(f"expert {expert}" for expert in range(experts)) + " |",
        "|---|" + "---|" * experts,
        *(f"| {step} | " + " | ".join(f"{gate:.2f}" for gate in row) + " |" for step, row in enumerate(gates.tolist())),
        "",
    ]
    return "\n".join(lines) + "\n"


def _most(max_latent_steps: int | None) -> str:
    return "" if max_latent_steps is None else f", {max_latent_steps} are the most"


def _video(config) -> str:
    frames = (
        f"{config.video_num_frames} frames" if config.video_fps is None else f"{config.video_fps} frames per second"
    )
    return f"{frames}, {config.video_min_pixels:,} to {config.video_max_pixels:,} pixels each"

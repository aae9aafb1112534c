"""The model card of a checkpoint, written from its configuration and its router."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from plume.config import PlumeConfig
from plume.version import __version__

_MARK = "<!-- Written by plume from the checkpoint itself; delete this line to keep your own text. -->"

_ADAPTERS = {
    "moe": "mixture of experts with a semantic anchor (PLUME)",
    "mlp": "one residual MLP",
    "projector": "projector (CODI)",
    "identity": "none: the hidden state itself is the next input (Coconut)",
}


def write_model_card(folder: str | os.PathLike, text: str) -> None:
    """Write `README.md`, unless the folder holds one that somebody wrote.

    Args:
        folder: where the checkpoint is saved.
        text: from `model_card`.
    """
    path = Path(folder) / "README.md"
    if not path.exists() or _MARK in path.read_text(encoding="utf-8"):
        path.write_text(text, encoding="utf-8")


def model_card(
    config: PlumeConfig, name: str, *, num_parameters: int, max_tokens: int | None, gates: Tensor | None
) -> str:
    """The text of the card.

    Args:
        config: of the checkpoint.
        name: what users load it by.
        num_parameters: of the model.
        max_tokens: length of an input at most, as the tokenizer has it; None where there is no tokenizer.
        gates: what each latent step prefers by itself, `[K, E]`; None without a router or without steps.
    """
    steps, backbone = config.num_latent_steps, config.backbone_config
    return f"""\
---
library_name: plume-embed
tags:
- plume
- sentence-transformers
- multimodal
- latent-reasoning
---

{_MARK}

# {name}

Install the package `plume-embed` (the one called `plume` is something else), and `import plume` before anything opens
this checkpoint:

```bash
pip install plume-embed
```

It embeds text, images, video and document pages into one space of unit vectors of length {config.hidden_size}. Before
it reads the embedding, the model takes {steps} latent steps: hidden states that go back into the model instead of
written reasoning (PLUME, arXiv 2604.02073).

```python
from plume import Plume

model = Plume("{name}")
vectors = model.encode(["a red kite", "a kite that is red", "the price of tea"])
print(model.similarity(vectors[:1], vectors[1:]))
```

After `import plume` the checkpoint opens with `AutoModel` and `SentenceTransformer` as well, without
`trust_remote_code`. A program that is given the name alone, such as `mteb run -m {name}`, is started by
`plume run mteb run -m {name}`. A path, a PIL image, a video, a PDF page or any mixture of them is an input too.

With transformers alone, the processor writes the prompt (the `feature-extraction` pipeline does not):

```python
import plume
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained("{name}"), AutoProcessor.from_pretrained("{name}")
print(model(**processor(text=["a red kite", "rain"])).embedding.shape)
```

| | |
|---|---|
| backbone | {backbone.model_type}, {backbone.get_text_config().num_hidden_layers} layers |
| parameters | {num_parameters:,} |
| latent steps | {_steps(config)}; `num_latent_steps=0` is a single pass{_most(config.max_latent_steps)} |
| inputs of latent steps | {_latents(config)} |
| transition adapter | {_ADAPTERS[config.transition]} |
| positions of latent steps | `{config.latent_positions}` |
| video | {_video(config)} |
| saved by | plume-embed {__version__} |

{_router(config, gates)}
## Intended use

Search, clustering, classification by nearest neighbour, and retrieval across modalities. Both sides of a comparison
must be embedded by this checkpoint, with the same instructions and pixel budgets.

## Limits

- How well it does on your data is not known from this card: measure it before you rely on it.
- Inputs longer than {max_tokens or "the model's limit"} tokens are
  refused, not truncated.
- Latent steps have no agreed interpretation; `plume trace` shows what can be seen of them. Each costs one pass of the
  text model, so where a single pass is as good, use `num_latent_steps=0`.
- The model inherits the biases and the licence of its backbone and of its training data.
"""


def _steps(config: PlumeConfig) -> str:
    """K of queries and of documents, and who takes none."""
    told = [f"{config.num_latent_steps} by default"]
    if config.document_steps() != config.num_latent_steps:
        told.append(f"{config.document_steps()} for documents (`encode_document`)")
    if config.gate_threshold is not None:
        told.append(f"none for inputs whose gate says less than {config.gate_threshold:.2g}, but for documents")
    return ", ".join(told)


def _router(config: PlumeConfig, gates: Tensor | None) -> str:
    """What can be read from the router's weights alone: which experts each step prefers before it has seen an input."""
    if gates is None:
        return ""
    experts = gates.shape[1]
    lines = [
        "## Gates of the router",
        "",
        f"Each step keeps {config.top_k} of {experts} experts. The table shows the router's gates per step where "
        "state and anchor\nare zero, that is, what the step alone prefers; inputs move it. It is read from the "
        "weights, trained or not.\n`plume trace` shows the gates for your inputs.",
        "",
        "| step | " + " | ".join(f"expert {expert}" for expert in range(experts)) + " |",
        "|---|" + "---|" * experts,
        *(f"| {step} | " + " | ".join(f"{gate:.2f}" for gate in row) + " |" for step, row in enumerate(gates.tolist())),
        "",
    ]
    return "\n".join(lines) + "\n"


def _latents(config: PlumeConfig) -> str:
    if config.latents == "sequential":
        return "sequential: each from the state before it"
    if config.is_one_pass:
        return "parallel: learnt, and read in the pass of the prefix; the adapter does not run"
    return f"parallel: learnt, then computed from all states {config.refinements} times"


def _most(max_latent_steps: int | None) -> str:
    return "" if max_latent_steps is None else f", {max_latent_steps} are the most"


def _video(config) -> str:
    frames = (
        f"{config.video_num_frames} frames" if config.video_fps is None else f"{config.video_fps} frames per second"
    )
    return f"{frames}, {config.video_min_pixels:,} to {config.video_max_pixels:,} pixels each"

"""What happened inside a rollout: states, gates, and what each state would say.

For every latent state h_0 .. h_K of an input: its norm, its cosine to the state before, the router's gates and the
experts kept, the nearest vocabulary tokens through the output head (the logit lens), and its cosine to the final
embedding and to candidates.

Letters: K latent steps, D hidden size, E routed experts, T kept experts, M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from plume.inputs.errors import InputError
from plume.inputs.item import Item, list_inputs
from plume.model.model import PlumeModel

_BATCH_SIZE = 16


@dataclass(frozen=True, eq=False)
class Trace:
    """One input's way through K latent steps; tensors are float32 on the CPU.

    name: how the caller knows the input.
    modality: the kinds it holds, for example "image+text".
    states: hidden states h_0 (at `<bot>`) to h_K, `[K+1, D]`.
    gates: the router's softmax at each step, `[K, E]`; None without a router.
    experts: the experts kept at each step, the strongest first, `[K, T]`; None without a router.
    words: for each state, the nearest vocabulary tokens and their probabilities.
    embedding: the final embedding, `[D]`.
    candidates: names of what states were compared with.
    to_candidates: cosine of each state to each candidate's embedding, `[K+1, M]`; None without candidates.
    """

    name: str
    modality: str
    states: Tensor
    gates: Tensor | None
    experts: Tensor | None
    words: list[list[tuple[str, float]]]
    embedding: Tensor
    candidates: list[str]
    to_candidates: Tensor | None

    @property
    def norms(self) -> Tensor:
        """Euclidean norm of each state, `[K+1]`."""
        return self.states.norm(dim=-1)

    @property
    def step_cosine(self) -> Tensor:
        """Cosine of each state to the one before it, `[K]`; near 1 where a step changes nothing."""
        return F.cosine_similarity(self.states[1:], self.states[:-1], dim=-1)

    @property
    def to_embedding(self) -> Tensor:
        """Cosine of each state to the final embedding, `[K+1]`."""
        return F.cosine_similarity(self.states, self.embedding[None], dim=-1)

    def to_dict(self) -> dict[str, Any]:
        """All but the states themselves, as plain numbers for JSON."""
        return {
            "name": self.name,
            "modality": self.modality,
            "num_latent_steps": len(self.states) - 1,
            "norms": self.norms.tolist(),
            "step_cosine": self.step_cosine.tolist(),
            "gates": None if self.gates is None else self.gates.tolist(),
            "experts": None if self.experts is None else self.experts.tolist(),
            "words": [[{"token": token, "probability": p} for token, p in state] for state in self.words],
            "cosine_to_embedding": self.to_embedding.tolist(),
            "candidates": self.candidates,
            "cosine_to_candidates": None if self.to_candidates is None else self.to_candidates.tolist(),
            "embedding": self.embedding.tolist(),
        }


@torch.no_grad()
def trace(
    model: PlumeModel,
    inputs: Any,
    *,
    num_latent_steps: int | None = None,
    candidates: Any = None,
    num_words: int = 5,
    names: Sequence[str] | None = None,
    instruction: str | None = None,
    images_kwargs: dict[str, Any] | None = None,
) -> list[Trace]:
    """Embed some inputs and keep what happened on the way.

    Args:
        model: with its processor.
        inputs: one input or a list of them, each what `Item.parse` accepts.
        num_latent_steps: K; None is the checkpoint's own.
        candidates: one input or several, embedded with the same K, or their embeddings `[M, D]`.
        num_words: nearest vocabulary tokens per state.
        names: of the inputs; their texts, or their places in the list, if not given.
        instruction: for every input that brings none of its own; candidates get none.
        images_kwargs: `size` of images, as the processor takes it.

    Raises:
        InputError: an input or candidate that cannot be embedded.

    Example:
        >>> model = getfixture("model")
        >>> (steps,) = trace(model, ["a red kite"], num_latent_steps=2, candidates=["blue", "red"])
        >>> steps.states.shape, steps.experts.shape, steps.to_candidates.shape
        (torch.Size([3, 64]), torch.Size([2, 2]), torch.Size([3, 2]))
    """
    assert model.processor is not None
    raws, _ = list_inputs(inputs)
    items = [_parsed(model, raw, index, instruction) for index, raw in enumerate(raws)]
    names = list(names) if names is not None else [_name(item, index) for index, item in enumerate(items)]
    compared, called = _candidates(model, candidates, num_latent_steps)
    traces: list[Trace] = []
    for start in range(0, len(items), _BATCH_SIZE):
        batch = items[start : start + _BATCH_SIZE]
        encoded = model.processor.encode(batch, images_kwargs).to(model.device)
        output = model(**encoded, num_latent_steps=num_latent_steps)
        chances = model.logits(output.states).float().softmax(dim=-1)
        for row, item in enumerate(batch):
            states = output.states[row].float().cpu()
            gates = None if output.gates is None else output.gates[row].float().cpu()
            traces.append(
                Trace(
                    name=names[start + row],
                    modality=item.modality,
                    states=states,
                    gates=gates,
                    experts=None if gates is None else gates.topk(model.config.top_k, dim=-1).indices,
                    words=_words(model, chances[row], num_words),
                    embedding=output.embedding[row].cpu(),
                    candidates=called,
                    to_candidates=None if compared is None else F.normalize(states, dim=-1) @ compared.T,
                )
            )
    return traces


def _parsed(model: PlumeModel, raw: Any, index: int, instruction: str | None) -> Item:
    try:
        return _checked(model, raw, f"input {index}", instruction)
    except InputError as error:
        error.locate(index)
        raise


def _checked(model: PlumeModel, raw: Any, name: str, instruction: str | None = None) -> Item:
    """An input that is not too long."""
    assert model.processor is not None
    return model.processor.fit(model.processor.parse(raw, name).instructed(instruction), name)


def expert_use(traces: Sequence[Trace]) -> dict[str, Tensor]:
    """How often each expert was kept, by modality: shares `[E]` that sum to 1; empty without a router.

    Example:
        >>> model = getfixture("model")
        >>> use = expert_use(trace(model, ["red kite", "blue kite"]))
        >>> list(use), round(use["text"].sum().item(), 3)
        (['text'], 1.0)
    """
    counts: dict[str, Tensor] = {}
    for traced in traces:
        if traced.experts is None or traced.gates is None or not len(traced.experts):
            continue
        kept = torch.bincount(traced.experts.flatten(), minlength=traced.gates.shape[1]).float()
        counts[traced.modality] = counts.get(traced.modality, torch.zeros_like(kept)) + kept
    return {modality: counts[modality] / counts[modality].sum() for modality in sorted(counts)}


def _candidates(model: PlumeModel, candidates: Any, num_latent_steps: int | None) -> tuple[Tensor | None, list[str]]:
    if candidates is None:
        return None, []
    if isinstance(candidates, Tensor):
        return F.normalize(candidates.float().cpu(), dim=-1), [str(index) for index in range(len(candidates))]
    assert model.processor is not None
    raws, _ = list_inputs(candidates)
    items = [_checked(model, raw, f"candidate {index}") for index, raw in enumerate(raws)]
    vectors = [
        model(**model.processor.encode([item]).to(model.device), num_latent_steps=num_latent_steps).embedding.cpu()
        for item in items
    ]
    return torch.cat(vectors), [_name(item, index) for index, item in enumerate(items)]


def _words(model: PlumeModel, chances: Tensor, count: int) -> list[list[tuple[str, float]]]:
    best = chances.topk(count, dim=-1)
    tokenizer: Any = model.processor.tokenizer  # type: ignore[union-attr]
    return [
        [(tokenizer.decode([index]), chance) for index, chance in zip(indices, values, strict=True)]
        for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _name(item: Item, index: int) -> str:
    return item.text[:60] or f"{item.modality} {index}"

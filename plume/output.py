"""What a pass of `PlumeModel` returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput


@dataclass
class PlumeOutput(ModelOutput):
    """What `PlumeModel.forward` returns. K is the largest number of latent steps in the batch.

    embedding `[B, D]`: the embedding; unit norm, float32 (float64 where the model is).
    anchor_embedding `[B, D]`: the hidden state at the anchor; likewise. A space of its own.
    states `[B, K+1, D]`: hidden states h_0 .. h_K; zero beyond a row's own K.
    gates `[B, K, E]`: the router's softmax at each latent step; None without a router or without steps.
    suffix_logits `[M, V]`: next-token logits of the M labels that are not -100, row by row; None without labels.
    read_out_layers `[layers + 1, B, D]`: hidden states of all layers at `<gen_emb>`; None unless kept.
    vision_states: of the vision tower before its merger, for a second pass over the same media; None without media.
    scalars: what `PlumeModel.loss_scalars` returned; None without it.
    num_latent_steps `[B]`: K of each row; with early exit, the steps that it took.
    """

    embedding: Tensor | None = None
    anchor_embedding: Tensor | None = None
    states: Tensor | None = None
    gates: Tensor | None = None
    suffix_logits: Tensor | None = None
    read_out_layers: Tensor | None = None
    vision_states: Tensor | None = None
    scalars: Tensor | None = None
    num_latent_steps: Tensor | None = None


def unit(hidden: Tensor) -> Tensor:
    """Hidden states as unit vectors, at least in float32, `[..., D] -> [..., D]`."""
    return F.normalize(hidden.to(torch.promote_types(hidden.dtype, torch.float32)), dim=-1)

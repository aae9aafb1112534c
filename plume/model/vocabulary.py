"""The special tokens in a new model: its vocabulary grows, and their rows begin as copies of others.

Letters: V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from plume.config import PlumeConfig
from plume.tokens import ANCHOR, LATENT_START, add_special_tokens

# A new row begins as a copy of the row of a token with a similar role, by backbone: one that opens, one that closes.
_SOURCES = {
    "qwen2_vl": ("<|object_ref_start|>", "<|object_ref_end|>"),
    "qwen2_5_vl": ("<tool_call>", "</tool_call>"),
}
_STARTS = {ANCHOR, LATENT_START}


@torch.no_grad()
def initialise_rows(
    weight: nn.Parameter, tokenizer: PreTrainedTokenizerBase, added: list[str], model_type: str
) -> None:
    """Set the rows of newly added tokens in an embedding matrix or an output head.

    Args:
        weight: the matrix `[V, D]`, changed in place.
        tokenizer: looks the ids up.
        added: the tokens that were new, from `add_special_tokens`.
        model_type: the backbone's, which decides the rows to copy from. Where the tokenizer lacks these
            (a small tokenizer), a new row is the mean of the old rows.
    """
    vocabulary = tokenizer.get_vocab()
    sources = _SOURCES[model_type]
    # Sorted, since a tokenizer lists its tokens in no fixed order, and sums depend on theirs.
    old_rows = sorted(index for token, index in vocabulary.items() if token not in added)
    for token in added:
        source = sources[0] if token in _STARTS else sources[1]
        row = weight[vocabulary[source]] if source in vocabulary else weight[old_rows].mean(dim=0)
        weight[vocabulary[token]] = row


def add_to_vocabulary(
    backbone: Any, head: nn.Linear | None, tokenizer: PreTrainedTokenizerBase, config: PlumeConfig
) -> None:
    """Give tokenizer, embeddings, output head and configuration the special tokens.

    Args:
        backbone: its embedding matrix grows if it has no spare rows.
        head: the output head, None where it is the embedding matrix.
        tokenizer: of the checkpoint.
        config: gets the ids.
    """
    added = add_special_tokens(tokenizer)
    embeddings = backbone.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        # Qwen-VL's matrix has spare rows; only a smaller one must grow.
        backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        embeddings = backbone.get_input_embeddings()
        if head is not None:
            grown = torch.zeros(len(tokenizer), head.in_features, dtype=head.weight.dtype)
            grown[: head.out_features] = head.weight.detach()
            head.weight, head.out_features = nn.Parameter(grown), len(tokenizer)
    for matrix in [embeddings] if head is None else [embeddings, head]:
        initialise_rows(matrix.weight, tokenizer, added, backbone.config.model_type)
    config.remember_ids(tokenizer)

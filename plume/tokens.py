"""The special tokens: what marks the parts of an input, and how their embedding rows begin.

The strings are those of the published PLUME checkpoints (arXiv 2604.02073) and stand in this file alone.

    <disc_emb>   anchor: its hidden state steers the router and is a cheap second embedding
    <bot>        start of the latent block, the last token of the prefix
    <ct>         placeholder of one latent step in a written layout; never fed, never predicted
    <eot>        end of the latent block, the first token of the suffix
    <gen_emb>    read-out: its hidden state is the embedding
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AddedToken, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from plume.config import PlumeConfig

ANCHOR = "<disc_emb>"
LATENT_START = "<bot>"
LATENT = "<ct>"
LATENT_END = "<eot>"
READ_OUT = "<gen_emb>"

#: In the order in which the published checkpoints add them, which fixes their ids.
SPECIAL_TOKENS = (READ_OUT, ANCHOR, LATENT_START, LATENT_END, LATENT)

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"

#: Strings with a meaning to the model. Where a user's text mentions one it is spelt as text, never read as the token.
RESERVED = (
    *SPECIAL_TOKENS,
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE,
    VIDEO,
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
)

# A new row begins as a copy of a row with a similar role. Each pair is (start-like, end-like); the first
# pair that the tokenizer knows is taken.
_SOURCES = {
    "qwen2_vl": ("<|object_ref_start|>", "<|object_ref_end|>"),
    "qwen2_5_vl": ("<tool_call>", "</tool_call>"),
}
_STARTS = {ANCHOR, LATENT_START}


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Add the five tokens that the tokenizer lacks, and return those.

    They are plain added tokens, as published: `skip_special_tokens=True` keeps them in decoded text.

    Example:
        >>> tokenizer = getfixture("tokenizer_without_plume_tokens")
        >>> add_special_tokens(tokenizer)
        ['<gen_emb>', '<disc_emb>', '<bot>', '<eot>', '<ct>']
        >>> add_special_tokens(tokenizer)
        []
    """
    known = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in missing])
    return missing


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of `token`, looked up by name.

    Raises:
        ValueError: the tokenizer does not hold the token.
    """
    index = tokenizer.get_vocab().get(token)
    if index is None:
        raise ValueError(
            f"the tokenizer has no token {token!r}, which plume needs; "
            "build the checkpoint with PlumeModel.from_backbone, which adds it"
        )
    return index


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
            (a small tokenizer of one's own), a new row is the mean of the old rows.
    """
    vocabulary = tokenizer.get_vocab()
    sources = _SOURCES.get(model_type, _SOURCES["qwen2_vl"])
    # Sorted, since a tokenizer lists its tokens in no fixed order, and sums depend on theirs.
    old_rows = sorted(index for token, index in vocabulary.items() if token not in added)
    for token in added:
        source = sources[0] if token in _STARTS else sources[1]
        row = weight[vocabulary[source]] if source in vocabulary else weight[old_rows].mean(dim=0)
        weight[vocabulary[token]] = row


def install(backbone: Any, head: nn.Linear | None, tokenizer: PreTrainedTokenizerBase, config: PlumeConfig) -> None:
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
    remember_ids(tokenizer, config)


def remember_ids(tokenizer: PreTrainedTokenizerBase, config: PlumeConfig) -> None:
    """Write the ids of the special tokens into the configuration.

    Raises:
        ValueError: the tokenizer lacks one.
    """
    config.anchor_token_id = token_id(tokenizer, ANCHOR)
    config.latent_start_token_id = token_id(tokenizer, LATENT_START)
    config.latent_end_token_id = token_id(tokenizer, LATENT_END)
    config.read_out_token_id = token_id(tokenizer, READ_OUT)

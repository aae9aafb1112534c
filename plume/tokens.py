"""The special tokens: what marks the parts of an input.

The strings are those of the published PLUME checkpoints (arXiv 2604.02073) and stand in this file alone.

    <disc_emb>   anchor: its hidden state steers the router and is a cheap second embedding
    <bot>        start of the latent block, the last token of the prefix
    <ct>         placeholder of one latent step in a written layout; never fed, never predicted
    <eot>        end of the latent block, the first token of the suffix
    <gen_emb>    read-out: its hidden state is the embedding
"""

from __future__ import annotations

from transformers import AddedToken, PreTrainedTokenizerBase

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

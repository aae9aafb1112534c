"""A Qwen2-VL small enough to train on two CPU cores, as a stock checkpoint folder.

It has the architecture and the file layout of the real one, random weights, and a tokenizer with one token per
known word (other text is spelt in characters). The demo and the tests start from it.
"""

from __future__ import annotations

import copy
import os
import string
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from plume.model.model import PlumeModel
from plume.tokens import (
    ANCHOR,
    IMAGE,
    LATENT_END,
    LATENT_START,
    READ_OUT,
    VIDEO,
    VISION_END,
    VISION_START,
)

#: Fields of `PlumeConfig` for a model so small that the published prompt would be most of its input.
SHORT_STRINGS = {
    "prompt_template": f"{{content}}{ANCHOR}{LATENT_START}",
    "suffix_template": f"{LATENT_END}{{rationale}}",
    "answer_template": "",
    "read_out": READ_OUT,
    "turn_end": "",
}

#: Qwen2-VL-2B, for `random_model`.
SHAPES_2B = {
    "text_config": {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
    "tie_word_embeddings": True,
}

#: Qwen2-VL-7B, for `random_model`.
SHAPES_7B = {
    "text_config": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16},
    "tie_word_embeddings": False,
}

_UNKNOWN = "<unk>"
_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", VISION_START, VISION_END, IMAGE, VIDEO)


def tiny_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per word; other text is spelt in ASCII characters.

    Args:
        words: of letters, digits and hyphens.

    Example:
        >>> tiny_tokenizer(["red-ring"]).tokenize("a red-ring.")
        ['a', 'red-ring', '.']
    """
    characters = string.ascii_letters + string.digits + string.punctuation
    pieces = [_UNKNOWN, *words, *characters, *("##" + character for character in characters)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=_UNKNOWN))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = pre_tokenizers.Split(  # type: ignore[assignment]
        Regex(r"[A-Za-z0-9-]+|[^\sA-Za-z0-9-]"), behavior="removed", invert=True
    )
    tokenizer.decoder = decoders.WordPiece()  # type: ignore[assignment]
    tokenizer.add_special_tokens(list(_QWEN_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=_UNKNOWN,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        model_max_length=4096,
    )


def save_tiny_backbone(
    folder: str | os.PathLike,
    words: Iterable[str] = (),
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    vision_width: int = 64,
    vision_layers: int = 1,
    temporal_patch_size: int = 2,
    tie_word_embeddings: bool = True,
    family: Literal["qwen2_vl", "qwen2_5_vl"] = "qwen2_vl",
    seed: int = 0,
) -> None:
    """Write a stock Qwen2-VL (or Qwen2.5-VL) folder: configuration, random weights, tokenizer, image processor.

    Args:
        folder: created if missing.
        words: each gets a token of its own.
        hidden_size: D; a multiple of 4 * num_heads.
        num_layers: of the text model.
        num_heads: H, query heads.
        num_key_value_heads: G.
        vision_width: width of the vision tower.
        vision_layers: its layers.
        temporal_patch_size: frames per patch; 1 halves the work where there is no video.
        tie_word_embeddings: whether the output head is the embedding matrix.
        family: the architecture.
        seed: of the weights.
    """
    tokenizer = tiny_tokenizer(words)
    token_ids = tokenizer.get_vocab()
    rotary_half = hidden_size // num_heads // 2
    if family == "qwen2_vl":
        config_class: Any = Qwen2VLConfig
        model_class: Any = Qwen2VLForConditionalGeneration
        vision = {"embed_dim": vision_width, "hidden_size": hidden_size, "mlp_ratio": 2}
    else:
        config_class, model_class = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
        vision = {
            "hidden_size": vision_width,
            "out_hidden_size": hidden_size,
            "intermediate_size": 2 * vision_width,
            "window_size": 56,
            "fullatt_block_indexes": [vision_layers - 1],
        }
    config = config_class(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "initializer_range": hidden_size**-0.5,  # 0.02 suits a width of 2,500
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_key_value_heads,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                # as 16, 24, 24 of 64 in the real one
                "mrope_section": [rotary_half - 2 * (3 * rotary_half // 8)] + 2 * [3 * rotary_half // 8],
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            **vision,
            "depth": vision_layers,
            "initializer_range": vision_width**-0.5,
            "num_heads": 4,
            "temporal_patch_size": temporal_patch_size,
        },
        tie_word_embeddings=tie_word_embeddings,
        image_token_id=token_ids[IMAGE],
        video_token_id=token_ids[VIDEO],
        vision_start_token_id=token_ids[VISION_START],
        vision_end_token_id=token_ids[VISION_END],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(temporal_patch_size=temporal_patch_size).save_pretrained(folder)


def random_model(
    small: PlumeModel, shapes: Mapping[str, Any], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PlumeModel:
    """A model of given shapes with random weights, made on the device, that reads what `small` reads.

    Args:
        small: gives tokens and processor.
        shapes: fields of `Qwen2VLConfig`, for example `SHAPES_2B`.
        device: where the weights are made.
        dtype: of the weights.
    """
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    backbone = Qwen2VLConfig(**shapes, **{name: getattr(small.config.backbone_config, name) for name in ids})
    config = copy.deepcopy(small.config)
    config.backbone_config = backbone
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = PlumeModel(config)
    finally:
        torch.set_default_dtype(previous)
    model.processor = small.processor
    return model.eval()

"""What tells checkpoints apart."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# Fields of the configuration that decide embeddings, besides K.
_DECISIVE = (
    "transition",
    "top_k",
    "router_context",
    "latent_positions",
    "prompt_template",
    "suffix_ids",
    "blank_image_size",
    "video_num_frames",
    "video_fps",
    "video_max_frames",
    "video_min_pixels",
    "video_max_pixels",
)
# Fields that came later count where they differ from their default, so that indexes made before them stay valid.
_DECISIVE_LATER = {"background": "white", "vision_positions": "all_axes", "gate_threshold": None}


def fingerprint(model: PreTrainedModel) -> str:
    """Tells checkpoints apart: a digest of what decides their embeddings.

    That is some fields of the configuration (not the default K, which a caller may change, nor the dtype), the pixel
    budget, and 64 values of each weight, evenly spaced, which every training step moves.
    """
    config, processor = model.config, getattr(model, "processor", None)
    fields: dict[str, Any] = {name: getattr(config, name) for name in _DECISIVE}
    fields |= {name: value for name, old in _DECISIVE_LATER.items() if (value := getattr(config, name)) != old}
    fields["backbone"] = config.backbone_config.model_type
    fields["pixels"] = None if processor is None else sorted(dict(processor.image_processor.size).items())
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    add_weights(digest, model)
    return digest.hexdigest()[:16]


def add_weights(digest: Any, model: nn.Module) -> None:
    """Add 64 values of each weight to a digest of `hashlib`, evenly spaced."""
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        count = min(64, len(flat))
        places = torch.arange(count, device=flat.device) * (len(flat) - 1) // max(count - 1, 1)
        # Rounded, so that a checkpoint in bfloat16 is the same one when it is loaded as float32.
        digest.update(name.encode() + flat[places].bfloat16().float().cpu().numpy().tobytes())

"""Where the weights of a Qwen-VL backbone are, for the engine, which runs them in its own way.

Beside `plume.backbone` the only file that knows how transformers names them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plume.backbone import Backbone


class UnsupportedModelError(ValueError):
    """A model that the engine cannot run, and why; it then runs as transformers does it."""


@dataclass(frozen=True)
class TextParts:
    """What the text model of Qwen2-VL and Qwen2.5-VL is made of.

    layers, norm: its modules. eps: of the RMSNorms. num_heads, num_key_value_heads, channels: H, G, C.
    inverse_frequencies `[C/2]`: of the rotation. rotary_sections: channels that follow time, height and width.
    """

    layers: list[Any]
    norm: Any
    eps: float
    num_heads: int
    num_key_value_heads: int
    channels: int
    inverse_frequencies: Tensor
    rotary_sections: list[int]


def text_parts(backbone: Backbone) -> TextParts:
    """The parts of a backbone's text model, for those who run them in their own way.

    Raises:
        UnsupportedModelError: it does what these parts do not tell: sliding windows, a scaled rotation.
    """
    model, config = backbone.language_model, backbone.config.get_text_config()
    rotary = config.rope_parameters
    if rotary.get("rope_type", "default") not in ("default", "mrope"):
        raise UnsupportedModelError(f"its rotary positions are of type {rotary['rope_type']!r}")
    if "sliding_attention" in config.layer_types:
        raise UnsupportedModelError("it attends within sliding windows")
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"its activation is {config.hidden_act!r}")
    return TextParts(
        layers=list(model.layers),
        norm=model.norm,
        eps=config.rms_norm_eps,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        channels=config.hidden_size // config.num_attention_heads,
        inverse_frequencies=model.rotary_emb.inv_freq.float(),
        rotary_sections=list(rotary["mrope_section"]),
    )


@dataclass(frozen=True)
class TowerParts:
    """What the vision tower of Qwen2-VL is made of.

    embed: the convolution that embeds patches, which never overlap. blocks, merger: its modules. num_heads: H.
    merge: patches per side of a visual token.
    inverse_frequencies `[C/4]`: of the rotation along each of the two axes.
    """

    embed: Any
    blocks: list[Any]
    merger: Any
    num_heads: int
    merge: int
    inverse_frequencies: Tensor


def tower_parts(backbone: Backbone) -> TowerParts:
    """The parts of a backbone's vision tower, for those who run them in their own way.

    Raises:
        UnsupportedModelError: it is not Qwen2-VL's.
    """
    tower = backbone.visual
    if backbone.config.model_type != "qwen2_vl":
        raise UnsupportedModelError(f"its vision tower is that of {backbone.config.model_type!r}")
    return TowerParts(
        embed=tower.patch_embed.proj,
        blocks=list(tower.blocks),
        merger=tower.merger,
        num_heads=backbone.config.vision_config.num_heads,
        merge=tower.spatial_merge_size,
        inverse_frequencies=tower.rotary_pos_emb.inv_freq.float(),
    )

"""The weights that the engine runs on: the model's own tensors, never copies.

text_weights, vision_weights   where transformers keeps them
BorrowedWeights                whether they are still what they were
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from plume.model.backbone import Backbone

_VERSION = attrgetter("_version")


class UnsupportedModelError(ValueError):
    """A model that the engine cannot run, and why; transformers' own layers then run it."""


@dataclass(frozen=True)
class TextWeights:
    """The modules and sizes of a text model of Qwen2-VL or Qwen2.5-VL.

    embedding, layers, norm: its modules. eps: of the RMSNorms. num_heads, num_key_value_heads, channels: H, G, C.
    inverse_frequencies `[C/2]`: of the rotation. rotary_sections: channels that follow time, height and width.
    """

    embedding: Any
    layers: list[Any]
    norm: Any
    eps: float
    num_heads: int
    num_key_value_heads: int
    channels: int
    inverse_frequencies: Tensor
    rotary_sections: list[int]


def text_weights(backbone: Backbone) -> TextWeights:
    """Where the weights of a backbone's text model are.

    Raises:
        UnsupportedModelError: it has sliding windows, a scaled rotation or another activation.
    """
    model, config = backbone.language_model, backbone.config.get_text_config()
    rotary = config.rope_parameters
    if rotary.get("rope_type", "default") not in ("default", "mrope"):
        raise UnsupportedModelError(f"its rotary positions are of type {rotary['rope_type']!r}")
    if "sliding_attention" in config.layer_types:
        raise UnsupportedModelError("it attends within sliding windows")
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"its activation is {config.hidden_act!r}")
    return TextWeights(
        embedding=backbone.get_input_embeddings(),
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
class VisionWeights:
    """The modules and sizes of the vision tower of Qwen2-VL.

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


def vision_weights(backbone: Backbone) -> VisionWeights:
    """Where the weights of a backbone's vision tower are.

    Raises:
        UnsupportedModelError: it is not Qwen2-VL's.
    """
    tower = backbone.visual
    if backbone.config.model_type != "qwen2_vl":
        raise UnsupportedModelError(f"its vision tower is that of {backbone.config.model_type!r}")
    return VisionWeights(
        embed=tower.patch_embed.proj,
        blocks=list(tower.blocks),
        merger=tower.merger,
        num_heads=backbone.config.vision_config.num_heads,
        merge=tower.spatial_merge_size,
        inverse_frequencies=tower.rotary_pos_emb.inv_freq.float(),
    )


class BorrowedWeights:
    """The parameters of a model: are they still what they were when this was made?

    Two questions, asked on every call, by what runs on the parameters and by what remembers results of them:

        are_same    the same parameters in the same memory: nothing was moved, replaced or merged
        revision    changes with their values too: nothing was trained, loaded or written in place

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> weights = BorrowedWeights(layer)
        >>> before = weights.revision()
        >>> _ = layer.weight.data.mul_(2)
        >>> weights.are_same(), weights.revision() == before
        (True, False)
        >>> layer.weight = nn.Parameter(torch.zeros(2, 2))
        >>> weights.are_same()
        False
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._take()

    def _take(self) -> None:
        modules = list(self._model.modules())
        # Views of the modules' own dicts, so that a call neither walks the modules nor asks them for attributes.
        self._child_views = [module._modules.values() for module in modules if module._modules]
        self._parameter_views = [module._parameters.values() for module in modules if module._parameters]
        self._children = list(chain.from_iterable(self._child_views))
        self._entries: list[Any] = list(chain.from_iterable(self._parameter_views))  # None where a bias is missing
        self._parameters: list[Tensor] = [entry for entry in self._entries if entry is not None]
        self._pointers = list(map(Tensor.data_ptr, self._parameters))
        self._samples = _samples(self._parameters)

    @property
    def device(self) -> torch.device:
        """Where the first of them is now."""
        return self._parameters[0].device

    def are_same(self) -> bool:
        """Whether all modules and parameters are the same ones in the same memory; tens of nanoseconds for each."""
        try:
            # Lists do not look into what is identical; two unlike tensors refuse to be compared.
            return (
                list(chain.from_iterable(self._child_views)) == self._children
                and list(chain.from_iterable(self._parameter_views)) == self._entries
                and list(map(Tensor.data_ptr, self._parameters)) == self._pointers
            )
        except RuntimeError:
            return False

    def revision(self) -> Hashable:
        """Changes whenever weights are replaced, moved or written to.

        Writing through `.data` leaves no mark; it is noticed by two values of every parameter, so that a write to a few
        other values alone goes unnoticed.
        """
        if not self.are_same():
            self._take()
        try:
            versions = tuple(map(_VERSION, self._parameters))
        except RuntimeError:  # made in inference mode, where nothing is counted
            versions = ()
        values = b"".join(torch.stack(views).float().cpu().numpy().tobytes() for views in self._samples)
        return hash(tuple(self._pointers)), hash(versions), values


def _samples(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Views of two values of each parameter, by dtype and device."""
    views: dict[Any, list[Tensor]] = {}
    with torch.no_grad():
        for weight in parameters:
            if weight.numel() and weight.device.type != "meta":
                places = (tuple(size // 3 for size in weight.shape), tuple(2 * size // 3 for size in weight.shape))
                views.setdefault((weight.dtype, weight.device), []).extend(weight.detach()[place] for place in places)
    return list(views.values())

"""Whether a model's weights are still what they were, for what borrows or remembers them.

The engine runs on the model's own tensors, and caches hold what these tensors made. Two questions, asked on every call:

    are_same    the same parameters in the same memory: nothing was moved, replaced or merged
    revision    changes with their values too: nothing was trained, loaded or written in place
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

_VERSION = attrgetter("_version")


class Weights:
    """The parameters of a model, as they are now.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> weights = Weights(layer)
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
        self._parameters: list[Tensor] = [one for one in self._entries if one is not None]
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
        for one in parameters:
            if one.numel() and one.device.type != "meta":
                places = (tuple(size // 3 for size in one.shape), tuple(2 * size // 3 for size in one.shape))
                views.setdefault((one.dtype, one.device), []).extend(one.detach()[place] for place in places)
    return list(views.values())

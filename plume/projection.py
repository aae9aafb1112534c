"""Linear layers as the engine runs them: several over one input joined, residuals added on the way, int8 on request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plume.parts import UnsupportedModelError


class Projection:
    """`x W^T + b` in the model's dtype.

    The weights of several layers over the same input stand below each other in one tensor, of which the layers' own
    parameters become views: nothing is held twice, and what is learnt in place is seen here too.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        """Join some layers.

        Args:
            layers: `nn.Linear`, over the same input; all of them have a bias, or none has.

        Raises:
            UnsupportedModelError: one is not a plain `nn.Linear`.
        """
        for layer in layers:
            if type(layer) is not nn.Linear:
                raise UnsupportedModelError(
                    f"a {type(layer).__name__} stands where nn.Linear is expected; merge adapters first"
                )
        own: list[nn.Linear] = list(layers)  # type: ignore[arg-type]
        self.weight = _joined([layer.weight for layer in own])
        biases = [layer.bias for layer in own if layer.bias is not None]
        self.bias = _joined(biases) if biases else None

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs of all layers beside each other, `[..., in] -> [..., out]`."""
        return F.linear(x, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual + self(x)`, `[M, out]`, in one operation where that is exact."""
        if self.bias is None:
            return torch.addmm(residual, x, self.weight.T)
        return residual + F.linear(x, self.weight, self.bias)


class Int8Projection(Projection):
    """The same in int8 (CPU): weights with one scale per output channel, inputs quantised as they come, one scale each.

    A row's result depends on that row alone. Weights in the model's dtype are kept, so that they can be trained on.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__(layers)
        # Without VNNI two products are added in 16 bits, which half of the range cannot overflow.
        self._levels = 127 if torch.cpu._is_vnni_supported() else 63
        self._quantised, self._scales = _quantised(self.weight.float(), self._levels)

    def __call__(self, x: Tensor) -> Tensor:
        flat, scales = _quantised(x.flatten(end_dim=-2), self._levels)
        y = torch._int_mm(flat, self._quantised.T).to(x.dtype) * (scales * self._scales.T)
        y = y if self.bias is None else y + self.bias
        return y.unflatten(0, x.shape[:-1])

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual + self(x)


def _quantised(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Rows as int8, `[M, n]`, and their scales, `[M, 1]`."""
    scales = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / levels
    return (x / scales).round_().to(torch.int8), scales


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters below each other; they become views of the result, unless they are so already."""
    first = parameters[0].data
    if len(parameters) == 1:
        return first
    ends = [parameter.data_ptr() + parameter.nbytes for parameter in parameters]
    starts = [parameter.data_ptr() for parameter in parameters]
    storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    if len(storages) == 1 and starts[1:] == ends[:-1]:  # another engine has been here
        return first.as_strided((sum(len(one) for one in parameters), *first.shape[1:]), first.stride())
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, whole.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = part
    return whole

"""Dendrites on a layer: their parameters' names, their forward pass, and the plain layers that keep them.

    z_d = M_d(x) + Σ_{e<d} V[d,e,:] ⊙ a_e        (1)
    a_d = f(z_d)                                  (2)
    y   = M(x) + Σ_d w[d,:] ⊙ a_d                 (3)

Set d of a layer has the parameters ``dendrite_weight_d`` and ``dendrite_bias_d`` (M_d), ``dendrite_cascade_d`` (V[d],
(d, C), none for d = 0) and ``dendrite_output_d`` (w[d], (C,)).
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from retrograde.maths.perforate import Activation, activate

NAMES = ("weight", "bias", "cascade", "output")
COUNT = "dendrite_count"

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``(x, weight, bias) → z``, the layer's own map with other parameters."""


def name_of(part: str, index: int) -> str:
    """Name of one parameter of set `index`."""
    return f"dendrite_{part}_{index}"


def allocate(layer: nn.Module, capacity: int) -> None:
    """Register `capacity` sets, all zero, and the count of those in use."""
    weight = cast(Tensor, layer.weight)
    for d in range(capacity):
        channels = weight.new_zeros(weight.shape[0])
        parts = {
            "weight": torch.zeros_like(weight),
            "bias": channels if isinstance(layer.bias, Tensor) else None,
            "cascade": weight.new_zeros(d, weight.shape[0]) if d else None,
            "output": channels.clone(),
        }
        for part, value in parts.items():
            parameter = None if value is None else nn.Parameter(value.detach())
            layer.register_parameter(name_of(part, d), parameter)
    layer.register_buffer(COUNT, torch.zeros((), dtype=torch.int64))


def parameters(layer: nn.Module, index: int) -> dict[str, nn.Parameter]:
    """The parameters of set `index` by part, without those that it lacks."""
    found = {part: getattr(layer, name_of(part, index)) for part in NAMES}
    return {part: value for part, value in found.items() if value is not None}


def remove(layer: nn.Module, first: int, capacity: int) -> None:
    """Take away the sets from `first` on and the count."""
    for d in range(first, capacity):
        for part in NAMES:
            delattr(layer, name_of(part, d))
    delattr(layer, COUNT)


def activations(
    layer: nn.Module, x: Tensor, count: int, activation: Activation, product: Product, *, detached: bool
) -> list[Tensor]:
    """a_d of the first `count` sets, equations (1) and (2).

    Args:
        layer: carries the parameters.
        x: what `product` multiplies.
        count: dendrites in use.
        activation: f.
        product: the layer's map.
        detached: let no gradient through to x or to the dendrites' parameters.
    """
    values: list[Tensor] = []
    spatial = cast(Tensor, layer.weight).dim() - 2
    x = x.detach() if detached else x
    for d in range(count):
        weight: Tensor = getattr(layer, name_of("weight", d))
        bias: Tensor | None = getattr(layer, name_of("bias", d))
        cascade: Tensor | None = getattr(layer, name_of("cascade", d))
        if detached:
            weight = weight.detach()
            bias = None if bias is None else bias.detach()
            cascade = None if cascade is None else cascade.detach()
        z = product(x, weight, bias)
        if cascade is not None:
            for e in range(d):
                z = z + over_channels(cascade[e], spatial) * values[e]
        values.append(activate(z, activation))
    return values


def add(layer: nn.Module, z: Tensor, values: list[Tensor]) -> Tensor:
    """Equation (3), in the precision of z."""
    spatial = cast(Tensor, layer.weight).dim() - 2
    for d, a in enumerate(values):
        z = z + (over_channels(getattr(layer, name_of("output", d)), spatial) * a).to(z.dtype)
    return z


def over_channels(value: Tensor, spatial: int) -> Tensor:
    """(C,) shaped to multiply a layer's output."""
    return value.view(-1, *[1] * spatial)


class _Dendritic(nn.Module):
    """Mixin: a plain layer with dendrites; nothing of it knows a session.

    Attributes:
        dendrites: number of sets.
        activation: f.
        detached: in further training, let no gradient through the dendrites.
    """

    dendrites: int
    activation: Activation
    detached: bool

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """As of the plain layer, with the dendrites' sum added."""
        z = super().forward(input)
        values = activations(
            self, input, self.dendrites, self.activation, self._product, detached=self.detached
        )
        return add(self, z, values)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dendrites={self.dendrites}, activation={self.activation!r}"


class DendriticLinear(_Dendritic, nn.Linear):
    """`nn.Linear` with dendrites, as `Session.fold` leaves it."""

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, weight, bias)


class DendriticConv1d(_Dendritic, nn.Conv1d):
    """`nn.Conv1d` with dendrites, as `Session.fold` leaves it."""

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class DendriticConv2d(_Dendritic, nn.Conv2d):
    """`nn.Conv2d` with dendrites, as `Session.fold` leaves it."""

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class DendriticConv3d(_Dendritic, nn.Conv3d):
    """`nn.Conv3d` with dendrites, as `Session.fold` leaves it."""

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


FOLDED: dict[type[nn.Module], type[_Dendritic]] = {
    nn.Linear: DendriticLinear,
    nn.Conv1d: DendriticConv1d,
    nn.Conv2d: DendriticConv2d,
    nn.Conv3d: DendriticConv3d,
}


def base_of(layer: nn.Module) -> type[nn.Module] | None:
    """The layer type that dendrites know, of which `layer` is one; None when there is none."""
    return next((cls for cls in type(layer).__mro__ if cls in FOLDED), None)


def fold(layer: nn.Module, capacity: int, activation: Activation, detached: bool) -> nn.Module:
    """Make a plain copy with all its capacity into a plain layer, or into a dendritic one when sets are in use."""
    count = int(getattr(layer, COUNT))
    remove(layer, count, capacity)
    base = base_of(layer)
    if count and base is not None:
        layer.__class__ = FOLDED[base]
        folded = cast(_Dendritic, layer)
        folded.dendrites, folded.activation, folded.detached = count, activation, detached
    return layer

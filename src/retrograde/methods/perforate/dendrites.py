"""Dendrites on a layer: their parameters' names, their forward pass, and the plain layers that keep them.

    z_d = M_d(x) + Σ_{e<d} V[d,e,:] ⊙ a_e        (1)
    a_d = f(z_d)                                  (2)
    y   = M(x) + Σ_d w[d,:] ⊙ a_d                 (3)

Set d of a layer has the parameters ``dendrite_weight_d`` and ``dendrite_bias_d`` (M_d), ``dendrite_cascade_d`` (V[d],
(d, C), none for d = 0) and ``dendrite_output_d`` (w[d], (C,)).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from retrograde.engine.maps.base import LayerKind, Map, kind_of, register_layer
from retrograde.errors import StateError, TransformError
from retrograde.maths.perforate import Activation, activate

NAMES = ("weight", "bias", "cascade", "output")
UNPACKED = "_retrograde_unpacked"
"""Marks an `nn.TransformerEncoder` that would pack padded batches, which its layers' fused kernels alone can take."""


def name_of(part: str, index: int) -> str:
    """Name of one parameter of set `index`."""
    return f"dendrite_{part}_{index}"


def allocate(layer: nn.Module, capacity: int, weight: Tensor, outputs: int, *, bias: bool) -> None:
    """Register `capacity` sets, all zero."""
    for d in range(capacity):
        channels = weight.new_zeros(outputs)
        parts = {
            "weight": torch.zeros_like(weight),
            "bias": channels if bias else None,
            "cascade": weight.new_zeros(d, outputs) if d else None,
            "output": channels.clone(),
        }
        for part, value in parts.items():
            parameter = None if value is None else nn.Parameter(value.detach())
            layer.register_parameter(name_of(part, d), parameter)


def parameters(layer: nn.Module, index: int) -> dict[str, nn.Parameter]:
    """The parameters of set `index` by part, without those that it lacks."""
    found = {part: getattr(layer, name_of(part, index)) for part in NAMES}
    return {part: value for part, value in found.items() if value is not None}


def activations(
    layer: nn.Module, x: Tensor, count: int, activation: Activation, map: Map, *, detached: bool
) -> list[Tensor]:
    """a_d of the first `count` sets, equations (1) and (2).

    Args:
        layer: carries the parameters.
        x: what the layer multiplies.
        count: dendrites in use.
        activation: f.
        map: how it multiplies.
        detached: let no gradient through to x or to the dendrites' parameters.
    """
    values: list[Tensor] = []
    x = x.detach() if detached else x
    for d in range(count):
        weight: Tensor = getattr(layer, name_of("weight", d))
        bias: Tensor | None = getattr(layer, name_of("bias", d))
        cascade: Tensor | None = getattr(layer, name_of("cascade", d))
        if detached:
            weight = weight.detach()
            bias = None if bias is None else bias.detach()
            cascade = None if cascade is None else cascade.detach()
        z = map.forward(x, weight, bias)
        if cascade is not None:
            for e in range(d):
                z = z + over_channels(cascade[e], map, z) * values[e]
        values.append(activate(z, activation))
    return values


def add(layer: nn.Module, z: Tensor, values: list[Tensor], map: Map) -> Tensor:
    """Equation (3), in the precision of z."""
    for d, a in enumerate(values):
        z = z + (over_channels(getattr(layer, name_of("output", d)), map, z) * a).to(z.dtype)
    return z


def over_channels(value: Tensor, map: Map, z: Tensor) -> Tensor:
    """(C,) shaped to multiply a layer's output."""
    return value.view(-1, *[1] * (-1 - map.axis(z)))


@dataclass
class State:
    """What a layer with dendrites keeps beside its parameters.

    Attributes:
        count: sets in use; the others are all zero, and add nothing.
        capacity: sets that there are parameters for.
        activation: f.
        detached: in training, let no gradient through the dendrites.
    """

    count: int
    capacity: int
    activation: Activation
    detached: bool


class Dendritic(nn.Module):
    """Mixin: a layer with dendrites, which computes with them whether or not it is attached.

    Its ``state_dict`` has the dendrites' keys beside the layer's; a state without any of them is one without dendrites.
    """

    _dendrite_base: ClassVar[type[nn.Module]]
    _dendrite_kind: ClassVar[LayerKind]
    _dendrite_state: State

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the plain layer, with the dendrites' sum added."""
        return self._dendrite_kind.forward(self, self._product, *args, **kwargs)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, map: Map) -> Tensor:
        state = self._dendrite_state
        # A copy may be an average, whose parameters grow without a word.
        count = state.count if "_retrograde" in self.__dict__ else state.capacity
        detached = state.detached and self.training
        found = activations(self, x, count, state.activation, map, detached=detached)
        return add(self, map.forward(x, weight, bias), found, map)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        mine, state = f"{prefix}dendrite_", self._dendrite_state
        if any(key.startswith(mine) for key in state_dict):
            state.count = in_use(self, state.capacity)
        elif f"{prefix}{self._dendrite_kind.names(self)[0]}" in state_dict:
            missing_keys[:] = [key for key in missing_keys if not key.startswith(mine)]
            with torch.no_grad():
                for d in range(state.capacity):
                    for value in parameters(self, d).values():
                        value.zero_()
            state.count = 0

    def extra_repr(self) -> str:
        """The plain layer's, and the dendrites."""
        state = self._dendrite_state
        return f"{super().extra_repr()}, dendrites={state.count}, activation={state.activation!r}"

    def __prepare_scriptable__(self) -> nn.Module:
        raise TransformError(
            f"torch.jit.script cannot compile a {self._dendrite_base.__name__} with dendrites: they are computed "
            "set by set in ordinary Python. Use torch.export or torch.jit.trace, which take this model as it is."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A registered kind is looked up again: it may hold a function that cannot be pickled, and a copy of it would
        # make another class.
        kind = self._dendrite_kind.origin
        kind = None if _registered(self._dendrite_base) is kind else kind
        return _empty, (self._dendrite_base, kind), self.__dict__


def _empty(plain: type[nn.Module], kind: LayerKind | None) -> nn.Module:
    kind = _registered(plain) if kind is None else kind
    if kind is None:
        raise StateError(
            f"a {plain.__name__} with dendrites cannot be loaded: its type is not registered here. Import what "
            "registers it (retrograde.register_layer) first."
        )
    made = dendritic(plain, kind)
    torch.serialization.add_safe_globals([made])
    return made.__new__(made)


# With the plain class itself allowed, `torch.load` with ``weights_only`` takes its layers with dendrites too.
torch.serialization.add_safe_globals([State, _empty])


def _registered(plain: type[nn.Module]) -> LayerKind | None:
    found = (kind_of(cls) for cls in plain.__mro__)
    return next((kind for kind in found if kind is not None), None)


@cache
def dendritic(plain: type[nn.Module], kind: LayerKind) -> type[Dendritic]:
    """The class of layers of a `plain` class with dendrites."""
    names = {
        "_dendrite_base": plain,
        "_dendrite_kind": kind,
        "__module__": __name__,
        "__doc__": plain.__doc__,
    }
    made = cast(type[Dendritic], type(f"Dendritic{plain.__name__}", (Dendritic, plain), names))
    register_layer(made, _DendriticKind(kind))
    return made


class _DendriticKind(LayerKind):
    """How other methods read a layer with dendrites: its own product is theirs, its dendrites run in plain autograd."""

    def __init__(self, plain: LayerKind) -> None:
        self._plain = plain

    def map(self, layer: nn.Module) -> Map:
        """The plain layer's."""
        return self._plain.map(layer)

    def names(self, layer: nn.Module) -> tuple[str, str]:
        """The plain layer's."""
        return self._plain.names(layer)

    def describe(self, layer: nn.Module) -> str:
        """The plain layer's."""
        return self._plain.describe(layer)

    def forward(self, layer: Any, product: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """The plain layer's, with the dendrites' sum added to each product."""

        def extended(x: Tensor, weight: Tensor, bias: Tensor | None, map: Map) -> Tensor:
            state: State = layer._dendrite_state
            found = activations(layer, x, state.capacity, state.activation, map, detached=state.detached)
            return add(layer, product(x, weight, bias, map), found, map)

        return self._plain.forward(layer, extended, *args, **kwargs)


def in_use(layer: nn.Module, capacity: int) -> int:
    """Sets up to the last one that is not all zero."""
    used = [d for d in range(capacity) if any(bool(value.any()) for value in parameters(layer, d).values())]
    return used[-1] + 1 if used else 0


def adopt(layer: nn.Module, kind: LayerKind, state: State) -> Dendritic:
    """Make a layer with allocated sets one that computes with them."""
    layer.__class__ = dendritic(type(layer), kind)
    made = cast(Dendritic, layer)
    made._dendrite_state = state  # pyright: ignore[reportPrivateUsage]
    return made


def fold(layer: Dendritic) -> nn.Module:
    """Make a copy with all its capacity into a plain layer, or into one with the sets that are in use."""
    state = layer._dendrite_state  # pyright: ignore[reportPrivateUsage]
    strip(layer, state.count)
    state.capacity = state.count
    if not state.count:
        restore(layer)
    return layer


def strip(layer: Dendritic, first: int) -> None:
    """Take away the sets from `first` on."""
    for d in range(first, layer._dendrite_state.capacity):  # pyright: ignore[reportPrivateUsage]
        for part in NAMES:
            delattr(layer, name_of(part, d))


def restore(layer: Dendritic) -> None:
    """Give the layer its plain class back."""
    layer.__class__ = layer._dendrite_base  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]
    del layer.__dict__["_dendrite_state"]

"""Dendrites on a layer: its class that computes with them, its state, and the plain layers that keep them.

The sets of a growth are a submodule, ``dendrites.g`` for the g-th, see `retrograde.methods.perforate.sets`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from retrograde.engine import ranks
from retrograde.engine.maps.base import LayerKind, Map, kind_of, register_layer
from retrograde.errors import StateError, TransformError
from retrograde.maths.perforate import Activation
from retrograde.methods.perforate.sets import Dendrites, DendriteSets, Norm

UNPACKED = "_retrograde_unpacked"
"""Marks an `nn.TransformerEncoder` that would pack padded batches, which its layers' fused kernels alone can take."""
_EARLIER = "dendrite_"
"""What the keys of an earlier version's dendrites began with."""


@dataclass
class State:
    """What a layer with dendrites keeps beside its parameters.

    Attributes:
        growths: whose sets are in use; those of the others are all zero, and add nothing.
        activation: f.
        detached: in training, let no gradient through the dendrites.
    """

    growths: int
    activation: Activation
    detached: bool

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "growths" not in state:
            raise StateError(
                "a layer with dendrites was pickled by an earlier version of retrograde, which kept each set in "
                "parameters of its own. This version cannot read it: load the model with that version, or train anew."
            )
        self.__dict__.update(state)


def growth(layer: nn.Module, index: int) -> DendriteSets:
    """The sets of one growth."""
    return cast(DendriteSets, cast(Any, layer).dendrites[index])


def capacity(layer: nn.Module) -> int:
    """Growths that there are parameters for."""
    return len(cast(Any, layer).dendrites)


def activations(layer: nn.Module, x: Tensor, count: int, activation: Activation, map: Map) -> list[Tensor]:
    """a_e of every set of the first `count` growths, without a gradient."""
    values: list[Tensor] = []
    for index in range(count):
        sets = growth(layer, index)
        a = sets.activations(x, map, activation, values, detached=True, aside=True)
        values += sets.split(a, map)
    return values


def add(
    layer: nn.Module,
    x: Tensor,
    z: Tensor,
    count: int,
    activation: Activation,
    map: Map,
    *,
    detached: bool,
    aside: bool = False,
) -> Tensor:
    """Equations (1) to (3): z and what the first `count` growths add.

    Args:
        layer: carries the dendrites.
        x: what the layer multiplies.
        z: the layer's own product.
        count: growths in use.
        activation: f.
        map: how the layer multiplies.
        detached: let no gradient through to x or to the dendrites' parameters but w.
        aside: see `Norm.normalised`.
    """
    values: list[Tensor] = []
    cascades = any(growth(layer, index).cascade is not None for index in range(count))
    for index in range(count):
        sets = growth(layer, index)
        a = sets.activations(x, map, activation, values, detached=detached, aside=aside)
        z = sets.add(z, a, map)
        if cascades:
            values += sets.split(a, map)
    return z


class Dendritic(nn.Module):
    """Mixin: a layer with dendrites, which computes with them whether or not it is attached.

    Its ``state_dict`` has the dendrites' keys beside the layer's; a state without any of them is one without dendrites.
    """

    _dendrite_base: ClassVar[type[nn.Module]]
    _dendrite_kind: ClassVar[LayerKind]
    _dendrite_state: State
    dendrites: Dendrites

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the plain layer, with the dendrites' sum added."""
        return self._dendrite_kind.forward(self, self._product, *args, **kwargs)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, map: Map) -> Tensor:
        state = self._dendrite_state
        # A copy may be an average, whose parameters grow without a word.
        count = state.growths if "_retrograde" in self.__dict__ else capacity(self)
        z = map.forward(x, weight, bias)
        return add(self, x, z, count, state.activation, map, detached=state.detached and self.training)

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
        _refuse_earlier(state_dict, prefix)
        mine, count = f"{prefix}dendrites.", 0
        weights = [state_dict.get(f"{mine}{index}.weight") for index in range(capacity(self))]
        if not any(key.startswith(mine) for key in state_dict):
            if f"{prefix}{self._dendrite_kind.names(self)[0]}" in state_dict:
                # The dendrites' own modules are loaded after this one, from the same dictionary.
                for index in range(capacity(self)):
                    state_dict.update(growth(self, index).blank(f"{mine}{index}."))
        elif used := [i for i, weight in enumerate(weights) if weight is not None and _any(weight)]:
            count = used[-1] + 1
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._dendrite_state.growths = count

    def extra_repr(self) -> str:
        """The plain layer's, and the dendrites."""
        state = self._dendrite_state
        sets = sum(growth(self, index).sets for index in range(state.growths))
        return f"{super().extra_repr()}, dendrites={sets}, activation={state.activation!r}"

    def __prepare_scriptable__(self) -> nn.Module:
        raise TransformError(
            f"torch.jit.script cannot compile a {self._dendrite_base.__name__} with dendrites: they are computed "
            "growth by growth in ordinary Python. Use torch.export or torch.jit.trace, which take this model as it is."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A registered kind is looked up again: it may hold a function that cannot be pickled, and a copy of it would
        # make another class.
        kind = self._dendrite_kind.origin
        kind = None if _registered(self._dendrite_base) is kind else kind
        return _empty, (self._dendrite_base, kind), self.__dict__


def _any(weight: Tensor) -> bool:
    return bool(ranks.whole(weight).any())


def _refuse_earlier(state_dict: dict[str, Any], prefix: str) -> None:
    """Never load a state whose dendrites would be left out, or be taken for others."""
    found = sorted(key for key in state_dict if key.startswith(f"{prefix}{_EARLIER}"))
    if found:
        raise StateError(
            f"the state holds dendrites of an earlier version of retrograde ({found[0]!r} and {len(found) - 1} more): "
            "each set had parameters of its own, without a norm and without a scale. This version keeps the sets of a "
            f"growth together ({prefix}dendrites.0.weight) and cannot read them. Load the state with the version that "
            "wrote it, or take the keys of its dendrites out, which leaves the plain layers."
        )


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
torch.serialization.add_safe_globals([State, Dendrites, DendriteSets, Norm, _empty])


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
            z, count = product(x, weight, bias, map), capacity(layer)
            return add(layer, x, z, count, state.activation, map, detached=state.detached)

        return self._plain.forward(layer, extended, *args, **kwargs)


def adopt(layer: nn.Module, kind: LayerKind, dendrites: Dendrites, state: State) -> Dendritic:
    """Make a layer one that computes with dendrites."""
    layer.__class__ = dendritic(type(layer), kind)
    made = cast(Dendritic, layer)
    made.dendrites = dendrites.train(layer.training)
    made._dendrite_state = state  # pyright: ignore[reportPrivateUsage]
    return made


def fold(layer: Dendritic) -> nn.Module:
    """Make a copy with all its capacity into a plain layer, or into one with the sets that are in use."""
    count = layer._dendrite_state.growths  # pyright: ignore[reportPrivateUsage]
    if not count:
        restore(layer)
        return layer
    del layer.dendrites[count:]
    for index in range(count):
        growth(layer, index).fold()
    return layer


def regrow(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put as many growths of each layer into use as the model's folded state has, which can then be loaded."""
    for name, layer in model.named_modules():
        if isinstance(layer, Dendritic):
            mine = f"{name}.dendrites." if name else "dendrites."
            found = {key[len(mine) :].partition(".")[0] for key in state if key.startswith(mine)}
            layer._dendrite_state.growths = len(found)  # pyright: ignore[reportPrivateUsage]


def restore(layer: Dendritic) -> None:
    """Give the layer its plain class back, without dendrites."""
    del layer.dendrites
    layer.__class__ = layer._dendrite_base  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]
    del layer.__dict__["_dendrite_state"]

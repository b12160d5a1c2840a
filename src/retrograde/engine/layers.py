"""The class swap that attaches a layer, and which layers can be attached."""

import copy
import copyreg
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from retrograde.engine.maps import attention, convolution, linear
from retrograde.engine.maps.base import LayerKind, kind_of
from retrograde.engine.program import LayerProgram
from retrograde.engine.slots import Rule
from retrograde.errors import DetachError, TransformError

__all__ = ["AttachedLayer", "attention", "convolution", "find_kind", "linear", "swap_in", "swap_out"]


def find_kind(layer: nn.Module) -> LayerKind | str | None:
    """How `layer` can be attached; a reason when its type is known but its forward is not; None when it is no layer.

    A subclass counts as its base only as long as it inherits ``forward``: what an override does is not ours to guess.
    """
    own = type(layer)._retrograde_base if isinstance(layer, AttachedLayer) else type(layer)  # pyright: ignore[reportAttributeAccessIssue]
    for cls in own.__mro__:
        kind = kind_of(cls)
        if kind is None:
            continue
        if "forward" in layer.__dict__:
            return "its forward was replaced on the object, which hides the class's: undo that, then attach"
        for method in ("forward", "_conv_forward"):
            if getattr(own, method, None) is not getattr(cls, method, None):
                return f"subclass of {cls.__name__} with a {method}() of its own: register it with register_layer"
        reason = kind.refuse(layer)
        return kind.bound(layer) if reason is None else reason
    return None


class AttachedLayer(nn.Module):
    """Mixin of every attached layer: runs the layer's program in place of its own forward.

    Outside training, and while paused, the layer's own forward runs, so evaluation, export and tracing see the plain
    layer. Copies and pickles are plain layers with the same keys, which compute the same.
    """

    _retrograde: LayerProgram
    _retrograde_kind: LayerKind

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's forward pass; shapes as of the plain layer."""
        program = self.__dict__.get("_retrograde")
        if program is None:
            # A forward that was bound while the layer was attached, and kept by whoever wrapped another around it.
            return type(self).forward(self, *args, **kwargs)
        if self.training and program.active and torch.is_grad_enabled():
            return self._retrograde_kind.forward(self, program.product, *args, **kwargs)
        return super().forward(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._retrograde.loaded = True

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return copied(self, _swapped_from(self, self._retrograde.name), _plain_state(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, _swapped_from(self, self._retrograde.name), _plain_state(self), protocol)

    def __prepare_scriptable__(self) -> nn.Module:
        # torch would put what is returned into the model that trains.
        raise TransformError(
            f"layer {self._retrograde.name!r} is attached, and torch.jit.script compiles a layer's source, not what it "
            "runs. Script the folded model (session.fold()), or use torch.export or torch.jit.trace in evaluation."
        )


def copied(
    module: nn.Module, plain: type[nn.Module], state: dict[str, Any], memo: dict[int, Any]
) -> nn.Module:
    """A deep copy of a swapped module, of its plain class."""
    made = plain.__new__(plain)
    memo[id(module)] = made
    made.__dict__.update(copy.deepcopy(state, memo))
    return made


def reduced(module: nn.Module, plain: type[nn.Module], state: dict[str, Any], protocol: Any) -> Any:
    """How a swapped module is pickled: as its plain class does it, so that whoever loads it needs no retrograde."""
    made = plain.__new__(plain)
    made.__dict__.update(state)
    found = made.__reduce_ex__(protocol)
    if found[0] is not copyreg.__newobj__ or found[3] is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return found
    return (*found[:3], _AsPlain(module, plain), *found[4:])


class _AsPlain:
    """No list items; until a pickler has asked for them the module is of its plain class.

    Unpicklers that are restricted to known classes take a new object by an opcode that picklers write for an object of
    that very class alone.
    """

    def __init__(self, module: nn.Module, plain: type[nn.Module]) -> None:
        self._waiting = [(module, type(module))]
        module.__class__ = plain

    def __iter__(self) -> "_AsPlain":
        return self

    def __next__(self) -> Any:
        self.__del__()
        raise StopIteration

    def __del__(self) -> None:
        # Also of a pickler that failed before it asked.
        while self._waiting:
            module, module.__class__ = self._waiting.pop()


def swap_in(layer: nn.Module, kind: LayerKind, program: LayerProgram) -> None:
    """Attach `program` to `layer` in place."""
    prepared: list[Rule] = []
    try:
        for rule in program.rules:
            rule.prepare(layer)
            prepared.append(rule)
    except BaseException:
        for rule in reversed(prepared):
            rule.release(layer)
        raise
    layer.__class__ = _attached_class(type(layer))
    object.__setattr__(layer, "_retrograde", program)
    object.__setattr__(layer, "_retrograde_kind", kind)


def swap_out(layers: Mapping[str, nn.Module], *, to_fold: bool = False) -> None:
    """Give the layers, by name, their own classes back: all of them, or none when one cannot.

    Args:
        layers: attached ones.
        to_fold: leave what a rule's `fold` will make plain as it is.
    """
    bases = {name: _swapped_from(layer, name) for name, layer in layers.items()}
    for name, layer in layers.items():
        program: LayerProgram = layer.__dict__["_retrograde"]
        layer.__class__ = bases[name]
        del layer.__dict__["_retrograde"], layer.__dict__["_retrograde_kind"]
        for rule in reversed(program.rules):
            if not (to_fold and program.folds(rule)):
                rule.release(layer)


def _swapped_from(layer: nn.Module, name: str) -> type[nn.Module]:
    """The class that an attached layer had before."""
    base = cast(type[nn.Module], type(layer)._retrograde_base)  # pyright: ignore[reportAttributeAccessIssue]
    if type(layer) is not _attached_class(base):
        raise DetachError(
            f"layer {name!r} has become a {type(layer).__name__} since it was attached, so its plain class is not "
            "known. Undo that first (for a parametrization: torch.nn.utils.parametrize.remove_parametrizations)."
        )
    return base


def _attached_class(base: type[nn.Module]) -> type[nn.Module]:
    return subclass(base, AttachedLayer)


def subclass(base: type[nn.Module], mixin: type[nn.Module]) -> type[nn.Module]:
    """The class of what is attached of class `base`: one for each, since compiled code is guarded by class."""
    # Looked for among the base's own: a class that torch made for a single layer must go with that layer.
    for known in base.__subclasses__():
        if known.__dict__.get("_retrograde_base") is base and issubclass(known, mixin):
            return known
    # The base's module: tools such as torch.fx know torch's own layers by it.
    namespace = {"_retrograde_base": base, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(f"Retrograde{base.__name__}", (mixin, base), namespace)


def _plain_state(layer: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in layer.__dict__.items() if k not in ("_retrograde", "_retrograde_kind")}

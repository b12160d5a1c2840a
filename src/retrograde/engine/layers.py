"""Which layers can be attached, and the class swap that attaches them."""

import copy
import copyreg
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograde.engine import boundary
from retrograde.engine.blocks import cross
from retrograde.engine.program import LayerProgram
from retrograde.engine.slots import Operands
from retrograde.errors import DetachError, OptionError
from retrograde.kernels.geometry import Geometry

Kind = Literal["linear", "convolution"]


@dataclass(frozen=True)
class LayerKind:
    """How to read a layer type as a linear-like map.

    Attributes:
        layer_type: the class whose own ``forward`` is understood.
        kind: the boundary that runs it.
        operands: ``(layer, *forward arguments) → Operands``.
    """

    layer_type: type[nn.Module]
    kind: Kind
    operands: Callable[..., Operands]


_KINDS: dict[type[nn.Module], LayerKind] = {}


def register_layer(
    layer_type: type[nn.Module], operands: Callable[..., Operands], *, kind: Kind = "linear"
) -> None:
    """Teach retrograde a layer type of another library.

    Args:
        layer_type: a module class whose forward pass is ``z = W x + b`` or a convolution.
        operands: called with the layer and the arguments of its ``forward``; returns the `Operands` of the product.
            It runs under autograd, so the weight may be computed (transposed, say) from the layer's parameters.
        kind: ``"linear"`` or ``"convolution"`` (whose operands carry a `Geometry`).

    Example:
        The transposed linear layer of GPT-2::

            rg.register_layer(Conv1D, lambda layer, x: rg.Operands(x, layer.weight.T, layer.bias))
    """
    if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise OptionError(f"register_layer needs a class of torch.nn.Module, not {layer_type!r}.")
    if kind not in ("linear", "convolution"):
        raise OptionError(f"register_layer knows the kinds 'linear' and 'convolution', not {kind!r}.")
    _KINDS[layer_type] = LayerKind(layer_type, kind, operands)


def find_kind(layer: nn.Module) -> LayerKind | str | None:
    """How `layer` can be attached; a reason when its type is known but its forward is not; None when it is no layer.

    A subclass counts as its base only as long as it inherits ``forward``: what an override does is not ours to guess.
    """
    own = type(layer)._retrograde_base if isinstance(layer, AttachedLayer) else type(layer)  # pyright: ignore[reportAttributeAccessIssue]
    for cls in own.__mro__:
        known = _KINDS.get(cls)
        if known is None:
            continue
        if "forward" in layer.__dict__:
            return "its forward was replaced on the object, which hides the class's: undo that, then attach"
        for method in ("forward", "_conv_forward"):
            if getattr(own, method, None) is not getattr(cls, method, None):
                return (
                    f"subclass of {cls.__name__} with a {method}() of its own: teach it with register_layer"
                )
        return known
    return None


class AttachedLayer(nn.Module):
    """Mixin of every attached layer: runs the layer's program in place of its own forward.

    Outside training, and while paused, the layer's own forward runs, so evaluation, export and tracing see the plain
    layer. Copies and pickles are plain layers.
    """

    _retrograde: LayerProgram
    _retrograde_kind: LayerKind

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's forward pass; shapes as of the plain layer."""
        program = self._retrograde
        training = self.training and program.active and torch.is_grad_enabled()
        if not (training or program.changes_forward):
            return cast(Tensor, super().forward(*args, **kwargs))
        operands = self._retrograde_kind.operands(self, *args, **kwargs)
        unbatched = operands.geometry is not None and operands.x.dim() == len(operands.geometry.stride) + 1
        if unbatched:
            operands = replace(operands, x=operands.x.unsqueeze(0))
        transformed = program.transform(operands)
        if training:
            z = boundary.apply(transformed, program, program.sample(operands))
        else:
            z = boundary.multiply(transformed)
        z = program.extend(operands.x, z)
        if training and program.exit is not None:
            z = cross(z, program.exit)
        return z.squeeze(0) if unbatched else z

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        base = _swapped_from(self, self._retrograde.name)
        plain = base.__new__(base)
        memo[id(self)] = plain
        plain.__dict__.update(copy.deepcopy(_plain_state(self), memo))
        folded = self._retrograde.fold(plain)
        memo[id(self)] = folded
        return folded

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain, state = _swapped_from(self, self._retrograde.name), _plain_state(self)
        if self._retrograde.changes_forward:
            folded = copy.deepcopy(self)
            plain, state = type(folded), folded.__dict__
        # The standard library's reconstructor: whoever loads the file needs no retrograde.
        reconstruct = copyreg._reconstructor  # pyright: ignore[reportAttributeAccessIssue]
        return reconstruct, (plain, object, None), state


def swap_in(layer: nn.Module, kind: LayerKind, program: LayerProgram) -> None:
    """Attach `program` to `layer` in place."""
    for rule in program.rules:
        rule.prepare(layer)
    layer.__class__ = _attached_class(type(layer))
    object.__setattr__(layer, "_retrograde", program)
    object.__setattr__(layer, "_retrograde_kind", kind)


def swap_out(layers: Mapping[str, nn.Module]) -> None:
    """Give the layers, by name, their own classes back: all of them, or none when one cannot."""
    bases = {name: _swapped_from(layer, name) for name, layer in layers.items()}
    for name, layer in layers.items():
        _restore(layer, bases[name])


def _restore(layer: nn.Module, base: type[nn.Module]) -> None:
    for rule in layer.__dict__["_retrograde"].rules:
        rule.release(layer)
    layer.__class__ = base
    del layer.__dict__["_retrograde"], layer.__dict__["_retrograde_kind"]


def _swapped_from(layer: nn.Module, name: str) -> type[nn.Module]:
    """The class that an attached layer had before."""
    base = cast(type[nn.Module], type(layer)._retrograde_base)  # pyright: ignore[reportAttributeAccessIssue]
    if type(layer) is not _attached_class(base):
        raise DetachError(
            f"layer {name!r} has become a {type(layer).__name__} since it was attached, so its plain class cannot be "
            "told. Undo that first (for a parametrization: torch.nn.utils.parametrize.remove_parametrizations)."
        )
    return base


@cache
def _attached_class(base: type[nn.Module]) -> type[nn.Module]:
    # One class for each base, cached: compiled code is guarded by class, and would be made again for each instance.
    # The base's module: tools such as torch.fx know torch's own layers by it.
    namespace = {"_retrograde_base": base, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(f"Retrograde{base.__name__}", (AttachedLayer, base), namespace)


def _plain_state(layer: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in layer.__dict__.items() if k not in ("_retrograde", "_retrograde_kind")}


def _linear(layer: nn.Linear, input: Tensor) -> Operands:
    return Operands(input, layer.weight, layer.bias)


def _convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, input: Tensor) -> Operands:
    # Read anew in every forward pass, as torch does: segmentation models change dilation and padding after building.
    kernel = layer.weight.shape[2:]
    none = (0,) * len(kernel)
    stride, dilation = _each(layer.stride, kernel), _each(layer.dilation, kernel)
    if layer.padding_mode != "zeros":
        # (left, right) for each dimension, last dimension first: torch computes them when the layer is built.
        sides = list(layer._reversed_padding_repeated_twice)  # pyright: ignore[reportPrivateUsage]
        input, padding = F.pad(input, sides, mode=layer.padding_mode), none
    elif layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = tuple(total // 2 for total in totals)
        odd = [total % 2 for total in totals]
        if any(odd):
            input = F.pad(input, [side for extra in reversed(odd) for side in (0, extra)])
    elif layer.padding == "valid":
        padding = none
    else:
        padding = _each(layer.padding, kernel)
    geometry = Geometry(stride, padding, dilation, False, none, layer.groups)
    return Operands(input, layer.weight, layer.bias, geometry)


def _each(value: Any, kernel: Sequence[int]) -> tuple[int, ...]:
    """A setting of a convolution for each spatial dimension; users may have set one number for all."""
    return (value,) * len(kernel) if isinstance(value, int) else tuple(value)


def _transposed(
    layer: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d,
    input: Tensor,
    output_size: list[int] | None = None,
) -> Operands:
    kernel = layer.weight.shape[2:]
    stride, dilation, padding = (_each(v, kernel) for v in (layer.stride, layer.dilation, layer.padding))
    extra = layer._output_padding(  # pyright: ignore[reportPrivateUsage]
        input,
        output_size,
        list(stride),
        list(padding),
        list(kernel),
        len(kernel),
        list(dilation),
    )
    geometry = Geometry(stride, padding, dilation, True, tuple(extra), layer.groups)
    return Operands(input, layer.weight, layer.bias, geometry)


register_layer(nn.Linear, _linear)
for _convolution_type in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_layer(_convolution_type, _convolution, kind="convolution")
for _transposed_type in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register_layer(_transposed_type, _transposed, kind="convolution")

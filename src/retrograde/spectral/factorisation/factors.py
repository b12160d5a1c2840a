"""Two plain layers in place of one: which layers can be replaced, how they are split, and how they are put in place.

`features.3` becomes an ``nn.Sequential`` whose parameters are ``features.3.0.weight`` (r outputs, no bias),
``features.3.1.weight`` and ``features.3.1.bias`` (1×1 for a convolution).
"""

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from retrograde.engine.layers import AttachedLayer
from retrograde.errors import AttachError, NoEffectError, StateError
from retrograde.patterns import ROOT, Choice, select
from retrograde.spectral.factorisation.moments import Plain, Spectrum

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that read the weights of layers inside, past their forward."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def candidates(
    model: nn.Module, only: Choice | None, skip: Choice | None, strict: bool = True
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """All linear and convolutional layers by full name, and of those that must be left, why.

    Raises:
        AttachError: a layer is attached, or the model is compiled or wrapped.
        PatternError: a pattern matches no layer.
        NoEffectError: every layer must be left.
    """
    _refuse_wrapped(model)
    called: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        called.setdefault(id(module), []).append(name)
    layers: dict[str, nn.Module] = {
        called[id(module)][0]: module
        for module in model.modules()
        if isinstance(module, (*_PLAIN, *_TRANSPOSED))
    }
    if not layers:
        raise NoEffectError(
            f"{type(model).__name__} has no linear or convolutional layer, so there is nothing to factorise. Give the "
            "module that holds them."
        )
    names = {name: called[id(layer)] for name, layer in layers.items()}
    chosen = set(layers) if only is None else select(names, only, "only", strict, layers)[0]
    skipped = set[str]() if skip is None else select(names, skip, "skip", strict, layers)[0]
    owners: dict[int, list[str]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():  # pyright: ignore[reportPrivateUsage]
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(called[id(module)][0])
    read = {
        id(child) for reader in model.modules() if isinstance(reader, _READERS) for child in reader.children()
    }
    left: dict[str, str] = {}
    for name, layer in layers.items():
        why = (
            "not chosen by `only`"
            if name not in chosen
            else "chosen by `skip`"
            if name in skipped
            else _reason(name, layer, owners, id(layer) in read)
        )
        if why:
            left[name] = why
    if len(left) == len(layers):
        first = next(iter(left))
        raise NoEffectError(
            f"none of the {len(layers)} linear and convolutional layers can be factorised. The first, "
            f"{first or ROOT!r}: {left[first]}. Choose others, or undo what stands in the way."
        )
    return layers, left


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = repr(name) if name else f"the model ({type(module).__name__})"
        if isinstance(module, AttachedLayer):
            raise AttachError(
                f"layer {name or ROOT!r} is attached to a session, which would be lost with the layer. Factorise "
                "session.fold(), or detach first."
            )
        compiled = type(module).__name__ == "OptimizedModule" or module.__dict__.get("_compiled_call_impl")
        sharded = any(
            cls.__name__ in ("FSDPModule", "FullyShardedDataParallel") for cls in type(module).__mro__
        )
        wrapped = isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
        if compiled or sharded or wrapped:
            raise AttachError(
                f"{where} is {'compiled' if compiled else 'wrapped for data parallelism'} already, and factorising "
                "changes the layers inside. Factorise the plain model, then compile or wrap it."
            )


def _reason(name: str, layer: nn.Module, owners: Mapping[int, list[str]], read: bool) -> str:
    """Why a layer must be left; empty: it need not be."""
    if isinstance(layer, _TRANSPOSED):
        return "transposed convolutions are not factorised"
    if type(layer) not in _PLAIN:
        return f"of class {type(layer).__name__}, whose forward or weight may be its own"
    plain = cast(Plain, layer)
    if "forward" in layer.__dict__:
        return "its forward was replaced on the object"
    if any(layer.__dict__[hooks] for hooks in _HOOKS):
        return "it has hooks, which would be lost with it"
    if read:
        return "the module around it reads its weight itself"
    if not isinstance(plain, nn.Linear) and plain.groups > 1:
        return f"grouped convolution ({plain.groups} groups)"
    if type(plain.weight.data) is not Tensor:
        return f"its weight is a {type(plain.weight.data).__name__}"
    if not plain.weight.is_floating_point():
        return f"its weight is {str(plain.weight.dtype).removeprefix('torch.')}"
    for parameter in (plain.weight, plain.bias):
        others = [] if parameter is None else [o for o in owners[id(parameter)] if o != name]
        if others:
            return f"it shares a parameter with {others[0]!r}"
    return ""


def split(layer: Plain, spectrum: Spectrum, rank: int) -> nn.Sequential:
    """The two layers of equation (1) of `retrograde.spectral.factorisation`.

    Args:
        layer: the one that they replace; dtype, device, memory format, training mode and ``requires_grad`` are kept.
        spectrum: of its outputs, or of its weight.
        rank: r.
    """
    q = spectrum.basis[:, :rank]
    weight = layer.weight.detach().flatten(1).double()
    bias = None if layer.bias is None else layer.bias.detach().double()
    if spectrum.offset.any():
        rest = spectrum.offset - q @ (q.mT @ spectrum.offset)
        bias = rest if bias is None else bias + rest
    first, second = _pair(layer, rank, bias is not None)
    first.weight = _parameter(layer, (q.mT @ weight).view_as(first.weight))
    second.weight = _parameter(layer, q.reshape(second.weight.shape))
    if bias is not None:
        second.bias = _parameter(layer, bias, layer.bias)
    return nn.Sequential(first, second).train(layer.training)


def _pair(layer: Plain, rank: int, bias: bool) -> tuple[Plain, Plain]:
    """Two layers without memory of their own yet."""
    meta: Any = {"device": "meta", "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return (
            nn.Linear(layer.in_features, rank, bias=False, **meta),
            nn.Linear(rank, layer.out_features, bias=bias, **meta),
        )
    of: Any = type(layer)
    first = of(
        layer.in_channels,
        rank,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        bias=False,
        padding_mode=layer.padding_mode,
        **meta,
    )
    return first, of(rank, layer.out_channels, 1, bias=bias, **meta)


def _parameter(layer: Plain, value: Tensor, like: Tensor | None = None) -> nn.Parameter:
    weight = layer.weight
    value = value.to(weight.dtype).contiguous()
    if weight.dim() == 4 and not weight.is_contiguous() and value.dim() == 4:
        value = value.contiguous(memory_format=torch.channels_last)
    trains = weight.requires_grad if like is None else like.requires_grad
    return nn.Parameter(value, requires_grad=trains)


def parameters_of(module: nn.Module) -> int:
    """How many numbers are its parameters."""
    return sum(p.numel() for p in module.parameters())


def shape_of(layer: nn.Module) -> str:
    """The weight's shape: ``128×64×3×3``."""
    weight: Any = layer.weight
    return _sizes(weight)


def _sizes(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape))


def place(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put new layers where old ones are, wherever the model holds them; the model, or what replaces it."""
    if model in new:
        return new[model]
    for module in list(model.modules()):
        for name, child in module._modules.items():  # pyright: ignore[reportPrivateUsage]
            if child is not None and child in new:
                module._modules[name] = new[child]  # pyright: ignore[reportPrivateUsage]
    return model


def load_factors(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of an unfactorised model with the layers, and the values, of a factorised one's ``state_dict``.

    Args:
        model: of the original architecture; it is left as it is.
        state: what ``state_dict`` of the factorised model gave.

    Raises:
        StateError: the state is not of this architecture: a layer of another width, or a key that is missing.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import retrograde as rg
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        >>> small, report = rg.spectral.factorise(model, torch.randn(256, 64), budget=0.5)
        >>> again = rg.spectral.load_factors(model, small.state_dict())
        >>> torch.equal(again[0][1].weight, small[0][1].weight)
        True
    """
    model = copy.deepcopy(model)
    new: dict[nn.Module, nn.Module] = {}
    for name, layer in model.named_modules():
        prefix = f"{name}." if name else ""
        second = state.get(f"{prefix}1.weight")
        if type(layer) in _PLAIN and f"{prefix}0.weight" in state and second is not None:
            plain, first = cast(Plain, layer), state[f"{prefix}0.weight"]
            expected = (second.shape[1], *plain.weight.shape[1:]), (len(plain.weight), second.shape[1])
            if (first.shape, tuple(second.shape[:2])) != expected:
                raise StateError(
                    f"load_factors: layer {name or ROOT!r} is {shape_of(plain)}, and its factors in the state, "
                    f"{_sizes(first)} and {_sizes(second)}, are of another width. Build the architecture that was "
                    "factorised."
                )
            basis = plain.weight.new_zeros(len(second), second.shape[1], dtype=torch.float64)
            offset = basis[:, 0] + float(f"{prefix}1.bias" in state)
            new[layer] = split(plain, Spectrum(basis, basis[0], offset), second.shape[1])
    model = place(model, new)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise StateError(
            f"load_factors: the state does not fit {type(model).__name__}: {' '.join(str(error).split())} Build the "
            "architecture that was factorised, and give the whole state_dict of the factorised model."
        ) from error
    return model

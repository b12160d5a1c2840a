"""Models for experiments, by name, fitted to a data set.

>>> model = build("vgg-small", data, seed=0)

Any other model can stand in their place as ``package.module:callable``.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from retrograde.errors import OptionError
from retrograde.lab.data import Data
from retrograde.lab.models.convolutional import VGG, LeNet, ResNet
from retrograde.lab.models.mlp import MLP, ResMLP
from retrograde.lab.models.text import TextBag, TextCNN, TextResidual, TextTransformer
from retrograde.lab.models.transformer import GPT, ViT
from retrograde.lab.options import require_known
from retrograde.methods.registry import suggest


@dataclass(frozen=True)
class _Entry:
    description: str
    kinds: tuple[str, ...]
    cls: Callable[..., nn.Module]
    """Its arguments without a default are called as what they are of the data."""
    options: dict[str, Any] = field(default_factory=dict)
    smallest: int = 1
    """Fewest pixels a side that the layers can take."""

    def build(self, data: Data, options: dict[str, Any]) -> nn.Module:
        shape = data.input_shape
        of_data = {
            "input_shape": shape,
            "classes": data.classes,
            "vocabulary": data.vocabulary,
            "length": shape[0],
        }
        known = inspect.signature(self.cls).parameters
        arguments = {name: value for name, value in of_data.items() if name in known}
        return self.cls(**{**arguments, **self.options, **options})


_DENSE, _IMAGE, _TEXT = ("image", "table"), ("image",), ("text",)
_MODELS = {
    "mlp": _Entry("3 hidden layers of 512, ReLU", _DENSE, MLP),
    "mlp-small": _Entry("2 hidden layers of 128, ReLU", _DENSE, MLP, {"widths": (128, 128)}),
    "resmlp": _Entry("4 residual branches Linear-ReLU-Linear, width 256", _DENSE, ResMLP),
    "lenet": _Entry("LeNet-5, ReLU", _IMAGE, LeNet, smallest=8),
    "vgg-small": _Entry(
        "first three stages of VGG-11: 4 convolutions of 64 to 256 channels, no BatchNorm",
        _IMAGE,
        VGG,
        smallest=8,
    ),
    "vgg-small-bn": _Entry("vgg-small with BatchNorm", _IMAGE, VGG, {"batch_norm": True}, 8),
    "resnet-small": _Entry("ResNet-20 (16, 32, 64 channels), BatchNorm", _IMAGE, ResNet, smallest=8),
    "resnet-small-plain": _Entry(
        "ResNet-20 without BatchNorm, branches that start at zero",
        _IMAGE,
        ResNet,
        {"batch_norm": False},
        8,
    ),
    "vit-small": _Entry("vision transformer, 6 layers of width 192, 3 heads", _IMAGE, ViT),
    "text-bag": _Entry("mean of word vectors, 2 hidden layers", _TEXT, TextBag),
    "text-cnn": _Entry("convolutions over 3, 4 and 5 words", _TEXT, TextCNN),
    "text-residual": _Entry("mean of word vectors, 6 residual branches of width 256", _TEXT, TextResidual),
    "text-transformer": _Entry("transformer encoder, 2 layers of width 128, 4 heads", _TEXT, TextTransformer),
    "gpt-small": _Entry("transformer decoder, 4 layers of width 256, 4 heads", ("language",), GPT),
}


def names() -> dict[str, str]:
    """Return name → one line on each model that :func:`build` knows."""
    return {name: entry.description for name, entry in _MODELS.items()}


def build(
    name: str, data: Data, *, seed: int | None = None, options: dict[str, Any] | None = None
) -> nn.Module:
    """Return the model ``name``, shaped for ``data``: one of :func:`names`, or ``package.module:callable``.

    The callable is imported, from the working directory too, and called with ``data`` where its first
    positional parameter is called that or has no default, else with nothing. ``options`` are keyword arguments of the
    model's class, or of the callable. With ``seed`` the initial weights depend on it alone, and torch's generator is
    left as it was.

    Raises :class:`~retrograde.errors.OptionError` for a name that is unknown, a model that does not fit the
    kind or size of the data, an option that the model does not have, and a callable that cannot be imported or
    returns no module.
    """
    chosen = options or {}
    if ":" in name:
        target = _imported(name)
        _check_options(name, target, chosen)
        builder = partial(_called, name, target, chosen)
    else:
        entry = _fitting(name, data)
        _check_options(name, entry.cls, chosen)
        builder = partial(entry.build, options=chosen)
    if seed is None:
        return builder(data)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return builder(data)


def _check_options(name: str, target: Callable[..., Any], options: dict[str, Any]) -> None:
    parameters = inspect.signature(target).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters if parameter.default is not inspect.Parameter.empty]
    require_known(f"model {name} has no option", options, known)


def _fitting(name: str, data: Data) -> _Entry:
    entry = _MODELS.get(name)
    if entry is None:
        raise OptionError(
            f"No model {name}.{suggest(name, _MODELS)} Known are {', '.join(_MODELS)}; give one of them or "
            "package.module:callable."
        )
    # Other data have no sides, and every model of theirs takes one.
    side = min(data.input_shape[1:]) if data.kind == "image" else 1
    fitting = {n: one for n, one in _MODELS.items() if data.kind in one.kinds and side >= one.smallest}
    if name in fitting:
        return entry
    why = (
        f"it takes {' and '.join(entry.kinds)}, and this is {data.kind}"
        if data.kind not in entry.kinds
        else f"it takes images of {entry.smallest} pixels a side and more, and these have {side}"
    )
    raise OptionError(f"Model {name} does not fit data set {data.name}: {why}. Use {', '.join(fitting)}.")


def _imported(name: str) -> Callable[..., Any]:
    path, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in path.split(".")):
        raise OptionError(
            f"Model {name} cannot be imported: {path or 'nothing'} is no module name. Write "
            "package.module:callable."
        )
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise OptionError(
            f"Model {name} cannot be imported: there is no module {error.name} here or among the installed "
            "packages. "
            "Correct the part before the colon, or change to the folder that holds it."
        ) from error
    finally:
        sys.path.remove(here)
    target: Any = getattr(module, attribute, None)
    if not callable(target):
        raise OptionError(
            f"Model {name} cannot be built: module {path} has no callable {attribute or 'after the colon'}."
            f"{suggest(attribute, dir(module))} Name a function or class that returns an nn.Module."
        )

    return target


def _called(name: str, target: Callable[..., Any], options: dict[str, Any], data: Data) -> nn.Module:
    arguments = (data,) if _takes_data(target) else ()
    try:
        inspect.signature(target).bind(*arguments, **options)
    except TypeError as error:
        given = ", ".join([*(["the data set"] if arguments else []), *options]) or "nothing"
        raise OptionError(
            f"Model {name} cannot be built: called with {given}, it says: {error}. It gets the data set, whose "
            "`input_shape` and `classes` it may read, as its one argument without a default; `model_options` of "
            "a recipe give others."
        ) from error
    model = target(*arguments, **options)
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"Model {name} cannot be used: it returned a {type(model).__name__}. Return an nn.Module."
        )
    return model


def _takes_data(target: Callable[..., Any]) -> bool:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind in positional:
            return parameter.default is inspect.Parameter.empty or parameter.name == "data"
    return False

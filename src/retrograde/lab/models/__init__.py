"""Models for experiments, by name, fitted to a data set.

>>> model = build("vgg-small", data, seed=0)

Any other model can stand in their place as ``package.module:callable``.
"""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from retrograde.engine.branches import Residual
from retrograde.errors import OptionError
from retrograde.lab.data import Data
from retrograde.lab.models.convolutional import VGG, LeNet, ResNet
from retrograde.lab.models.mlp import MLP, ResMLP
from retrograde.lab.models.text import TextBag, TextCNN, TextTransformer
from retrograde.lab.models.transformer import GPT, ViT

__all__ = [
    "GPT",
    "MLP",
    "VGG",
    "LeNet",
    "ResMLP",
    "ResNet",
    "Residual",
    "TextBag",
    "TextCNN",
    "TextTransformer",
    "ViT",
    "build",
    "names",
]


@dataclass(frozen=True)
class _Entry:
    description: str
    kinds: tuple[str, ...]
    builder: Callable[[Data], nn.Module]
    smallest: int = 1
    """Fewest pixels a side that the layers can take."""


_DENSE = ("image", "table")
_MODELS = {
    "mlp": _Entry("3 hidden layers of 512, ReLU", _DENSE, lambda d: MLP(d.input_shape, d.classes)),
    "mlp-small": _Entry(
        "2 hidden layers of 128, ReLU", _DENSE, lambda d: MLP(d.input_shape, d.classes, (128, 128))
    ),
    "resmlp": _Entry(
        "4 residual branches Linear-ReLU-Linear, width 256",
        _DENSE,
        lambda d: ResMLP(d.input_shape, d.classes),
    ),
    "lenet": _Entry("LeNet-5, ReLU", ("image",), lambda d: LeNet(d.input_shape, d.classes), 8),
    "vgg-small": _Entry(
        "first three stages of VGG-11: 4 convolutions of 64 to 256 channels, no BatchNorm",
        ("image",),
        lambda d: VGG(d.input_shape, d.classes),
        8,
    ),
    "vgg-small-bn": _Entry(
        "vgg-small with BatchNorm", ("image",), lambda d: VGG(d.input_shape, d.classes, batch_norm=True), 8
    ),
    "resnet-small": _Entry(
        "ResNet-20 (16, 32, 64 channels), BatchNorm",
        ("image",),
        lambda d: ResNet(d.input_shape, d.classes),
        8,
    ),
    "resnet-small-plain": _Entry(
        "ResNet-20 without BatchNorm, branches that start at zero",
        ("image",),
        lambda d: ResNet(d.input_shape, d.classes, batch_norm=False),
        8,
    ),
    "vit-small": _Entry(
        "vision transformer, 6 layers of width 192, 3 heads",
        ("image",),
        lambda d: ViT(d.input_shape, d.classes),
    ),
    "text-bag": _Entry(
        "mean of word vectors, 2 hidden layers", ("text",), lambda d: TextBag(d.vocabulary or 0, d.classes)
    ),
    "text-cnn": _Entry(
        "convolutions over 3, 4 and 5 words", ("text",), lambda d: TextCNN(d.vocabulary or 0, d.classes)
    ),
    "text-transformer": _Entry(
        "transformer encoder, 2 layers of width 128, 4 heads",
        ("text",),
        lambda d: TextTransformer(d.vocabulary or 0, d.input_shape[0], d.classes),
    ),
    "gpt-small": _Entry(
        "transformer decoder, 4 layers of width 256, 4 heads",
        ("language",),
        lambda d: GPT(d.vocabulary or 0, d.input_shape[0]),
    ),
}


def names() -> dict[str, str]:
    """Return name → one line on each model that :func:`build` knows."""
    return {name: entry.description for name, entry in _MODELS.items()}


def build(name: str, data: Data, *, seed: int | None = None) -> nn.Module:
    """Return the model ``name``, shaped for ``data``: one of :func:`names`, or ``package.module:callable``.

    The callable is imported, from the working directory too, and called with ``data`` where its first
    positional parameter is called that or has no default, else with nothing. With ``seed`` the initial
    weights depend on it alone, and torch's generator is left as it was.

    Raises :class:`~retrograde.errors.OptionError` for a name that is unknown, a model that does not fit the
    kind or size of the data, and a callable that cannot be imported or returns no module.
    """
    builder = _imported(name) if ":" in name else _registered(name, data)
    if seed is None:
        return builder(data)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return builder(data)


def _registered(name: str, data: Data) -> Callable[[Data], nn.Module]:
    entry = _MODELS.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, _MODELS, n=3)
        nearest = f" Nearest: {', '.join(near)}." if near else ""
        raise OptionError(
            f"No model {name}.{nearest} Known are {', '.join(_MODELS)}; give one of them or "
            "package.module:callable."
        )
    side = min(data.input_shape[1:]) if data.kind == "image" else entry.smallest
    if data.kind in entry.kinds and side >= entry.smallest:
        return entry.builder
    fitting = [
        other
        for other, known in _MODELS.items()
        if data.kind in known.kinds and (data.kind != "image" or side >= known.smallest)
    ]
    why = (
        f"it takes {' and '.join(entry.kinds)}, and this is {data.kind}"
        if data.kind not in entry.kinds
        else f"it takes images of {entry.smallest} pixels a side and more, and these have {side}"
    )
    raise OptionError(f"Model {name} does not fit data set {data.name}: {why}. Use {', '.join(fitting)}.")


def _imported(name: str) -> Callable[[Data], nn.Module]:
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
        near = difflib.get_close_matches(attribute, dir(module), n=3)
        raise OptionError(
            f"Model {name} cannot be built: module {path} has no callable {attribute or 'after the colon'}."
            f"{f' Nearest: {near[0]}.' if near else ''} Name a function or class that returns an nn.Module."
        )

    def builder(data: Data) -> nn.Module:
        model = target(data) if _takes_data(target) else target()
        if not isinstance(model, nn.Module):
            raise OptionError(
                f"Model {name} cannot be used: it returned a {type(model).__name__}. Return an nn.Module."
            )
        return model

    return builder


def _takes_data(target: Callable[..., Any]) -> bool:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind in positional:
            return parameter.default is inspect.Parameter.empty or parameter.name == "data"
    return False

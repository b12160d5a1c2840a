"""Other shapes of the same network, as rivals of whatever adds to it or takes from it: narrower, deeper, normalised.

Channels are taken away together with all that must go with them, by the package `torch-pruning`, which traces the
network; the initial weights that stay are multiplied by sqrt(fan-in before / fan-in after), so that they are those of
the narrower network's own initialisation, whatever that is.

Reference: Fang, Ma, Song, Mi, Wang, *DepGraph: towards any structural pruning*, CVPR 2023.
"""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, NonNegativeInt
from pydantic import dataclasses as checked
from torch import Tensor, nn

from retrograde.errors import OptionError
from retrograde.lab.peers import pruning
from retrograde.lab.peers.base import Peer
from retrograde.spectral.factorisation.factors import parameters_of

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Mish)


@checked.dataclass(frozen=True)
class Shape(Peer):
    """The recipe's network in another shape; all options together.

    Attributes:
        width: share of the hidden channels that stay, in (0, 1].
        deeper: hidden layers that are added: copies, newly drawn, of the last one that an activation follows.
        normalise: put a BatchNorm behind every hidden layer that has no norm.
    """

    package: ClassVar[str | None] = "torch-pruning"

    width: Annotated[float, Field(gt=0, le=1)] = 1.0
    deeper: NonNegativeInt = 0
    normalise: bool = False

    def prepare(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """The model in this shape."""
        if example is None:
            raise OptionError("the peer Shape traces the model, and needs an example of its input.")
        return self.shaped(model, example)

    def shaped(self, model: nn.Module, example: Tensor) -> nn.Module:
        """A copy of `model` in this shape.

        Args:
            model: any that can be traced.
            example: an input.

        Raises:
            OptionError: the model cannot be made so.
            MissingPackageError: `torch-pruning` is not installed.
        """
        found = copy.deepcopy(model)
        if self.deeper:
            found = deepened(found, example, self.deeper)
        if self.normalise:
            found = normalised(found, example)
        return narrowed(found, example, self.width) if self.width < 1 else found


@dataclass
class _Call:
    """A module as it was called: what follows what."""

    name: str
    module: nn.Module
    out: Tensor


def narrowed(model: nn.Module, example: Tensor, width: float) -> nn.Module:
    """A copy with this share of the hidden channels, at least one in each layer; inputs and outputs stay.

    Args:
        model: any that the package can trace.
        example: an input.
        width: share, above 0 and below 1.

    Raises:
        OptionError: the package finds nothing to take away, or what it leaves does not run.
        MissingPackageError: `torch-pruning` is not installed.
    """
    package = pruning.load("a narrower network")
    training = model.training
    small = copy.deepcopy(model).eval()
    shape, before = _run(small, example).shape, _inputs(small)
    whole = parameters_of(small)
    last = [call.module for call in _calls(small, example) if isinstance(call.module, _LAYERS)][-1]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of the package, about parameters that it leaves alone
        torch.manual_seed(0)
        try:
            package.pruner.MagnitudePruner(
                small,
                example,
                importance=package.importance.RandomImportance(),
                pruning_ratio=1 - width,
                ignored_layers=[last],
            ).step()
            after = _run(small, example).shape
        except Exception as error:
            raise OptionError(
                f"{type(model).__name__} cannot be made narrower by its channels: {error}. Give a model whose forward "
                "takes its sizes from its layers, or narrow it yourself."
            ) from error
    if parameters_of(small) == whole or after != shape:
        raise OptionError(
            f"{type(model).__name__} cannot be made narrower by its channels: width={width} takes nothing away. Give "
            "a larger share to lose, or narrow it yourself."
        )
    with torch.no_grad():
        for name, inputs in _inputs(small).items():
            small.get_submodule(name).get_parameter("weight").mul_(math.sqrt(before[name] / inputs))
    for parameter in small.parameters():
        parameter.grad = None
    return small.train(training)


def normalised(model: nn.Module, example: Tensor) -> nn.Module:
    """`model` with a BatchNorm behind every hidden layer that no norm follows; linear ones of (B, d) alone.

    Raises:
        OptionError: it has no such layer.
    """
    calls = _calls(model, example)
    hidden = calls[: max((i for i, call in enumerate(calls) if isinstance(call.module, _LAYERS)), default=0)]
    added = 0
    for call, following in zip(hidden, [*calls[1:], None], strict=False):
        layer = call.module
        if not isinstance(layer, _LAYERS) or (following is not None and _is_norm(following.module)):
            continue
        if isinstance(layer, nn.Linear) and call.out.ndim != 2:
            continue
        norm = nn.BatchNorm1d if isinstance(layer, nn.Linear) else _NORMS[type(layer)]
        _replace(model, call.name, nn.Sequential(layer, norm(call.out.shape[1])))
        added += 1
    if not added:
        raise OptionError(
            f"{type(model).__name__} has no hidden layer without a norm that a BatchNorm could follow."
        )
    return model


def deepened(model: nn.Module, example: Tensor, layers: int = 1) -> nn.Module:
    """`model` with so many hidden layers more, each as wide as the last hidden one, with its activation.

    Their weights are drawn from torch's generator, as those of any new layer.

    Raises:
        OptionError: no hidden layer has an activation module behind it.
    """
    calls = _calls(model, example)
    names = [call.name for call in calls]
    pairs = [
        (call, following, calls[i + 1 : i + 3])
        for i, call in enumerate(calls[:-1])
        for following in calls[i + 1 : i + 3]
        if isinstance(call.module, _LAYERS)
        and isinstance(following.module, _ACTIVATIONS)
        # A module that is called twice would become deeper in both places.
        and names.count(following.name) == 1
    ]
    if not pairs:
        raise OptionError(
            f"{type(model).__name__} cannot be made deeper: no layer has an activation module of its own behind it."
        )
    call, activation, between = pairs[-1]
    norms = [one.module for one in between if _is_norm(one.module)][:1]
    tail: list[nn.Module] = [activation.module]
    for _ in range(layers):
        tail += [_square(call), *(_fresh(norm) for norm in norms), copy.deepcopy(activation.module)]
    _replace(model, activation.name, nn.Sequential(*tail))
    return model


def _square(call: _Call) -> nn.Module:
    """A layer of as many inputs as outputs, of the kind of this one, that keeps its output's shape."""
    # torch's stubs know no layer without a bias.
    layer: Any = call.module
    biased = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.out_features, layer.out_features, bias=biased)
    width = layer.out_channels
    made = type(layer)(width, width, layer.kernel_size, padding="same", bias=biased)
    nn.init.kaiming_normal_(made.weight, nonlinearity="relu")
    return made


def _fresh(norm: nn.Module) -> nn.Module:
    made: Any = copy.deepcopy(norm)
    made.reset_parameters()
    return made


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _calls(model: nn.Module, example: Tensor) -> list[_Call]:
    """Modules without children in the order of their calls on the example."""
    found: list[_Call] = []

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found.append(_Call(name, module, output))

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    training = model.training
    try:
        _run(model.eval(), example)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not any(isinstance(call.module, _LAYERS) for call in found):
        raise OptionError(f"{type(model).__name__} calls no linear or convolutional layer.")
    return found


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _run(model: nn.Module, example: Tensor) -> Tensor:
    with torch.no_grad():
        return model(example)


def _inputs(model: nn.Module) -> dict[str, int]:
    """Fan-in of every layer with a weight that multiplies."""
    return {
        name: module.weight[0].numel()
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS)
    }

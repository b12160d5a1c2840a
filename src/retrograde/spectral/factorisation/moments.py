"""Mean, second moment and cost of each layer's outputs, gathered while a model runs.

For rows y of a layer's outputs without its bias, y = W x, over all positions of a convolution,

    m = E[y],   C = E[(y − m)(y − m)ᵀ]   (centred)   or   E[y yᵀ]   (not)     (1)

Rows are summed up by `retrograde.spectral.moments`: m may be large against the deviations. A linear layer with fewer
inputs than outputs keeps its inputs' moments instead, from which C = W C_x Wᵀ follows exactly.

Cost: n·d² multiply-adds for n rows of width d = d_out, or d_in where that is smaller; 8·d² bytes; an eigenproblem of
about 9·d³ operations in float64. Of a layer whose outputs are constant every direction is as good as another.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree

from retrograde.maths.spectral import eigh
from retrograde.spectral.moments import Moments

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Plain = nn.Linear | Convolution
"""The layers that can be factorised."""


@dataclass(frozen=True)
class Spectrum:
    """The principal directions of a layer's outputs.

    Attributes:
        basis: Q (d_out, k) float64, orthonormal columns, leading first; as many as the largest rank that saves.
        eigenvalues: λ float64, all of them.
        offset: (d_out,) float64, the part of E[y] that a bias keeps, whatever the rank: m, or 0 where not centred.
    """

    basis: Tensor
    eigenvalues: Tensor
    offset: Tensor

    def shares(self) -> list[float]:
        """E(1), E(2), …: the share of Σλ in the leading r directions; 1 throughout where all are 0."""
        total = self.eigenvalues.sum()
        if not total > 0:
            return [1.0] * len(self.eigenvalues)
        return (self.eigenvalues.cumsum(0) / total).clamp_max(1.0).tolist()


def spectrum_of_outputs(layer: Plain, moments: Moments, centred: bool) -> Spectrum:
    """Eigenpairs of C, equation (1).

    Args:
        layer: whose outputs, or inputs, they are the moments of.
        moments: as `Watch` gathered them.
        centred: which C.
    """
    mean, second = moments.finish()
    weight = layer.weight.detach().flatten(1).double()
    if _by_inputs(layer):
        if not centred:
            second = second + torch.outer(mean, mean)
        values, vectors = eigh(second)
        half = (weight @ vectors) * values.clamp_min(0).sqrt()
        basis, roots, _ = torch.linalg.svd(half, full_matrices=False)
        offset = weight @ mean
        eigenvalues = roots.square()
    else:
        offset = mean if layer.bias is None else mean - layer.bias.detach().double()
        if not centred:
            second = second + torch.outer(offset, offset)
        values, vectors = eigh(second)
        eigenvalues, basis = values.flip(-1).clamp_min(0), vectors.flip(-1)
    # A copy, so that the rest is freed.
    basis = basis[:, : max(1, largest_rank(layer))].clone()
    return Spectrum(basis, eigenvalues, offset if centred else torch.zeros_like(offset))


def spectrum_of_weight(layer: Plain) -> Spectrum:
    """Left singular vectors of W: with them Q_r Q_rᵀ W is W's truncated SVD, and nothing is known of the data."""
    weight = layer.weight.detach().flatten(1).double()
    basis, roots, _ = torch.linalg.svd(weight, full_matrices=False)
    return Spectrum(basis, roots.square(), weight.new_zeros(len(weight)))


class Watch:
    """Forward hooks that gather moments and count multiply-adds. Copies and pickles of a watched layer are unwatched.

    Args:
        layers: those whose multiply-adds are counted, by name.
        of: names of those whose moments are gathered too.
        when: asked of each layer before anything is gathered.
        model: whose examples are counted, by the leading dimension of the first tensor that it is given.

    Attributes:
        macs: multiply-adds of each layer so far.
        moments: by name.
        examples: that the model was given.
        inputs: the first input of each layer, once this is a dict.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        of: set[str],
        when: Callable[[nn.Module], bool] = lambda layer: True,
        model: nn.Module | None = None,
    ) -> None:
        self._when, self._layers = when, layers
        self.moments = {name: Moments() for name in layers if name in of}
        self.macs = dict.fromkeys(layers, 0.0)
        self.examples = 0
        self.inputs: dict[str, Tensor] | None = None
        self._handles = [
            layer.register_forward_hook(_Ear(layer, partial(self._take, name)), with_kwargs=True)
            for name, layer in layers.items()
        ]
        if model is not None:
            ear = _Ear(model, self._count)
            self._handles.append(model.register_forward_hook(ear, with_kwargs=True))

    def reset(self) -> None:
        """Forget what was gathered."""
        self.moments = {name: Moments() for name in self.moments}
        self.macs = dict.fromkeys(self.macs, 0.0)
        self.examples = 0

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """What was gathered since the last `reset`."""
        moments = {name: of.state_dict() for name, of in self.moments.items()}
        return {"macs": dict(self.macs), "moments": moments, "examples": self.examples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, of the same layers."""
        self.macs, self.examples = dict(state["macs"]), int(state["examples"])
        self.moments = {name: Moments() for name in self.moments}
        for name, of in self.moments.items():
            weight: Any = self._layers[name].weight
            of.load_state_dict(state["moments"][name], weight.device)

    def _take(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not self._when(layer):
            return
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None:
            return
        if self.inputs is not None:
            self.inputs.setdefault(name, x.detach())
        self.macs[name] += macs_of_call(layer, x, output)
        if name in self.moments:
            self.moments[name].add(_rows(layer, x, output))

    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._when(model):
            self.examples += rows_of((args, kwargs))


class _Ear:
    """A hook that stays with its module: a copy of it, in a copied or unpickled model, hears nothing."""

    def __init__(self, module: nn.Module | None = None, take: Callable[..., None] | None = None) -> None:
        self._module = None if module is None else weakref.ref(module)
        self._take = take

    def __call__(self, module: nn.Module, *call: Any) -> None:
        if self._take is not None and self._module is not None and self._module() is module:
            self._take(module, *call)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Ear":
        return _Ear()

    def __reduce__(self) -> tuple[type["_Ear"], tuple[()]]:
        return _Ear, ()


def rows_of(batch: Any) -> int:
    """The leading dimension of the first tensor in a batch; 0 without one."""
    return next((t.shape[0] for t in tree.tree_leaves(batch) if isinstance(t, Tensor) and t.dim()), 0)


def macs_of_call(layer: nn.Module, x: Tensor, y: Tensor) -> float:
    """Multiply-adds of a linear or convolutional layer, grouped or transposed ones included, x → y."""
    weight: Any = layer.weight
    if isinstance(layer, nn.Linear):
        return float(y.numel()) * weight.shape[1]
    if getattr(layer, "transposed", False):
        return float(x.numel()) * weight[0].numel()
    return float(y.numel()) * weight[0].numel()


def macs_for_a_rank(layer: Plain) -> float:
    """u of `ranks`, over M: what a rank of the two layers costs of the whole layer."""
    fan_in, outputs = layer.weight[0].numel(), len(layer.weight)
    return (fan_in + outputs) / (fan_in * outputs)


def largest_rank(layer: Plain) -> int:
    """The largest r < d_in·d_out/(d_in + d_out), d_in being a convolution's k×k·inputs; 0: no rank saves."""
    return math.ceil(1 / macs_for_a_rank(layer)) - 1


def _by_inputs(layer: Plain) -> bool:
    return isinstance(layer, nn.Linear) and layer.in_features < layer.out_features


def _rows(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        kept = x if _by_inputs(layer) else y
        return kept.reshape(-1, kept.shape[-1])
    assert isinstance(layer, Convolution)
    return y.movedim(-len(layer.kernel_size) - 1, -1).reshape(-1, layer.out_channels)

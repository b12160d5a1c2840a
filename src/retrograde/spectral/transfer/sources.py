"""What a model's layers are given on source data: the leading eigenpairs of each one's second moment.

For a linear-like layer the rows are x̃ = (x, 1), the 1 where the layer has a bias, so that W̃ = (W, b) multiplies them;
a convolution's rows are patches. C₀ = E[x̃ x̃ᵀ] is summed up over the source and cut to its top,

    C₀ = Q Λ Qᵀ + rest,    tr C₀ kept,                                (1)

so what is stored of a layer is Q (D × k), Λ (k) and tr C₀, beside its weights: nothing of any single example.

Cost: the model's forward pass, 2·n·D² for n rows of D entries, and D² numbers of memory a layer until it is cut.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from retrograde.engine import ranks
from retrograde.engine.layers import find_kind
from retrograde.engine.maps.base import LayerKind, Map
from retrograde.errors import DataError, NoEffectError
from retrograde.maths.spectral import eigh, leading_eigenpairs, qr_steps
from retrograde.spectral.running import Runner, evaluating

NORMALISATIONS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
)

_EXACT = 256
"""Up to this many entries of a row all eigenpairs are computed, and the leading ones kept."""
_ITERATIONS, _SPARE = 8, 16
"""Beyond: steps of subspace iteration, and directions followed besides those that are kept."""

Forward = Callable[[Any], object]
"""Runs the model on one batch of the loader."""


def linear_like(model: nn.Module) -> dict[str, tuple[nn.Module, LayerKind]]:
    """Full name → layer and kind of every layer whose weight is a parameter that multiplies rows."""
    found: dict[str, tuple[nn.Module, LayerKind]] = {}
    for name, layer in model.named_modules():
        kind = find_kind(layer)
        if isinstance(kind, LayerKind) and kind.names(layer)[0]:
            found[name] = layer, kind
    return found


def has_bias_entry(layer: nn.Module, kind: LayerKind) -> bool:
    """Whether a 1 stands behind the rows: a transposed convolution's rows have no output of their own to add it to."""
    own = dict(layer.named_parameters(recurse=False))
    return kind.names(layer)[1] in own and kind.map(layer).rows_are_outputs


def source_moments(
    model: nn.Module,
    source: Iterable[Any],
    *,
    rank: int,
    rows: int,
    batches: int,
    forward: Forward | None = None,
) -> dict[str, Tensor]:
    """Equation (1) of every linear-like layer that the source reaches, and the weights of all that it may restrain.

    The model runs in evaluation mode and without gradients; modes, buffers and random numbers are left as they were.

    Args:
        model: at the source's weights.
        source: batches: x, (x, …) of which x is the input, or a mapping of keyword arguments.
        rank: k, at most.
        rows: rows of each call of a layer that are looked at.
        batches: of the source that are looked at.
        forward: runs one batch, where the model is called otherwise.

    Returns:
        For each layer ``name.basis`` (g, D, k), ``name.values`` (g, k), ``name.trace`` (g,) and ``name.weight``,
        ``name.bias`` as they are now; of normalisations only these. Written as safetensors as they are.

    Raises:
        NoEffectError: the model has no linear-like layer.
        OptionError: a batch that the model does not take.
        DataError: no batch came, or a layer was given what is not finite.
    """
    layers = linear_like(model)
    if not layers:
        raise NoEffectError(
            f"{type(model).__name__} has no linear-like layer with a weight of its own, so there is nothing to take "
            "statistics of. Register its layer types with retrograde.register_layer."
        )
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(layers, 0)

    def watch(name: str, kind: LayerKind) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kind.forward(layer, product, *args, **kwargs)

        def product(x: Tensor, weight: Tensor, bias: Tensor | None, map: Map) -> Tensor:
            seen = map.rows(x.detach(), weight, rows)
            if has_bias_entry(layers[name][0], kind):
                seen = torch.cat((seen, seen.new_ones(*seen.shape[:2], 1)), -1)
            counts[name] += seen.shape[1]
            moment = seen.mT @ seen
            sums[name] = sums[name] + moment if name in sums else moment
            return map.forward(x, weight, bias)

        return hook

    run = Runner("source", None if forward is None else partial(_call, forward), "forward")
    handles = [
        layer.register_forward_pre_hook(watch(name, kind), with_kwargs=True)
        for name, (layer, kind) in layers.items()
    ]
    seen = 0
    try:
        with evaluating(model):
            for batch in islice(source, batches):
                run(model, batch)
                seen += 1
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise DataError(
            "the source brought no batch, so there are no statistics of it. A generator can be read only once: pass "
            "a DataLoader or a list of batches."
        )
    state: dict[str, Tensor] = {}
    for name, (layer, kind) in layers.items():
        if counts[name]:
            total = ranks.mean(sums[name] / counts[name])
            if not bool(total.isfinite().all()):
                raise DataError(
                    f"layer {name!r} was given values that are not finite, or too large to be squared, on the source. "
                    "Look for them in the source's inputs, and call with the precision that the model was trained in."
                )
            state |= {f"{name}.{key}": value for key, value in zip(_KEYS, _cut(total, rank), strict=True)}
        own = dict(layer.named_parameters(recurse=False))
        for key, parameter in zip(("weight", "bias"), kind.names(layer), strict=True):
            if parameter in own:
                state[f"{name}.{key}"] = own[parameter].detach().clone()
    for name, layer in model.named_modules():
        if isinstance(layer, NORMALISATIONS):
            for key, parameter in layer.named_parameters(recurse=False):
                state[f"{name}.{key}"] = parameter.detach().clone()
    return state


def _call(forward: Forward, model: nn.Module, batch: Any) -> object:
    return forward(batch)


_KEYS = ("basis", "values", "trace")


def _cut(moment: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q, Λ and the trace of (g, D, D)."""
    groups, width, _ = moment.shape
    k, wider = min(rank, width), min(rank + _SPARE, width)
    trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)
    if width <= max(_EXACT, 2 * wider):
        values, vectors = eigh((moment + moment.mT) / 2)
        return vectors[..., -k:].flip(-1).contiguous(), values[..., -k:].flip(-1).clamp_min(0), trace
    generator = torch.Generator().manual_seed(0)  # any start will do
    start = torch.linalg.qr(torch.randn(groups, width, wider, generator=generator).to(moment))[0]
    values, basis = leading_eigenpairs(
        lambda q: moment @ q, qr_steps(lambda q: moment @ q, start, _ITERATIONS)
    )
    return basis[..., :k].contiguous(), values[..., :k].contiguous(), trace

r"""Smaller layers by the spectrum of their outputs: a layer of rank r as two plain ones.

For a layer y = W x + b with outputs of mean μ and covariance C = Q Λ Qᵀ, λ₁ ≥ λ₂ ≥ …, the best rank-r map of x in the
mean square over the data is the projection of the outputs on the leading r columns Q_r,

    min_{rank M ≤ r, c} E‖y − M x − c‖² = Σ_{i>r} λ_i    at  M = Q_r Q_rᵀ W,  c = b + (I − Q_r Q_rᵀ)(μ − b)     (1)

Without centring, C = E[W x xᵀ Wᵀ], c = b. Two layers compute it: z = (Q_rᵀ W) x of r outputs, then Q_r z + c. For a
k×k convolution the first is one of the same kernel, stride, padding and dilation with r outputs, the second 1×1 (Zhang
et al. 2016). They cost r(d_in + d_out) multiply-adds at each position in place of d_in·d_out (d_in = k²·inputs), so

    a layer is factorised where  r < d_in d_out / (d_in + d_out)                                              (2)

Ranks are those that keep a share θ of each layer's energy, r = min{r : Σ_{i≤r} λ_i ≥ θ Σ λ}, or are chosen for all
layers together within a budget of multiply-adds (`retrograde.spectral.factorisation.ranks`).

From the source (Muthuraman 2025, extension 2, whose text was not available) come the rule for r and the form of W; the
mean in the bias, convolutions, the joint budget and the choice by measured time are added here. The spectra are those
of the model as it was: errors of the layers before do not enter the statistics of those behind them.

Symbols: W `weight` (d_out, d_in), Q `basis`, λ `eigenvalues`, θ `energy`. Cost: one forward pass of the data, and
`retrograde.spectral.factorisation.moments`: 8 d² bytes for each layer of width d until its rank is chosen, so a model
of many wide layers is better done in parts, with `only`.

References: Muthuraman, arXiv 2505.23369, 2025; Zhang, Zou, He, Sun, *Accelerating very deep convolutional networks for
classification and detection*, IEEE TPAMI 38, 2016; Yu, Wu, *Compressing transformers: features are low-rank, but
weights are not!*, AAAI 2023.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

from torch import Tensor, nn

from retrograde.errors import OptionError, RetrogradeWarning, check_value, is_finite
from retrograde.patterns import ROOT, Choice
from retrograde.spectral.factorisation.factors import candidates, parameters_of, place
from retrograde.spectral.factorisation.moments import Plain, spectrum_of_weight
from retrograde.spectral.factorisation.observation import Call, inputs_of, observe
from retrograde.spectral.factorisation.parts import Part, ranks_within, report_rows
from retrograde.spectral.factorisation.report import FactorReport
from retrograde.spectral.factorisation.timing import MARGIN, alternate, fastest_rank
from retrograde.spectral.running import Runner, evaluating

Seconds = tuple[float, float]


def factorise(
    model: nn.Module,
    data: Tensor | Iterable[Any],
    *,
    energy: float | None = None,
    budget: float | None = None,
    spectrum: Literal["outputs", "weights"] = "outputs",
    centred: bool = True,
    faster: bool | Any = False,
    only: Choice | None = None,
    skip: Choice | None = None,
    call: Call | None = None,
    inplace: bool = False,
) -> tuple[nn.Module, FactorReport]:
    """Replace linear layers and convolutions by two plain layers of lower rank, where that saves multiply-adds.

    The result holds torch's own modules alone, and needs torch alone to be saved, loaded and run. Statistics are
    taken in evaluation mode without gradients; training modes, buffers and torch's random state stay what they were.
    Frozen layers are replaced by frozen ones, a layer that is used in several places by one pair in all of them. In a
    distributed run every rank must call it, with its own data: statistics are those of all.

    Args:
        model: any module. Grouped and transposed convolutions, subclasses of layers, layers with hooks or
            parametrizations, and layers that share a parameter are left, with the reason in the report.
        data: batches that stand for the model's inputs, a few thousand rows or more: one tensor, or an iterable of
            tensors, of tuples whose first entry is the input (a ``DataLoader``), or of dicts of keyword arguments.
        energy: θ in (0, 1]: the smallest rank of each layer that keeps this share of its outputs' energy.
        budget: multiply-adds of all linear and convolutional layers: below 1 as a share of the model's own, else a
            number for one example. Ranks are chosen jointly, so that the least energy is lost within it. Give this or
            `energy`.
        spectrum: ``"weights"`` takes W's singular vectors in place of the outputs' principal directions, which is
            plain truncated SVD; the data then only counts multiply-adds.
        centred: subtract the outputs' mean, which the second layer's bias keeps. A layer without a bias gets one.
        faster: true, or a batch as in `data`: time each layer on it (true: on the first batch) and factorise only
            where that measured faster, at ranks that did. Low-rank convolutions often do not, and the batch size
            matters: give the one that the model will be used at. A budget may then be missed; the report says so.
        only: glob patterns over full layer names, or a function of name and layer; nothing else is factorised.
        skip: likewise; layers that it chooses are left.
        call: runs the model on one batch of `data`; by default ``model(input)``.
        inplace: change `model` itself in place of a deep copy.

    Returns:
        The model, and the report: print it, or read its rows.

    Raises:
        OptionError: an option's value, a batch that is not one, data without rows, outputs that are not finite, or a
            budget that even ranks of 1 exceed.
        NoEffectError: no layer can be factorised.
        AttachError: the model is compiled or wrapped, or attached and to be changed in place.

    Warns:
        RetrogradeWarning: no rank saves anything, or a layer saw fewer rows than it is wide.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import retrograde as rg
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        >>> small, report = rg.spectral.factorise(model, torch.randn(512, 64), budget=0.5)
        >>> [type(layer).__name__ for layer in small[0]]
        ['Linear', 'Linear']
        >>> report.macs[1] <= 0.5 * report.macs[0]
        True
    """
    _check(energy, budget, spectrum)
    original, run = model, Runner("factorise: data", call, "call")
    model = model if inplace else copy.deepcopy(model)
    layers, left = candidates(model, only, skip)
    if inplace and model in layers.values():
        raise OptionError(
            "inplace=True cannot replace the model itself, which is one layer. Leave it out and use what is returned."
        )
    seen = observe(model, data, run, layers, set(layers) - set(left) if spectrum == "outputs" else set())
    left |= {name: "never called on the data" for name in layers if not seen.macs[name] and name not in left}
    parts: dict[str, Part] = {}
    for name, layer in cast(dict[str, Plain], layers).items():
        if name not in left:
            found = (
                spectrum_of_weight(layer) if spectrum == "weights" else seen.spectrum(name, layer, centred)
            )
            parts[name] = Part(name, layer, found, seen.macs[name])
    total = sum(seen.macs.values())
    goal = None if budget is None else float(budget * total if budget < 1 else budget)
    _check_goal(goal, total, parts)

    example = seen.first if faster is True else None if faster is False else faster
    inputs = {} if example is None else inputs_of(model, {n: p.layer for n, p in parts.items()}, run, example)
    with evaluating(model):
        for name, x in inputs.items():
            part = parts[name]
            part.limit(fastest_rank(part.layer, part.pair, part.largest, x), "no rank tried was faster here")
        ranks, seconds = _choose(parts, energy, goal, total, inputs)
    pairs = {name: parts[name].pair(rank) for name, rank in ranks.items()}
    left |= {name: part.why for name, part in parts.items() if name not in pairs}
    if not pairs:
        first = next(iter(left))
        warnings.warn(
            f"no layer was factorised; the first, {first or ROOT!r}: {left[first]}. The model is returned as it was. "
            "Ask for less `energy` or a smaller `budget`, or leave `faster` out.",
            RetrogradeWarning,
            stacklevel=2,
        )
    rows = report_rows(layers, parts, ranks, pairs, left, seen.macs, seconds)
    size = parameters_of(model)
    whole = copy.deepcopy(model) if example is not None and inplace else original
    new: dict[nn.Module, nn.Module] = {parts[name].layer: pair for name, pair in pairs.items()}
    small = place(model, new)
    try:
        took = _try(whole, small, run, seen.first, example)
    except BaseException:
        place(model, {pair: layer for layer, pair in new.items()})
        raise
    return small, FactorReport(rows, goal, (size, parameters_of(small)), took)


def _choose(
    parts: Mapping[str, Part],
    energy: float | None,
    goal: float | None,
    total: float,
    inputs: Mapping[str, Tensor],
) -> tuple[dict[str, int], dict[str, Seconds]]:
    """Ranks, and the seconds of layers and their pairs where inputs are given: then each must be faster."""
    while True:
        if energy is not None:
            found = {name: part.rank_for_energy(energy) for name, part in parts.items()}
        else:
            found = ranks_within(parts, cast(float, goal) - total + sum(p.macs for p in parts.values()))
        ranks = {name: rank for name, rank in found.items() if rank is not None}
        seconds = {
            name: _times(parts[name], rank, inputs[name]) for name, rank in ranks.items() if name in inputs
        }
        slow = [name for name, (before, after) in seconds.items() if after >= MARGIN * before]
        if not slow:
            return ranks, seconds
        for name in slow:
            before, after = seconds[name]
            parts[name].limit(0, f"rank {ranks[name]} measured ×{after / before:.2f} of its time")


def _times(part: Part, rank: int, x: Tensor) -> Seconds:
    pair = part.pair(rank)
    before, after = alternate((lambda: part.layer(x), lambda: pair(x)))
    return before, after


def _try(whole: nn.Module, small: nn.Module, run: Call, first: Any, example: Any | None) -> Seconds | None:
    """Run the factorised model once, and time it against the original where an example is given."""
    with evaluating(small):
        try:
            run(small, first)
        except Exception as error:
            cause = error.__cause__ or error
            raise OptionError(
                f"the factorised model fails on the first batch: {type(cause).__name__}: {cause}. Probably a module "
                "reads the weight of a layer inside, past its forward, and the layer is two now: leave it with `skip`."
            ) from cause
        if example is None:
            return None
        with evaluating(whole):
            before, after = alternate((lambda: run(whole, example), lambda: run(small, example)))
            return before, after


def _check(energy: float | None, budget: float | None, spectrum: str) -> None:
    if (energy is None) == (budget is None):
        raise OptionError(
            f"factorise: energy={energy!r}, budget={budget!r}: give one of them: the share of the outputs' energy that "
            "each layer keeps, or the multiply-adds that all may cost."
        )
    share = energy is None or (is_finite(energy) and 0 < energy <= 1)
    check_value("factorise", "energy", energy, share, "a share above 0 and up to 1")
    cost = budget is None or (is_finite(budget) and budget > 0)
    check_value("factorise", "budget", budget, cost, "a share below 1, or a number of multiply-adds")
    check_value(
        "factorise", "spectrum", spectrum, spectrum in ("outputs", "weights"), "'outputs' or 'weights'"
    )


def _check_goal(goal: float | None, total: float, parts: Mapping[str, Part]) -> None:
    if goal is None:
        return
    if goal >= total:
        raise OptionError(
            f"factorise: budget={goal:.6g} multiply-adds for one example must be less than the model's {total:.6g}. "
            "Below 1 it is a share of these."
        )
    least = total - sum(part.macs - part.cost(1) for part in parts.values() if part.largest)
    if goal < least:
        raise OptionError(
            f"factorise: budget={goal:.6g} multiply-adds for one example cannot be reached: with all ranks 1 the model "
            f"costs {least:.6g} ({least / total:.1%} of its {total:.6g}), layers that are left included."
        )

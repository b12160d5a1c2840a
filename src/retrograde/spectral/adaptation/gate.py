"""The limits of the gate of `retrograde.spectral.adapt`, from source data alone.

The equations and symbols are those of `retrograde.spectral.adaptation`, equation (6) above all. Half of the source's
batches make statistics, and the others are the stream that is held against them, for rows that statistics were taken
from are nearer to them than new ones are. Of few batches one such pair says little: its halves may happen to be alike,
and the stream ends before its window is full. So below 100 batches halves are drawn anew, up to four times, and each
stream is read twice in a row, or more often until it has lasted for three windows. What B batches cannot say is left
to f: shifts are squares, so they spread as estimates of a variance do.

References:
    Wilson, Hilferty, *The distribution of chi-square*, PNAS 17, 1931: f.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from retrograde.errors import OptionError
from retrograde.spectral.adaptation.features import channel_axis, features, follow, hooked, rows_of
from retrograde.spectral.adaptation.tracking import Tracker
from retrograde.spectral.moments import Moments
from retrograde.spectral.running import Runner, evaluating

Halves = Mapping[str, Sequence[Moments]]
"""Name → moments of a layer's features on either half of the batches."""

FEWEST_BATCHES = 10
_ENOUGH = 100
"""Batches for which one pair of halves will do."""
_DRAWS, _READINGS = 4, 2
"""Below: pairs of halves, at most, and times that each stream is read."""
_WINDOWS = 3
"""That each stream lasts, at least: it is read as often."""
_CONFIDENCE = 1.645
"""Standard deviations of a normal distribution's 95 % quantile."""
_TINY = 1e-12
_RUN = Runner("adapt: source")


def measure(
    model: nn.Module, source: Iterable[Any], names: Iterable[str], at: str, sides: Sequence[int] | None = None
) -> tuple[Halves, int]:
    """Moments of each layer's features, in the order of their calls, and the number of batches.

    Args:
        model: left as it was.
        source: batches.
        names: of the layers.
        at: whether their output or input.
        sides: 0 or 1 for each batch: its half; None takes them in turns.

    Raises:
        OptionError: features of a batch are not finite.
    """
    found: dict[str, tuple[Moments, Moments]] = {}
    count = 0

    def add(name: str, layer: nn.Module, x: Any) -> None:
        rows = rows_of(features(name, x), channel_axis(layer, x), 2**62)
        if not bool(rows.isfinite().all()):
            raise OptionError(
                f"adapt: batch {count} of the source gives features at layer {name!r} that are not finite, and no "
                "statistics follow from them. Leave out examples with NaN or infinite entries."
            )
        side = count % 2 if sides is None else sides[count % len(sides)]
        found.setdefault(name, (Moments(), Moments()))[side].add(rows)

    with evaluating(model), hooked(model, {name: partial(add, name) for name in names}, at):
        for batch in source:
            _RUN(model, batch)
            count += 1
    return found, count


def limits(
    model: nn.Module,
    source: Iterable[Any],
    halves: Halves,
    count: int,
    trackers: Mapping[str, Tracker],
    *,
    at: str,
    rows: int,
    window: float,
    quantile: float,
) -> tuple[Tensor, Tensor]:
    """What (3) to (5) are divided by, (layers, 3), and the level below which the gate closes; equation (6).

    Args:
        model: left as it was.
        source: batches, the same as `halves` were measured on.
        halves: of the first reading, in turns.
        count: batches of the source.
        trackers: of all source data, whose ranks those of a half take.
        at, rows, window, quantile: as `retrograde.spectral.adapt` has them.

    Raises:
        OptionError: the source gave no batches when it was read again.
    """
    draws, readings = min(_DRAWS, -(-_ENOUGH // count)), _READINGS if count < _ENOUGH else 1
    found: list[Tensor] = []
    draw = 0
    while draw < draws:
        sides = [number % 2 for number in range(count)]
        if draw:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(draw)).tolist()
            sides = [sides[i] for i in order]
            halves, _ = measure(model, source, trackers, at, sides)
        own = {
            name: Tracker.of(halves[name][0], tracker.source_values.shape[0])
            for name, tracker in trackers.items()
        }
        hooks = {name: partial(_watch, name, tracker, rows, window) for name, tracker in own.items()}
        with evaluating(model), hooked(model, hooks, at):
            reading, young = 0, False
            while reading < readings or young:
                before = len(found)
                for batch, side in zip(source, sides, strict=False):
                    if side:
                        _RUN(model, batch)
                        found.append(torch.stack([tracker.shift() for tracker in own.values()]))
                if len(found) == before:
                    break
                reading, young = reading + 1, _is_young(own.values())
                # What lasts for few windows is few, however many batches it has.
                draws = _DRAWS if young else draws
        draw += 1
        if not found:
            raise OptionError(
                "adapt: the source gave no batches when it was read for the second time. Give a DataLoader or a list, "
                "not an iterator."
            )
    shifts = torch.stack(found).double().cpu()
    high, middle = shifts.quantile(quantile, 0).clamp_min(_TINY), shifts.median(0).values.clamp_min(_TINY)
    scatter = high / middle
    usual = bound(count - 1) * high * scatter.clamp_min(scatter.median())
    return usual, (shifts / usual).amax((1, 2)).quantile(quantile).clamp_max(1)


def _is_young(trackers: Iterable[Tracker]) -> bool:
    """Whether a stream must be read again: its statistics began as the source's, and still are for the most part."""
    ages = [float(tracker.stream.age) for tracker in trackers]
    # A layer that only other batches call stays as it was.
    return 0 < min(ages) < _WINDOWS


def _watch(name: str, tracker: Tracker, budget: int, window: float, layer: nn.Module, x: Any) -> None:
    follow(name, tracker, budget, window, layer, x)


def bound(freedom: int) -> float:
    """f: the upper 95 % bound of a variance over its estimate of so many degrees of freedom, ν/χ²₀.₀₅(ν)."""
    spread = 2 / (9 * freedom)
    return (1 - spread - _CONFIDENCE * math.sqrt(spread)) ** -3

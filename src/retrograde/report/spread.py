"""Means and standard deviations over seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from retrograde.report.records import number


@dataclass(frozen=True)
class Spread:
    """A mean over ``count`` seeds; ``deviation`` is the sample standard deviation, None of a single seed."""

    mean: float
    deviation: float | None
    count: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and deviation of the values that are known and finite; None when none is."""
    known = [value for value in map(number, values) if value is not None]
    if not known:
        return None
    return Spread(fmean(known), stdev(known) if len(known) > 1 else None, len(known))


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are known and finite; None when none is."""
    found = spread(values)
    return found.mean if found else None


Points = list[tuple[float, float]]


def mean_line(lines: Sequence[Points], *, aligned: bool = True) -> Points:
    """The mean of several lines as far as all of them go.

    Args:
        lines: empty ones are left out.
        aligned: the mean is taken where all lines have the same x; else point by point, and x is averaged too.
    """
    filled = [line for line in lines if line]
    if not filled:
        return []
    if aligned:
        heights = [dict(line) for line in filled]
        return [(x, fmean(y[x] for y in heights)) for x in heights[0] if all(x in y for y in heights)]
    return [(fmean(x for x, _ in at), fmean(y for _, y in at)) for at in zip(*filled, strict=False)]

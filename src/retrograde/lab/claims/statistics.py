"""Means and paired differences with their 95 % intervals (Student's t)."""

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

_CONFIDENCE = 0.95


class Estimate(BaseModel):
    """A mean over seeds.

    Attributes:
        n: seeds.
        mean: of them.
        deviation: standard deviation over seeds (n − 1); None for one seed.
        low: lower end of the mean's 95 % interval; None for one seed.
        high: its upper end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int
    mean: float
    deviation: float | None
    low: float | None
    high: float | None

    @property
    def half(self) -> float | None:
        """Half of the interval; None for one seed."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of `values`, one for each seed, which must be one or more."""
    from scipy import stats

    x = np.asarray(values, dtype=float)
    n, mean = len(x), float(x.mean())
    if n < 2:
        return Estimate(n=n, mean=mean, deviation=None, low=None, high=None)
    deviation = float(x.std(ddof=1))
    half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, n - 1)) * deviation / n**0.5
    return Estimate(n=n, mean=mean, deviation=deviation, low=mean - half, high=mean + half)

"""Timing variants against each other: they take turns, round by round."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles

WARMUPS = 1
"""Rounds that do not count."""

DROPPED_AT = 10.0
"""A variant that takes so many times as long as the baseline in the first round that counts is not run again."""

Work = Callable[[], object]


@dataclass(frozen=True)
class Speedup:
    """How many times as fast as a baseline.

    Attributes:
        ratio: median over rounds of the baseline's seconds divided by the variant's.
        quartiles: first and third, of these ratios.
        of_medians: the baseline's median seconds divided by the variant's.
    """

    ratio: float
    quartiles: tuple[float, float]
    of_medians: float


@dataclass(frozen=True)
class Times:
    """Seconds of each variant, round by round, and of those that were dropped how many times the baseline's it took."""

    seconds: dict[str, list[float]]
    dropped: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def rounds(self) -> int:
        """How many were made."""
        return max(map(len, self.seconds.values()))

    def median(self, name: str) -> float:
        """Of a variant."""
        return median(self.seconds[name])

    def speedup(self, name: str, baseline: str) -> Speedup:
        """Of a variant against another, in the rounds that both ran in."""
        pairs = zip(self.seconds[baseline], self.seconds[name], strict=False)
        ratios = [theirs / mine for theirs, mine in pairs]
        low, middle, high = quantiles(ratios if len(ratios) > 1 else ratios * 2, method="inclusive")
        return Speedup(middle, (low, high), self.median(baseline) / self.median(name))


def interleave(
    runs: Mapping[str, Work],
    rounds: int,
    *,
    warmups: int = WARMUPS,
    against: str | None = None,
    seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    tick: Callable[[], None] = lambda: None,
) -> Times:
    """Time every variant once in each round: whatever the machine does meanwhile, it does to all of them.

    Every other round is run in reverse, which cancels a steady drift and changes who finds whose data in the caches.

    Args:
        runs: variants by name.
        rounds: that count, 1 or more.
        warmups: rounds before those.
        against: the variant that others are dropped against, by `DROPPED_AT`; None drops none.
        seconds: after so many no other round begins, but one that counts is always made; None: no limit.
        clock: seconds.
        tick: called after every run.
    """
    begun = clock() if seconds is not None else 0.0
    found: dict[str, list[float]] = {name: [] for name in runs}
    dropped: dict[str, float] = {}
    for number in range(-warmups, rounds):
        if number > 0 and seconds is not None and clock() - begun >= seconds:
            break
        order = [(name, run) for name, run in runs.items() if name not in dropped]
        for name, run in reversed(order) if number % 2 else order:
            start = clock()
            run()
            took = clock() - start
            if number >= 0:
                found[name].append(took)
            tick()
        if number == 0 and against is not None:
            ratios = {name: took / found[against][0] for name, (took,) in found.items()}
            dropped = {name: ratio for name, ratio in ratios.items() if ratio >= DROPPED_AT}
    return Times(found, dropped)

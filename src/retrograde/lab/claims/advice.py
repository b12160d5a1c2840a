"""A recommendation from short runs: which method pays on this machine, by what, and how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from retrograde.lab.claims.adhoc import BASELINE
from retrograde.lab.claims.result import Result
from retrograde.lab.claims.statistics import Estimate
from retrograde.lab.claims.wording import points, times

_WORTH = 0.05
"""Less than this share of the time or memory is not worth a changed line."""


@dataclass(frozen=True)
class Judged:
    """What the short runs say of one variant, against plain backpropagation on the same seeds.

    Attributes:
        name: of the variant.
        step: time of a step over plain's.
        accuracy: validation accuracy after the same steps, minus plain's.
        to_target: time to plain's best validation accuracy over the time that plain took; None where it did not get
            there in every seed.
        memory: saved activations over plain's.
        flops: executed FLOPs over plain's.
    """

    name: str
    step: Estimate
    accuracy: Estimate
    to_target: Estimate | None
    memory: Estimate
    flops: Estimate

    @property
    def as_accurate(self) -> bool:
        """No worse than plain, as far as the seeds can tell."""
        return self.accuracy.high is None or self.accuracy.high >= 0

    @property
    def time(self) -> Estimate | None:
        """What a user waits for: the time to plain's accuracy, or for methods that are as accurate, of a step."""
        if self.to_target is not None:
            return self.to_target
        return self.step if self.as_accurate else None


@dataclass(frozen=True)
class Advice:
    """The recommendation.

    Attributes:
        name: of the recommended variant; ``plain`` where nothing pays.
        why: in words, with its figures.
        judged: all variants.
        saves: share of the training time that it should save; negative where it costs some.
    """

    name: str
    why: str
    judged: tuple[Judged, ...]
    saves: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "recommended": self.name,
            "why": self.why,
            "saves": self.saves,
            "contestants": {
                one.name: {
                    key: value.model_dump() if isinstance(value, Estimate) else None
                    for key, value in (
                        ("step", one.step),
                        ("accuracy", one.accuracy),
                        ("to_target", one.to_target),
                        ("memory", one.memory),
                        ("flops", one.flops),
                    )
                }
                for one in self.judged
            },
        }


def advise(result: Result) -> Advice:
    """Recommend the variant that saves most time; failing that, memory; failing that, plain backpropagation.

    A saving counts where the far end of its 95 % interval is a saving too; with one seed, where it is above the least
    that is worth a changed line.
    """
    judged = tuple(_judge(result, name) for name in result.contestants if name != BASELINE)
    timed = [(one, one.time) for one in judged if one.time is not None]
    faster = [(one, time) for one, time in timed if saves(time)]
    if faster:
        best, time = min(faster, key=lambda pair: pair[1].mean)
        reached = best.to_target is not None
        what = "plain's best validation accuracy in" if reached else "as accurate after as many steps, in"
        return Advice(
            best.name,
            f"{what} {times(time)} of plain's time; a step takes {times(best.step)}, validation accuracy after the "
            f"same steps differs by {points(best.accuracy)}",
            judged,
            1 - time.mean,
        )
    smaller = [one for one in judged if one.as_accurate and saves(one.memory)]
    if smaller:
        best = min(smaller, key=lambda one: one.memory.mean)
        return Advice(
            best.name,
            f"no method saves time here, but it keeps {times(best.memory)} of the activations; a step takes "
            f"{times(best.step)}, validation accuracy after the same steps differs by {points(best.accuracy)}",
            judged,
            1 - best.step.mean,
        )
    why = "no method saves time or memory on this model and machine"
    return Advice(BASELINE, why + _undecided(timed), judged, 0.0)


def _undecided(timed: Sequence[tuple[Judged, Estimate]]) -> str:
    """Whoever may save time: its mean is a saving, its interval is not."""
    open_ones = [(one, time) for one, time in timed if time.mean <= 1 - _WORTH]
    if not open_ones:
        return ""
    best, time = min(open_ones, key=lambda pair: pair[1].mean)
    return (
        f" for sure. {best.name} may: {times(time)} of plain's time, which these runs leave open; more seeds or longer "
        "runs decide it"
    )


def _judge(result: Result, name: str) -> Judged:
    paired = result.against_baseline[name]

    def over(metric: str) -> Estimate:
        found = paired[metric].over
        return found if found is not None else paired[metric].minus

    target = paired.get("seconds_to_target")
    return Judged(
        name=name,
        step=over("step_seconds"),
        accuracy=paired["best_validation"].minus,
        to_target=target.over if target is not None else None,
        memory=over("saved_bytes"),
        flops=over("executed"),
    )


def saves(share: Estimate) -> bool:
    """Whether a share of plain's time or memory is worth a changed line, and sure as far as the seeds can tell."""
    end = share.mean if share.high is None else share.high
    return share.mean <= 1 - _WORTH and end < 1

"""A recommendation from short runs: which method pays on this machine, by what, and how sure that is."""

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

    @property
    def beside(self) -> str:
        """What else it changes, in words."""
        return (
            f"a step takes {times(self.step)}, validation accuracy after the same steps differs by "
            f"{points(self.accuracy)}"
        )


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
                    for key, value in vars(one).items()
                    if key != "name"
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
    timed = sorted(((one, one.time) for one in judged if one.time is not None), key=lambda pair: pair[1].mean)
    smaller = sorted((one for one in judged if one.as_accurate), key=lambda one: one.memory.mean)
    for best, time in timed:
        if saves(time):
            reached = best.to_target is not None
            what = "plain's best validation accuracy in" if reached else "as accurate after as many steps, in"
            return Advice(
                best.name, f"{what} {times(time)} of plain's time; {best.beside}", judged, 1 - time.mean
            )
    for best in smaller:
        if saves(best.memory):
            why = f"no method saves time here, but it keeps {times(best.memory)} of the activations; {best.beside}"
            return Advice(best.name, why, judged, 1 - best.step.mean)
    why = "no method saves time or memory on this model and machine"
    for best, time in timed[:1]:
        if time.mean <= 1 - _WORTH:
            why += (
                f" for sure. {best.name} may: {times(time)} of plain's time, which these runs leave open; more seeds "
                "or longer runs decide it"
            )
    return Advice(BASELINE, why, judged, 0.0)


def _judge(result: Result, name: str) -> Judged:
    over = result.ratios(name)
    return Judged(
        name=name,
        step=over["step_seconds"],
        accuracy=result.against_baseline[name]["best_validation"].minus,
        to_target=over.get("seconds_to_target"),
        memory=over["saved_bytes"],
        flops=over["executed"],
    )


def saves(share: Estimate) -> bool:
    """Whether a share of plain's time or memory is worth a changed line, and sure as far as the seeds can tell."""
    end = share.mean if share.high is None else share.high
    return share.mean <= 1 - _WORTH and end < 1

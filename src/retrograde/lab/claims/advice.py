"""A recommendation from short runs: which method pays on this machine, by what, and how sure that is."""

from pydantic import BaseModel

from retrograde.lab.claims.adhoc import BASELINE
from retrograde.lab.claims.result import Result
from retrograde.lab.claims.statistics import Estimate
from retrograde.lab.claims.wording import points, times

_WORTH = 0.05
"""Less than this share of the time or memory is not worth a changed line."""


class Judged(BaseModel):
    """What the short runs say of one variant, against plain backpropagation on the same seeds.

    Attributes:
        step: time of a step over plain's.
        accuracy: validation accuracy after the same steps, minus plain's.
        to_target: time to plain's best validation accuracy over the time that plain took; None where it did not get
            there in every seed.
        memory: saved activations over plain's.
        flops: executed FLOPs over plain's.
    """

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


class Advice(BaseModel):
    """The recommendation.

    Attributes:
        recommended: name of a variant; ``plain`` where nothing pays.
        why: in words, with its figures.
        saves: share of the training time that it should save; negative where it costs some.
        contestants: all variants but plain, by name.
    """

    recommended: str
    why: str
    saves: float
    contestants: dict[str, Judged]


def advise(result: Result) -> Advice:
    """Recommend the variant that saves most time; failing that, memory; failing that, plain backpropagation.

    A saving counts where the far end of its 95 % interval is a saving too; with one seed, where it is above the least
    that is worth a changed line.
    """
    judged = {name: _judge(result, name) for name in result.contestants if name != BASELINE}
    timed = [(name, one.time) for name, one in judged.items() if one.time is not None]
    timed.sort(key=lambda pair: pair[1].mean)
    smaller = [(name, one.memory) for name, one in judged.items() if one.as_accurate]
    smaller.sort(key=lambda pair: pair[1].mean)

    def recommend(name: str, why: str, saves: float) -> Advice:
        return Advice(recommended=name, why=why, saves=saves, contestants=judged)

    for name, time in timed:
        if saves(time):
            best = judged[name]
            reached = best.to_target is not None
            what = "plain's best validation accuracy in" if reached else "as accurate after as many steps, in"
            return recommend(name, f"{what} {times(time)} of plain's time; {best.beside}", 1 - time.mean)
    for name, memory in smaller:
        if saves(memory):
            best = judged[name]
            why = f"no method saves time here, but it keeps {times(memory)} of the activations; {best.beside}"
            return recommend(name, why, 1 - best.step.mean)
    why = "no method saves time or memory on this model and machine"
    for name, time in timed[:1]:
        if time.mean <= 1 - _WORTH:
            why += (
                f" for sure. {name} may: {times(time)} of plain's time, which these runs leave open; more seeds "
                "or longer runs decide it"
            )
    return recommend(BASELINE, why, 0.0)


def _judge(result: Result, name: str) -> Judged:
    over = result.ratios(name)
    return Judged(
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

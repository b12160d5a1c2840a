"""What a scenario's figures say, in words, and from what this machine gains most."""

from collections.abc import Sequence
from dataclasses import dataclass

from retrograde.lab.claims.advice import points, saves, times
from retrograde.lab.claims.result import Result
from retrograde.lab.claims.statistics import Estimate, estimate
from retrograde.lab.demo.scenarios import BASELINE, Scenario


@dataclass(frozen=True)
class Verdict:
    """What came of one method.

    Attributes:
        scenario: by name.
        name: of the run.
        label: of the method.
        gains: whether the figure that decides is better than the baseline's, at no measurable loss of accuracy.
        words: that, with its figures, and for a method that gains nothing the reason that they support.
    """

    scenario: str
    name: str
    label: str
    gains: bool
    words: str


def judge(scenario: Scenario, result: Result) -> list[Verdict]:
    """Every method of a scenario against its baseline."""
    return [
        Verdict(scenario.name, name, entry.label, *_words(scenario, result, name))
        for name, entry in result.contestants.items()
        if name not in (BASELINE, scenario.without)
    ]


def advice(shown: Sequence[tuple[Scenario, Result]]) -> str:
    """From which method this machine gains most: time first, then memory, as `retrograde advise` ranks them."""
    gains: list[tuple[bool, float, str]] = []
    for scenario, result in shown:
        of_memory = scenario.metric == "mean_saved_bytes"
        for verdict in judge(scenario, result):
            over = result.ratios(verdict.name).get(scenario.time or scenario.metric)
            if over is None or not verdict.gains:
                continue
            label = f"{verdict.label}, on {scenario.claim.title.rpartition(': ')[2]}"
            if of_memory:
                said = f"No method saves time on this machine here; in memory it would gain from {label}: it keeps"
                gains.append((of_memory, over.mean, f"{said} {times(over)} of plain’s bytes."))
            elif scenario.time is not None and saves(over):
                to_target = scenario.time == "seconds_to_target"
                what = "the way to plain’s best accuracy" if to_target else "a step"
                said = (
                    f"This machine would gain most from {label}: {what} takes {times(over)} of plain’s time."
                )
                gains.append((of_memory, over.mean, said))
    plain = (
        "On this machine plain backpropagation is best for work of this size: no method saves time or memory."
    )
    return min(gains, default=(False, 1.0, plain))[-1]


def _words(scenario: Scenario, result: Result, name: str) -> tuple[bool, str]:
    accuracy = result.against_baseline[name]["accuracy"].minus
    if scenario.metric == "accuracy":
        gains, words = _of_accuracy(accuracy, scenario.unit)
        return gains, words + _beside(scenario, result, name)
    ratios = result.ratios(name)
    over = ratios.get(scenario.metric)
    if over is None:
        return False, f"no gain here: it did not get {scenario.unit} in every seed"
    # One seed has no interval: a point is then more than it may cost.
    worse = (accuracy.mean + 0.01 if accuracy.high is None else accuracy.high) < 0
    if saves(over) and not worse:
        return True, f"{_gain(scenario, over)}, {_accuracy(accuracy)}"
    if saves(over):
        return False, f"{_gain(scenario, over)}, but less accurate by {points(accuracy)}"
    if over.mean < 1 and over.high is not None and over.high >= 1:
        return False, f"not decided: {times(over)} of plain’s; more seeds would tell, {_accuracy(accuracy)}"
    return False, f"no gain here: {times(over)} of plain’s; {_reason(scenario, ratios)}"


def _of_accuracy(accuracy: Estimate, unit: str) -> tuple[bool, str]:
    if accuracy.mean > 0 and (accuracy.low is None or accuracy.low > 0):
        return True, f"more accurate {unit} by {points(accuracy)}"
    if accuracy.high is None:
        return False, f"no gain here: {points(accuracy)} {unit}, with one seed"
    if accuracy.high < 0:
        return False, f"no gain here: less accurate {unit} by {points(accuracy)}"
    return False, f"no gain here {unit}: {points(accuracy)}, within the noise"


def _beside(scenario: Scenario, result: Result, name: str) -> str:
    """Against the same network without the method."""
    if scenario.without in (None, name):
        return ""
    pairs = zip(result.figures(name, "accuracy"), result.figures(scenario.without, "accuracy"), strict=True)
    found = estimate([ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None])
    return f"; {points(found)} over {result.contestants[scenario.without].label} alone"


def _gain(scenario: Scenario, over: Estimate) -> str:
    if scenario.metric.endswith("bytes"):
        return f"{100 * (1 - over.mean):.0f} % fewer bytes {scenario.unit}"
    return f"{1 / over.mean:.1f}× faster {scenario.unit}"


def _accuracy(accuracy: Estimate) -> str:
    if accuracy.low is None or accuracy.high is None:
        return f"accuracy {points(accuracy)} with one seed"
    if accuracy.low <= 0 <= accuracy.high:
        return "accuracy within the noise"
    return f"accuracy {points(accuracy)}"


def _reason(scenario: Scenario, ratios: dict[str, Estimate]) -> str:
    """Why time is not saved, as far as what was measured says."""
    step, steps, flops = (ratios.get(metric) for metric in ("step_seconds", "steps_to_target", "executed"))
    if scenario.metric == "seconds_to_target" and steps is not None and step is not None:
        return f"it takes {times(steps)} of the steps, but each takes {times(step)} of the time"
    if scenario.metric.endswith("seconds") and flops is not None:
        if flops.mean < 1:
            return f"it runs {100 * flops.mean:.0f} % of the FLOPs, but its own work on small layers outweighs that"
        return f"with its own work it runs {100 * flops.mean:.0f} % of plain’s FLOPs"
    return "it keeps no less than plain training does"

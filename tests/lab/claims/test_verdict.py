"""From figures to findings and a verdict."""

import math
from typing import Any

import pytest
from scipy import stats
from small_claims import made_up

from retrograde.lab.claims.definition import Check
from retrograde.lab.claims.metrics import of_run, to_target
from retrograde.lab.claims.result import Finding, Reading, Result
from retrograde.lab.claims.verdict import complete, find, judge
from retrograde.lab.record import Flops, Outcome

A = [0.90, 0.92, 0.94]
B = [0.89, 0.92, 0.91]


def check(**fields: Any) -> Check:
    return Check.model_validate({"says": "it holds", "of": "a", "metric": "accuracy", **fields})


def two(a: list[float | None] = A, b: list[float | None] = B, metric: str = "accuracy") -> Result:
    return made_up({"b": {metric: b}, "a": {metric: a}})


# Findings.


def test_alone_the_mean_decides() -> None:
    found = find(check(at_least=0.9199), two())
    assert found.holds
    assert found.value == pytest.approx(0.92)
    assert found.low is not None
    assert found.low < 0.9199, "by its interval it would not hold"
    assert (found.bound, found.direction, found.by) == (0.9199, "at least", "mean")
    assert not find(check(at_least=0.9201), two()).holds


def test_at_most() -> None:
    assert find(check(at_most=0.93), two()).holds
    assert not find(check(at_most=0.91), two()).holds
    assert find(check(at_most=0.93), two()).direction == "at most"


def test_by_interval_its_far_end_decides() -> None:
    """The lower end against at_least, the upper one against at_most."""
    ends = stats.ttest_1samp(A, 0.0).confidence_interval(0.95)
    assert find(check(by="interval", at_least=ends.low - 1e-6), two()).holds
    assert not find(check(by="interval", at_least=ends.low + 1e-6), two()).holds
    assert find(check(by="interval", at_most=ends.high + 1e-6), two()).holds
    assert not find(check(by="interval", at_most=ends.high - 1e-6), two()).holds


def test_minus_is_paired_and_its_interval_decides() -> None:
    ends = stats.ttest_rel(A, B).confidence_interval(0.95)
    found = find(check(minus="b", at_least=ends.low - 1e-6), two())
    assert found.holds
    assert found.value == pytest.approx(0.04 / 3)
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    assert (found.by, found.kind) == ("interval", "difference")
    assert not find(check(minus="b", at_least=ends.low + 1e-6), two()).holds
    assert find(check(minus="b", at_least=0.013, by="mean"), two()).holds


def test_over_is_paired() -> None:
    """The mean of ratios, not the ratio of means."""
    result = two([1.0, 6.0], [2.0, 2.0], metric="seconds")
    assert find(check(metric="seconds", over="b", at_most=2.0, by="mean"), result).value == 1.75
    skewed = two([1.0, 1.0], [1.0, 4.0], metric="seconds")
    assert find(check(metric="seconds", over="b", at_most=2.0), skewed).value == pytest.approx(0.625)


def test_over_nothing_does_not_hold() -> None:
    found = find(check(over="b", at_least=0.0), two(b=[0.0, 0.5, 0.5]))
    assert not found.holds


def test_one_seed_is_decided_by_its_figure() -> None:
    assert find(check(minus="b", at_least=0.01), two([0.9], [0.85])).holds
    assert not find(check(minus="b", at_least=0.06), two([0.9], [0.85])).holds


def test_exceeds_is_a_second_bound() -> None:
    assert find(check(at_least=0.9), two()).exceeds is None
    assert find(check(at_least=0.9, exceeds=0.915), two()).exceeds is True
    found = find(check(at_least=0.9, exceeds=0.95), two())
    assert (found.holds, found.exceeds) == (True, False)
    assert find(check(at_most=0.95, exceeds=0.93), two()).exceeds is True
    assert find(check(at_most=0.95, exceeds=0.91), two()).exceeds is False


def test_a_missing_figure_does_not_hold() -> None:
    found = find(check(at_least=0.0, exceeds=0.5), two([0.9, None, None]))
    assert (found.holds, found.exceeds, found.value) == (False, False, None)
    assert found.remark == "a has no figure for 2 of 3 seeds"


def test_a_rivals_missing_figure_does_not_hold() -> None:
    found = find(check(minus="b", at_least=-1.0), two(b=[0.9, None, 0.9]))
    assert (found.holds, found.value) == (False, None)
    assert found.remark == "b has no figure to compare with"


# Time to a target.


READINGS = [(10, 1.0, 0.5), (20, 2.0, 0.7), (30, 3.0, 0.6), (40, 4.0, 0.8)]


@pytest.mark.parametrize(
    ("target", "expected"),
    [(0.4, (1.0, 10)), (0.5, (1.0, 10)), (0.55, (2.0, 20)), (0.75, (4.0, 40)), (0.81, None)],
)
def test_the_first_reading_that_reaches(target: float, expected: tuple[float, int] | None) -> None:
    curve = [Reading(step=step, seconds=s, accuracy=a) for step, s, a in READINGS]
    assert to_target(curve, target) == expected


def raced(goal: float) -> Result:
    """Contestant a gets to `b`'s best after 2 s; b itself reads `READINGS`."""
    figures: dict[str, dict[str, list[float | None]]] = {
        "b": {"best_validation": [0.8, goal], "seconds": [5.0, 5.0], "steps": [50.0, 50.0]},
        "a": {"best_validation": [0.9, 0.9], "seconds": [5.0, 5.0], "steps": [50.0, 50.0]},
    }
    curves = {"b": READINGS, "a": [(10, 1.0, 0.6), (20, 2.0, 0.9)]}
    return made_up(figures, curves=curves, target="b")


def test_times_are_taken_to_the_targets_best_of_the_same_seed() -> None:
    result = complete(raced(0.6), [])
    assert result.figures("b", "seconds_to_target") == [4.0, 2.0]
    assert result.figures("b", "steps_to_target") == [40, 20]
    assert result.figures("a", "seconds_to_target") == [2.0, 1.0]
    assert result.against_baseline["a"]["seconds_to_target"].over is not None
    assert result.against_baseline["a"]["seconds_to_target"].over.mean == 0.5


def test_by_budgets_only_the_ends_of_runs_count() -> None:
    """What is read before a schedule's end reaches nothing; the better of two targets is the goal, seed by seed."""
    figures: dict[str, dict[str, list[float | None]]] = {
        name: {"best_validation": [0.99, 0.99]} for name in ("a", "b", "ours", "never")
    }
    curves = {
        "a": [(10, 1.0, 0.95), (40, 4.0, 0.80)],
        "b": [(40, 4.0, 0.82)],
        "ours": [(10, 1.0, 0.90), (40, 6.0, 0.85)],
        "never": [(40, 4.0, 0.81)],
    }
    result = made_up(figures, curves=curves, target=["a", "b"])
    ends = {"a": (0.7, 0.7), "b": (0.6, 0.83), "ours": (0.82, 0.81), "never": (0.1, 0.81)}
    for name, accuracies in ends.items():
        for seed, accuracy in enumerate(accuracies):
            whole = next(run for run in result.runs if (run.contestant, run.seed) == (name, seed))
            end = Reading(step=20, seconds=2.5, accuracy=accuracy)
            result.shorter.append(whole.model_copy(update={"curve": [end]}))
    result = complete(result, [])
    assert result.goals() == {0: 0.82, 1: 0.82}
    assert result.target_label == "a or b"
    assert result.figures("ours", "seconds_to_target") == [2.5, 6.0]
    assert result.figures("ours", "steps_to_target") == [20, 40]
    assert result.figures("b", "seconds_to_target") == [4.0, 2.5]
    assert result.figures("a", "seconds_to_target") == [None, None]
    assert result.figures("never", "seconds_to_target") == [None, None]


@pytest.mark.parametrize(("metric", "whole"), [("seconds_to_target", 5.0), ("steps_to_target", 50.0)])
def test_a_rival_that_never_gets_there_counts_its_whole_run(metric: str, whole: float) -> None:
    result = raced(0.85)
    found = complete(result, [check(metric=metric, over="b", at_most=1.0, by="mean")]).findings[0]
    ours, theirs = result.figures("a", metric), result.figures("b", metric)
    assert theirs[1] is None
    assert found.value == pytest.approx(((ours[0] or 0) / (theirs[0] or 0) + (ours[1] or 0) / whole) / 2)
    assert found.remark == "b did not reach the target in 1 of 2 seeds: its whole run is counted"


def test_whoever_never_gets_there_is_not_judged_by_it() -> None:
    """The favour is the rival's alone."""
    result = raced(0.95)
    found = complete(result, [check(metric="seconds_to_target", over="b", at_most=9.0)]).findings[0]
    assert not found.holds
    assert found.remark == "a has no figure for 1 of 2 seeds"


# Summaries.


def test_summaries_are_of_what_every_seed_has() -> None:
    figures: dict[str, dict[str, list[float | None]]] = {
        "b": {"accuracy": [0.8, 0.9], "zeros": [None, None], "seconds": [0.0, 1.0]},
        "a": {"accuracy": [0.9, 0.8], "zeros": [0.5, 0.7], "seconds": [1.0, 1.0], "sharpness": [3.0, None]},
    }
    result = complete(made_up(figures), [])
    assert set(result.summaries["a"]) == {"accuracy", "zeros", "seconds"}
    assert set(result.summaries["b"]) == {"accuracy", "seconds"}
    assert result.summaries["a"]["zeros"].mean == pytest.approx(0.6)
    assert set(result.against_baseline) == {"a"}
    assert set(result.against_baseline["a"]) == {"accuracy", "seconds"}
    assert result.against_baseline["a"]["accuracy"].minus.mean == pytest.approx(0.0)
    assert result.against_baseline["a"]["seconds"].over is None, "a baseline of 0 has no ratio"


def test_shares_of_flops() -> None:
    """Of the whole step; the backward pass's are what is left without the forward pass."""
    sums = {"dense": 300.0, "needed": 200.0, "executed": 250.0, "discounted": 150.0, "overhead": 1.0}
    flops = Flops.model_validate(sums | {"forward": {"dense": 100.0, "discounted": 90.0}})
    found = of_run(Outcome(flops=flops, test={"accuracy": math.nan}, measures={"sharpness": 2.0}))
    assert (found["needed"], found["executed"], found["discounted"]) == pytest.approx((2 / 3, 5 / 6, 0.5))
    assert found["discounted_backward"] == pytest.approx((150 - 90) / (300 - 100))
    assert found["sharpness"] == 2.0
    assert found["accuracy"] is None


# The verdict.


def finding(holds: bool, exceeds: bool | None = None) -> Finding:
    return Finding(
        says="",
        metric="accuracy",
        kind="figure",
        value=1.0,
        low=None,
        high=None,
        bound=0.5,
        direction="at least",
        by="mean",
        holds=holds,
        exceeds=exceeds,
    )


@pytest.mark.parametrize(
    ("findings", "verdict"),
    [
        ([], "no checks"),
        ([(True, None), (True, None)], "reproduced"),
        ([(True, None), (False, None)], "partly"),
        ([(False, None), (False, None)], "not reproduced"),
        ([(True, True), (True, None)], "exceeded"),
        ([(True, True), (True, False)], "reproduced"),
        ([(True, True), (False, None)], "partly"),
    ],
)
def test_verdicts(findings: list[tuple[bool, bool | None]], verdict: str) -> None:
    assert judge([finding(*one) for one in findings]) == verdict


def test_a_result_carries_its_verdict() -> None:
    checks = [check(at_least=0.9), check(at_least=0.99)]
    assert complete(two(), checks).verdict == "partly"
    assert complete(two(), checks[:1]).verdict == "reproduced"

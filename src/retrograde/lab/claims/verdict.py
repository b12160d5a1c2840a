"""From runs to summaries, findings and a verdict: nothing here is typed by hand."""

from collections.abc import Sequence

from retrograde.lab.claims import metrics
from retrograde.lab.claims.definition import Check
from retrograde.lab.claims.result import Finding, Ratio, Result, Verdict
from retrograde.lab.claims.statistics import Estimate, estimate


def complete(result: Result, checks: Sequence[Check]) -> Result:
    """The result with the time to the target, summaries, findings and verdict."""
    if result.target is not None:
        _time_to_target(result)
    baseline = result.baseline
    for name in result.contestants:
        seeds = result.seeds_of(name)
        result.summaries[name] = {
            metric: estimate(values)
            for metric in metrics.ALL
            if (values := _known(result.figures(name, metric, seeds))) is not None
        }
        if name != baseline:
            common = [seed for seed in seeds if seed in result.seeds_of(baseline)]
            result.against_baseline[name] = {
                metric: ratio
                for metric in metrics.ALL
                if (ratio := _ratio(*(result.figures(one, metric, common) for one in (name, baseline))))
                is not None
            }
    result.findings = [find(check, result) for check in checks]
    result.verdict = judge(result.findings)
    return result


def judge(findings: Sequence[Finding]) -> Verdict:
    """All hold: reproduced, or exceeded where every check that asks for more has it; some: partly; none: not."""
    if not findings:
        return "no checks"
    if not any(finding.holds for finding in findings):
        return "not reproduced"
    if not all(finding.holds for finding in findings):
        return "partly"
    asked = [finding.exceeds for finding in findings if finding.exceeds is not None]
    return "exceeded" if asked and all(asked) else "reproduced"


def find(check: Check, result: Result) -> Finding:
    """What the runs say to a check."""
    least = check.at_least is not None
    limit = check.at_least if check.at_least is not None else check.at_most
    assert limit is not None
    paired = check.minus or check.over
    by = check.by or ("interval" if paired else "mean")
    found, remark = _figure(check, result)

    def beyond(threshold: float) -> bool:
        if found is None:
            return False
        end = found.low if least else found.high
        decides = found.mean if by == "mean" or end is None else end
        return decides >= threshold if least else decides <= threshold

    return Finding(
        says=check.says,
        metric=check.metric,
        kind="difference" if check.minus else "ratio" if check.over else "figure",
        value=found and found.mean,
        low=found and found.low,
        high=found and found.high,
        bound=limit,
        direction="at least" if least else "at most",
        by=by,
        holds=beyond(limit),
        exceeds=None if check.exceeds is None else beyond(check.exceeds),
        remark=remark,
    )


def _figure(check: Check, result: Result) -> tuple[Estimate | None, str]:
    """What a check looks at; None where seeds have no figure; and what a reader must know of it."""
    ours, other = result.figures(check.of, check.metric), check.minus or check.over
    values = _known(ours)
    if values is None:
        return None, f"{check.of} has no figure for {ours.count(None)} of {len(ours)} seeds"
    if other is None:
        return estimate(values), ""
    theirs, remark = _rival(result, other, check.metric)
    paired = _ratio(ours, theirs)
    found = paired and (paired.minus if check.minus else paired.over)
    return (found, remark) if found else (None, f"{other} has no figure to compare with")


def _rival(result: Result, name: str, metric: str) -> tuple[list[float | None], str]:
    """A rival's figures; one that never reached the target counts with all its time, which favours it."""
    found = result.figures(name, metric)
    if metric not in metrics.TO_TARGET or None not in found:
        return found, ""
    whole = result.figures(name, metric.removesuffix("_to_target"))
    remark = f"{name} did not reach the target in {found.count(None)} of {len(found)} seeds: its whole run is counted"
    return [w if f is None else f for f, w in zip(found, whole, strict=True)], remark


def _time_to_target(result: Result) -> None:
    goals = result.goals()
    for run in result.runs:
        goal = goals.get(run.seed)
        curve = result.ends(run) if result.shorter else run.curve
        reached = None if goal is None else metrics.to_target(curve, goal)
        run.metrics["seconds_to_target"] = reached[0] if reached else None
        run.metrics["steps_to_target"] = reached[1] if reached else None


def _known(values: Sequence[float | None]) -> list[float] | None:
    """The values where every seed has one."""
    found = [value for value in values if value is not None]
    return found if found and len(found) == len(values) else None


def _ratio(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Ratio | None:
    a, b = _known(ours), _known(theirs)
    if a is None or b is None:
        return None
    return Ratio(
        minus=estimate([x - y for x, y in zip(a, b, strict=True)]),
        over=estimate([x / y for x, y in zip(a, b, strict=True)]) if all(b) else None,
    )

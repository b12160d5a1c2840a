"""How figures are written, in a terminal, in documents and in reports alike: a mean ± half of its 95 % interval."""

from retrograde.lab.claims import metrics
from retrograde.lab.claims.result import Finding, Result
from retrograde.lab.claims.statistics import Estimate

_NOTHING = 1e-12
"""Half of an interval that is not worth writing."""


def figure(metric: str, value: float) -> str:
    """One value with its unit."""
    return _written(metric, (value,), value)


def spread(metric: str, found: Estimate) -> str:
    """A mean with half of its 95 % interval."""
    return _written(metric, _values(found), found.mean)


def times(ratio: Estimate) -> str:
    """A ratio with half of its interval."""
    return "×" + " ± ".join(f"{value:.2f}" for value in _values(ratio))


def difference(metric: str, found: Estimate) -> str:
    """A difference with its sign and half of its interval; of shares in percentage points."""
    values = _values(found)
    if metrics.ALL[metric].unit == "%":
        mean, *half = (f"{100 * value:.2f}" for value in values)
        text = " ± ".join((mean, *half)) + " points"
    else:
        text = _written(metric, values, found.mean)
    sign = "+" if found.mean > 0 and not text.startswith("−") else ""
    return f"{sign}{text}".replace("-", "−")


def points(found: Estimate) -> str:
    """A difference of accuracies with half of its interval."""
    return difference("accuracy", found)


def _values(found: Estimate) -> tuple[float, ...]:
    """The mean, and half of the interval where there is one."""
    return (found.mean,) if found.half is None or found.half < _NOTHING else (found.mean, found.half)


def _written(metric: str, values: tuple[float, ...], size: float) -> str:
    """Values in one unit with one number of digits, which those of `size` get."""
    unit, factor = metrics.ALL[metric].unit, 1.0
    match unit:
        case "%":
            factor, digits = 100.0, metrics.ALL[metric].digits
        case "MiB":
            factor, digits = 1 / 2**20, 2
        case "10⁻⁶":
            factor, digits = 1e6, 2
        case "s" if abs(size) < 1e-3:
            unit, factor, digits = "µs", 1e6, 1
        case "s" if abs(size) < 1:
            unit, factor, digits = "ms", 1e3, 2
        case "s":
            digits = 1
        case _:
            digits = 0 if abs(size) >= 100 else 1 if abs(size) >= 10 else 2
            digits = 0 if all(float(value).is_integer() for value in values) else digits
    text = " ± ".join(f"{factor * value:,.{digits}f}" for value in values).replace("-", "−")
    return f"{text} {unit}".rstrip()


def cell(result: Result, name: str, metric: str) -> str:
    """A variant's figure in a table; how many seeds have one, where not all do."""
    found = result.summaries[name].get(metric)
    if found is not None:
        return spread(metric, found)
    seeds = result.seeds_of(name)
    reached = [value for value in result.figures(name, metric, seeds) if value is not None]
    if not reached:
        return "never" if metric in metrics.TO_TARGET else "–"
    return f"{figure(metric, sum(reached) / len(reached))} in {len(reached)} of {len(seeds)}"


def source(result: Result, name: str) -> str:
    """The source's figures of a variant."""
    figures = result.contestants[name].source
    return ", ".join(f"{metrics.ALL[m].label} {figure(m, value)}" for m, value in figures.items()) or "–"


def ratio(result: Result, name: str, metric: str) -> str | None:
    """A figure over the baseline's, with half of its interval; None where there is none."""
    found = result.ratios(name).get(metric)
    return None if found is None else times(found)


def outcome(finding: Finding) -> str:
    """A finding's figure with half of its interval, as its metric is written, and what a reader must know of it."""
    if finding.value is None:
        return finding.remark
    return f"{found(finding)}" + (f"; {finding.remark}" if finding.remark else "")


def found(finding: Finding) -> str:
    """A finding's figure with half of its interval; a dash where there is none."""
    if finding.value is None:
        return "–"
    return _as_found(
        finding,
        Estimate(n=1, mean=finding.value, deviation=None, low=finding.low, high=finding.high),
    )


def bound(finding: Finding) -> str:
    """What a finding is held against, and how."""
    who = "the far end of the interval" if finding.by == "interval" else "the mean"
    limit = Estimate(n=1, mean=finding.bound, deviation=None, low=None, high=None)
    return f"{finding.direction} {_as_found(finding, limit)}, {who} decides"


def _as_found(finding: Finding, value: Estimate) -> str:
    """A value of a finding: differences of shares in points, ratios as such."""
    match finding.kind:
        case "ratio":
            return times(value)
        case "difference":
            return difference(finding.metric, value)
        case "figure":
            return spread(finding.metric, value)

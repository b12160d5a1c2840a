"""The plots of a result: accuracy against time, against what it costs, and seed by seed."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np

from retrograde.lab.claims import metrics, wording
from retrograde.lab.claims.result import Result, Run
from retrograde.report.comparison import INK, Comparison
from retrograde.report.pictures.chart import Chart, Plot, Points, broken
from retrograde.report.pictures.lines import Line, lines_chart
from retrograde.report.table import Swatch

MOST_READINGS = 200
_DIFFERENT = 1.05
"""Costs this many times apart are worth an axis."""
_LOGARITHMIC = 20.0


def result_charts(comparison: Comparison) -> list[Chart]:
    """All plots of a result; a plot without data is left out."""
    found = [one for one in (time_chart(comparison), _cost(comparison), _paired(comparison)) if one]
    # An odd one out takes a whole line.
    return [replace(found[0], wide=True), *found[1:]] if len(found) % 2 else found


def course(lines: Iterable[Points]) -> list[Points]:
    """The seeds' lines at the same readings, as far as all of them go.

    Each line is taken to be straight between its readings, so nothing is lost at the readings of all of them.
    """
    filled = [line for line in lines if line]
    start, end = (
        max((line[0][0] for line in filled), default=0),
        min((line[-1][0] for line in filled), default=0),
    )
    if start > end:
        # Runs of a single reading, for instance: their ends are all that can be told.
        at = fmean(line[-1][0] for line in filled)
        return [[(at, line[-1][1])] for line in filled]
    grid = np.unique([x for line in filled for x, _ in line if start <= x <= end])
    if len(grid) > MOST_READINGS:
        grid = np.linspace(start, end, MOST_READINGS)
    heights = (np.interp(grid, [x for x, _ in line], [y for _, y in line]).tolist() for line in filled)
    return [list(zip(grid.tolist(), one, strict=True)) for one in heights]


def courses(result: Result) -> dict[str, list[Points]]:
    """Validation accuracy over seconds of every seed, of each variant that has readings.

    Along a run, or from end to end of runs with schedules of different lengths.
    """

    def line(run: Run) -> Points:
        readings = result.ends(run) if result.shorter else run.curve
        return [(reading.seconds, 100 * reading.accuracy) for reading in readings]

    found = {
        name: course(line(run) for run in result.runs if run.contestant == name)
        for name in result.contestants
    }
    return {name: lines for name, lines in found.items() if lines}


def goal(result: Result) -> tuple[float, str] | None:
    """The target in per cent, a validation accuracy as a mean over seeds; and its legend."""
    goals = result.goals()
    if not goals:
        return None
    target = 100 * fmean(goals.values())
    which = "end" if result.shorter else "best"
    return target, f"target, the {which} of {result.target_label}: {target:.2f} %"


def time_chart(comparison: Comparison) -> Chart | None:
    """Validation accuracy over seconds of training, beside the target."""
    found = courses(comparison.result)
    lines = [Line(one.swatch, found[one.name]) for one in comparison.variants if one.name in found]
    if lines and (target := goal(comparison.result)):
        end = max(seeds[0][-1][0] for seeds in found.values())
        lines.append(Line(Swatch(target[1], INK, dash="dash"), [[(0.0, target[0]), (end, target[0])]]))
    # The steep beginning would leave the rest no height.
    later = [y for seeds in found.values() for line in seeds for _, y in line[len(line) // 2 :]]
    ends = " A strong line ends with its shortest run." if comparison.seeded else ""
    return lines_chart(
        "Validation accuracy over time",
        lines,
        x="seconds of training",
        unit=" %",
        least=min(later) - 0.05 * (max(later) - min(later)) if later else None,
        note=f"Seconds of training, all overhead included.{ends}",
    )


def main_metric(result: Result) -> str | None:
    """The first metric of the table that any variant has a figure of."""
    known = {metric for run in result.runs for metric, value in run.metrics.items() if value is not None}
    return next(filter(known.__contains__, result.table), None)


def scale(metric: str) -> tuple[float, str]:
    """What a plot multiplies a metric by, and the unit behind it."""
    unit = metrics.ALL[metric].unit
    return {"%": 100.0, "MiB": 1 / 2**20}.get(unit, 1.0), f" {unit}".rstrip()


def cost_metric(result: Result) -> str:
    """The cost that distinguishes the variants: executed FLOPs, else parameters, else seconds."""
    for metric in ("executed", "parameters"):
        known = [found.mean for one in result.summaries.values() if (found := one.get(metric)) and found.mean]
        if len(known) == len(result.contestants) and max(known) > _DIFFERENT * min(known):
            return metric
    return "seconds"


def _cost(comparison: Comparison) -> Chart | None:
    result, plot = comparison.result, Plot()
    metric, cost = main_metric(result), cost_metric(result)
    if metric is None or metric == cost:
        return None
    (up, unit), (across, cost_unit) = scale(metric), scale(cost)
    costs: list[float] = []
    for variant in comparison.variants:
        both = zip(result.figures(variant.name, cost), result.figures(variant.name, metric), strict=True)
        pairs = [(across * x, up * y) for x, y in both if x is not None and y is not None]
        if not pairs:
            continue
        x, y = _dots(plot, variant.swatch, pairs, f"%{{y:.4~g}}{unit} at %{{x:.4~g}}{cost_unit}")
        costs.append(x)
        plot.legend.append(replace(variant.swatch, mark="box"))
        written = wording.figure(metric, y / up), wording.figure(cost, x / across)
        plot.said.append(f"{variant.label} {' at '.join(written)}")
    if len(costs) < 2:
        return None
    label, against = metrics.ALL[metric].label, metrics.ALL[cost].label
    logarithmic = min(costs) > 0 and max(costs) > _LOGARITHMIC * min(costs)
    plot.figure.update_xaxes(title=against, ticksuffix=cost_unit, type="log" if logarithmic else "linear")
    plot.figure.update_yaxes(ticksuffix=unit)
    note = "Small dots are single seeds, large ones their mean." if comparison.seeded else ""
    return plot.chart(f"{label.capitalize()} against {against}", "Scatter chart", height=320, note=note)


def _paired(comparison: Comparison) -> Chart | None:
    """What each variant has over the baseline, seed by seed."""
    result, (baseline, *others) = comparison.result, comparison.variants
    metric = main_metric(result)
    if metric is None or not comparison.seeded:
        return None
    factor, unit = scale(metric)
    unit = " points" if unit == " %" else unit
    plot, rows, dots = Plot(), list[str](), [0.0]
    for variant in others:
        both = zip(*(result.figures(one.name, metric) for one in (variant, baseline)), strict=True)
        seeds = [factor * (x - y) for x, y in both if x is not None and y is not None]
        if not seeds:
            continue
        place, found = len(rows), result.against_baseline.get(variant.name, {}).get(metric)
        rows.append(broken(variant.label))
        dots += seeds
        if found is not None and found.minus.low is not None and found.minus.high is not None:
            ends = [(factor * end, place) for end in (found.minus.low, found.minus.high)]
            plot.line(variant.swatch, ends, width=3, opacity=0.55)
        points = [(value, float(place)) for value in seeds]
        mean, _ = _dots(plot, variant.swatch, points, f"%{{x:+.4~g}}{unit}", symbol="diamond")
        plot.said.append(f"{variant.label} {mean:+.4g}{unit}")
    room = 0.4 * ((max(dots) - min(dots)) or 1.0)
    title = f"difference{',' if unit else ''}{unit}"
    plot.figure.update_xaxes(title=title, range=[min(dots) - room, max(dots) + room])
    plot.rows(rows)
    plot.figure.add_vline(x=0, line={"color": INK, "width": 1.2, "dash": "dash"})
    return plot.chart(
        f"{metrics.ALL[metric].label.capitalize()}, seed by seed",
        "Dot plot, differences from the baseline",
        height=130 + 44 * len(rows),
        note="Dots: seeds, each less the baseline with the same seed. Diamonds: their mean; bars: its 95 % interval.",
    )


def _dots(
    plot: Plot, swatch: Swatch, seeds: Sequence[tuple[float, float]], hover: str, *, symbol: str = "circle"
) -> tuple[float, float]:
    """Small dots of the seeds, where there are several, and a large one of their mean, which is returned."""
    mean = fmean(x for x, _ in seeds), fmean(y for _, y in seeds)
    if len(seeds) > 1:
        plot.marks(swatch, seeds, size=6, opacity=0.6, hover=hover)
    plot.marks(swatch, [mean], size=13, symbol=symbol, hover=hover)
    return mean

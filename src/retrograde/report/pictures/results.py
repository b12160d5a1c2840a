"""The plots of a result: accuracy against time, against what it costs, and seed by seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from retrograde.lab.claims import metrics, wording
from retrograde.lab.claims.result import Result
from retrograde.report.comparison import INK, Comparison
from retrograde.report.pictures.chart import Chart, Plot, Points, broken
from retrograde.report.table import Swatch

MOST_READINGS = 200
_DIFFERENT = 1.05
"""Costs this many times apart are worth an axis."""
_LOGARITHMIC = 20.0


@dataclass(frozen=True)
class Course:
    """A variant's validation accuracy after so many seconds.

    Attributes:
        seconds: in order; the last are those of the shortest run.
        mean: over seeds, in per cent.
        low: of the worst seed.
        high: of the best one.
    """

    seconds: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def result_charts(comparison: Comparison) -> list[Chart]:
    """All plots of a result; a plot without data is left out."""
    found = [one for one in (time_chart(comparison), _cost(comparison), _paired(comparison)) if one]
    # An odd one out takes a whole line.
    return [replace(found[0], wide=True), *found[1:]] if len(found) % 2 else found


def course(lines: Sequence[Points]) -> Course | None:
    """The seeds' lines as one, as far as all of them go; None where there is none.

    Each line is taken to be straight between its readings, so nothing is lost at the readings of all of them.
    """
    filled = [line for line in lines if line]
    if not filled:
        return None
    start, end = max(line[0][0] for line in filled), min(line[-1][0] for line in filled)
    if start > end:
        # Runs of a single reading, for instance: their ends are all that can be told.
        ends = [line[-1] for line in filled]
        grid = np.array([fmean(x for x, _ in ends)])
        heights = np.array([[y] for _, y in ends])
    else:
        grid = np.unique([x for line in filled for x, _ in line if start <= x <= end])
        if len(grid) > MOST_READINGS:
            grid = np.linspace(start, end, MOST_READINGS)
        heights = np.array([np.interp(grid, [x for x, _ in line], [y for _, y in line]) for line in filled])
    return Course(
        grid.tolist(),
        heights.mean(axis=0).tolist(),
        heights.min(axis=0).tolist(),
        heights.max(axis=0).tolist(),
    )


def courses(result: Result) -> dict[str, Course]:
    """The course of each variant that has readings."""
    found = {
        name: course(
            [
                [(reading.seconds, 100 * reading.accuracy) for reading in run.curve]
                for run in result.runs
                if run.contestant == name
            ]
        )
        for name in result.contestants
    }
    return {name: one for name, one in found.items() if one}


def goal(result: Result) -> tuple[float, str] | None:
    """The target in per cent, the best validation accuracy of its variant as a mean over seeds; and its legend."""
    best = result.summaries.get(result.target or "", {}).get("best_validation")
    if best is None or result.target is None:
        return None
    target = 100 * best.mean
    return target, f"target, the best of {result.contestants[result.target].label}: {target:.2f} %"


def time_chart(comparison: Comparison) -> Chart | None:
    """Validation accuracy over seconds of training, with a band from the worst to the best seed."""
    found, plot = courses(comparison.result), Plot()
    shown = [
        (variant.swatch, found[variant.name]) for variant in comparison.variants if variant.name in found
    ]
    for swatch, one in shown:
        if len(one.seconds) > 1 and one.low != one.high:
            around = [
                *zip(one.seconds, one.high, strict=True),
                *reversed([*zip(one.seconds, one.low, strict=True)]),
            ]
            fill: dict[str, Any] = {"fill": "toself", "fillcolor": swatch.colour, "opacity": 0.15}
            plot.line(swatch, around, width=0, showlegend=False, **fill)
    for swatch, one in shown:
        points = zip(one.seconds, one.mean, strict=True)
        plot.line(swatch, points, marked=True, hover="%{y:.2f} % after %{x:.4~g} s")
        plot.legend.append(swatch)
        plot.said.append(f"{swatch.label} ends at {one.mean[-1]:.2f} % after {one.seconds[-1]:.4g} s")
    heights = [y for one in found.values() for y in (*one.high, *one.low[len(one.low) // 2 :])] or [0.0]
    if found and (target := goal(comparison.result)):
        swatch = Swatch(target[1], INK, dash="dash")
        end = max(one.seconds[-1] for one in found.values())
        plot.line(swatch, [(0, target[0]), (end, target[0])], width=1.4)
        plot.legend.append(swatch)
        heights.append(target[0])
    room = max((max(heights) - min(heights)) * 0.08, 0.05)
    plot.figure.update_xaxes(title="seconds of training", rangemode="tozero")
    plot.figure.update_yaxes(ticksuffix=" %", range=[min(heights) - room, max(heights) + room])
    several = "Mean over seeds, with a band from the worst to the best; a line ends with its shortest run. "
    return plot.chart(
        "Validation accuracy over time",
        "Line chart, validation accuracy over seconds of training",
        height=340,
        note=f"{several if comparison.seeded else ''}Seconds of training, all overhead included.",
    )


def main_metric(result: Result) -> str | None:
    """The first metric of the table that any variant has a figure of."""
    for metric in result.table:
        if any(value is not None for name in result.contestants for value in result.figures(name, metric)):
            return metric
    return None


def scale(metric: str) -> tuple[float, str]:
    """What a plot multiplies a metric by, and the unit behind it."""
    match metrics.ALL[metric].unit:
        case "%":
            return 100.0, " %"
        case "MiB":
            return 1 / 2**20, " MiB"
        case "s":
            return 1.0, " s"
        case _:
            return 1.0, ""


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

"""The plots of a result: accuracy against time, against what it costs, and seed by seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
import plotly.graph_objects as go

from retrograde.lab.claims import metrics, wording
from retrograde.lab.claims.result import Result
from retrograde.report.comparison import INK, Comparison, Variant
from retrograde.report.pictures.chart import Chart, Points, broken, chart, plain, rounded
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
    found = [one for one in (_time(comparison), _cost(comparison), _paired(comparison)) if one]
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


def time_figure(comparison: Comparison) -> go.Figure | None:
    """Validation accuracy over seconds of training, with a band from the worst to the best seed."""
    found = courses(comparison.result)
    look = {variant.name: variant.swatch for variant in comparison.variants}
    if not found:
        return None
    figure = go.Figure()
    for name, one in found.items():
        if len(one.seconds) > 1 and one.low != one.high:
            _band(figure, one, look[name])
    for name, one in found.items():
        swatch = look[name]
        figure.add_scatter(
            x=[rounded(x) for x in one.seconds],
            y=[rounded(y) for y in one.mean],
            name=plain(swatch.label),
            mode="lines+markers" if len(one.seconds) <= 12 else "lines",
            line={"color": swatch.colour, "dash": swatch.dash, "width": 2.4},
            marker={"color": swatch.colour, "size": 5},
            meta=swatch.meta,
            hovertemplate="%{y:.2f} % after %{x:.4~g} s",
        )
    target = goal(comparison.result)
    if target is not None:
        figure.add_scatter(
            x=[0, max(one.seconds[-1] for one in found.values())],
            y=[rounded(target[0])] * 2,
            name=plain(target[1]),
            mode="lines",
            line={"color": INK, "dash": "dash", "width": 1.4},
            hoverinfo="skip",
        )
    later = [y for one in found.values() for y in one.low[len(one.low) // 2 :]]
    highest = max([y for one in found.values() for y in one.high] + ([] if target is None else [target[0]]))
    lowest = min(later)
    room = max((highest - lowest) * 0.08, 0.05)
    figure.update_xaxes(title="seconds of training", rangemode="tozero")
    figure.update_yaxes(ticksuffix=" %", range=[lowest - room, highest + room])
    return figure


def _band(figure: go.Figure, one: Course, swatch: Swatch) -> None:
    red, green, blue = (int(swatch.colour[at : at + 2], 16) for at in (1, 3, 5))
    figure.add_scatter(
        x=[rounded(x) for x in [*one.seconds, *reversed(one.seconds)]],
        y=[rounded(y) for y in [*one.high, *reversed(one.low)]],
        mode="lines",
        line={"width": 0, "color": swatch.colour},
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.15)",
        meta={"run": swatch.run, "ink": False},
        hoverinfo="skip",
        showlegend=False,
    )


def _time(comparison: Comparison) -> Chart | None:
    figure, found = time_figure(comparison), courses(comparison.result)
    if figure is None:
        return None
    shown = [variant for variant in comparison.variants if variant.name in found]
    target = goal(comparison.result)
    several = "Mean over seeds, with a band from the worst to the best; a line ends with its shortest run. "
    ends = "; ".join(
        f"{one.label} ends at {found[one.name].mean[-1]:.2f} % after {found[one.name].seconds[-1]:.4g} s"
        for one in shown
    )
    return chart(
        figure,
        "Validation accuracy over time",
        f"Line chart, validation accuracy over seconds of training. {ends}.",
        [*(one.swatch for one in shown), *([Swatch(target[1], INK, dash="dash")] if target else [])],
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
    result = comparison.result
    metric, cost = main_metric(result), cost_metric(result)
    if metric is None or metric == cost:
        return None
    (up, unit), (across, cost_unit) = scale(metric), scale(cost)
    figure, legend, said = go.Figure(), list[Swatch](), list[str]()
    costs: list[float] = []
    for variant in comparison.variants:
        both = zip(result.figures(variant.name, cost), result.figures(variant.name, metric), strict=True)
        pairs = [(across * x, up * y) for x, y in both if x is not None and y is not None]
        if not pairs:
            continue
        middle = fmean(x for x, _ in pairs), fmean(y for _, y in pairs)
        costs.append(middle[0])
        _dots(figure, variant, pairs, middle, f"%{{y:.4~g}}{unit} at %{{x:.4~g}}{cost_unit}")
        legend.append(replace(variant.swatch, mark="box"))
        written = wording.figure(metric, middle[1] / up), wording.figure(cost, middle[0] / across)
        said.append(f"{variant.label} {' at '.join(written)}")
    if len(legend) < 2:
        return None
    label, against = metrics.ALL[metric].label, metrics.ALL[cost].label
    logarithmic = min(costs) > 0 and max(costs) > _LOGARITHMIC * min(costs)
    figure.update_xaxes(title=against, ticksuffix=cost_unit, type="log" if logarithmic else "linear")
    figure.update_yaxes(ticksuffix=unit)
    return chart(
        figure,
        f"{label.capitalize()} against {against}",
        f"Scatter chart. {'; '.join(said)}.",
        legend,
        height=320,
        note="Small dots are single seeds, large ones their mean." if comparison.seeded else "",
    )


def _paired(comparison: Comparison) -> Chart | None:
    """What each variant has over the baseline, seed by seed."""
    result, (baseline, *others) = comparison.result, comparison.variants
    metric = main_metric(result)
    if metric is None or not comparison.seeded:
        return None
    factor, unit = scale(metric)
    unit = " points" if unit == " %" else unit
    figure, rows, dots, said = go.Figure(), list[str](), [0.0], list[str]()
    for variant in reversed(others):
        both = zip(*(result.figures(one.name, metric) for one in (variant, baseline)), strict=True)
        seeds = [factor * (x - y) for x, y in both if x is not None and y is not None]
        if not seeds:
            continue
        place = len(rows)
        rows.append(broken(variant.label, 18))
        dots += seeds
        found = result.against_baseline.get(variant.name, {}).get(metric)
        if found is not None and found.minus.low is not None and found.minus.high is not None:
            figure.add_scatter(
                x=[rounded(factor * found.minus.low), rounded(factor * found.minus.high)],
                y=[place, place],
                mode="lines",
                line={"color": variant.swatch.colour, "width": 3},
                opacity=0.55,
                hoverinfo="skip",
            )
        mean = fmean(seeds)
        points = [(value, float(place)) for value in seeds]
        _dots(figure, variant, points, (mean, place), f"%{{x:+.4~g}}{unit}", symbol="diamond")
        said.append(f"{variant.label} {mean:+.4g}{unit}")
    if not rows:
        return None
    room = 0.4 * ((max(dots) - min(dots)) or 1.0)
    figure.update_xaxes(
        title=f"difference{',' if unit else ''}{unit}",
        range=[min(dots) - room, max(dots) + room],
    )
    figure.update_yaxes(tickvals=list(range(len(rows))), ticktext=rows, range=[-0.6, len(rows) - 0.4])
    figure.add_vline(x=0, line={"color": INK, "width": 1.2, "dash": "dash"})
    return chart(
        figure,
        f"{metrics.ALL[metric].label.capitalize()}, seed by seed",
        f"Dot plot, differences from the baseline. {'; '.join(reversed(said))}.",
        height=max(260, 130 + 44 * len(rows)),
        note="Dots: seeds, each less the baseline with the same seed. Diamonds: their mean; bars: its 95 % interval.",
    )


def _dots(
    figure: go.Figure,
    variant: Variant,
    seeds: Sequence[tuple[float, float]],
    middle: tuple[float, float],
    hover: str,
    *,
    symbol: str = "circle",
) -> None:
    """Small dots of the seeds, where there are several, and a large one of their mean."""
    small = (seeds, 6, 0.6, "circle")
    for points, size, opacity, mark in (*([small] if len(seeds) > 1 else []), ([middle], 13, 1.0, symbol)):
        figure.add_scatter(
            x=[rounded(x) for x, _ in points],
            y=[rounded(y) for _, y in points],
            name=plain(variant.label),
            mode="markers",
            opacity=opacity,
            marker={"color": variant.swatch.colour, "size": size, "symbol": mark},
            meta=variant.swatch.meta,
            hovertemplate=hover,
        )

"""Lines over epochs or steps, in one manner: of variants with their seeds, and of layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from retrograde.report.pictures.chart import Chart, Plot, Points, mean_line, short
from retrograde.report.table import Swatch

MAX_POINTS = 1000
MAX_POINTS_OF_PLOT = 12_000
"""Lines of one plot share them, so that many seeds do not make a page of many megabytes."""

_MOST_UNIFIED = 8


@dataclass(frozen=True)
class Line:
    """Lines of one colour: of every seed, drawn faintly beside their mean; `lesser` is a dotted second one."""

    swatch: Swatch
    seeds: Sequence[Points]
    lesser: Points = field(default_factory=list[tuple[float, float]])


def lines_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: str = "epoch",
    names: Sequence[str] = (),
    unit: str = "",
    note: str = "",
    log: bool = False,
    least: float | None = None,
    legend: Sequence[Swatch] | None = None,
) -> Chart | None:
    """The lines; None where there is none.

    Args:
        title: of the plot.
        lines: empty ones are left out.
        x: of what it is a plot over.
        names: of the places 0, 1, 2 … along it, where these are layers.
        unit: behind the figures.
        note: what to know of it.
        log: with a logarithmic axis.
        least: what the axis begins with.
        legend: swatches to name, by default all.
    """
    stride = stride_of([line for one in lines for line in (*one.seeds, one.lesser)])
    plot, seeded = Plot(), False
    # Where lines have the same places, one box under the mouse holds the figures of all, while they are few.
    unified = x in ("epoch", "step", "layer") and len(lines) <= _MOST_UNIFIED
    hover = f"%{{y:.4~g}}{unit}" + ("" if unified else f"<br>{x}: %{{x:.4~g}}")
    for one in lines:
        if one.lesser:
            swatch = replace(one.swatch, label=f"{one.swatch.label}, dotted", dash="dot")
            plot.line(swatch, every(one.lesser, stride), width=1.3, hover=hover)
    for one in lines:
        seeds = [every(line, stride) for line in one.seeds if line]
        mean = mean_line(seeds)
        if len(seeds) > 1:
            seeded = True
            # One trace for all seeds: the gaps keep them apart.
            joined = [point for line in seeds for point in (*line, (None, None))]
            plot.line(one.swatch, joined, width=0.9, opacity=0.4, showlegend=False)
        if mean:
            plot.line(one.swatch, mean, marked=True, hover=hover)
            plot.legend.append(one.swatch)
            plot.said.append(f"{one.swatch.label} from {mean[0][1]:.4g}{unit} to {mean[-1][1]:.4g}{unit}")
    # A tick for each epoch or layer while they are few.
    few = x in ("epoch", "layer") and max((len(line) for one in lines for line in one.seeds), default=0) <= 12
    plot.figure.update_xaxes(title=x, dtick=1 if few else None, rangemode="nonnegative")
    plot.figure.update_xaxes(labelalias={str(at): short(name) for at, name in enumerate(names)} or None)
    plot.figure.update_yaxes(ticksuffix=unit, type="log" if log else "linear", range=least and [least, None])
    plot.legend = plot.legend if legend is None else list(legend)
    note += f" Every {stride}th point is drawn." if stride > 1 else ""
    note += " Faint lines are single seeds, strong ones their mean." if seeded else ""
    return plot.chart(title, "Line chart", note=note, hover="x unified" if unified else "closest")


def stride_of(lines: Sequence[Points]) -> int:
    """Every how many points are drawn of the lines of one plot, which share a budget."""
    filled = [len(line) for line in lines if line]
    room = max(25, min(MAX_POINTS, MAX_POINTS_OF_PLOT // max(1, len(filled))))
    return max((-(-length // room) for length in filled), default=1)


def every(line: Points, stride: int) -> Points:
    """Every n-th point, and the last."""
    return line[::stride] + (line[-1:] if (len(line) - 1) % stride else [])

"""What every plot is made of: its frame, its legend, and the variants' lines.

Every plot is a `Chart`: a plotly figure plus its title, its legend and a sentence for those who cannot see it. The
legend is HTML and not plotly's, so that it wraps on a phone and takes no height from the plot. Colours that depend on
the theme (text, grid, the baseline's ink) are set by the page's script; a trace's ``meta`` says whose it is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean
from textwrap import wrap
from typing import Any

import plotly.graph_objects as go

from retrograde.report.comparison import INK
from retrograde.report.table import Swatch

MAX_POINTS = 1000
# Lines of one plot share this many points, so that many seeds do not make a page of many megabytes.
MAX_POINTS_OF_PLOT = 12_000

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A plot: ``spec`` is plotly's JSON, ``alt`` says in a sentence what it shows."""

    title: str
    note: str
    alt: str
    legend: tuple[Swatch, ...]
    height: int
    spec: dict[str, Any]
    wide: bool = False


def chart(
    figure: go.Figure,
    title: str,
    alt: str,
    legend: Iterable[Swatch] = (),
    *,
    height: int = 300,
    note: str = "",
    wide: bool = False,
    hover: str = "closest",
    room: int = 12,
    top: int = 12,
) -> Chart:
    """The figure in the page's frame: no plotly title or legend, and ``room`` and ``top`` pixels for text."""
    figure.update_layout(
        template=go.layout.Template(),
        height=height,
        showlegend=False,
        hovermode=hover,
        margin={"l": 8, "r": room, "t": top, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(automargin=True, zeroline=False, title_standoff=8)
    figure.update_yaxes(automargin=True, zeroline=False)
    return Chart(title, note, alt, tuple(legend), height, figure.to_plotly_json(), wide)


def mean_line(lines: Sequence[Points]) -> Points:
    """The mean of several lines where all of them have the same x; empty lines are left out."""
    heights = [dict(line) for line in lines if line]
    if not heights:
        return []
    return [(x, fmean(y[x] for y in heights)) for x in heights[0] if all(x in y for y in heights)]


def add_seeds(
    figure: go.Figure, swatch: Swatch, lines: Sequence[Points], *, unit: str = "", width: float = 2.4
) -> Points:
    """Draw a variant's line of each seed thinly and their mean strongly; returns the mean."""
    mean = mean_line(lines)
    if len(lines) > 1:
        # One trace for all seeds: the gaps keep them apart.
        joined: list[tuple[float | None, float | None]] = []
        for line in lines:
            joined += [*line, (None, None)]
        figure.add_scatter(
            x=[rounded(x) for x, _ in joined],
            y=[rounded(y) for _, y in joined],
            mode="lines",
            line={"color": swatch.colour, "width": 0.9},
            opacity=0.4,
            meta=swatch.meta,
            hoverinfo="skip",
        )
    add_line(figure, swatch, mean, unit=unit, width=width)
    return mean


def add_line(
    figure: go.Figure,
    swatch: Swatch,
    points: Points,
    *,
    unit: str = "",
    width: float = 2.4,
    dotted: bool = False,
) -> None:
    """Draw one line, with its points marked while they are few; ``dotted`` is for a second, lesser one."""
    figure.add_scatter(
        x=[rounded(x) for x, _ in points],
        y=[rounded(y) for _, y in points],
        name=plain(swatch.label + (", dotted" if dotted else "")),
        mode="lines" if dotted or len(points) > 20 else "lines+markers",
        line={
            "color": swatch.colour,
            "dash": "dot" if dotted else swatch.dash,
            "width": 1.3 if dotted else width,
        },
        marker={"color": swatch.colour, "size": 5},
        meta=swatch.meta,
        hovertemplate=f"%{{y:.4~g}}{unit}",
    )


def rows_axis(figure: go.Figure, names: Sequence[str], at: Sequence[float] | None = None) -> None:
    """Name the rows of a plot of bars or marks, the first at the top."""
    at = list(range(len(names))) if at is None else at
    figure.update_yaxes(
        tickvals=at, ticktext=list(names), range=[max(at) + 0.6, min(at) - 0.6], showgrid=False
    )


def half_interval(values: Sequence[float | None], colour: str = INK) -> dict[str, Any] | None:
    """Whiskers of half a 95 % interval along x; None where no seed is repeated."""
    if not any(values):
        return None
    return {"type": "data", "array": list(values), "color": colour, "width": 3, "thickness": 1.4}


def epoch_axis(figure: go.Figure, most: int) -> None:
    """Label the x axis as epochs, with a tick for each while they are few."""
    figure.update_xaxes(title="epoch")
    if most <= 12:
        figure.update_xaxes(dtick=1)


def thinned(lines: Sequence[Points], budget: int = MAX_POINTS_OF_PLOT) -> tuple[list[Points], int]:
    """The lines of one plot with every n-th point and the last, and the n: all lines share a budget of points."""
    filled = [len(line) for line in lines if line]
    room = max(25, min(MAX_POINTS, budget // max(1, len(filled))))
    stride = max((-(-length // room) for length in filled), default=1)
    return [line[::stride] + (line[-1:] if (len(line) - 1) % stride else []) for line in lines], stride


def rounded(value: float | None) -> float | None:
    """Five digits: more cannot be seen, and the page holds every one."""
    return value if value is None or isinstance(value, int) else float(f"{value:.5g}")


def plain(label: str) -> str:
    """A label as plotly shows it literally: it reads <b>, <a> and the like as markup."""
    return escape(label, quote=False)


def broken(label: str, width: int) -> str:
    """A label for an axis, in two lines at most."""
    return "<br>".join(map(plain, wrap(label, width, max_lines=2, placeholder="…")))


def short(name: str, most: int = 18) -> str:
    """A layer's name for an axis: of a long one the end, which distinguishes layers."""
    return plain(name if len(name) <= most else "…" + name[1 - most :])

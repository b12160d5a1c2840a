"""What every plot is made of: its frame, its legend, and its lines and marks.

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

from retrograde.report.table import Swatch

Points = list[tuple[float, float]]
Gapped = Iterable[tuple[float | None, float | None]]
"""Points, some of which have no coordinates: a line is interrupted there."""


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


class Plot:
    """A plot that is being drawn.

    Attributes:
        figure: plotly's.
        legend: entries below it.
        said: what it shows; a plot of which nothing is said has no data.
    """

    def __init__(self) -> None:
        self.figure = go.Figure()
        self.legend: list[Swatch] = []
        self.said: list[str] = []

    def scatter(self, swatch: Swatch, points: Gapped, *, hover: str = "", **look: Any) -> None:
        """A trace of points; without `hover`, which is plotly's template, they say nothing under the mouse."""
        both = list(points)
        said = {"hovertemplate": hover} if hover else {"hoverinfo": "skip"}
        self.figure.add_scatter(
            x=[rounded(x) for x, _ in both],
            y=[rounded(y) for _, y in both],
            name=plain(swatch.label),
            meta=swatch.meta,
            **said,
            **look,
        )

    def line(
        self, swatch: Swatch, points: Gapped, *, width: float = 2.2, marked: bool = False, **look: Any
    ) -> None:
        """A line in the swatch's colour and dash; with `marked` its points are marked while they are few."""
        both = list(points)
        line = {"color": swatch.colour, "dash": swatch.dash, "width": width}
        marker = {"color": swatch.colour, "size": 5}
        mode = "lines+markers" if marked and len(both) <= 20 else "lines"
        self.scatter(swatch, both, mode=mode, line=line, marker=marker, **look)

    def marks(
        self,
        swatch: Swatch,
        points: Gapped,
        *,
        size: float,
        symbol: str = "circle",
        **look: Any,
    ) -> None:
        """Marks in the swatch's colour."""
        marker = {"symbol": symbol, "size": size, "color": swatch.colour, "line": {"width": 0}}
        self.scatter(swatch, points, mode="markers", marker=marker, **look)

    def rows(self, names: Sequence[str], at: Sequence[float] | None = None) -> None:
        """Name the rows of a plot of bars or marks, the first at the top."""
        at = list(range(len(names))) if at is None else at
        ends = [max(at, default=0) + 0.6, min(at, default=0) - 0.6]
        self.figure.update_yaxes(tickvals=at, ticktext=list(names), range=ends, showgrid=False)

    def chart(
        self,
        title: str,
        kind: str,
        *,
        note: str = "",
        height: int = 300,
        wide: bool = False,
        hover: str = "closest",
        room: int = 12,
        top: int = 12,
    ) -> Chart | None:
        """The plot in the page's frame, without plotly's title and legend; None of one that has no data.

        Args:
            title: above it.
            kind: of plot, for those who cannot see it.
            note: below it.
            height: in pixels, of which 260 are the least.
            wide: takes a whole line of the page.
            hover: plotly's mode.
            room: pixels for text at its right.
            top: the same above it.
        """
        if not self.said:
            return None
        height = max(260, height)
        self.figure.update_layout(
            template=go.layout.Template(),
            height=height,
            showlegend=False,
            hovermode=hover,
            margin={"l": 8, "r": room, "t": top, "b": 8},
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
        )
        self.figure.update_xaxes(automargin=True, zeroline=False, title_standoff=8)
        self.figure.update_yaxes(automargin=True, zeroline=False)
        alt = f"{kind}, {title.lower()}. {'; '.join(self.said)}."
        return Chart(title, note.strip(), alt, tuple(self.legend), height, self.figure.to_plotly_json(), wide)


def mean_line(lines: Iterable[Points]) -> Points:
    """The mean of several lines where all of them have the same x; empty lines are left out."""
    heights = [dict(line) for line in lines if line]
    if not heights:
        return []
    return [(x, fmean(y[x] for y in heights)) for x in heights[0] if all(x in y for y in heights)]


def rounded(value: float | None) -> float | None:
    """Five digits: more cannot be seen, and the page holds every one."""
    return value if value is None or isinstance(value, int) else float(f"{value:.5g}")


def plain(label: str) -> str:
    """A label as plotly shows it literally: it reads <b>, <a> and the like as markup."""
    return escape(label, quote=False)


def broken(label: str, width: int = 18) -> str:
    """A label for an axis, in two lines at most."""
    return "<br>".join(map(plain, wrap(label, width, max_lines=2, placeholder="…")))


def short(name: str, most: int = 18) -> str:
    """A layer's name for an axis: of a long one the end, which distinguishes layers."""
    return plain(name if len(name) <= most else "…" + name[1 - most :])

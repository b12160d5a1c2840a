"""Horizontal bars with whiskers and their figures, in one manner."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

from retrograde.lab.claims.statistics import Estimate
from retrograde.report.comparison import INK
from retrograde.report.pictures.chart import Chart, Plot, plain, rounded
from retrograde.report.table import Swatch

_ROW = 26
"""Pixels."""


@dataclass(frozen=True)
class Bar:
    """A row.

    Attributes:
        label: on the axis.
        total: where it ends, and its interval over seeds.
        end: the text there.
        parts: it is stacked of, by colour.
    """

    label: str
    total: Estimate
    end: str
    parts: dict[Swatch, float]


def bars_chart(
    title: str,
    axis: str,
    rows: Sequence[Bar | str],
    *,
    scale: tuple[float, str] = (1.0, ""),
    note: str = "",
    legend: Sequence[Swatch] = (),
) -> Chart | None:
    """The bars, the first at the top.

    Args:
        title: of the plot.
        axis: what it shows.
        rows: bars, and headings between them.
        scale: what one of the unit is, and its name.
        note: what to know of it.
        legend: with one, of the parts in this order; otherwise each has the row's own colour.
    """
    (factor, unit), plot = scale, Plot()
    bars = {at: bar for at, bar in enumerate(rows) if isinstance(bar, Bar)}
    drawn = dict.fromkeys(swatch for bar in bars.values() for swatch in bar.parts)
    for swatch in filter(drawn.__contains__, legend or drawn):
        own = {at: bar.parts[swatch] / factor for at, bar in bars.items() if swatch in bar.parts}
        plot.figure.add_bar(
            x=[rounded(x) for x in own.values()],
            y=list(own),
            orientation="h",
            width=0.7,
            name=plain(swatch.label),
            marker={"color": swatch.colour, "line": {"width": 0}},
            meta=swatch.meta,
            hovertemplate=f"{plain(swatch.label)}: %{{x:.4~g}} {unit}<extra></extra>",
        )
        plot.legend += [swatch] if legend else []
    head = ""
    for at, row in enumerate(rows):
        if isinstance(row, Bar):
            plot.said.append(f"{head}{row.label.replace('<br>', ' ')} {row.end}")
        else:
            head = f"{row}, "
            place = {"x": 0, "xref": "paper", "xanchor": "left", "showarrow": False}
            plot.figure.add_annotation(
                y=at, text=f"<b>{plain(shorten(row, 34, placeholder='…'))}</b>", **place
            )
    # An interval of less than a thousandth is rounding.
    halves = [h if (h := bar.total.half or 0.0) > bar.total.mean / 1000 else 0.0 for bar in bars.values()]
    ends, none = [bar.total.mean / factor for bar in bars.values()], Swatch("", INK)
    whiskers = {"array": [half / factor for half in halves], "color": INK, "width": 3, "thickness": 1.4}
    plot.marks(none, zip(ends, bars, strict=True), size=0.1, error_x=whiskers if any(halves) else None)
    reach = [end + half / factor for end, half in zip(ends, halves, strict=True)]
    texts: dict[str, Any] = {"mode": "text", "textposition": "middle right", "cliponaxis": False}
    plot.scatter(none, zip(reach, bars, strict=True), text=[f" {bar.end}" for bar in bars.values()], **texts)
    plot.figure.update_layout(barmode="stack")
    plot.figure.update_xaxes(title=f"{unit} {axis}".strip(), range=[0, 1.001 * max(reach, default=0) or 1])
    plot.rows([bar.label for bar in bars.values()], list(bars))
    plot.figure.update_yaxes(range=[len(rows) - 0.4, -0.6])
    if any(halves):
        note += " Bars are means over seeds, and the whisker is half of a 95 % interval."
    return plot.chart(title, "Bar chart", note=note, height=_ROW * len(rows) + 70, wide=True, room=84)

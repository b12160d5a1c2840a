"""Perforate's pictures: its phases over the validation score, and where it put its dendrites."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from retrograde.lab.record import Epoch, RunRecord, mapping, number
from retrograde.report.comparison import INK, Variant
from retrograde.report.pictures.chart import Chart, add_line, chart, half_interval, rounded, rows_axis, short
from retrograde.report.pictures.learning import accuracy
from retrograde.report.table import Swatch

_GROWN = "#009E73"
_SHADE = "rgba(0,158,115,0.13)"


@dataclass(frozen=True)
class Mark:
    """A phase that began at ``step``, with the dendrites accepted until then."""

    step: float
    phase: str
    dendrites: float | None


def perforate(variant: Variant) -> list[Chart | None]:
    """The phases of the first seed, and the dendrites of every layer."""
    return [_phases(variant), _dendrites(variant)]


def marks(run: RunRecord) -> list[Mark]:
    """The run's phase changes in order; an epoch may repeat those of the epochs before it."""
    found: dict[tuple[float, str], Mark] = {}
    for epoch in run.epochs:
        for entry in map(mapping, _entries(epoch) or []):
            step, phase = number(entry.get("step")), entry.get("phase")
            if step is not None and isinstance(phase, str):
                found[step, phase] = Mark(step, phase, number(entry.get("dendrites")))
    return sorted(found.values(), key=lambda mark: mark.step)


def _entries(epoch: Epoch) -> list[Any] | None:
    """The phase changes so far; None where the method is another one."""
    found = epoch.mapping("perforate").get("marks")
    return found if isinstance(found, list) else None


def _phases(variant: Variant) -> Chart | None:
    run = next((run for run in variant.records if any(_entries(e) is not None for e in run.epochs)), None)
    if run is None:
        return None
    line = [(float(epoch.step), y) for epoch in run.epochs if (y := accuracy(epoch)) is not None]
    if not line:
        return None
    figure, found = go.Figure(), marks(run)
    add_line(figure, variant.swatch, line, unit=" %")
    _draw(figure, found, line[-1][0])
    figure.update_xaxes(title="step", range=[0, line[-1][0] * 1.03])
    figure.update_yaxes(ticksuffix=" %")
    which = f" Drawn for one seed, {run.seed}." if len(variant.records) > 1 else ""
    changes = "; ".join(f"{mark.phase} phase from step {mark.step:g}" for mark in found)
    return chart(
        figure,
        "Perforate: phases over validation accuracy",
        f"Line chart, validation accuracy over steps with the phases. {changes}.",
        [Swatch("dendrites learn", _SHADE.replace("0.13", "0.4"), mark="box")],
        note="A vertical line is a change of phase and the number above it the dendrites so far: a gain shows as "
        "a rise after a shaded stretch." + which,
        height=320,
        top=26,
    )


def _draw(figure: go.Figure, found: Sequence[Mark], end: float) -> None:
    shown: float | None = None
    for index, mark in enumerate(found):
        until = found[index + 1].step if index + 1 < len(found) else max(end, mark.step)
        if mark.phase == "dendrite":
            figure.add_shape(
                type="rect", x0=mark.step, x1=until, y0=0, y1=1, yref="paper", fillcolor=_SHADE, line_width=0
            )
        figure.add_shape(
            type="line",
            x0=mark.step,
            x1=mark.step,
            y0=0,
            y1=1,
            yref="paper",
            line={"color": INK, "width": 1, "dash": "dot"},
        )
        if mark.dendrites is not None and mark.dendrites != shown:
            shown = mark.dendrites
            figure.add_annotation(
                x=mark.step, y=1.0, yref="paper", yanchor="bottom", text=f"{shown:g}", showarrow=False
            )


def _dendrites(variant: Variant) -> Chart | None:
    def count(run: RunRecord, name: str) -> float | None:
        layer = run.layers.get(name)
        return layer.number("dendrites") if layer else None

    counts = [
        (name, value)
        for name in variant.layers()
        if (value := variant.estimate(lambda run, name=name: count(run, name)))
    ]
    if not counts:
        return None
    figure = go.Figure()
    figure.add_bar(
        x=[rounded(value.mean) for _, value in counts],
        y=list(range(len(counts))),
        orientation="h",
        width=0.6,
        marker={"color": _GROWN},
        error_x=half_interval([value.half for _, value in counts]),
        hovertemplate="%{x:.3~g} dendrites<extra></extra>",
    )
    figure.update_xaxes(title="dendrites", rangemode="tozero")
    if max(value.mean for _, value in counts) <= 10:
        figure.update_xaxes(dtick=1)
    rows_axis(figure, [short(name) for name, _ in counts])
    ends = "; ".join(f"{name} {value.mean:g}" for name, value in counts)
    return chart(
        figure,
        "Perforate: dendrites of each layer",
        f"Bar chart, accepted dendrites of each layer. {ends}.",
        height=max(320, 22 * len(counts) + 70),
        note="The dendrites each layer has accepted at the end: a long bar is a layer that gained from them.",
    )

"""Perforate's pictures: its phases over the validation score, and where it put its dendrites."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from retrograde.lab.record import Epoch, RunRecord, mapping, number
from retrograde.report.comparison import INK, Variant
from retrograde.report.pictures.bars import Bar, bars_chart
from retrograde.report.pictures.chart import Chart, Plot, short
from retrograde.report.pictures.learning import accuracy
from retrograde.report.table import Swatch

_GROWN = Swatch("dendrites", "#009E73")
_LEARN = Swatch("dendrites learn", "rgba(0,158,115,0.4)", mark="box")


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
    line = [(float(e.step), y) for e in run.epochs if (y := accuracy(e)) is not None] if run else []
    if run is None or not line:
        return None
    plot, found, end = Plot(), marks(run), line[-1][0]
    # Only one run is drawn: without the dash, which distinguishes variants.
    plot.line(replace(variant.swatch, dash="solid"), line, marked=True, hover="%{y:.4~g} %")
    _draw(plot, found, end)
    plot.figure.update_xaxes(title="step", range=[0, end * 1.03])
    plot.figure.update_yaxes(ticksuffix=" %")
    plot.said = [f"{mark.phase} phase from step {mark.step:g}" for mark in found] or ["no phase has changed"]
    plot.legend = [_LEARN]
    which = f" Drawn for one seed, {run.seed}." if len(variant.records) > 1 else ""
    return plot.chart(
        "Perforate: phases over validation accuracy",
        "Line chart, validation accuracy over steps",
        note="A vertical line is a change of phase and the number above it the dendrites so far: a gain shows as "
        f"a rise after a shaded stretch.{which}",
        height=320,
        top=26,
    )


def _draw(plot: Plot, found: Sequence[Mark], end: float) -> None:
    shown: float | None = None
    for index, mark in enumerate(found):
        until = found[index + 1].step if index + 1 < len(found) else max(end, mark.step)
        if mark.phase == "dendrite":
            plot.figure.add_vrect(x0=mark.step, x1=until, fillcolor=_GROWN.colour, opacity=0.13, line_width=0)
        plot.figure.add_vline(x=mark.step, line={"color": INK, "width": 1, "dash": "dot"})
        if mark.dendrites is not None and mark.dendrites != shown:
            shown = mark.dendrites
            place = {"y": 1.0, "yref": "paper", "yanchor": "bottom", "showarrow": False}
            plot.figure.add_annotation(x=mark.step, text=f"{shown:g}", **place)


def _dendrites(variant: Variant) -> Chart | None:
    def count(run: RunRecord, name: str) -> float | None:
        layer = run.layers.get(name)
        return layer.number("dendrites") if layer else None

    rows = [
        Bar(short(name), total, f"{total.mean:.3g}", {_GROWN: total.mean})
        for name in variant.layers()
        if (total := variant.estimate(lambda run, name=name: count(run, name)))
    ]
    return bars_chart(
        "Perforate: dendrites of each layer",
        "dendrites",
        rows,
        note="The dendrites each layer has accepted at the end: a long bar is a layer that gained from them.",
    )

"""What each method did: lines of layers or blocks over epochs, coloured by depth; Perforate's phases and dendrites."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

from plotly.colors import sample_colorscale

from retrograde.lab.record import Epoch, RunRecord, mapping, number
from retrograde.report.comparison import INK, Variant
from retrograde.report.pictures.bars import Bar, bars_chart
from retrograde.report.pictures.chart import Chart, Plot, Points, mean_line, short
from retrograde.report.pictures.lines import Line, lines_chart
from retrograde.report.pictures.runs import accuracy, along
from retrograde.report.table import Swatch

Number = Callable[[Epoch, str], float | None]
"""What an epoch holds of a layer or block."""

# From the first layer to the last; every colour is clear on white and on black.
_RAMP = ("#3f6fb5", "#2f9aa0", "#5aa654", "#c99a2e", "#cf5f3a", "#a8437f")
_MOST_NAMED = 8

_TIERS = {
    "full": Swatch("full", "#2f6690"),
    "low": Swatch("low precision", "#7fb3d1"),
    "skip": Swatch("skipped", "#e0913f"),
}
_GROWN = Swatch("dendrites", "#009E73")
_LEARN = Swatch("dendrites learn", "rgba(0,158,115,0.4)", mark="box")


@dataclass(frozen=True)
class Mark:
    """A phase that began at ``step``, with the dendrites accepted until then."""

    step: float
    phase: str
    dendrites: float | None


def decorrelate(variant: Variant) -> list[Chart | None]:
    """Correlation after the transformation, against that of the layer's input, on a logarithmic axis."""
    return [
        layer_lines(
            variant,
            _of_layer("correlation"),
            "Decorrelate: correlation left in each layer’s input",
            "Solid: after the transformation. Dotted: the input itself. The further a solid line lies below its "
            "dotted one, the more correlation was removed.",
            lesser=_of_layer("correlation_input"),
            log=True,
        )
    ]


def spectral(variant: Variant) -> list[Chart | None]:
    """How well each layer's small basis holds its gradient, and how it moves."""
    return [
        layer_lines(
            variant,
            _of_layer("captured_energy"),
            "Spectral: gradient energy inside the basis",
            "Share of the gradient’s energy inside the small basis: at 100 % nothing is lost by learning within it.",
            share=True,
        ),
        layer_lines(
            variant,
            _of_layer("effective_rank"),
            "Spectral: effective rank of each layer’s input",
            "The number of directions the input really uses: a basis of fewer directions leaves some out.",
        ),
        layer_lines(
            variant,
            _of_layer("drift"),
            "Spectral: drift of the basis",
            "How far the basis turned at its refresh: near zero it has settled and could be refreshed less often.",
        ),
    ]


def deepfocus(variant: Variant) -> list[Chart | None]:
    """The mix of the tiers, mean over blocks, and the skipped share of every block."""
    epochs = [epoch for run in variant.records for epoch in run.epochs]
    names = list(dict.fromkeys(name for epoch in epochs for name in epoch.mapping("blocks")))

    def mean(epoch: Epoch, tier: str) -> float | None:
        known = [share for name in names if (share := _share(epoch, name, tier)) is not None]
        return 100 * fmean(known) if known else None

    tiers = [
        Line(swatch, [along(run, partial(mean, tier=tier)) for run in variant.records])
        for tier, swatch in _TIERS.items()
    ]
    return [
        lines_chart(
            "DeepFocus: how backward work was done",
            tiers,
            unit=" %",
            note="Share of all backward calls, mean over blocks: together they are the whole.",
        ),
        layer_lines(
            variant,
            partial(_share, tier="skip"),
            "DeepFocus: share skipped, by block",
            "Share of each epoch’s calls whose backward work was left out.",
            names=names,
            share=True,
        ),
    ]


def _share(epoch: Epoch, block: str, tier: str) -> float | None:
    """A tier's share of a block's calls."""
    return number(mapping(epoch.mapping("blocks").get(block)).get(tier))


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


def _of_layer(key: str) -> Number:
    """A method's own number of a layer."""
    return lambda epoch, name: epoch.layers[name].number(key) if name in epoch.layers else None


def layer_lines(
    variant: Variant,
    value: Number,
    title: str,
    note: str,
    *,
    names: Sequence[str] | None = None,
    lesser: Number | None = None,
    share: bool = False,
    log: bool = False,
) -> Chart | None:
    """A number of each layer over epochs, mean over seeds; that of `lesser` is dotted; a `share` in per cent.

    Layers without `lesser`, where that is asked for, are left out: another method may call a number of its own like
    that of `value`. Blocks, by their `names`, may stand in the layers' place.
    """

    def line(name: str, of: Number) -> Points:
        points = mean_line(along(run, lambda epoch: of(epoch, name)) for run in variant.records)
        return [(x, y * (100 if share else 1)) for x, y in points if y > 0 or not log]

    both = {
        name: (line(name, value), line(name, lesser) if lesser else [])
        for name in (variant.layers() if names is None else names)
    }
    found = {name: lines for name, lines in both.items() if lines[0] and (lines[1] or not lesser)}
    places = [at / max(1, len(found) - 1) for at in range(len(found))]
    colours: Any = sample_colorscale(_RAMP, places)
    swatches = list(map(Swatch, found, colours))
    lines = [Line(swatch, [found[swatch.label][0]], found[swatch.label][1]) for swatch in swatches]
    # All layers while they are few, then some on the way from the first to the last.
    named = swatches
    if len(named) > _MOST_NAMED:
        named = [swatches[round((len(swatches) - 1) * part / 4)] for part in range(5)]
    return lines_chart(title, lines, unit=" %" if share else "", note=note, log=log, legend=named)

"""Zeros in the gradient: dithering's own picture."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from retrograde.lab.record import RunRecord
from retrograde.report.comparison import Comparison, Variant
from retrograde.report.pictures.chart import Chart, chart, half_interval, plain, short
from retrograde.report.pictures.learning import over_epochs, percent


def zeros(comparison: Comparison) -> list[Chart | None]:
    """By layer at the end, and over epochs."""
    over_time = over_epochs(
        comparison,
        "Zeros in the gradient over epochs",
        lambda epoch: percent(epoch.zeros),
        lesser=lambda epoch: percent(epoch.own_zeros),
        unit=" %",
        note="Solid: with the method. Dotted: before the method.",
    )
    return [_layers(comparison), over_time]


def _layers(comparison: Comparison) -> Chart | None:
    """One row per layer and variant: an open mark at the zeros before the method, a full one at those with it."""
    shown = [variant for variant in comparison.variants if variant.layers()]
    names = list(dict.fromkeys(name for variant in shown for name in variant.layers()))
    if not names:
        return None
    figure, ends = go.Figure(), list[str]()
    block = len(shown) + 1
    for row, variant in enumerate(shown):
        at = [index * block + row for index in range(len(names))]
        before, after = (
            [variant.estimate(lambda run, name=name, own=own: _of_layer(run, name, own)) for name in names]
            for own in (True, False)
        )
        own = [found and found.mean for found in before]
        with_method = [found and found.mean for found in after]
        _joints(figure, variant, at, own, with_method)
        _marks(figure, variant, names, at, own, full=False)
        halves = [found and found.half for found in after]
        _marks(
            figure, variant, names, at, with_method, half_interval(halves, variant.swatch.colour), full=True
        )
        known = [value for value in with_method if value is not None]
        if known:
            ends.append(f"{variant.label} from {min(known):.0f} % to {max(known):.0f} %")
    if not ends:
        return None
    figure.update_xaxes(range=[-2, 102], ticksuffix=" %")
    figure.update_yaxes(
        tickvals=[index * block + (block - 2) / 2 for index in range(len(names))],
        ticktext=[short(name) for name in names],
        range=[len(names) * block - 0.6, -1.0],
        showgrid=False,
    )
    pitch = max(5, min(15, 1400 / (len(names) * block)))
    note = "Open mark: before the method. Full mark: with the method. Last epoch" + (
        ", mean over seeds with half of its 95 % interval." if comparison.seeded else "."
    )
    height = max(280, round(len(names) * block * pitch) + 60)
    return chart(
        figure,
        "Zeros in the gradient by layer",
        f"Dot chart, zeros in the gradient of each layer. {'; '.join(ends)}.",
        [variant.swatch for variant in shown],
        height=height,
        note=note,
        wide=height > 500,
    )


def _marks(
    figure: go.Figure,
    variant: Variant,
    names: Sequence[str],
    at: Sequence[int],
    x: Sequence[float | None],
    whiskers: dict[str, Any] | None = None,
    *,
    full: bool,
) -> None:
    swatch = variant.swatch
    figure.add_scatter(
        x=list(x),
        y=list(at),
        mode="markers",
        marker={
            "symbol": "circle" if full else "circle-open",
            "size": 9,
            "color": swatch.colour,
            "line": {"color": swatch.colour, "width": 1.6},
        },
        error_x=whiskers,
        meta=swatch.meta,
        name=plain(swatch.label),
        customdata=[plain(name) for name in names],
        hovertemplate=f"%{{customdata}}: %{{x:.1f}} % {'with' if full else 'before'} the method",
    )


def _joints(
    figure: go.Figure,
    variant: Variant,
    at: Sequence[int],
    own: Sequence[float | None],
    with_method: Sequence[float | None],
) -> None:
    """A line from each open mark to its full one."""
    x: list[float | None] = []
    y: list[float | None] = []
    for row, start, end in zip(at, own, with_method, strict=True):
        if start is not None and end is not None:
            x += [start, end, None]
            y += [row, row, None]
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines",
        line={"color": variant.swatch.colour, "width": 2},
        opacity=0.45,
        meta=variant.swatch.meta,
        hoverinfo="skip",
    )


def _of_layer(run: RunRecord, name: str, own: bool) -> float | None:
    layer = run.layers.get(name)
    return percent(layer.own_zeros if own else layer.zeros) if layer else None

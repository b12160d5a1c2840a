"""Zeros in the gradient: dithering's own picture."""

from collections.abc import Sequence

import plotly.graph_objects as go

from retrograde.report.groups import Contestant, Group
from retrograde.report.pictures.chart import Chart, Swatch, chart, plain, short, swatches
from retrograde.report.pictures.learning import over_epochs
from retrograde.report.records import Epoch, number
from retrograde.report.runs import Run


def zeros(group: Group) -> list[Chart | None]:
    """By layer at the end, and over epochs."""

    def with_method(epoch: Epoch) -> float | None:
        return _percent(epoch.zeros)

    def own(epoch: Epoch) -> float | None:
        return _percent(epoch.own_zeros)

    over_time = over_epochs(
        group,
        "Zeros in the gradient over epochs",
        with_method,
        lesser=own,
        unit=" %",
        note="Solid: with the method. Dotted: the run’s own zeros, before the method.",
    )
    return [_layers(group), over_time]


def _layers(group: Group) -> Chart | None:
    """One row per layer and contestant: an open mark at its own zeros, a full one at those with the method."""
    shown = [
        (contestant, swatch)
        for contestant, swatch in zip(group.contestants, swatches(group), strict=True)
        if contestant.mean(lambda run: 1.0 if run.layers else None)
    ]
    names = list(dict.fromkeys(name for contestant, _ in shown for name in contestant.layers()))
    if not names:
        return None
    figure, ends = go.Figure(), list[str]()
    block = len(shown) + 1
    for row, (contestant, swatch) in enumerate(shown):
        at = [index * block + row for index in range(len(names))]
        own = [contestant.mean(lambda run, name=name: _of_layer(run, name, True)) for name in names]
        with_method = [contestant.mean(lambda run, name=name: _of_layer(run, name, False)) for name in names]
        _joints(figure, swatch, at, own, with_method)
        _marks(figure, swatch, names, at, own, contestant, False)
        _marks(figure, swatch, names, at, with_method, contestant, True)
        known = [value for value in with_method if value is not None]
        if known:
            ends.append(f"{swatch.label} from {min(known):.0f} % to {max(known):.0f} %")
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
    note = "Open mark: the gradient’s own zeros. Full mark: with the method. Last epoch" + (
        ", mean over seeds with its standard deviation." if group.seeded else "."
    )
    alt = f"Dot chart, zeros in the gradient of each layer. {'; '.join(ends)}."
    height = max(280, round(len(names) * block * pitch) + 60)
    legend = [swatch for _, swatch in shown]
    return chart(
        figure, "Zeros in the gradient by layer", alt, legend, height=height, note=note, wide=height > 500
    )


def _marks(
    figure: go.Figure,
    swatch: Swatch,
    names: Sequence[str],
    at: Sequence[int],
    x: Sequence[float | None],
    contestant: Contestant,
    full: bool,
) -> None:
    mark = {"symbol": "circle" if full else "circle-open", "size": 9, "color": swatch.colour}
    spreads = [contestant.spread(lambda run, name=name: _of_layer(run, name, False)) for name in names]
    deviations = [found.deviation if found else None for found in spreads]
    whiskers = {"type": "data", "array": deviations, "width": 0, "thickness": 1.4, "color": swatch.colour}
    figure.add_scatter(
        x=list(x),
        y=list(at),
        mode="markers",
        marker=mark | {"line": {"color": swatch.colour, "width": 1.6}},
        error_x=whiskers if full and any(deviations) else None,
        meta=swatch.meta,
        name=plain(swatch.label),
        customdata=[plain(name) for name in names],
        hovertemplate=f"%{{customdata}}: %{{x:.1f}} % {'with the method' if full else 'own'}",
    )


def _joints(
    figure: go.Figure,
    swatch: Swatch,
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
        line={"color": swatch.colour, "width": 2},
        opacity=0.45,
        meta=swatch.meta,
        hoverinfo="skip",
    )


def _of_layer(run: Run, name: str, own: bool) -> float | None:
    layer = run.layers.get(name)
    return _percent(layer.own_zeros if own else layer.zeros) if layer else None


def _percent(value: float | None) -> float | None:
    value = number(value)
    return None if value is None else value * 100

"""The report's plots, and how its numbers are written for people.

Every plot is a :class:`Chart`: a plotly figure plus its title, its legend and a sentence for those who cannot
see it. The legend is HTML and not plotly's, so that it wraps on a phone and takes no height from the plot.
Colours that depend on the theme (text, grid, the baseline's ink) are set by the page's script; a trace's
``meta`` says whose it is.
"""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from typing import Any

import plotly.graph_objects as go

from retrograde.report.runs import Epoch, Flops, Group, Run

# Okabe and Ito's palette without black, which the baseline takes. Yellow is last, as it is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
DASHES = ("solid", "dash", "dot", "dashdot")
INK = "#80868b"
PARTS = (
    ("forward", "forward", "#2f6690"),
    ("input_grad", "input gradient", "#5fa3c7"),
    ("weight_grad", "weight gradient", "#a9d0e3"),
    ("rest", "overhead, or not split", "#c8553d"),
)
COUNTS = (
    ("dense", "dense"),
    ("needed", "needed"),
    ("executed", "executed"),
    ("discounted", "discounted"),
)
NONE = "–"
MAX_POINTS = 1000


@dataclass(frozen=True)
class Swatch:
    """One legend entry; ``run`` is the run's key where a click may hide it, ``mark`` its shape."""

    label: str
    colour: str
    mark: str = "line"
    dash: str = "solid"
    run: str = ""
    ink: bool = False


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


def swatches(group: Group) -> tuple[Swatch, ...]:
    """Each run's colour and dash, the same in all plots of the group; the baselines are ink."""
    found: list[Swatch] = []
    inks = colours = 0
    for index, (run, label) in enumerate(zip(group.runs, group.labels, strict=True)):
        if run.description.baseline:
            colour, dash, inks = INK, DASHES[inks % len(DASHES)], inks + 1
        else:
            colour = COLOURS[colours % len(COLOURS)]
            dash, colours = DASHES[colours // len(COLOURS) % len(DASHES)], colours + 1
        found.append(Swatch(label, colour, dash=dash, run=str(index), ink=run.description.baseline))
    return tuple(found)


def charts(group: Group) -> dict[str, list[Chart]]:
    """All plots of a group by section; a plot without data is left out."""
    metric = group.metric
    factor, unit = (100.0, " %") if is_share(metric) else (1.0, "")

    def score(epoch: Epoch) -> float | None:
        value = epoch.validation.get(metric)
        return None if value is None else value * factor

    def loss(part: str) -> Callable[[Epoch], float | None]:
        return lambda epoch: (epoch.train if part == "train" else epoch.validation).get("loss")

    def zeros(own: bool) -> Callable[[Epoch], float | None]:
        def share(epoch: Epoch) -> float | None:
            value = epoch.own_zeros if own else epoch.zeros
            return None if value is None else value * 100

        return share

    title = f"Validation {metric}"
    learning = [
        _epochs(group, f"{title} over epochs", "epoch", [score], unit=unit),
        _epochs(group, f"{title} over time", "seconds", [score], unit=unit),
        _epochs(
            group,
            "Loss over epochs",
            "epoch",
            [loss("validation"), loss("train")],
            note="Solid: validation. Thin and dotted: training.",
        ),
        _steps(group),
    ]
    sparsity = [
        _layers(group),
        _epochs(
            group,
            "Zeros in the gradient over epochs",
            "epoch",
            [zeros(False), zeros(True)],
            unit=" %",
            note="Solid: with the method. Thin and dotted: the run’s own zeros, before the method.",
        ),
    ]
    sections = {"learning": learning, "zeros": sparsity, "flops": [_flops(group)], "time": [_time(group)]}
    return {name: [chart for chart in found if chart] for name, found in sections.items()}


def _epochs(
    group: Group,
    title: str,
    axis: str,
    series: Sequence[Callable[[Epoch], float | None]],
    *,
    unit: str = "",
    note: str = "",
) -> Chart | None:
    """Lines of one or more values over epochs or seconds; the second and later series are thin and dotted."""
    figure, ends = go.Figure(), list[str]()
    legend = swatches(group)
    most = 0
    for run, swatch in zip(group.runs, legend, strict=True):
        for order, value in enumerate(series):
            x: list[float] = []
            y: list[float] = []
            for epoch in run.epochs:
                at = epoch.epoch if axis == "epoch" else epoch.seconds
                height = _finite(value(epoch))
                if at is not None and height is not None:
                    x.append(at)
                    y.append(height)
            if not x:
                continue
            most = max(most, len(x))
            line = {
                "color": swatch.colour,
                "dash": "dot" if order else swatch.dash,
                "width": 1.3 if order else 2.4,
            }
            figure.add_scatter(
                x=x,
                y=y,
                name=_text(swatch.label + (", dotted" if order else "")),
                mode="lines" if order or len(x) > 40 else "lines+markers",
                line=line,
                marker={"color": swatch.colour, "size": 5},
                meta={"run": swatch.run, "ink": swatch.ink},
                hovertemplate=f"%{{y:.4~g}}{unit}",
            )
            if not order:
                ends.append(f"{swatch.label} ends at {y[-1]:.4g}{unit}")
    if not ends:
        return None
    figure.update_xaxes(title="epoch" if axis == "epoch" else "seconds since the start")
    if axis == "epoch" and most <= 12:
        figure.update_xaxes(dtick=1)
    figure.update_yaxes(ticksuffix=unit)
    return _chart(
        figure,
        title,
        f"Line chart, {title.lower()}. {'; '.join(ends)}.",
        legend,
        note=note,
        hover="x unified",
    )


def _steps(group: Group) -> Chart | None:
    figure, ends = go.Figure(), list[str]()
    legend = swatches(group)
    stride = 1
    for run, swatch in zip(group.runs, legend, strict=True):
        points = [(step.step, loss) for step in run.steps if (loss := _finite(step.loss)) is not None]
        if not points:
            continue
        every = -(-len(points) // MAX_POINTS)
        stride = max(stride, every)
        figure.add_scatter(
            x=[step for step, _ in points[::every]],
            y=[loss for _, loss in points[::every]],
            name=_text(swatch.label),
            mode="lines",
            line={"color": swatch.colour, "dash": swatch.dash, "width": 1.6},
            meta={"run": swatch.run, "ink": swatch.ink},
            hovertemplate="%{y:.4~g}",
        )
        ends.append(f"{swatch.label} ends at {points[-1][1]:.4g}")
    if not ends:
        return None
    figure.update_xaxes(title="step")
    alt = f"Line chart, training loss over steps. {'; '.join(ends)}."
    note = f"Every {stride}th recorded step is drawn." if stride > 1 else ""
    return _chart(figure, "Training loss over steps", alt, legend, note=note, hover="x unified")


def _layers(group: Group) -> Chart | None:
    """One row per layer and run: an open mark at its own zeros, a full one at those with the method."""
    figure = go.Figure()
    legend = swatches(group)
    names = list(dict.fromkeys(name for run in group.runs for name in run.layers))
    shown = [(run, swatch) for run, swatch in zip(group.runs, legend, strict=True) if run.layers]
    if not names:
        return None
    block = len(shown) + 1
    _joints(figure, group, names)
    ends: list[str] = []
    for row, (run, swatch) in enumerate(shown):
        for own in (True, False):
            x: list[float | None] = []
            y: list[float] = []
            for index, name in enumerate(names):
                layer = run.layers.get(name)
                value = layer and (layer.own_zeros if own else layer.zeros)
                x.append(None if value is None else value * 100)
                y.append(index * block + row)
            mark = {"symbol": "circle-open" if own else "circle", "size": 9, "color": swatch.colour}
            figure.add_scatter(
                x=x,
                y=y,
                mode="markers",
                marker=mark | {"line": {"color": swatch.colour, "width": 1.6}},
                meta={"run": swatch.run, "ink": swatch.ink},
                name=_text(swatch.label),
                customdata=[_text(name) for name in names],
                hovertemplate=f"%{{customdata}}: %{{x:.1f}} % {'own' if own else 'with the method'}",
            )
        shares = [layer.zeros for layer in run.layers.values() if layer.zeros is not None]
        if shares:
            ends.append(f"{swatch.label} from {min(shares):.0%} to {max(shares):.0%}")
    figure.update_xaxes(range=[-2, 102], ticksuffix=" %")
    figure.update_yaxes(
        tickvals=[index * block + (block - 2) / 2 for index in range(len(names))],
        ticktext=[_text(name if len(name) <= 18 else "…" + name[-17:]) for name in names],
        range=[len(names) * block - 0.6, -1.0],
        showgrid=False,
    )
    pitch = max(5, min(15, 1400 / (len(names) * block)))
    note = "Open mark: the gradient’s own zeros. Full mark: with the method. Last epoch."
    alt = f"Dot chart, zeros in the gradient of each layer. {'; '.join(ends)}."
    height = max(280, round(len(names) * block * pitch) + 60)
    return _chart(figure, "Zeros in the gradient by layer", alt, legend, height=height, note=note)


def _joints(figure: go.Figure, group: Group, names: Sequence[str]) -> None:
    """A line from each open mark to its full one."""
    shown = [entry for entry in zip(group.runs, swatches(group), strict=True) if entry[0].layers]
    for row, (run, swatch) in enumerate(shown):
        x: list[float | None] = []
        y: list[float | None] = []
        for index, name in enumerate(names):
            layer = run.layers.get(name)
            if layer and layer.zeros is not None and layer.own_zeros is not None:
                at = index * (len(shown) + 1) + row
                x += [layer.own_zeros * 100, layer.zeros * 100, None]
                y += [at, at, None]
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines",
            line={"color": swatch.colour, "width": 2},
            opacity=0.45,
            meta={"run": swatch.run, "ink": swatch.ink},
            hoverinfo="skip",
        )


def _flops(group: Group) -> Chart | None:
    """A block per run, a bar per count, stacked by product; what the products do not explain is the rest."""
    most = max((flops_of(run, key) or 0.0 for run in group.runs for key, _ in COUNTS), default=0.0)
    if most <= 0:
        return None
    factor, unit = _scale(most)
    bars: dict[str, tuple[list[float], list[float]]] = {part: ([], []) for part, _, _ in PARTS}
    ticks: list[tuple[float, str]] = []
    ends: list[tuple[float, float, str]] = []
    heads: list[tuple[float, str]] = []
    sentences: list[str] = []
    at = 0.0
    for run, label in zip(group.runs, group.labels, strict=True):
        totals = [(key, name, total) for key, name in COUNTS if (total := flops_of(run, key)) is not None]
        if not totals:
            continue
        heads.append((at, label))
        dense = flops_of(run, "dense")
        for key, name, total in totals:
            at += 1
            ticks.append((at, name))
            for part, value in _split(run.result.flops, key, total).items():
                bars[part][0].append(value / factor)
                bars[part][1].append(at)
            ends.append((total / factor, at, share(total / dense) if dense else flops(total)))
        sentences.append(f"{label}: " + ", ".join(f"{name} {flops(total)}" for _, name, total in totals))
        at += 1.5
    figure = go.Figure()
    legend: list[Swatch] = []
    for part, name, colour in PARTS:
        x, y = bars[part]
        if any(x):
            legend.append(Swatch(name, colour, mark="box"))
            figure.add_bar(
                x=x,
                y=y,
                orientation="h",
                width=0.72,
                name=name,
                marker={"color": colour, "line": {"width": 0}},
                hovertemplate=f"{name}: %{{x:.4~g}} {unit}<extra></extra>",
            )
    figure.add_scatter(
        x=[x for x, _, _ in ends],
        y=[y for _, y, _ in ends],
        text=[f" {text}" for _, _, text in ends],
        mode="text",
        textposition="middle right",
        cliponaxis=False,
        hoverinfo="skip",
    )
    for y, label in heads:
        head = f"<b>{_text(textwrap.shorten(label, 48, placeholder='…'))}</b>"
        figure.add_annotation(x=0, y=y, text=head, xref="paper", xanchor="left", showarrow=False)
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title=f"{unit}, whole run", range=[0, most / factor])
    figure.update_yaxes(
        tickvals=[y for y, _ in ticks],
        ticktext=[name for _, name in ticks],
        range=[at - 0.7, -0.7],
        showgrid=False,
    )
    alt = f"Stacked bar chart, FLOPs of each run. {'; '.join(sentences)}."
    note = "The percentage is of the run’s own dense-equivalent."
    return _chart(
        figure,
        "FLOPs by count and product",
        alt,
        legend,
        height=max(260, round(at * 25) + 60),
        note=note,
        wide=True,
        room=56,
    )


def _split(counted: Flops, key: str, total: float) -> dict[str, float]:
    products = ((name, getattr(counted, name)) for name in ("forward", "input_grad", "weight_grad"))
    parts = {
        name: value for name, product in products if (value := _finite(getattr(product, key))) is not None
    }
    rest = total - sum(parts.values())
    # Below a thousandth it is rounding, and a sliver of colour would claim an overhead that nobody counted.
    return parts | ({"rest": rest} if rest > total / 1000 else {})


def _time(group: Group) -> Chart | None:
    figure, sentences = go.Figure(), list[str]()
    legend = swatches(group)
    values = [step_seconds(run) for run in group.runs]
    most = max((value for value in values if value is not None), default=0.0)
    if most <= 0:
        return None
    factor, unit = (1.0, "s") if most >= 1 else (1e-3, "ms") if most >= 1e-3 else (1e-6, "µs")
    for row, (value, swatch) in enumerate(zip(values, legend, strict=True)):
        if value is None:
            continue
        text = f"{value / factor:.3g} {unit}"
        figure.add_bar(
            x=[value / factor],
            y=[row],
            orientation="h",
            width=0.62,
            text=[text],
            textposition="outside",
            cliponaxis=False,
            marker={"color": swatch.colour},
            meta={"run": swatch.run, "ink": swatch.ink},
            hovertemplate=f"{_text(swatch.label)}: {text}<extra></extra>",
        )
        sentences.append(f"{swatch.label} {text}")
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title=f"{unit} per training step", range=[0, most / factor])
    figure.update_yaxes(
        tickvals=list(range(len(legend))),
        ticktext=[
            "<br>".join(_text(line) for line in textwrap.wrap(swatch.label, 18)[:2]) for swatch in legend
        ],
        range=[len(legend) - 0.4, -0.6],
        showgrid=False,
    )
    alt = f"Bar chart, time per training step. {'; '.join(sentences)}."
    return _chart(
        figure, "Time per training step", alt, height=max(260, 42 * len(legend) + 70), wide=True, room=64
    )


def _chart(
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
) -> Chart:
    figure.update_layout(
        template=go.layout.Template(),
        height=height,
        showlegend=False,
        hovermode=hover,
        margin={"l": 8, "r": room, "t": 12, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(automargin=True, zeroline=False, title_standoff=8)
    figure.update_yaxes(automargin=True, zeroline=False)
    return Chart(title, note, alt, tuple(legend), height, figure.to_plotly_json(), wide)


def step_seconds(run: Run) -> float | None:
    """Seconds per step: the run's own figure, or for a run that has not ended that of its last epoch."""
    if run.result.step_seconds is not None:
        return _finite(run.result.step_seconds)
    return _finite(next((epoch.step_seconds for epoch in reversed(run.epochs) if epoch.step_seconds), None))


def flops_of(run: Run, key: str) -> float | None:
    """One of the counts of the whole run."""
    return _finite(getattr(run.result.flops, key))


def is_share(metric: str) -> bool:
    """Whether the metric is a share of one, to be written in per cent."""
    return "accuracy" in metric or metric in ("f1", "precision", "recall")


def share(value: float | None) -> str:
    """0.974 as ``97.4 %``."""
    value = _finite(value)
    return NONE if value is None else f"{value * 100:.1f}\u00a0%"


def flops(value: float | None) -> str:
    """1.2e9 as ``1.2 GFLOP``."""
    value = _finite(value)
    if value is None:
        return NONE
    factor, unit = _scale(value)
    return f"{value / factor:.3g}\u00a0{unit}"


def _scale(value: float) -> tuple[float, str]:
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return factor, f"{prefix}FLOP"
    return 1.0, "FLOP"


def _finite(value: float | None) -> float | None:
    # A run that diverged records NaN or infinity; JSON has neither, and a plot has no place for them.
    return value if value is not None and isfinite(value) else None


def _text(label: str) -> str:
    # plotly reads <b>, <a> and the like in labels as markup.
    return escape(label, quote=False)

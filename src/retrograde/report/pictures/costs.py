"""What the runs cost: FLOPs by count and product, and time per step."""

import textwrap
from collections.abc import Sequence

import plotly.graph_objects as go

from retrograde.report.formats import flops, flops_unit, seconds_unit, share
from retrograde.report.groups import Contestant, Group
from retrograde.report.pictures.chart import INK, Chart, Swatch, chart, plain, swatches
from retrograde.report.records import number
from retrograde.report.runs import Run
from retrograde.report.spread import Spread

PARTS = (
    ("forward", "forward", "#2f6690"),
    ("input_grad", "input gradient", "#5fa3c7"),
    ("weight_grad", "weight gradient", "#a9d0e3"),
    ("rest", "overhead, or not split", "#c8553d"),
)
COUNTS = ("dense", "needed", "executed", "discounted")


def flops_chart(group: Group) -> Chart | None:
    """A block per contestant, a bar per count, stacked by product; what the products do not explain is the rest."""
    totals = {
        (contestant.label, count): found
        for contestant in group.contestants
        for count in COUNTS
        if (found := contestant.spread(lambda run, count=count: run.flops(count)))
    }
    most = max((total.mean for total in totals.values()), default=0.0)
    if most <= 0:
        return None
    factor, unit = flops_unit(most)
    bars: dict[str, tuple[list[float], list[float]]] = {part: ([], []) for part, _, _ in PARTS}
    ticks: list[tuple[float, str]] = []
    ends: list[tuple[float, float, str]] = []
    heads: list[tuple[float, str]] = []
    whiskers: list[tuple[Spread, float]] = []
    sentences: list[str] = []
    at = 0.0
    for contestant in group.contestants:
        counted = [(count, found) for count in COUNTS if (found := totals.get((contestant.label, count)))]
        if not counted:
            continue
        heads.append((at, contestant.label))
        for count, total in counted:
            at += 1
            ticks.append((at, count))
            whiskers.append((total, at))
            for part, value in _split(contestant, count, total.mean).items():
                bars[part][0].append(value / factor)
                bars[part][1].append(at)
            of_dense = contestant.mean(lambda run, count=count: run.of_dense(count))
            # The text stands clear of the whisker.
            reach = total.mean + (total.deviation or 0.0)
            ends.append((reach / factor, at, flops(total.mean) if of_dense is None else share(of_dense)))
        said = ", ".join(f"{count} {flops(total.mean)}" for count, total in counted)
        sentences.append(f"{contestant.label}: {said}")
        at += 1.5
    figure = go.Figure()
    legend = _bars(figure, bars, unit)
    _whiskers(figure, [(w.mean / factor, (w.deviation or 0.0) / factor, y) for w, y in whiskers])
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
        head = f"<b>{plain(textwrap.shorten(label, 48, placeholder='…'))}</b>"
        figure.add_annotation(x=0, y=y, text=head, xref="paper", xanchor="left", showarrow=False)
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title=f"{unit}, whole run", range=[0, max(x for x, _, _ in ends)])
    figure.update_yaxes(
        tickvals=[y for y, _ in ticks],
        ticktext=[name for _, name in ticks],
        range=[at - 0.7, -0.7],
        showgrid=False,
    )
    return chart(
        figure,
        "FLOPs by count and product",
        f"Stacked bar chart, FLOPs of each contestant. {'; '.join(sentences)}.",
        legend,
        height=max(260, round(at * 25) + 60),
        note="The percentage is of the run’s own dense-equivalent."
        + (" Bars are means over seeds." if group.seeded else ""),
        wide=True,
        room=56,
    )


def time_chart(group: Group) -> Chart | None:
    """A bar per contestant: seconds per training step."""
    figure, sentences = go.Figure(), list[str]()
    legend = swatches(group)
    values = [contestant.spread(lambda run: run.step_seconds) for contestant in group.contestants]
    most = max((value.mean for value in values if value), default=0.0)
    if most <= 0:
        return None
    factor, unit = seconds_unit(most)
    reach = 0.0
    for row, (value, swatch) in enumerate(zip(values, legend, strict=True)):
        if value is None:
            continue
        deviation = (value.deviation or 0.0) / factor
        text = f"{value.mean / factor:.3g} {unit}"
        figure.add_bar(
            x=[value.mean / factor],
            y=[row],
            orientation="h",
            width=0.62,
            marker={"color": swatch.colour},
            meta=swatch.meta,
            hovertemplate=f"{plain(swatch.label)}: {text}<extra></extra>",
        )
        end = value.mean / factor + deviation
        figure.add_scatter(
            x=[end],
            y=[row],
            text=[f" {text}"],
            mode="text",
            textposition="middle right",
            cliponaxis=False,
            hoverinfo="skip",
        )
        reach = max(reach, end)
        sentences.append(f"{swatch.label} {text}")
    _whiskers(
        figure,
        [(v.mean / factor, (v.deviation or 0.0) / factor, row) for row, v in enumerate(values) if v],
    )
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title=f"{unit} per training step", range=[0, reach])
    figure.update_yaxes(
        tickvals=list(range(len(legend))),
        ticktext=[
            "<br>".join(plain(line) for line in textwrap.wrap(swatch.label, 18)[:2]) for swatch in legend
        ],
        range=[len(legend) - 0.4, -0.6],
        showgrid=False,
    )
    return chart(
        figure,
        "Time per training step",
        f"Bar chart, time per training step. {'; '.join(sentences)}.",
        height=max(260, 42 * len(legend) + 70),
        note="Mean over seeds; the whisker is one standard deviation." if group.seeded else "",
        wide=True,
        room=64,
    )


def _bars(figure: go.Figure, bars: dict[str, tuple[list[float], list[float]]], unit: str) -> list[Swatch]:
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
    return legend


def _whiskers(figure: go.Figure, found: Sequence[tuple[float, float, float]]) -> None:
    """One standard deviation to both sides of each bar's end, where there is one."""
    spread = [entry for entry in found if entry[1] > entry[0] / 1000]
    if spread:
        figure.add_scatter(
            x=[x for x, _, _ in spread],
            y=[y for _, _, y in spread],
            mode="markers",
            marker={"size": 0.1, "color": INK},
            error_x={
                "type": "data",
                "array": [d for _, d, _ in spread],
                "width": 3,
                "thickness": 1.4,
                "color": INK,
            },
            hoverinfo="skip",
        )


def _split(contestant: Contestant, count: str, total: float) -> dict[str, float]:
    def part(run: Run, name: str) -> float | None:
        return number(getattr(getattr(run.result.flops, name), count))

    parts = {
        name: value
        for name in ("forward", "input_grad", "weight_grad")
        if (value := contestant.mean(lambda run, name=name: part(run, name))) is not None
    }
    rest = total - sum(parts.values())
    # Below a thousandth it is rounding, and a sliver of colour would claim an overhead that nobody counted.
    return parts | ({"rest": rest} if rest > total / 1000 else {})

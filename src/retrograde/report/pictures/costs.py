"""What the runs cost: FLOPs by count and product, and time per step."""

import textwrap
from collections.abc import Sequence

import plotly.graph_objects as go

from retrograde.lab.claims import wording
from retrograde.lab.claims.statistics import Estimate
from retrograde.lab.record import RunRecord, number
from retrograde.report.comparison import Comparison, Variant
from retrograde.report.formats import flops, flops_unit, seconds_unit
from retrograde.report.pictures.chart import Chart, broken, chart, half_interval, plain, rows_axis
from retrograde.report.table import Swatch

PARTS = (
    ("forward", "forward", "#2f6690"),
    ("input_grad", "input gradient", "#5fa3c7"),
    ("weight_grad", "weight gradient", "#a9d0e3"),
    ("rest", "overhead, or not split", "#c8553d"),
)
COUNTS = {"dense": "dense", "needed": "non-zero", "executed": "executed", "discounted": "discounted"}


def flops_chart(comparison: Comparison) -> Chart | None:
    """A block per variant, a bar per count, stacked by product; what the products do not explain is the rest."""
    totals = {
        (variant.name, count): found
        for variant in comparison.variants
        for count in COUNTS
        if (found := variant.estimate(lambda run, count=count: getattr(run.outcome.flops, count)))
    }
    most = max((total.mean for total in totals.values()), default=0.0)
    if most <= 0:
        return None
    factor, unit = flops_unit(most)
    bars: dict[str, tuple[list[float], list[float]]] = {part: ([], []) for part, _, _ in PARTS}
    rows: list[tuple[float, str, Estimate, str]] = []
    heads: list[tuple[float, str]] = []
    sentences: list[str] = []
    at = 0.0
    for variant in comparison.variants:
        counted = [(count, found) for count in COUNTS if (found := totals.get((variant.name, count)))]
        if not counted:
            continue
        heads.append((at, variant.label))
        for count, total in counted:
            at += 1
            share = variant.mean(lambda run, count=count: run.outcome.flops.of_dense(count))
            end = flops(total.mean) if share is None else wording.figure("executed", share)
            rows.append((at, COUNTS[count], total, end))
            for part, value in _split(variant, count, total.mean).items():
                bars[part][0].append(value / factor)
                bars[part][1].append(at)
        said = ", ".join(f"{COUNTS[count]} {flops(total.mean)}" for count, total in counted)
        sentences.append(f"{variant.label}: {said}")
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
    reach = _ends(figure, [(y, total, end) for y, _, total, end in rows], factor)
    for y, label in heads:
        head = f"<b>{plain(textwrap.shorten(label, 34, placeholder='…'))}</b>"
        figure.add_annotation(x=0, y=y, text=head, xref="paper", xanchor="left", showarrow=False)
    figure.update_layout(barmode="stack")
    figure.update_xaxes(title=f"{unit}, whole run", range=[0, reach])
    figure.update_yaxes(
        tickvals=[y for y, *_ in rows],
        ticktext=[name for _, name, *_ in rows],
        range=[at - 0.7, -0.7],
        showgrid=False,
    )
    return chart(
        figure,
        "FLOPs by count and product",
        f"Stacked bar chart, FLOPs of each variant. {'; '.join(sentences)}.",
        legend,
        height=max(260, round(at * 25) + 60),
        note="The percentage is of the run’s own dense-equivalent." + _of_seeds(comparison),
        wide=True,
        room=56,
    )


def time_chart(comparison: Comparison) -> Chart | None:
    """A bar per variant: seconds per training step."""
    known = [
        (variant, found)
        for variant in comparison.variants
        if (found := variant.estimate(lambda run: run.step_seconds))
    ]
    if not known:
        return None
    factor, unit = seconds_unit(max(found.mean for _, found in known))
    figure, sentences = go.Figure(), list[str]()
    for row, (variant, found) in enumerate(known):
        text = f"{found.mean / factor:.3g} {unit}"
        figure.add_bar(
            x=[found.mean / factor],
            y=[row],
            orientation="h",
            width=0.62,
            marker={"color": variant.swatch.colour},
            meta=variant.swatch.meta,
            hovertemplate=f"{plain(variant.label)}: {text}<extra></extra>",
        )
        sentences.append(f"{variant.label} {text}")
    ends = [(float(row), found, f"{found.mean / factor:.3g} {unit}") for row, (_, found) in enumerate(known)]
    reach = _ends(figure, ends, factor)
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title=f"{unit} per training step", range=[0, reach])
    rows_axis(figure, [broken(variant.label, 18) for variant, _ in known])
    return chart(
        figure,
        "Time per training step",
        f"Bar chart, time per training step. {'; '.join(sentences)}.",
        height=max(260, 42 * len(known) + 70),
        note=_of_seeds(comparison).strip(),
        wide=True,
        room=64,
    )


def _of_seeds(comparison: Comparison) -> str:
    if not comparison.seeded:
        return ""
    return " Bars are means over seeds, and the whisker is half of a 95 % interval."


def _ends(figure: go.Figure, bars: Sequence[tuple[float, Estimate, str]], factor: float) -> float:
    """A whisker at each bar's end, where seeds differ, and the bar's text clear of it; returns how far they reach."""
    halves = [
        half if (half := (found.half or 0.0) / factor) > found.mean / factor / 1000 else 0.0
        for _, found, _ in bars
    ]
    ends = [found.mean / factor for _, found, _ in bars]
    reach = [end + half for end, half in zip(ends, halves, strict=True)]
    figure.add_scatter(
        x=ends,
        y=[y for y, _, _ in bars],
        mode="markers",
        marker={"size": 0.1},
        error_x=half_interval(halves),
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=reach,
        y=[y for y, _, _ in bars],
        text=[f" {text}" for _, _, text in bars],
        mode="text",
        textposition="middle right",
        cliponaxis=False,
        hoverinfo="skip",
    )
    return max(reach)


def _split(variant: Variant, count: str, total: float) -> dict[str, float]:
    def part(run: RunRecord, name: str) -> float | None:
        return number(getattr(getattr(run.outcome.flops, name), count, None))

    parts = {
        name: value
        for name in ("forward", "input_grad", "weight_grad")
        if (value := variant.mean(lambda run, name=name: part(run, name))) is not None
    }
    rest = total - sum(parts.values())
    # Below a thousandth it is rounding, and a sliver of colour would claim an overhead that nothing counted.
    return parts | ({"rest": rest} if rest > total / 1000 else {})

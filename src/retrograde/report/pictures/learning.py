"""Curves of loss and validation score."""

from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from retrograde.report.formats import is_share
from retrograde.report.groups import Group
from retrograde.report.pictures.chart import (
    Chart,
    add_line,
    add_seeds,
    chart,
    epoch_axis,
    swatches,
    thinned,
)
from retrograde.report.records import Epoch, number
from retrograde.report.runs import Run
from retrograde.report.spread import Points, mean_line

Value = Callable[[Epoch], float | None]
SEEDS = "Faint lines are single seeds, strong ones their mean."


def learning(group: Group) -> list[Chart | None]:
    """Validation score and losses, over epochs, time and steps."""
    title = f"Validation {group.metric}"
    score, unit = score_of(group.metric)

    def loss(epoch: Epoch) -> float | None:
        return epoch.validation.get("loss")

    def train_loss(epoch: Epoch) -> float | None:
        return epoch.train.get("loss")

    return [
        over_epochs(group, f"{title} over epochs", score, unit=unit),
        over_epochs(group, f"{title} over time", score, unit=unit, timed=True),
        over_epochs(
            group,
            "Loss over epochs",
            loss,
            lesser=train_loss,
            note="Solid: validation. Dotted: training.",
        ),
        _steps(group),
    ]


def score_of(metric: str) -> tuple[Value, str]:
    """The validation score of an epoch as plots show it, and its unit."""
    factor, unit = (100.0, " %") if is_share(metric) else (1.0, "")

    def score(epoch: Epoch) -> float | None:
        value = number(epoch.validation.get(metric))
        return None if value is None else value * factor

    return score, unit


def over_epochs(
    group: Group,
    title: str,
    value: Value,
    *,
    lesser: Value | None = None,
    timed: bool = False,
    unit: str = "",
    note: str = "",
) -> Chart | None:
    """Lines over epochs or seconds; those of ``lesser`` are dotted, and of several seeds only the mean."""
    figure, ends = go.Figure(), list[str]()
    legend = swatches(group)
    most = 0
    for contestant, swatch in zip(group.contestants, legend, strict=True):
        lines = [line for run in contestant.runs if (line := _line(run, value, timed))]
        most = max([most, *map(len, lines)])
        if lines:
            mean = add_seeds(figure, swatch, lines, unit=unit, aligned=not timed)
            ends += [f"{swatch.label} ends at {y:.4g}{unit}" for _, y in mean[-1:]]
        if lesser:
            mean = mean_line([_line(run, lesser, timed) for run in contestant.runs], aligned=not timed)
            if mean:
                add_line(figure, swatch, mean, unit=unit, dotted=True)
    if not ends:
        return None
    if timed:
        figure.update_xaxes(title="seconds since the start")
    else:
        epoch_axis(figure, most)
    figure.update_yaxes(ticksuffix=unit)
    alt = f"Line chart, {title.lower()}. {'; '.join(ends)}."
    return chart(figure, title, alt, legend, note=_with_seeds(group, note), hover="x unified")


def _line(run: Run, value: Value, timed: bool) -> Points:
    points: Points = []
    for epoch in run.epochs:
        x, y = number(epoch.seconds if timed else epoch.epoch), number(value(epoch))
        if x is not None and y is not None:
            points.append((x, y))
    return points


def _steps(group: Group) -> Chart | None:
    figure, ends = go.Figure(), list[str]()
    legend = swatches(group)
    lines: list[Points] = [
        [(step.step, loss) for step in run.steps if (loss := number(step.loss)) is not None]
        for run in group.runs
    ]
    lines, stride = thinned(lines)
    rest = iter(lines)
    for contestant, swatch in zip(group.contestants, legend, strict=True):
        own: Sequence[Points] = [line for line in (next(rest) for _ in contestant.runs) if line]
        if own:
            mean = add_seeds(figure, swatch, own, width=1.6)
            ends += [f"{swatch.label} ends at {y:.4g}" for _, y in mean[-1:]]
    if not ends:
        return None
    figure.update_xaxes(title="step")
    figure.update_traces(mode="lines")
    alt = f"Line chart, training loss over steps. {'; '.join(ends)}."
    note = f"Every {stride}th recorded step is drawn." if stride > 1 else ""
    return chart(
        figure, "Training loss over steps", alt, legend, note=_with_seeds(group, note), hover="x unified"
    )


def _with_seeds(group: Group, note: str) -> str:
    return f"{note} {SEEDS}".strip() if group.seeded else note

"""Curves of loss and validation accuracy."""

from collections.abc import Callable

import plotly.graph_objects as go

from retrograde.lab.record import Epoch, RunRecord, number
from retrograde.report.comparison import Comparison
from retrograde.report.pictures.chart import (
    Chart,
    Points,
    add_line,
    add_seeds,
    chart,
    epoch_axis,
    mean_line,
    thinned,
)

Value = Callable[[Epoch], float | None]
SEEDS = "Faint lines are single seeds, strong ones their mean."


def learning(comparison: Comparison) -> list[Chart | None]:
    """Validation accuracy and losses, over epochs and steps."""

    def loss(epoch: Epoch) -> float | None:
        return epoch.validation.get("loss")

    def train_loss(epoch: Epoch) -> float | None:
        return epoch.train.get("loss")

    return [
        over_epochs(comparison, "Validation accuracy over epochs", accuracy, unit=" %"),
        over_epochs(
            comparison,
            "Loss over epochs",
            loss,
            lesser=train_loss,
            note="Solid: validation. Dotted: training.",
        ),
        _steps(comparison),
    ]


def accuracy(epoch: Epoch) -> float | None:
    """Validation accuracy in per cent."""
    return percent(epoch.validation.get("accuracy"))


def percent(share: float | None) -> float | None:
    """A share of one in per cent; None where it is missing or not finite."""
    share = number(share)
    return None if share is None else share * 100


def over_epochs(
    comparison: Comparison,
    title: str,
    value: Value,
    *,
    lesser: Value | None = None,
    unit: str = "",
    note: str = "",
) -> Chart | None:
    """Lines over epochs; those of ``lesser`` are dotted, and of several seeds only the mean."""
    figure, ends = go.Figure(), list[str]()
    most = 0
    for variant in comparison.variants:
        lines = [line for run in variant.records if (line := _line(run, value))]
        most = max([most, *map(len, lines)])
        if lines:
            mean = add_seeds(figure, variant.swatch, lines, unit=unit)
            ends += [f"{variant.label} ends at {y:.4g}{unit}" for _, y in mean[-1:]]
        if lesser and (mean := mean_line([_line(run, lesser) for run in variant.records])):
            add_line(figure, variant.swatch, mean, unit=unit, dotted=True)
    if not ends:
        return None
    epoch_axis(figure, most)
    figure.update_yaxes(ticksuffix=unit)
    return chart(
        figure,
        title,
        f"Line chart, {title.lower()}. {'; '.join(ends)}.",
        [variant.swatch for variant in comparison.variants],
        note=_with_seeds(comparison, note),
        hover="x unified",
    )


def _line(run: RunRecord, value: Value) -> Points:
    return [(epoch.epoch, y) for epoch in run.epochs if (y := number(value(epoch))) is not None]


def _steps(comparison: Comparison) -> Chart | None:
    figure, ends = go.Figure(), list[str]()
    lines, stride = thinned(
        [
            [(step.step, loss) for step in run.steps if (loss := number(step.loss)) is not None]
            for variant in comparison.variants
            for run in variant.records
        ]
    )
    rest = iter(lines)
    for variant in comparison.variants:
        # A single point makes no line.
        own = [line for line in (next(rest) for _ in variant.records) if len(line) > 1]
        if own:
            mean = add_seeds(figure, variant.swatch, own, width=1.6)
            ends += [f"{variant.label} ends at {y:.4g}" for _, y in mean[-1:]]
    if not ends:
        return None
    figure.update_xaxes(title="step")
    figure.update_traces(mode="lines")
    return chart(
        figure,
        "Training loss over steps",
        f"Line chart, training loss over steps. {'; '.join(ends)}.",
        [variant.swatch for variant in comparison.variants],
        note=_with_seeds(comparison, f"Every {stride}th recorded step is drawn." if stride > 1 else ""),
        hover="x unified",
    )


def _with_seeds(comparison: Comparison, note: str) -> str:
    return f"{note} {SEEDS}".strip() if comparison.seeded else note

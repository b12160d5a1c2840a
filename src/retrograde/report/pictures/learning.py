"""Curves of loss and validation accuracy."""

from collections.abc import Callable

from retrograde.lab.record import Epoch, RunRecord, number
from retrograde.report.comparison import Comparison
from retrograde.report.pictures.chart import Chart, Points, mean_line
from retrograde.report.pictures.lines import Line, lines_chart

Value = Callable[[Epoch], float | None]


def learning(comparison: Comparison) -> list[Chart | None]:
    """Validation accuracy and losses, over epochs and steps."""

    def losses(run: RunRecord) -> Points:
        line = [(float(step.step), y) for step in run.steps if (y := number(step.loss)) is not None]
        # A single point makes no line.
        return line if len(line) > 1 else []

    steps = [Line(variant.swatch, list(map(losses, variant.records))) for variant in comparison.variants]
    return [
        over_epochs(comparison, "Validation accuracy over epochs", accuracy, unit=" %"),
        over_epochs(
            comparison,
            "Loss over epochs",
            lambda epoch: epoch.validation.get("loss"),
            lambda epoch: epoch.train.get("loss"),
            note="Solid: validation. Dotted: training.",
        ),
        lines_chart("Training loss over steps", steps, x="step"),
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
    lesser: Value | None = None,
    *,
    unit: str = "",
    note: str = "",
) -> Chart | None:
    """The variants' lines over epochs; those of ``lesser`` are dotted, and of several seeds only the mean."""
    lines = [
        Line(
            variant.swatch,
            [along(run, value) for run in variant.records],
            mean_line(along(run, lesser) for run in variant.records) if lesser else [],
        )
        for variant in comparison.variants
    ]
    return lines_chart(title, lines, unit=unit, note=note)


def along(run: RunRecord, value: Value) -> Points:
    """A run's finite values by epoch."""
    return [(epoch.epoch, y) for epoch in run.epochs if (y := number(value(epoch))) is not None]

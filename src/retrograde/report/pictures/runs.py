"""The plots of run folders: learning, zeros in the gradient, FLOPs by count and product, and time per step."""

from collections.abc import Callable
from functools import partial

from retrograde.lab.claims import wording
from retrograde.lab.record import Epoch, RunRecord, number
from retrograde.report.comparison import Comparison, Variant
from retrograde.report.formats import flops, flops_unit
from retrograde.report.pictures.bars import Bar, bars_chart
from retrograde.report.pictures.chart import Chart, Points, broken, mean_line
from retrograde.report.pictures.lines import Line, lines_chart
from retrograde.report.table import Swatch

PRODUCTS = {
    "forward": Swatch("forward", "#2f6690", mark="box"),
    "input_grad": Swatch("input gradient", "#5fa3c7", mark="box"),
    "weight_grad": Swatch("weight gradient", "#a9d0e3", mark="box"),
}
_REST = Swatch("overhead, or not split", "#c8553d", mark="box")
COUNTS = {"dense": "dense", "needed": "non-zero", "executed": "executed", "discounted": "discounted"}

Value = Callable[[Epoch], float | None]


def learning(comparison: Comparison) -> list[Chart | None]:
    """Validation accuracy and losses, over epochs and steps."""

    def losses(run: RunRecord) -> Points:
        line = [(float(step.step), y) for step in run.steps if (y := number(step.loss)) is not None]
        # A single point makes no line.
        return line if len(line) > 1 else []

    steps = [variant_line(variant, losses) for variant in comparison.variants]
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
    """The variants' lines over epochs, as `variant_line` has them."""
    lines = [
        variant_line(variant, partial(along, value=value), lesser and partial(along, value=lesser))
        for variant in comparison.variants
    ]
    return lines_chart(title, lines, unit=unit, note=note)


def variant_line(
    variant: Variant,
    points: Callable[[RunRecord], Points],
    lesser: Callable[[RunRecord], Points] | None = None,
) -> Line:
    """A variant's line, of the points of each run; those of `lesser` are dotted, of several seeds only the mean."""
    runs = variant.records
    return Line(variant.swatch, list(map(points, runs)), mean_line(map(lesser, runs)) if lesser else [])


def along(run: RunRecord, value: Value) -> Points:
    """A run's finite values by epoch."""
    return [(epoch.epoch, y) for epoch in run.epochs if (y := number(value(epoch))) is not None]


def zeros(comparison: Comparison) -> list[Chart | None]:
    """Zeros in the gradient before and with the method, by layer at the end, and over epochs."""
    over_time = over_epochs(
        comparison,
        "Zeros in the gradient over epochs",
        lambda epoch: percent(epoch.zeros),
        lambda epoch: percent(epoch.own_zeros),
        unit=" %",
        note="Solid: with the method. Dotted: before the method.",
    )
    return [_zeros_by_layer(comparison), over_time]


def _zeros_by_layer(comparison: Comparison) -> Chart | None:
    names = list(dict.fromkeys(name for variant in comparison.variants for name in variant.layers()))

    def line(run: RunRecord, field: str) -> Points:
        found = (percent(getattr(run.layers.get(name), field, None)) for name in names)
        return [(at, share) for at, share in enumerate(found) if share is not None]

    lines = [
        variant_line(variant, partial(line, field="zeros"), partial(line, field="own_zeros"))
        for variant in comparison.variants
    ]
    return lines_chart(
        "Zeros in the gradient by layer",
        lines,
        x="layer",
        names=names,
        unit=" %",
        note="Solid: with the method. Dotted: before the method. Last epoch.",
    )


def flops_chart(comparison: Comparison) -> Chart | None:
    """A block per variant, a bar per count, stacked by product; what the products do not explain is the rest."""
    rows: list[Bar | str] = []
    for variant in comparison.variants:
        bars = [bar for count in COUNTS if (bar := _count(variant, count))]
        rows += [variant.label, *bars] if bars else []
    most = max((row.total.mean for row in rows if isinstance(row, Bar)), default=0.0)
    return bars_chart(
        "FLOPs by count and product",
        "of the whole run",
        rows if most > 0 else [],
        scale=flops_unit(most),
        note="The percentage is of the run’s own dense-equivalent.",
        legend=(*PRODUCTS.values(), _REST),
    )


def time_chart(comparison: Comparison) -> Chart | None:
    """A bar per variant: seconds per training step."""
    rows = [
        Bar(
            broken(variant.label),
            total,
            wording.figure("step_seconds", total.mean),
            {variant.swatch: total.mean},
        )
        for variant in comparison.variants
        if (total := variant.estimate(lambda run: run.step_seconds))
    ]
    scale = (1.0, "s") if max((row.total.mean for row in rows), default=0) >= 1 else (1e-3, "ms")
    return bars_chart("Time per training step", "per training step", rows, scale=scale)


def _count(variant: Variant, count: str) -> Bar | None:
    """One count, and the products that it is made of."""

    def part(run: RunRecord, name: str) -> float | None:
        return number(getattr(getattr(run.outcome.flops, name), count, None))

    total = variant.estimate(lambda run: getattr(run.outcome.flops, count))
    if total is None:
        return None
    parts = {
        swatch: value
        for name, swatch in PRODUCTS.items()
        if (value := variant.mean(lambda run, name=name: part(run, name)))
    }
    rest = total.mean - sum(parts.values())
    # Below a thousandth it is rounding, and a sliver of colour would claim an overhead that nothing counted.
    parts |= {_REST: rest} if rest > total.mean / 1000 else {}
    share = variant.mean(lambda run: run.outcome.flops.of_dense(count))
    end = flops(total.mean) if share is None else wording.figure("executed", share)
    return Bar(COUNTS[count], total, end, parts)

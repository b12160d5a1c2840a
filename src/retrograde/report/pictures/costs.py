"""What the runs cost: FLOPs by count and product, and time per step."""

from retrograde.lab.claims import wording
from retrograde.lab.record import RunRecord, number
from retrograde.report.comparison import Comparison, Variant
from retrograde.report.formats import flops, flops_unit
from retrograde.report.pictures.bars import Bar, bars_chart
from retrograde.report.pictures.chart import Chart, broken
from retrograde.report.table import Swatch

PRODUCTS = {
    "forward": Swatch("forward", "#2f6690", mark="box"),
    "input_grad": Swatch("input gradient", "#5fa3c7", mark="box"),
    "weight_grad": Swatch("weight gradient", "#a9d0e3", mark="box"),
}
_REST = Swatch("overhead, or not split", "#c8553d", mark="box")
COUNTS = {"dense": "dense", "needed": "non-zero", "executed": "executed", "discounted": "discounted"}


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

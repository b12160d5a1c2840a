"""The page's plots: of a comparison, and of what each method did."""

from collections.abc import Sequence
from dataclasses import dataclass

from retrograde.report.comparison import Comparison, Variant
from retrograde.report.pictures.chart import Chart as Chart
from retrograde.report.pictures.methods import decorrelate, deepfocus, perforate, spectral
from retrograde.report.pictures.results import result_charts
from retrograde.report.pictures.runs import flops_chart, learning, time_chart, zeros
from retrograde.report.table import Swatch

TERMS = (
    ("Dense-equivalent", "What plain backpropagation multiplies."),
    ("Non-zero", "Multiply-adds whose δ is not zero: what a kernel that skips zeros does."),
    ("Executed", "What the kernels in use really did, with the method’s own overhead."),
    ("Discounted", "Executed, with low-precision work counted in part: bf16 at 0.5, int8 at 0.25."),
)


@dataclass(frozen=True)
class Gallery:
    """Plots under a heading; one with a `swatch` belongs to a variant, and stands below the heading before it."""

    title: str
    charts: tuple[Chart, ...]
    text: str = ""
    terms: tuple[tuple[str, str], ...] = ()
    swatch: Swatch | None = None


def galleries(comparison: Comparison) -> list[Gallery]:
    """All plots by section; a plot without data is left out, and so is a section without plots."""
    whole = [
        Gallery("Accuracy, time and cost", tuple(result_charts(comparison))),
        Gallery("Learning", _drawn(learning(comparison))),
        Gallery(
            "Zeros in the gradient",
            _drawn(zeros(comparison)),
            "A gradient has zeros before any method, from ReLU and pooling for instance. What a method adds is the "
            "distance between the two lines.",
        ),
        Gallery("Work", _drawn([flops_chart(comparison)]), terms=TERMS),
        Gallery("Time", _drawn([time_chart(comparison)])),
    ]
    methods = [
        Gallery(
            variant.label,
            charts,
            f"mean over {len(variant.records)} seeds" if len(variant.records) > 1 else "",
            swatch=variant.swatch,
        )
        for variant in comparison.variants
        if (charts := tuple(method_charts(variant)))
    ]
    found = [gallery for gallery in whole if gallery.charts]
    return [*found, *([Gallery("What each method did", ()), *methods] if methods else [])]


def method_charts(variant: Variant) -> tuple[Chart, ...]:
    """What the variant's methods did, as far as they left numbers; mean over seeds unless a note says otherwise."""
    return _drawn([*decorrelate(variant), *deepfocus(variant), *perforate(variant), *spectral(variant)])


def _drawn(charts: Sequence[Chart | None]) -> tuple[Chart, ...]:
    return tuple(chart for chart in charts if chart)

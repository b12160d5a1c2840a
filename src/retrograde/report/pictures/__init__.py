"""The report's plots: those of a whole group, and those of what each method did."""

from retrograde.report.groups import Contestant, Group
from retrograde.report.pictures.chart import Chart as Chart
from retrograde.report.pictures.chart import Swatch as Swatch
from retrograde.report.pictures.chart import swatches as swatches
from retrograde.report.pictures.costs import flops_chart, time_chart
from retrograde.report.pictures.decorrelate import decorrelate
from retrograde.report.pictures.deepfocus import deepfocus
from retrograde.report.pictures.learning import learning
from retrograde.report.pictures.perforate import perforate
from retrograde.report.pictures.spectral import spectral
from retrograde.report.pictures.zeros import zeros


def charts(group: Group) -> dict[str, list[Chart]]:
    """All plots of a group by section; a plot without data is left out."""
    sections = {
        "learning": learning(group),
        "zeros": zeros(group),
        "flops": [flops_chart(group)],
        "time": [time_chart(group)],
    }
    return {name: [chart for chart in found if chart] for name, found in sections.items()}


def method_charts(contestant: Contestant, swatch: Swatch) -> list[Chart]:
    """What the contestant's methods did, as far as they left numbers; mean over seeds unless a note says otherwise."""
    found = [
        *decorrelate(contestant),
        *deepfocus(contestant),
        *perforate(contestant, swatch),
        *spectral(contestant),
    ]
    return [chart for chart in found if chart]

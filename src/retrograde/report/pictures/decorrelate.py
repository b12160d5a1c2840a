"""Decorrelate's picture: how much correlation its transformation leaves in each layer's input."""

from retrograde.report.groups import Contestant
from retrograde.report.pictures.chart import Chart
from retrograde.report.pictures.layer_lines import layer_lines


def decorrelate(contestant: Contestant) -> list[Chart | None]:
    """Correlation after the transformation, against that of the layer's input, on a logarithmic axis."""
    return [
        layer_lines(
            contestant,
            "correlation",
            "Decorrelate: correlation left in each layer’s input",
            "Solid: after the transformation. Dotted: the input itself. The further a solid line lies below its "
            "dotted one, the more correlation was removed.",
            lesser="correlation_input",
            log=True,
        )
    ]

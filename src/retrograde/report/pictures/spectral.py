"""Spectral's pictures: how well each layer's small basis holds its gradient, and how it moves."""

from retrograde.report.groups import Contestant
from retrograde.report.pictures.chart import Chart
from retrograde.report.pictures.layer_lines import layer_lines


def spectral(contestant: Contestant) -> list[Chart | None]:
    """Captured energy, effective rank and drift of the basis."""
    return [
        layer_lines(
            contestant,
            "captured_energy",
            "Spectral: gradient energy inside the basis",
            "Share of the gradient’s energy inside the small basis: at 100 % nothing is lost by learning within it.",
            factor=100.0,
            unit=" %",
        ),
        layer_lines(
            contestant,
            "effective_rank",
            "Spectral: effective rank of each layer’s input",
            "The number of directions the input really uses: a basis of fewer directions leaves some out.",
        ),
        layer_lines(
            contestant,
            "drift",
            "Spectral: drift of the basis",
            "How far the basis turned at its refresh: near zero it has settled and could be refreshed less often.",
        ),
    ]

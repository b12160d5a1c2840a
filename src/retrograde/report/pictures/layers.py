"""One line per layer over the epochs, coloured by depth: the pictures of Decorrelate and Spectral."""

from typing import Any

from plotly.colors import sample_colorscale

from retrograde.lab.record import Epoch
from retrograde.report.comparison import Variant
from retrograde.report.pictures.chart import Chart, Points, mean_line
from retrograde.report.pictures.learning import along
from retrograde.report.pictures.lines import Line, lines_chart
from retrograde.report.table import Swatch

# From the first layer to the last; every colour is clear on white and on black.
_RAMP = ("#3f6fb5", "#2f9aa0", "#5aa654", "#c99a2e", "#cf5f3a", "#a8437f")
_MOST_NAMED = 8


def decorrelate(variant: Variant) -> list[Chart | None]:
    """Correlation after the transformation, against that of the layer's input, on a logarithmic axis."""
    return [
        layer_lines(
            variant,
            "correlation",
            "Decorrelate: correlation left in each layer’s input",
            "Solid: after the transformation. Dotted: the input itself. The further a solid line lies below its "
            "dotted one, the more correlation was removed.",
            lesser="correlation_input",
            log=True,
        )
    ]


def spectral(variant: Variant) -> list[Chart | None]:
    """How well each layer's small basis holds its gradient, and how it moves."""
    return [
        layer_lines(
            variant,
            "captured_energy",
            "Spectral: gradient energy inside the basis",
            "Share of the gradient’s energy inside the small basis: at 100 % nothing is lost by learning within it.",
            share=True,
        ),
        layer_lines(
            variant,
            "effective_rank",
            "Spectral: effective rank of each layer’s input",
            "The number of directions the input really uses: a basis of fewer directions leaves some out.",
        ),
        layer_lines(
            variant,
            "drift",
            "Spectral: drift of the basis",
            "How far the basis turned at its refresh: near zero it has settled and could be refreshed less often.",
        ),
    ]


def layer_lines(
    variant: Variant,
    key: str,
    title: str,
    note: str,
    *,
    lesser: str = "",
    share: bool = False,
    log: bool = False,
) -> Chart | None:
    """The layers' number ``key`` over epochs, mean over seeds; that of ``lesser`` is dotted; a ``share`` in per cent.

    Layers without `lesser`, where that is asked for, are left out: another method may call a number of its own `key`.
    """

    def line(name: str, of: str) -> Points:
        def value(epoch: Epoch) -> float | None:
            return epoch.layers[name].number(of) if name in epoch.layers else None

        points = mean_line(along(run, value) for run in variant.records)
        return [(x, y * (100 if share else 1)) for x, y in points if y > 0 or not log]

    both = {name: (line(name, key), line(name, lesser) if lesser else []) for name in variant.layers()}
    found = {name: lines for name, lines in both.items() if lines[0] and (lines[1] or not lesser)}
    places = [at / max(1, len(found) - 1) for at in range(len(found))]
    colours: Any = sample_colorscale(_RAMP, places)
    swatches = list(map(Swatch, found, colours))
    lines = [Line(swatch, [found[swatch.label][0]], found[swatch.label][1]) for swatch in swatches]
    # All layers while they are few, then some on the way from the first to the last.
    named = swatches
    if len(named) > _MOST_NAMED:
        named = [swatches[round((len(swatches) - 1) * part / 4)] for part in range(5)]
    return lines_chart(title, lines, unit=" %" if share else "", note=note, log=log, legend=named)

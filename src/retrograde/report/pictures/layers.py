"""One line per layer over the epochs, coloured by depth: the pictures of Decorrelate and Spectral."""

from collections.abc import Sequence

import plotly.graph_objects as go

from retrograde.report.comparison import Variant
from retrograde.report.pictures.chart import Chart, Points, add_line, chart, epoch_axis, mean_line, thinned
from retrograde.report.table import Swatch

# From the first layer to the last; every colour is clear on white and on black.
_RAMP = ((63, 111, 181), (47, 154, 160), (90, 166, 84), (201, 154, 46), (207, 95, 58), (168, 67, 127))
_MOST_NAMED = 8
_MOST_POINTS = 3000


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
            factor=100.0,
            unit=" %",
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
    factor: float = 1.0,
    unit: str = "",
    log: bool = False,
) -> Chart | None:
    """The layers' number ``key`` over epochs, mean over seeds; that of ``lesser`` is dotted.

    Layers without `lesser`, where that is asked for, are left out: another method may call a number of its own `key`.
    """

    def line(name: str, of: str) -> Points:
        points = _mean_line(variant, name, of)
        return [(x, y * factor) for x, y in points if y > 0 or not log]

    names = [name for name in variant.layers() if not lesser or line(name, lesser)]
    lines = {name: points for name in names if (points := line(name, key))}
    if not lines:
        return None
    lines = dict(zip(lines, thinned(list(lines.values()), _MOST_POINTS)[0], strict=True))
    figure = go.Figure()
    swatches = [Swatch(*entry) for entry in zip(lines, _ramp(len(lines)), strict=True)]
    for swatch in swatches:
        if lesser and (points := line(swatch.label, lesser)):
            add_line(
                figure, swatch, thinned([points], _MOST_POINTS // len(lines))[0][0], unit=unit, dotted=True
            )
    for swatch in swatches:
        add_line(figure, swatch, lines[swatch.label], unit=unit, width=1.8)
    epoch_axis(figure, max(map(len, lines.values())))
    figure.update_yaxes(ticksuffix=unit, type="log" if log else "linear")
    ends = [f"{name} from {at[0][1]:.3g}{unit} to {at[-1][1]:.3g}{unit}" for name, at in lines.items()]
    return chart(
        figure, title, f"Line chart, {title.lower()}. {'; '.join(ends)}.", _legend(swatches), note=note
    )


def _mean_line(variant: Variant, name: str, key: str) -> Points:
    lines: list[Points] = []
    for run in variant.records:
        points = (
            (epoch.epoch, epoch.layers[name].number(key)) for epoch in run.epochs if name in epoch.layers
        )
        lines.append([(x, y) for x, y in points if y is not None])
    return mean_line(lines)


def _ramp(count: int) -> list[str]:
    """`count` colours along the ramp."""
    found: list[str] = []
    for index in range(count):
        at = index / max(1, count - 1) * (len(_RAMP) - 1)
        low = min(int(at), len(_RAMP) - 2)
        mixed = (round(a + (b - a) * (at - low)) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True))
        found.append("#" + "".join(f"{part:02x}" for part in mixed))
    return found


def _legend(swatches: Sequence[Swatch]) -> list[Swatch]:
    """All layers while they are few, then some on the way from the first to the last."""
    if len(swatches) <= _MOST_NAMED:
        return list(swatches)
    last = len(swatches) - 1
    return [swatches[round(last * part / 4)] for part in range(5)]

"""Zeros in the gradient: dithering's own picture."""

from retrograde.lab.record import RunRecord
from retrograde.report.comparison import Comparison
from retrograde.report.pictures.chart import Chart, Plot, half_interval, plain, short
from retrograde.report.pictures.learning import over_epochs, percent


def zeros(comparison: Comparison) -> list[Chart | None]:
    """By layer at the end, and over epochs."""
    over_time = over_epochs(
        comparison,
        "Zeros in the gradient over epochs",
        lambda epoch: percent(epoch.zeros),
        lambda epoch: percent(epoch.own_zeros),
        unit=" %",
        note="Solid: with the method. Dotted: before the method.",
    )
    return [_layers(comparison), over_time]


def _layers(comparison: Comparison) -> Chart | None:
    """One row per layer and variant: an open mark at the zeros before the method, a full one at those with it."""
    shown = [variant for variant in comparison.variants if variant.layers()]
    names = list(dict.fromkeys(name for variant in shown for name in variant.layers()))
    plot, block = Plot(), len(shown) + 1
    for row, variant in enumerate(shown):
        swatch, at = variant.swatch, [index * block + row for index in range(len(names))]
        found = [variant.estimate(lambda run, name=name: _of_layer(run, name, "zeros")) for name in names]
        before = [variant.mean(lambda run, name=name: _of_layer(run, name, "own_zeros")) for name in names]
        after = [one and one.mean for one in found]
        joints = [
            point
            for start, end, y in zip(before, after, at, strict=True)
            if start is not None and end is not None
            for point in ((start, y), (end, y), (None, None))
        ]
        plot.line(swatch, joints, width=2, opacity=0.45)
        for x, word, symbol in ((before, "before", "circle-open"), (after, "with", "circle")):
            halves = [one and one.half for one in found] if x is after else []
            plot.marks(
                swatch,
                zip(x, at, strict=True),
                symbol=symbol,
                hover=f"%{{customdata}}: %{{x:.1f}} % {word} the method",
                customdata=list(map(plain, names)),
                error_x=half_interval(halves, swatch.colour),
            )
        plot.legend.append(swatch)
        if known := [value for value in after if value is not None]:
            plot.said.append(f"{variant.label} from {min(known):.0f} % to {max(known):.0f} %")
    plot.figure.update_xaxes(range=[-2, 102], ticksuffix=" %")
    plot.rows([short(name) for name in names], [at * block + (block - 2) / 2 for at in range(len(names))])
    plot.figure.update_yaxes(range=[len(names) * block - 0.6, -1.0])
    pitch = max(5, min(15, 1400 / max(1, len(names) * block)))
    height = max(280, round(len(names) * block * pitch) + 60)
    last = ", mean over seeds with half of its 95 % interval." if comparison.seeded else "."
    return plot.chart(
        "Zeros in the gradient by layer",
        "Dot chart",
        note=f"Open mark: before the method. Full mark: with the method. Last epoch{last}",
        height=height,
        wide=height > 500,
    )


def _of_layer(run: RunRecord, name: str, field: str) -> float | None:
    return percent(getattr(run.layers.get(name), field, None))

"""DeepFocus' pictures: how much of each block's backward work was skipped, done coarsely or done in full."""

from statistics import fmean

from retrograde.lab.record import RunRecord, mapping, number
from retrograde.report.comparison import Variant
from retrograde.report.pictures.chart import Chart, Plot, plain, rounded, short
from retrograde.report.table import Swatch

TIERS = {
    "full": Swatch("full", "#2f6690", mark="box"),
    "low": Swatch("low precision", "#7fb3d1", mark="box"),
    "skip": Swatch("skipped", "#e0913f", mark="box"),
}
_SKIP = "224,145,63"


def deepfocus(variant: Variant) -> list[Chart | None]:
    """The mix of the tiers over epochs, mean over blocks, and the skipped share of every block."""
    epochs = [epoch for run in variant.records for epoch in run.epochs if epoch.mapping("blocks")]
    names = list(dict.fromkeys(name for epoch in epochs for name in epoch.mapping("blocks")))
    found = sorted({epoch.epoch for epoch in epochs})
    return [_mix(variant, found, names), _skipped(variant, found, names)]


def _mix(variant: Variant, epochs: list[int], names: list[str]) -> Chart | None:
    plot = Plot()
    for tier, swatch in TIERS.items():
        every = ([_share(variant, at, name, tier) for name in names] for at in epochs)
        known = ([share for share in shares if share is not None] for shares in every)
        y = [100 * fmean(shares) if shares else 0.0 for shares in known]
        if not any(y):
            continue
        # An area needs a width, so that of a single epoch is drawn around it.
        wide = len(epochs) == 1
        x = [epochs[0] - 0.5, epochs[0] + 0.5] if wide else epochs
        points = zip(x, y * 2 if wide else y, strict=True)
        plot.line(swatch, points, width=0.8, fillcolor=swatch.colour, stackgroup="tiers", hover="%{y:.1f} %")
        plot.legend.insert(0, swatch)
        plot.said.append(f"{swatch.label} {y[0]:.0f} % at first and {y[-1]:.0f} % at last")
    plot.figure.update_xaxes(title="epoch", dtick=1 if len(epochs) <= 12 else None)
    plot.figure.update_yaxes(ticksuffix=" %", range=[0, 100])
    return plot.chart(
        "DeepFocus: how backward work was done",
        "Stacked area chart, share of the calls in each tier over epochs",
        note="Share of all backward calls, mean over blocks: the more orange, the more work was left out.",
        hover="x unified",
    )


def _skipped(variant: Variant, epochs: list[int], names: list[str]) -> Chart | None:
    plot = Plot()
    z = [[_share(variant, at, name, "skip") for at in epochs] for name in names]
    plot.figure.add_heatmap(
        x=epochs,
        y=list(range(len(names))),
        z=[[rounded(None if value is None else value * 100) for value in row] for row in z],
        zmin=0,
        zmax=100,
        # Transparent at zero, so that the card shows through in both themes.
        colorscale=[[0, f"rgba({_SKIP},0.12)"], [1, f"rgba({_SKIP},1)"]],
        showscale=False,
        xgap=1,
        ygap=1,
        hoverongaps=False,
        customdata=[[plain(name)] * len(epochs) for name in names],
        hovertemplate="%{customdata}, epoch %{x}: %{z:.1f} % skipped<extra></extra>",
    )
    ticks = epochs[:: -(-len(epochs) // 7) or 1]
    plot.figure.update_xaxes(title="epoch", tickvals=ticks, tickangle=0, showgrid=False)
    plot.rows([short(name, 26) for name in names])
    plot.said = [
        f"{name} {row[-1]:.0%} at last" for name, row in zip(names, z, strict=True) if row[-1] is not None
    ]
    shades = ((part, f"rgba({_SKIP},{max(0.12, part / 100)})") for part in (0, 50, 100))
    plot.legend = [Swatch(f"{part} %", colour, mark="box") for part, colour in shades]
    return plot.chart(
        "DeepFocus: share skipped, by block",
        "Heat map, skipped share of each block over epochs",
        height=max(300, 18 * len(names) + 60),
        note="A row is a block, from the first at the top; the darker a cell, the more of that epoch’s calls it "
        "skipped.",
    )


def _share(variant: Variant, at: int, block: str, tier: str) -> float | None:
    """A tier's share of a block's calls in epoch `at`, mean over seeds."""

    def of_run(run: RunRecord) -> float | None:
        epoch = next((epoch for epoch in run.epochs if epoch.epoch == at), None)
        return number(mapping(epoch.mapping("blocks").get(block)).get(tier)) if epoch else None

    return variant.mean(of_run)

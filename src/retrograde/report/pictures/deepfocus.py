"""DeepFocus' pictures: how much of each block's backward work was skipped, done coarsely or done in full."""

from statistics import fmean

import plotly.graph_objects as go

from retrograde.lab.record import Epoch, RunRecord, mapping, number
from retrograde.report.comparison import Variant
from retrograde.report.pictures.chart import Chart, chart, epoch_axis, plain, rounded, rows_axis, short
from retrograde.report.table import Swatch

TIERS = (
    ("full", "full", "#2f6690"),
    ("low", "low precision", "#7fb3d1"),
    ("skip", "skipped", "#e0913f"),
)
_SKIP = "224,145,63"


def deepfocus(variant: Variant) -> list[Chart | None]:
    """The mix of the tiers over epochs, mean over blocks, and the skipped share of every block."""
    return [_mix(variant), _skipped(variant)]


def _mix(variant: Variant) -> Chart | None:
    epochs = _epochs(variant)
    shares: dict[str, list[float]] = {tier: [] for tier, _, _ in TIERS}
    for at in epochs:
        for tier, of_tier in shares.items():
            known = [
                found for block in _blocks(variant) if (found := _share(variant, at, block, tier)) is not None
            ]
            of_tier.append(fmean(known) if known else 0.0)
    drawn = [(tier, name, colour) for tier, name, colour in TIERS if any(shares[tier])]
    if not drawn:
        return None
    figure, ends = go.Figure(), list[str]()
    for tier, name, colour in drawn:
        y = [rounded(share * 100) for share in shares[tier]]
        # An area needs a width, so that of a single epoch is drawn around it.
        wide = len(epochs) == 1
        figure.add_scatter(
            x=[epochs[0] - 0.5, epochs[0] + 0.5] if wide else epochs,
            y=y * 2 if wide else y,
            name=name,
            mode="lines",
            line={"color": colour, "width": 0.8},
            fillcolor=colour,
            stackgroup="tiers",
            hovertemplate="%{y:.1f} %",
        )
        ends.append(f"{name} {y[0]:.0f} % at first and {y[-1]:.0f} % at last")
    epoch_axis(figure, len(epochs))
    figure.update_yaxes(ticksuffix=" %", range=[0, 100])
    return chart(
        figure,
        "DeepFocus: how backward work was done",
        f"Stacked area chart, share of the calls in each tier over epochs. {'; '.join(ends)}.",
        [Swatch(name, colour, mark="box") for _, name, colour in reversed(drawn)],
        note="Share of all backward calls, mean over blocks: the more orange, the more work was left out.",
        hover="x unified",
    )


def _skipped(variant: Variant) -> Chart | None:
    epochs = _epochs(variant)
    names = _blocks(variant)
    z = [[_share(variant, at, name, "skip") for at in epochs] for name in names]
    if not any(value is not None for row in z for value in row):
        return None
    figure = go.Figure()
    figure.add_heatmap(
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
    figure.update_xaxes(title="epoch", tickvals=epochs[:: -(-len(epochs) // 7)], tickangle=0, showgrid=False)
    rows_axis(figure, [short(name, 26) for name in names])
    ends = [f"{name} {row[-1]:.0%}" for name, row in zip(names, z, strict=True) if row[-1] is not None]
    return chart(
        figure,
        "DeepFocus: share skipped, by block",
        f"Heat map, skipped share of each block over epochs. At last {'; '.join(ends)}.",
        [Swatch(f"{part} %", f"rgba({_SKIP},{max(0.12, part / 100)})", mark="box") for part in (0, 50, 100)],
        height=max(300, 18 * len(names) + 60),
        note="A row is a block, from the first at the top; the darker a cell, the more of that epoch’s calls "
        "it skipped.",
    )


def _blocks(variant: Variant) -> list[str]:
    """All blocks, in the network's order."""
    return list(
        dict.fromkeys(n for run in variant.records for epoch in run.epochs for n in epoch.mapping("blocks"))
    )


def _epochs(variant: Variant) -> list[int]:
    return sorted({epoch.epoch for run in variant.records for epoch in run.epochs if epoch.mapping("blocks")})


def _share(variant: Variant, at: int, block: str, tier: str) -> float | None:
    """A tier's share of a block's calls in epoch `at`, mean over seeds."""

    def of(epoch: Epoch) -> float | None:
        return number(mapping(epoch.mapping("blocks").get(block)).get(tier))

    def of_run(run: RunRecord) -> float | None:
        return next((of(epoch) for epoch in run.epochs if epoch.epoch == at), None)

    return variant.mean(of_run)

"""Run folders become results: who is compared with whom, and what is said of it."""

from pathlib import Path

import pytest
from small_runs import Make, edit, edit_epochs

from retrograde.lab import files
from retrograde.report.comparison import COLOURS, INK, Comparison, of_folders
from retrograde.report.prose import caption, caveats, differing, headline
from retrograde.report.tables import figures_table

PLAIN, DITHER = "plain", "dither(scale=1.0)"


def compared(path: Path) -> Comparison:
    return of_folders([path])[0]


def said(comparison: Comparison) -> str:
    return " ".join(caveats(comparison))


def cells(comparison: Comparison, name: str) -> dict[str, str]:
    table = figures_table(comparison)
    row = next(row for row in table.rows if row.cells[0] == name)
    return {column.name: cell for column, cell in zip(table.columns, row.cells, strict=True)}


def scored(copy_run: Make, run: str, scores: dict[int, float], seconds: float = 10.0) -> None:
    for seed, accuracy in scores.items():
        copy_run(run, f"{run}, {seed}", seed=seed, accuracy=accuracy, outcome={"seconds": seconds})


def test_the_baseline_is_first_and_equal_labels_are_distinguished(copy_run: Make, tmp_path: Path) -> None:
    copy_run("dither-0", "a")
    copy_run("dither-0", "b")
    copy_run("plain-0", "z")
    copy_run("dither-0", "other", group="other")
    first, other = of_folders([tmp_path / "runs"])
    assert [first.result.title, other.result.title] == ["digits · mlp-small", "other"]
    assert [one.label for one in first.variants] == [PLAIN, f"{DITHER} · a", f"{DITHER} · b"]
    assert "No run is plain backpropagation" in said(other)
    assert "No run is plain backpropagation" not in said(first)


def test_copies_of_one_run_are_distinguished_by_their_folders(copy_run: Make, tmp_path: Path) -> None:
    for name in ("a", "b"):
        copy_run("dither-0", name, name="same")
    copy_run("dither-0", "elsewhere/a", name="same")
    labels = [
        one.label for one in of_folders([tmp_path / "runs", tmp_path / "runs" / "elsewhere"])[0].variants
    ]
    assert labels[1] == f"{DITHER} · same · b"
    assert labels[0].endswith("/runs/a")
    assert labels[2].endswith("/elsewhere/a")


def test_seeds_of_one_label_are_one_variant_in_the_order_of_the_seeds(copy_run: Make, tmp_path: Path) -> None:
    for name, seed in (("a", 10), ("b", 2), ("c", 0)):
        copy_run("dither-0", name, seed=seed)
    (variant,) = compared(tmp_path / "runs").variants
    assert [run.seed for run in variant.records] == [0, 2, 10]
    assert variant.seed_label(variant.records[1]) == f"{DITHER}, seed 2"


def test_a_variant_keeps_its_colour_and_the_baseline_is_ink(runs: Path) -> None:
    swatches = [one.swatch for one in compared(runs).variants]
    assert [(one.colour, one.ink) for one in swatches] == [(INK, True), (COLOURS[0], False)]


def test_figures_are_those_of_the_runs(runs: Path) -> None:
    comparison = compared(runs)
    for variant in comparison.variants:
        for run in variant.records:
            at = comparison.result.seeds.index(run.seed)
            assert comparison.result.figures(variant.name, "accuracy")[at] == run.outcome.score("test")
            assert comparison.result.figures(variant.name, "zeros")[at] == run.outcome.zeros


def test_differences_are_taken_seed_by_seed(copy_run: Make, tmp_path: Path) -> None:
    """The means hide that every seed gains the same: the paired interval is nothing, that of the scores is not."""
    scored(copy_run, "plain-0", {0: 0.80, 1: 0.90, 2: 0.97})
    scored(copy_run, "dither-0", {0: 0.81, 1: 0.91, 2: 0.98}, seconds=12.0)
    comparison = compared(tmp_path / "runs")
    found = cells(comparison, DITHER)
    assert found["test accuracy"] == "90.00 ± 21.22 %"
    assert found["difference"] == "+1.00 points"
    assert found["time over the baseline’s"] == "×1.20"
    assert (cells(comparison, PLAIN)["difference"], cells(comparison, PLAIN)["time over the baseline’s"]) == (
        "baseline",
        "×1",
    )
    assert "Means over 3 seeds ± half of their 95 % interval" in caption(comparison.result)
    assert "90.00 ± 21.22 % test accuracy on average over 3 seeds, +1.00 points" in headline(comparison)
    assert "took ×1.20 the baseline’s time" in headline(comparison)
    assert "several seeds" not in said(comparison)


def test_a_seed_without_baseline_stays_out_of_the_difference(copy_run: Make, tmp_path: Path) -> None:
    scored(copy_run, "plain-0", {0: 0.90, 1: 0.92})
    scored(copy_run, "dither-0", {0: 0.91, 1: 0.95, 7: 0.10})
    comparison = compared(tmp_path / "runs")
    found = comparison.result.against_baseline[DITHER]["accuracy"].minus
    assert (found.mean, found.n) == (pytest.approx(0.02), 2)
    assert comparison.result.summaries[DITHER]["accuracy"].n == 3
    assert f"{DITHER} ran with seed 7 and plain did not" in said(comparison)
    assert "Means over 2 to 3 seeds" in caption(comparison.result)


def test_without_a_shared_seed_nothing_is_compared(copy_run: Make, tmp_path: Path) -> None:
    scored(copy_run, "plain-0", {0: 0.90, 1: 0.92})
    scored(copy_run, "dither-0", {2: 0.93, 3: 0.95})
    comparison = compared(tmp_path / "runs")
    assert (
        cells(comparison, DITHER)["difference"]
        == cells(comparison, DITHER)["time over the baseline’s"]
        == "–"
    )
    assert "shares no seed" in said(comparison)


@pytest.mark.parametrize(("seeds", "few"), [((0,), "one seed"), ((0, 1), "two seeds")])
def test_few_seeds_are_a_caveat(copy_run: Make, tmp_path: Path, seeds: tuple[int, ...], few: str) -> None:
    for run in ("plain", "dither"):
        for seed in seeds:
            copy_run(f"{run}-{seed}")
    comparison = compared(tmp_path / "runs")
    assert f"A variant with {few} says little" in said(comparison)
    assert ("One seed: no intervals" in caption(comparison.result)) == (len(seeds) == 1)
    rows = figures_table(comparison).rows
    assert any("±" in cell for row in rows for cell in row.cells) == (len(seeds) == 2)


def test_the_best_variant_is_in_the_headline(copy_run: Make, tmp_path: Path) -> None:
    copy_run("plain-0", accuracy=0.9)
    copy_run("dither-0", accuracy=0.95)
    copy_run("bases", accuracy=0.85)
    text = headline(compared(tmp_path / "runs"))
    assert text.startswith(f"{DITHER} reaches 95.00 % test accuracy, +5.00 points against the baseline")
    assert "best of 2 variants" in text
    assert "Skipping every zero would take" in text


def test_a_baseline_alone_has_nothing_to_compare(copy_run: Make, tmp_path: Path) -> None:
    copy_run("plain-0")
    assert headline(compared(tmp_path / "runs")) == "1 run; nothing to compare with the baseline yet."


def test_a_recipe_that_differs_in_more_than_the_seed_is_named(copy_run: Make, tmp_path: Path) -> None:
    copy_run("dither-0")
    folder = copy_run("dither-1")
    comparison = compared(tmp_path / "runs")
    assert "more than their seed" not in said(comparison)
    recipe = comparison.variants[0].records[1].description.recipe
    edit(folder / files.RUN, recipe=recipe | {"epochs": 3})
    comparison = compared(tmp_path / "runs")
    assert differing(comparison.variants[0]) == ["epochs"]
    assert "more than their seed: epochs" in said(comparison)


def test_an_unfinished_seed_is_counted_and_named(copy_run: Make, tmp_path: Path) -> None:
    copy_run("plain-0")
    copy_run("dither-0", accuracy=0.5)
    copy_run("dither-1", finished=False)
    comparison = compared(tmp_path / "runs")
    assert cells(comparison, DITHER)["test accuracy"] == "50.00 % in 1 of 2"
    assert f"{DITHER}, seed 1 is unfinished" in said(comparison)


def test_other_machines_and_fallbacks_are_caveats(copy_run: Make, tmp_path: Path) -> None:
    copy_run("plain-0")
    folder = copy_run("dither-0", machine={"cpu": "Another"})
    line = '{"event": "epoch", "epoch": 2, "step": 8, "seconds": 1, "layers": {"head": {"fallbacks": 1}}}\n'
    with (folder / files.METRICS).open("a") as file:
        file.write(line)
    found = said(compared(tmp_path / "runs"))
    assert "different machines" in found
    assert f"{DITHER} fell back to the exact backward pass once" in found


def test_reference_kernels_are_a_caveat(copy_run: Make, tmp_path: Path) -> None:
    folder = copy_run("dither-0")
    assert "reference kernel, which multiplies zeros too" in said(compared(tmp_path / "runs"))
    edit_epochs(folder, layers={"head": {"zeros": 0.9, "kernel_skip": 1.0}})
    assert "reference kernel" not in said(compared(tmp_path / "runs"))

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from retrograde.report.groups import Group, differing, grouped
from retrograde.report.prose import caption, caveats, headline
from retrograde.report.runs import collect
from retrograde.report.spread import mean_line, spread
from retrograde.report.table import score_difference, table

Make = Callable[..., Path]
SPACE = "\u00a0"


def group(path: Path) -> Group:
    return grouped(collect([path]))[0]


def edit(folder: Path, **fields: object) -> None:
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | fields))


def scored(make_run: Make, scores: dict[int, float], scale: float, seconds: float = 10.0) -> None:
    for seed, accuracy in scores.items():
        folder = make_run(f"scale-{scale}-{seed}", scale=scale, seed=seed)
        edit(folder, test={"accuracy": accuracy}, seconds=seconds)


def test_groups_put_the_baseline_first_and_tell_equal_labels_apart(make_run: Make, tmp_path: Path) -> None:
    make_run("a-0", scale=1)
    make_run("a-1", scale=1)
    make_run("z", scale=0)
    make_run("other", group="other")
    groups = grouped(collect([tmp_path / "runs"]))
    assert [group.name for group in groups] == ["digits · mlp", "other"]
    labels = [contestant.label for contestant in groups[0].contestants]
    assert labels == ["Backprop", "Dither(scale=1) · a-0", "Dither(scale=1) · a-1"]
    assert [contestant.label for contestant in groups[0].baselines] == ["Backprop"]


def test_seeds_of_one_label_are_one_contestant_in_the_order_of_the_seeds(
    make_run: Make, tmp_path: Path
) -> None:
    for name, seed in (("a", 10), ("b", 2), ("c", 0)):
        make_run(name, seed=seed)
    (contestant,) = group(tmp_path / "runs").contestants
    assert [run.seed for run in contestant.runs] == [0, 2, 10]
    assert contestant.label == "Dither(scale=2)"
    assert contestant.seed_label(contestant.runs[1]) == "Dither(scale=2), seed 2"


def test_differences_are_taken_seed_by_seed(make_run: Make, tmp_path: Path) -> None:
    # The means hide that every seed gains the same: the paired deviation is 0, that of the scores is not.
    scored(make_run, {0: 0.80, 1: 0.90, 2: 0.97}, 0)
    scored(make_run, {0: 0.81, 1: 0.91, 2: 0.98}, 1, seconds=12.0)
    base, dither = table(group(tmp_path / "runs")).rows
    assert base.cells["Seeds"].text == dither.cells["Seeds"].text == "3"
    assert base.cells["Difference"].text == "baseline"
    assert dither.cells["Test"].text == f"90.0{SPACE}%"
    assert dither.cells["Test"].detail == f"±{SPACE}8.5"
    assert dither.cells["Difference"].text == f"+1.0{SPACE}pt"
    assert dither.cells["Difference"].detail == f"±{SPACE}0.0"
    assert dither.cells["Time ratio"].text == f"1.20{SPACE}×"


def test_a_seed_without_baseline_stays_out_of_the_difference(make_run: Make, tmp_path: Path) -> None:
    scored(make_run, {0: 0.90, 1: 0.92}, 0)
    scored(make_run, {0: 0.91, 1: 0.95, 7: 0.10}, 1)
    first = group(tmp_path / "runs")
    found = score_difference(first, first.contestants[1])
    assert found
    assert (found.mean, found.count) == (pytest.approx(0.02), 2)
    assert any("no baseline of seed 7" in text for text in caveats(first))


def test_without_a_shared_seed_only_means_are_compared(make_run: Make, tmp_path: Path) -> None:
    scored(make_run, {0: 0.90, 1: 0.92}, 0)
    scored(make_run, {2: 0.93, 3: 0.95}, 1)
    first = group(tmp_path / "runs")
    found = score_difference(first, first.contestants[1])
    assert found
    assert found.mean == pytest.approx(0.03)
    assert found.deviation is None
    assert any("shares no seed" in text for text in caveats(first))


def test_a_group_of_single_seeds_says_nothing_of_seeds(runs: Path) -> None:
    first = group(runs)
    found = table(first)
    assert "Seeds" not in found.columns
    assert not any("±" in cell.detail for row in found.rows for cell in row.cells.values())
    assert "over seeds" not in caption(first)


def test_seeds_are_told_in_words(seeded: Path) -> None:
    first = group(seeded)
    assert "seed by seed" in caption(first)
    assert "on average over 3 seeds" in headline(first)
    assert not any("several seeds" in text for text in caveats(first))


def test_two_seeds_are_still_few(make_run: Make, tmp_path: Path) -> None:
    scored(make_run, {0: 0.90, 1: 0.92}, 0)
    scored(make_run, {0: 0.91, 1: 0.95}, 1)
    assert any("several seeds" in text for text in caveats(group(tmp_path / "runs")))


def test_a_recipe_that_differs_in_more_than_the_seed_is_named(make_run: Make, tmp_path: Path) -> None:
    make_run("a", seed=0, epochs=2)
    make_run("b", seed=1, epochs=3)
    first = group(tmp_path / "runs")
    assert differing(first.contestants[0]) == ["epochs"]
    assert any("more than their seed: epochs" in text for text in caveats(first))


def test_an_unfinished_seed_is_counted_and_named(make_run: Make, tmp_path: Path) -> None:
    make_run("a", seed=0)
    make_run("b", seed=1, finished=False)
    first = group(tmp_path / "runs")
    cells = table(first).rows[0].cells
    assert cells["Seeds"].text == "1 of 2"
    assert cells["Status"].text == "1 finished, 1 unfinished"
    assert any("Dither(scale=2), seed 1 is unfinished" in text for text in caveats(first))


def test_memory_and_parameters_are_against_the_baseline(make_run: Make, tmp_path: Path) -> None:
    edit(make_run("base", scale=0), saved_activation_bytes=4 * 2**20, parameters=1000)
    edit(make_run("less"), saved_activation_bytes=2**20, parameters=1250)
    base, less = table(group(tmp_path / "runs")).rows
    assert (less.cells["Saved activations"].text, less.cells["Saved activations"].detail) == (
        f"1.0{SPACE}MiB",
        f"0.25{SPACE}×",
    )
    assert (less.cells["Parameters"].text, less.cells["Parameters"].detail) == ("1,250", "+250")
    assert base.cells["Saved activations"].detail == base.cells["Parameters"].detail == ""


def test_spread_leaves_out_what_is_not_known() -> None:
    found = spread([1.0, None, 3.0, float("nan")])
    assert found
    assert (found.mean, found.count) == (2.0, 2)
    assert found.deviation == pytest.approx(2**0.5)
    assert spread([None]) is None


def test_the_mean_of_lines_is_taken_where_all_of_them_are() -> None:
    lines = [[(1.0, 2.0), (2.0, 4.0), (3.0, 0.0)], [(2.0, 6.0), (3.0, 2.0)], []]
    assert mean_line(lines) == [(2.0, 5.0), (3.0, 1.0)]
    assert mean_line([[(1.0, 2.0)], [(3.0, 4.0), (5.0, 6.0)]], aligned=False) == [(2.0, 3.0)]

"""The plots of run folders, from what each method really left."""

from pathlib import Path
from typing import Any

import pytest
from small_runs import Make, edit_epochs

from retrograde.lab import files
from retrograde.report import write
from retrograde.report.comparison import Comparison, Variant, of_folders
from retrograde.report.pictures import Chart, galleries, method_charts
from retrograde.report.pictures.chart import mean_line
from retrograde.report.pictures.lines import MAX_POINTS_OF_PLOT, every, stride_of
from retrograde.report.pictures.methods import marks

BASES = [
    "Decorrelate: correlation left in each layer’s input",
    "Spectral: gradient energy inside the basis",
    "Spectral: effective rank of each layer’s input",
    "Spectral: drift of the basis",
]
BLOCKS = ["DeepFocus: how backward work was done", "DeepFocus: share skipped, by block"]
GROWN = ["Perforate: phases over validation accuracy", "Perforate: dendrites of each layer"]


def compared(path: Path) -> Comparison:
    return of_folders([path])[0]


def only(path: Path) -> Variant:
    (variant,) = compared(path).variants
    return variant


def pictures(path: Path) -> dict[str, Chart]:
    return {chart.title: chart for chart in method_charts(only(path))}


def gallery(path: Path, title: str) -> dict[str, Chart]:
    found = next(one for one in galleries(compared(path)) if one.title == title)
    return {chart.title: chart for chart in found.charts}


@pytest.mark.parametrize(
    ("run", "titles"), [("bases", BASES), ("blocks", BLOCKS), ("grown", GROWN), ("dither-0", [])]
)
def test_a_method_has_its_pictures_with_a_caption(trained: Path, run: str, titles: list[str]) -> None:
    found = pictures(trained / run)
    assert list(found) == titles
    assert all(chart.note.endswith(".") and chart.alt for chart in found.values())


def test_methods_have_a_section_only_where_they_left_something(trained: Path, runs: Path) -> None:
    titles = [one.title for one in galleries(compared(trained / "bases"))]
    assert titles[-2:] == ["What each method did", only(trained / "bases").label]
    assert [one.title for one in galleries(compared(runs))] == [
        "Accuracy, time and cost",
        "Learning",
        "Zeros in the gradient",
        "Work",
        "Time",
    ]


def test_layers_are_means_over_seeds(copy_run: Make, tmp_path: Path) -> None:
    for seed, energy in ((0, 0.5), (1, 0.7)):
        edit_epochs(copy_run("bases", str(seed), seed=seed), layers={"1": {"captured_energy": energy}})
    (trace,) = pictures(tmp_path / "runs")[BASES[1]].spec["data"]
    assert trace["y"] == [pytest.approx(60.0)] * 2


def test_correlation_is_drawn_against_that_of_the_input_on_a_log_axis(trained: Path) -> None:
    spec = pictures(trained / "bases")[BASES[0]].spec
    assert spec["layout"]["yaxis"]["type"] == "log"
    half = len(spec["data"]) // 2
    assert [trace["line"]["dash"] for trace in spec["data"]] == ["dot"] * half + ["solid"] * half
    colours = [trace["line"]["color"] for trace in spec["data"]]
    assert colours[:half] == colours[half:]
    assert len(set(colours)) == half > 1


def test_correlation_alone_is_not_decorrelates(copy_run: Make, tmp_path: Path) -> None:
    """Perforate calls a number of its own so."""
    folder = copy_run("bases")
    for layer, shown in (
        ({"correlation": 0.2}, False),
        ({"correlation": 0.2, "correlation_input": 0.4}, True),
    ):
        edit_epochs(folder, layers={"1": layer})
        assert (BASES[0] in pictures(tmp_path / "runs")) is shown


def test_the_tiers_are_the_whole_and_every_block_has_a_line(trained: Path) -> None:
    found = pictures(trained / "blocks")
    tiers = found[BLOCKS[0]].spec["data"]
    assert [sum(parts) for parts in zip(*(tier["y"] for tier in tiers), strict=True)] == pytest.approx(
        [100] * 4, rel=1e-4
    )
    lines = found[BLOCKS[1]].spec["data"]
    blocks = only(trained / "blocks").records[0].epochs[-1].mapping("blocks")
    shares = {line["name"]: line["y"][-1] for line in lines}
    assert shares == pytest.approx({name: 100 * block["skip"] for name, block in blocks.items()}, rel=1e-4)
    assert any(shares.values())


def test_one_epoch_is_still_seen(copy_run: Make, tmp_path: Path) -> None:
    folder = copy_run("blocks")
    lines = (folder / files.METRICS).read_text().splitlines(keepends=True)
    (folder / files.METRICS).write_text(lines[0])
    for title in BLOCKS:
        assert {line["mode"] for line in pictures(tmp_path / "runs")[title].spec["data"]} == {"lines+markers"}


def test_each_phase_change_is_marked_once(trained: Path) -> None:
    (run,) = only(trained / "grown").records
    found = marks(run)
    assert [mark.phase for mark in found[:4]] == ["dendrite", "neuron"] * 2
    steps = [mark.step for mark in found]
    assert steps == sorted(set(steps))
    layout = pictures(trained / "grown")[GROWN[0]].spec["layout"]
    assert [shape["x0"] for shape in layout["shapes"] if shape["type"] == "line"] == steps
    assert [(shape["x0"], shape["x1"]) for shape in layout["shapes"] if shape["type"] == "rect"][:2] == [
        (steps[0], steps[1]),
        (steps[2], steps[3]),
    ]
    assert [note["text"] for note in layout["annotations"]] == ["0", "1", "2"]


def test_phases_name_the_seed_they_are_drawn_for(copy_run: Make, tmp_path: Path) -> None:
    for seed in (3, 1):
        copy_run("grown", str(seed), seed=seed)
    assert pictures(tmp_path / "runs")[GROWN[0]].note.endswith("Drawn for one seed, 1.")


@pytest.mark.parametrize("odd", [None, 1, "text", [1, None], {"a": 1}, {"a": {"skip": "x"}}, {"marks": [1]}])
def test_fields_of_another_shape_are_harmless(copy_run: Make, tmp_path: Path, odd: object) -> None:
    layer = dict.fromkeys(("correlation", "captured_energy", "effective_rank", "drift", "dendrites"), odd)
    edit_epochs(copy_run("bases"), blocks=odd, perforate=odd, unknown=odd, layers={"1": layer})
    write([tmp_path / "runs"], tmp_path / "report.html")
    assert set(pictures(tmp_path / "runs")) <= {GROWN[0], *([*BASES, GROWN[1]] if odd == 1 else [])}


def test_a_variant_keeps_its_colour_in_every_plot(runs: Path) -> None:
    comparison = compared(runs)
    colours = {one.name: one.swatch.colour for one in comparison.variants}
    seen = 0
    for chart in [chart for one in galleries(comparison) for chart in one.charts]:
        for trace in chart.spec["data"]:
            if trace.get("meta") and trace["meta"]["run"] and trace.get("fill") is None:
                colour = trace.get("line", trace.get("marker"))["color"]
                assert colour == colours[trace["meta"]["run"]]
                seen += 1
    assert seen > 20


def test_seeds_are_faint_and_their_mean_strong_in_one_colour(runs: Path) -> None:
    traces = gallery(runs, "Learning")["Validation accuracy over epochs"].spec["data"]
    assert [trace["meta"]["run"] for trace in traces] == ["plain"] * 2 + ["dither(scale=1.0)"] * 2
    for faint, strong in zip(traces[::2], traces[1::2], strict=True):
        assert faint["line"]["color"] == strong["line"]["color"]
        assert faint["line"]["width"] < strong["line"]["width"]
        assert faint["y"].count(None) == 2
        assert strong["y"][0] == pytest.approx((faint["y"][0] + faint["y"][3]) / 2, rel=1e-4)


def test_the_bars_of_a_count_add_up_to_its_total(copy_run: Make, tmp_path: Path) -> None:
    copy_run("plain-0")
    copy_run("dither-0")
    chart = gallery(tmp_path / "runs", "Work")["FLOPs by count and product"]
    bars = [trace for trace in chart.spec["data"] if trace["type"] == "bar"]
    at = sorted({y for trace in bars for y in trace["y"]})
    sums = [
        sum(x for trace in bars for x, y in zip(trace["x"], trace["y"], strict=True) if y == row)
        for row in at
    ]
    runs = [run for one in compared(tmp_path / "runs").variants for run in one.records]
    counts = ("dense", "needed", "executed", "discounted")
    totals = [getattr(run.outcome.flops, count) or 0.0 for run in runs for count in counts]
    assert sums == pytest.approx([total * sums[0] / totals[0] for total in totals], rel=1e-4)
    assert "overhead, or not split" in [swatch.label for swatch in chart.legend]


def whiskers(spec: dict[str, Any]) -> list[Any]:
    return [trace["error_x"]["array"] for trace in spec["data"] if trace.get("error_x", {}).get("array")]


def test_whiskers_are_half_of_the_interval_and_need_seeds(runs: Path) -> None:
    chart = gallery(runs, "Time")["Time per training step"]
    (halves,) = whiskers(chart.spec)
    plain = compared(runs).variants[0].estimate(lambda run: run.step_seconds)
    assert plain is not None
    assert plain.half is not None
    bar = next(trace for trace in chart.spec["data"] if trace["type"] == "bar")
    assert halves[0] / bar["x"][0] == pytest.approx(plain.half / plain.mean, rel=1e-4)
    alone = gallery(runs / "plain-0", "Time")["Time per training step"]
    assert whiskers(alone.spec) == []


def test_zeros_are_drawn_before_and_with_the_method(runs: Path) -> None:
    chart = gallery(runs, "Zeros in the gradient")["Zeros in the gradient by layer"]
    before, seeds, after = chart.spec["data"]
    assert [before["line"]["dash"], after["line"]["dash"]] == ["dot", "solid"]
    assert all(one < other for one, other in zip(before["y"], after["y"], strict=True))
    assert seeds["y"].count(None) == 2
    names = list(compared(runs).variants[1].records[0].layers)
    assert chart.spec["layout"]["xaxis"]["labelalias"] == {str(at): name for at, name in enumerate(names)}
    layer = [run.layers["head"].zeros for run in compared(runs).variants[1].records]
    assert after["y"][names.index("head")] == pytest.approx(50 * sum(layer), rel=1e-4)


def test_the_mean_of_lines_is_taken_where_all_of_them_are() -> None:
    lines = [[(1.0, 2.0), (2.0, 4.0), (3.0, 0.0)], [(2.0, 6.0), (3.0, 2.0)], []]
    assert mean_line(lines) == [(2.0, 5.0), (3.0, 1.0)]
    assert mean_line([[], []]) == []


def test_many_long_lines_share_a_budget_and_keep_their_ends() -> None:
    line = [(float(x), 0.0) for x in range(5001)]
    stride = stride_of([line] * 40)
    lines = [every(line, stride)] * 40
    assert stride > 1
    assert sum(map(len, lines)) <= MAX_POINTS_OF_PLOT * 1.1
    assert all(kept[0] == line[0] and kept[-1] == line[-1] for kept in lines)

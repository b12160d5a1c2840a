import json
from collections.abc import Callable
from pathlib import Path

import pytest

from retrograde.report.groups import Contestant, grouped
from retrograde.report.page import write
from retrograde.report.pictures import Chart, charts, method_charts, swatches
from retrograde.report.pictures.chart import MAX_POINTS_OF_PLOT, thinned
from retrograde.report.pictures.perforate import marks
from retrograde.report.runs import collect, read

Make = Callable[..., Path]
TITLES = [
    "Decorrelate: correlation left in each layer’s input",
    "DeepFocus: how backward work was done",
    "DeepFocus: share skipped, by block",
    "Perforate: phases over validation accuracy",
    "Perforate: dendrites of each layer",
    "Spectral: gradient energy inside the basis",
    "Spectral: effective rank of each layer’s input",
    "Spectral: drift of the basis",
]


def contestant(path: Path, label: str = "Everything") -> Contestant:
    return next(one for one in grouped(collect([path]))[0].contestants if one.label == label)


def pictures(path: Path) -> dict[str, Chart]:
    first = grouped(collect([path]))[0]
    at = [one.label for one in first.contestants].index("Everything")
    return {chart.title: chart for chart in method_charts(first.contestants[at], swatches(first)[at])}


def test_every_method_has_its_pictures_with_a_caption(seeded: Path) -> None:
    found = pictures(seeded)
    assert list(found) == TITLES
    assert all(chart.note.endswith(".") and chart.alt for chart in found.values())


def test_a_run_without_the_data_has_no_pictures(seeded: Path) -> None:
    assert (
        method_charts(contestant(seeded, "Dither(scale=1)"), swatches(grouped(collect([seeded]))[0])[0]) == []
    )


def test_layers_are_means_over_seeds(make_run: Make, tmp_path: Path) -> None:
    for seed, energy in ((0, 0.5), (1, 0.7)):
        folder = make_run(f"s{seed}", "Everything", seed=seed, epochs=1)
        rewrite(folder, layers={"1": {"captured_energy": energy}})
    (trace,) = pictures(tmp_path / "runs")[TITLES[5]].spec["data"]
    assert trace["y"] == [pytest.approx(60.0)]


def test_correlation_is_drawn_against_that_of_the_input_on_a_log_axis(seeded: Path) -> None:
    spec = pictures(seeded)[TITLES[0]].spec
    assert spec["layout"]["yaxis"]["type"] == "log"
    assert [trace["line"]["dash"] for trace in spec["data"]] == ["dot"] * 3 + ["solid"] * 3
    colours = [trace["line"]["color"] for trace in spec["data"]]
    assert colours[:3] == colours[3:]
    assert len(set(colours)) == 3


def test_the_tiers_fill_the_whole_and_the_heat_map_has_every_block(seeded: Path) -> None:
    found = pictures(seeded)
    areas = found[TITLES[1]].spec["data"]
    assert [sum(parts) for parts in zip(*(area["y"] for area in areas), strict=True)] == pytest.approx(
        [100] * 8, rel=1e-4
    )
    (heat,) = found[TITLES[2]].spec["data"]
    assert (len(heat["z"]), len(heat["z"][0])) == (4, 8)
    assert heat["z"][0][-1] == pytest.approx(80)
    assert found[TITLES[2]].spec["layout"]["yaxis"]["ticktext"][3] == "stages.3.branch (chain)"


def test_one_epoch_still_has_an_area(make_run: Make, tmp_path: Path) -> None:
    make_run("a", "Everything", methods=True, epochs=1)
    area = pictures(tmp_path / "runs")[TITLES[1]].spec["data"][0]
    assert area["x"] == [0.5, 1.5]


def test_each_phase_change_is_marked_once(make_run: Make, tmp_path: Path) -> None:
    folder = make_run("a", "Everything", methods=True)
    found = marks(read(folder))
    assert [(mark.step, mark.phase, mark.dendrites) for mark in found] == [
        (46, "dendrite", 0),
        (92, "neuron", 2),
        (138, "done", 4),
    ]
    layout = pictures(tmp_path / "runs")[TITLES[3]].spec["layout"]
    assert [shape["x0"] for shape in layout["shapes"] if shape["type"] == "line"] == [46, 92, 138]
    assert [(shape["x0"], shape["x1"]) for shape in layout["shapes"] if shape["type"] == "rect"] == [(46, 92)]
    assert [note["text"] for note in layout["annotations"]] == ["0", "2", "4"]


def test_phases_are_found_by_what_is_recorded(make_run: Make, tmp_path: Path) -> None:
    """Whatever the method is called that recorded them."""
    folder = make_run("a", "Everything", epochs=2)
    rewrite(folder, somebody={"marks": [{"step": 10, "phase": "dendrite", "dendrites": 0}]})
    (mark,) = marks(read(folder))
    assert (mark.step, mark.phase) == (10, "dendrite")
    assert TITLES[3] in pictures(tmp_path / "runs")


def test_correlation_alone_is_not_decorrelates(make_run: Make, tmp_path: Path) -> None:
    """Perforate calls a number of its own so."""
    folder = make_run("a", "Everything", epochs=2)
    for layer, shown in (
        ({"correlation": 0.2}, False),
        ({"correlation": 0.2, "correlation_input": 0.4}, True),
    ):
        rewrite(folder, layers={"1": layer})
        assert (TITLES[0] in pictures(tmp_path / "runs")) is shown


def test_phases_name_the_seed_they_are_drawn_for(seeded: Path) -> None:
    assert pictures(seeded)[TITLES[3]].note.endswith("Drawn for one seed, 0.")


@pytest.mark.parametrize("odd", [None, 1, "text", [1, None], {"a": 1}, {"a": {"skip": "x"}}, {"marks": [1]}])
def test_fields_of_another_shape_are_harmless(make_run: Make, tmp_path: Path, odd: object) -> None:
    layer = dict.fromkeys(("correlation", "captured_energy", "effective_rank", "drift", "dendrites"), odd)
    folder = make_run("a", "Everything", epochs=2)
    rewrite(folder, blocks=odd, perforate=odd, unknown=odd, layers={"1": layer})
    write([tmp_path / "runs"], tmp_path / "report.html")
    assert set(pictures(tmp_path / "runs")) <= {TITLES[3], *(TITLES if odd == 1 else [])}


def test_seeds_are_faint_and_their_mean_strong_in_one_colour(seeded: Path) -> None:
    first = grouped(collect([seeded]))[0]
    traces = charts(first)["learning"][0].spec["data"]
    assert [trace["meta"]["run"] for trace in traces] == ["0", "0", "1", "1", "2", "2"]
    for faint, strong in zip(traces[::2], traces[1::2], strict=True):
        assert faint["line"]["color"] == strong["line"]["color"]
        assert faint["line"]["width"] < strong["line"]["width"]
        assert faint["y"].count(None) == 3
        first_of_seeds = [y for at, y in enumerate(faint["y"]) if at % 9 == 0]
        assert strong["y"][0] == pytest.approx(sum(first_of_seeds) / 3, rel=1e-4)


def test_bars_have_whiskers_only_with_seeds(seeded: Path) -> None:
    first = grouped(collect([seeded]))[0]
    assert any("error_x" in trace for trace in charts(first)["time"][0].spec["data"])
    single = grouped(collect([seeded / "backprop-0"]))[0]
    assert not any("error_x" in trace for trace in charts(single)["time"][0].spec["data"])


def test_many_long_lines_share_a_budget_and_keep_their_ends() -> None:
    line = [(float(x), 0.0) for x in range(5001)]
    lines, stride = thinned([line] * 40)
    assert stride > 1
    assert sum(map(len, lines)) <= MAX_POINTS_OF_PLOT * 1.1
    assert all(kept[0] == line[0] and kept[-1] == line[-1] for kept in lines)


def rewrite(folder: Path, **fields: object) -> None:
    """Replace fields of every epoch line."""
    source = folder / "metrics.jsonl"
    events = [json.loads(line) for line in source.read_text().splitlines()]
    lines = [event | fields if event["event"] == "epoch" else event for event in events]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from retrograde.errors import RunError
from retrograde.report.runs import collect, read

Make = Callable[..., Path]


def test_reads_description_events_and_result(make_run: Make) -> None:
    run = read(make_run("dither-2", scale=2, epochs=3))
    assert run.label == "Dither(scale=2)"
    assert [epoch.epoch for epoch in run.epochs] == [1, 2, 3]
    assert len(run.steps) == 18
    assert run.result.status == "finished"
    assert run.test == pytest.approx(0.9688)
    assert run.description.plan.layers[0].methods == ("dither",)
    assert run.result.flops.forward.dense == pytest.approx(run.result.flops.dense / 3)


def test_unknown_layer_fields_are_kept(make_run: Make) -> None:
    run = read(make_run())
    assert run.layers["1"].number("unknown") == 17


def test_null_fields_take_their_defaults(make_run: Make) -> None:
    folder = make_run(machine=None, plan=None, label="", started=None)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(dict.fromkeys(result) | {"schema": 1}))
    run = read(folder)
    assert run.description.plan.layers == ()
    assert run.label == "dither-0"
    assert run.test is None
    assert run.result.flops.dense is None


def test_a_run_without_result_is_unfinished(make_run: Make) -> None:
    run = read(make_run(finished=False))
    assert run.result.status == "unfinished"
    assert run.test is None


@pytest.mark.parametrize("end", [b'{"event": "ep', '{"event": "é'.encode()[:-1]])
def test_a_cut_off_last_line_is_left_out(make_run: Make, end: bytes) -> None:
    folder = make_run(epochs=2)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(end)
    assert len(read(folder).epochs) == 2


def test_a_damaged_line_in_the_middle_is_an_error(make_run: Make) -> None:
    folder = make_run(epochs=2)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:20]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 4 is not JSON"):
        read(folder)


def test_a_resumed_run_counts_the_later_epoch(make_run: Make) -> None:
    folder = make_run(epochs=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "epoch", "epoch": 2, "validation": {"accuracy": 0.5}}) + "\n")
    run = read(folder)
    assert [epoch.epoch for epoch in run.epochs] == [1, 2]
    assert run.epochs[1].validation == {"accuracy": 0.5}


@pytest.mark.parametrize("name", ["run.json", "result.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        ('{"name": "a"}', "has schema None"),
        ('{"schema": 2, "name": "a"}', "has schema 2"),
    ],
)
def test_a_damaged_file_is_named(make_run: Make, name: str, text: str, message: str) -> None:
    folder = make_run()
    (folder / name).write_text(text)
    with pytest.raises(RunError, match=message) as error:
        read(folder)
    assert str(folder / name) in str(error.value)


def test_a_missing_field_is_named(make_run: Make) -> None:
    folder = make_run()
    (folder / "run.json").write_text('{"schema": 1}')
    with pytest.raises(RunError, match="name: Field required"):
        read(folder)


def test_collect_takes_runs_and_folders_of_runs_once_each(runs: Path) -> None:
    found = collect([runs / "dither-2", runs])
    assert [run.folder.name for run in found] == [
        "dither-2",
        "backprop-0",
        "dither-1",
        "images-backprop-0",
        "images-dither-2",
    ]


def test_collect_reports_a_run_folder_without_description(runs: Path) -> None:
    (runs / "dither-1" / "run.json").unlink()
    with pytest.raises(RunError, match=r"dither-1/run\.json is missing"):
        collect([runs])


def test_collect_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No runs found in"):
        collect([tmp_path])
    with pytest.raises(RunError, match="is not a folder"):
        collect([tmp_path / "nowhere"])
    with pytest.raises(RunError, match="no path was given"):
        collect([])

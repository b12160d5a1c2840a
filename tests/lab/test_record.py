"""The record of a run: what the trainer writes is what everybody reads, and damage is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from retrograde.errors import RunError
from retrograde.lab import files
from retrograde.lab.recipe import Recipe
from retrograde.lab.record import Epoch, RunRecord, collect, read_description, read_outcome, read_run
from retrograde.lab.trainer import train

RECIPE = Recipe(
    methods={"dither": {"scale": 1.0}},
    epochs=3,
    evaluations=2,
    limit=128,
    batch_size=32,
    learning_rate=0.01,
    decline=False,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("record") / "dither-0"
    return folder, train(RECIPE, folder)


@pytest.fixture
def folder(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A run folder to be changed."""
    return shutil.copytree(trained[0], tmp_path / "runs" / "dither-0")


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def add_line(folder: Path, **fields: Any) -> None:
    with (folder / files.METRICS).open("a") as file:
        file.write(json.dumps(fields) + "\n")


def test_what_is_written_is_read(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, result = trained
    run = read_run(folder)
    assert run.label == "dither(scale=1.0)"
    assert run.seed == 0
    assert Recipe.model_validate(run.description.recipe) == RECIPE
    assert [layer.methods for layer in run.description.plan.layers] == [("dither",)] * 3
    assert [step.step for step in run.steps] == [10, 12]
    assert [(reading.event, reading.step) for reading in run.readings] == [
        (event, step) for step, event in zip(range(2, 13, 2), ["reading", "epoch"] * 3, strict=True)
    ]
    assert run.outcome.to_dict() == result == files.read_json(folder / files.RESULT)
    assert run.step_seconds == run.outcome.step_seconds
    assert list(run.layers) == [layer.name for layer in run.description.plan.layers]
    assert (run.layers["head"].number("kernel_reference") or 0) > 0


def test_nothing_that_is_written_is_unknown_to_the_record(folder: Path) -> None:
    """Methods add figures of layers; a field of the trainer's that no type names would go unread."""
    run = read_run(folder)
    for part in (run.description, run.outcome, run.outcome.timing, *run.steps, *run.readings):
        assert part is not None
        assert not part.model_extra, part


def test_null_fields_take_their_defaults(folder: Path) -> None:
    edit(folder / files.RUN, machine=None, plan=None, label="", started=None)
    result = json.loads((folder / files.RESULT).read_text())
    (folder / files.RESULT).write_text(json.dumps(dict.fromkeys(result) | {"schema": 1}))
    run = read_run(folder)
    assert run.description.plan.layers == ()
    assert run.label == "dither-0"
    assert run.outcome.score("test") is None
    assert run.outcome.flops.dense is None


def test_a_run_without_result_is_unfinished(folder: Path) -> None:
    (folder / files.RESULT).unlink()
    run = read_run(folder)
    assert read_outcome(folder) is None
    assert run.outcome.status == "unfinished"
    assert run.step_seconds == run.epochs[-1].step_seconds


@pytest.mark.parametrize("end", [b'{"event": "ep', '{"event": "é'.encode()[:-1]])
def test_a_cut_off_last_line_is_left_out(folder: Path, end: bytes) -> None:
    with (folder / files.METRICS).open("ab") as file:
        file.write(end)
    assert len(read_run(folder).epochs) == 3


def test_a_damaged_line_in_the_middle_is_an_error(folder: Path) -> None:
    lines = (folder / files.METRICS).read_text().splitlines()
    lines[3] = lines[3][:20]
    (folder / files.METRICS).write_text("\n".join(lines))
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 4 is not JSON"):
        read_run(folder)


def test_a_resumed_run_counts_the_later_line(folder: Path) -> None:
    add_line(folder, event="epoch", epoch=2, step=8, seconds=1.0, validation={"accuracy": 0.5})
    add_line(folder, event="step", step=10, loss=7.0)
    add_line(folder, event="of a later version")
    run = read_run(folder)
    assert [epoch.epoch for epoch in run.epochs] == [1, 2, 3]
    assert run.epochs[1].validation == {"accuracy": 0.5}
    assert run.steps[0].loss == 7.0


def test_fields_of_methods_are_read_with_care() -> None:
    epoch = Epoch.model_validate(
        {"epoch": 1, "step": 1, "seconds": 1, "a": float("nan"), "b": [1], "c": {"d": 1}}
    )
    assert (epoch.number("a"), epoch.number("b"), epoch.number("missing")) == (None, None, None)
    assert (dict(epoch.mapping("b")), dict(epoch.mapping("c"))) == ({}, {"d": 1})


@pytest.mark.parametrize("name", [files.RUN, files.RESULT])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "not a JSON object"),
        (b'{"name": "a"}', "has schema None"),
        (b'{"schema": 2, "name": "a"}', "has schema 2"),
        (b'{"schema": 1, "name": "a", "recipe": 3, "steps": "many"}', "does not fit schema 1"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(RunError, match=message) as error:
        read_run(folder)
    assert str(folder / name) in str(error.value)


def test_a_missing_field_is_named(folder: Path) -> None:
    (folder / files.RUN).write_text('{"schema": 1, "recipe": {}}')
    with pytest.raises(RunError, match="name: Field required"):
        read_description(folder)


def names(runs: list[RunRecord]) -> list[str]:
    return [run.folder.name for run in runs]


def test_collect_takes_runs_and_folders_of_runs_once_each(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "another")
    (folder.parent / "no run").mkdir()
    assert names(collect([folder, folder.parent])) == ["dither-0", "another"]
    assert names(collect([folder.parent])) == ["another", "dither-0"]


def test_collect_reports_a_run_folder_without_description(folder: Path) -> None:
    (folder / files.RUN).unlink()
    with pytest.raises(RunError, match=r"dither-0/run\.json is missing"):
        collect([folder.parent])


def test_collect_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="No runs found in"):
        collect([tmp_path])
    with pytest.raises(RunError, match="is not a folder"):
        collect([tmp_path / "nowhere"])
    with pytest.raises(RunError, match="no path was given"):
        collect([])

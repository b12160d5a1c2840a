"""A checkpoint that is incomplete, or of something else, is refused by the name of its field before anything runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retrograde.errors import CheckpointError, RunError, StateError
from retrograde.lab import files
from retrograde.lab.checkpoint import Checkpoint
from retrograde.lab.recipe import Recipe
from retrograde.lab.trainer import Trainer, train

SMALL = Recipe(
    limit=64,
    epochs=2,
    batch_size=16,
    methods={"dither": {}},
    peers={"selective-backprop": {}},
    optimizer="adam",
    decline=False,
)


def stopped(folder: Path, recipe: Recipe = SMALL) -> dict[str, Any]:
    """The checkpoint of a run that was stopped after its third step."""
    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        train(recipe, folder, stop=lambda: steps.append(1) or len(steps) == 3)
    return files.load_checkpoint(folder)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("begun") / "run"
    stopped(folder)
    return folder, (folder / files.CHECKPOINT).read_bytes()


@pytest.fixture
def refused(begun: tuple[Path, bytes]) -> Callable[[dict[str, Any]], str]:
    """What resuming from a changed checkpoint says; the run's files stay as they are."""
    folder, whole = begun

    def resume(change: dict[str, Any]) -> str:
        (folder / files.CHECKPOINT).write_bytes(whole)
        content = files.load_checkpoint(folder) | change
        content = {name: value for name, value in content.items() if value is not ...}
        torch.save(content, folder / files.CHECKPOINT)
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        with pytest.raises((CheckpointError, StateError)) as raised:
            train(SMALL, folder, resume=True)
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
        return str(raised.value)

    return resume


FIELDS = [name for name in Checkpoint.model_fields if name != "format"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [..., "something else", -1, {"a": None}, [torch.zeros(2)]], ids=repr)
def test_a_field_that_is_missing_or_of_another_kind(refused: Any, field: str, value: Any) -> None:
    if (field, value) == ("seconds", -1):
        pytest.skip("a number of seconds")
    assert f"'{field}'" in refused({field: value}) or field == "recipe"


def test_a_field_that_nobody_reads(refused: Any) -> None:
    assert "'extra'" in refused({"extra": 1})


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("model", {"model": "lenet"}),
        ("optimizer", {"model": "lenet"}),
        ("optimizer", {"model": "mlp"}),
        ("optimizer", {"optimizer": "sgd", "model": "mlp"}),
        ("schedule", {"schedule": "cosine"}),
        ("schedule", {"schedule": "constant"}),
        ("session", {"methods": {}}),
        ("session", {"model": "lenet"}),
        ("session", {"methods": {"spectral": {}}}),
        ("selector", {"peers": {}}),
    ],
)
def test_a_field_of_another_run(refused: Any, tmp_path: Path, field: str, other: dict[str, Any]) -> None:
    found = stopped(tmp_path / "other", SMALL.model_copy(update=other))
    assert f"'{field}'" in refused({field: found[field]})


def test_counts_that_do_not_fit_each_other(refused: Any) -> None:
    assert "'step'" in refused({"step": 10**9})
    assert "'step'" in refused({"finished_epochs": 2})
    assert "'schedule'" in refused({"step": 2})
    assert "shorter" in refused({"metrics_bytes": 10**9})


def test_a_run_without_its_description_is_refused_before_it_trains(tmp_path: Path) -> None:
    stopped(tmp_path / "run")
    (tmp_path / "run" / files.RUN).unlink()
    with pytest.raises(RunError, match="there is no run in"):
        train(SMALL, tmp_path / "run", resume=True)


def test_a_second_trainer_waits_for_the_first(tmp_path: Path) -> None:
    data = SMALL.load_data()
    first = Trainer(SMALL, tmp_path / "run", data)
    with pytest.raises(RunError, match="another run is training"):
        Trainer(SMALL, tmp_path / "run", data, resume=True)
    first.keep()
    with pytest.raises(CheckpointError, match="another recipe") as kept:
        Trainer(SMALL.model_copy(update={"seed": 1}), tmp_path / "run", data, resume=True)
    # An error that is kept keeps nobody out.
    assert kept.value
    Trainer(SMALL, tmp_path / "run", data, resume=True).close()

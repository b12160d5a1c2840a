"""TensorBoard logs, with TensorBoard and without."""

from pathlib import Path

import pytest

from retrograde.lab import tensorboard
from retrograde.lab.recipe import Recipe
from retrograde.lab.tensorboard import is_available, open_writer
from retrograde.lab.trainer import train


def test_without_tensorboard_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "is_available", lambda: False)
    assert open_writer(tmp_path / "logs", 0) is None
    assert not (tmp_path / "logs").exists()
    result = train(Recipe(limit=32, epochs=1, batch_size=16), tmp_path / "run")
    assert result["status"] == "finished"
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.skipif(not is_available(), reason="TensorBoard is not installed")
def test_scalars_can_be_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = open_writer(tmp_path, 0)
    assert writer is not None
    for step in range(3):
        writer.add_scalar("loss", step / 2, step)
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0.0), (1, 0.5), (2, 1.0)]

"""Few-shot tasks: what they are made of, and that a cell of every kind runs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from retrograde.lab.decode import Raw
from retrograde.lab.experiments import few_shot
from retrograde.lab.experiments.base import Context
from retrograde.lab.experiments.few_shot import FewShot, classes


def raw(count: int, per_class: int, parts: tuple[str, ...], side: int = 28) -> Raw:
    """Images of which each has its class and its number in the first two pixels."""

    def arrays() -> dict[str, np.ndarray]:
        labels = np.repeat(np.arange(count), per_class)
        pixels = np.random.default_rng(0).integers(0, 255, (len(labels), 1, side, side), dtype=np.uint8)
        pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = labels % 250, np.tile(np.arange(per_class), count)
        return {"pixels": pixels, "labels": labels}

    return Raw("image", {part: arrays() for part in parts})


@pytest.fixture
def pneumonia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_shot, "read", lambda name, data_dir: raw(2, 30, ("train", "validation", "test")))


@pytest.mark.usefixtures("pneumonia")
def test_a_task_has_each_class_in_both_sets_and_no_image_twice() -> None:
    cell = FewShot(data="pneumoniamnist", ways=2, shots=3, queries=4)
    images = classes("pneumoniamnist", None)["train"]
    batches = cell._batches(images, 50, 4, 0)
    x, y, query, target = next(batches)
    assert x.shape == (50, 6, 1, 28, 28)
    assert query.shape == (50, 8, 1, 28, 28)
    assert y[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert target[0].tolist() == [0] * 4 + [1] * 4
    marks = (torch.cat((x, query), 1)[:, :, 0, 0, :2] * 255).round().int()
    assert all(len({tuple(m) for m in task.tolist()}) == 14 for task in marks)
    for task, labels in zip(marks, torch.cat((y, target), 1), strict=True):
        assert len({(int(m[0]), int(label)) for m, label in zip(task, labels, strict=True)}) == 2
    # Either class comes first, about as often.
    assert 10 < int((marks[:, 0, 0] == 0).sum()) < 40
    again = next(cell._batches(images, 50, 4, 0))
    assert torch.equal(again[0], x)
    assert not torch.equal(next(batches)[0], x)


def test_classes_of_the_splits_are_disjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_shot, "read", lambda name, data_dir: raw(50, 2, ("train", "validation"), 32))
    splits = classes("tiny-imagenet-50", None)
    marks = {split: {int(one[0, 0, 0, 0]) for one in images} for split, images in splits.items()}
    assert [len(marks[split]) for split in ("train", "validation", "test")] == [30, 8, 12]
    assert len(set.union(*marks.values())) == 50


@pytest.mark.usefixtures("pneumonia")
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4},
        {"rank": 8, "model": "convolutional", "basis": "task"},
        {"head_only": True, "first_order": True},
    ],
)
def test_a_cell_runs_the_same_twice(tmp_path: Path, options: dict[str, object]) -> None:
    cell = FewShot.model_validate(
        {
            "data": "pneumoniamnist",
            "ways": 2,
            "tasks": 2,
            "iterations": 2,
            "test_tasks": 20,
            "width": 4,
            **options,
        }
    )
    told: list[float] = []
    first = cell.run(Context(tmp_path, tell=told.append))
    assert first["accuracy"] == cell.run(Context(tmp_path))["accuracy"]
    assert 0 < first["accuracy"] < 1
    assert first["step_peak_bytes"] > 0
    assert told == sorted(told)

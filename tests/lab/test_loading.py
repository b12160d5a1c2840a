"""The network of a finished run, as a module again."""

from pathlib import Path

import pytest
import torch

import retrograde as rg
from retrograde.engine.layers import AttachedLayer
from retrograde.errors import RunError
from retrograde.lab import files
from retrograde.lab.measure import evaluate
from retrograde.lab.recipe import make_recipe
from retrograde.lab.trainer import train

RECIPE = {
    "model": "mlp",
    "model_options": {"widths": (24, 24)},
    "data": "digits",
    "epochs": 4,
    "limit": 256,
    "batch_size": 16,
    "learning_rate": 0.01,
}


def run(folder: Path, **fields: object) -> Path:
    train(make_recipe({**RECIPE, **fields}), folder)
    return folder


@pytest.mark.parametrize("method", ["", "dither", "decorrelate", "spectral", "perforate"])
def test_it_computes_what_was_tested(method: str, tmp_path: Path) -> None:
    folder = run(tmp_path / "run", methods={method: {}} if method else {}, decline=False)
    model = rg.load_run(str(folder))
    assert not model.training
    data = make_recipe(RECIPE).load_data()
    test = files.read_json(folder / files.RESULT)["test"]
    assert test["accuracy"] > 0.5
    assert evaluate(model, data.test, torch.device("cpu"), "float32") == pytest.approx(test)
    assert any("dendrites" in name for name, _ in model.named_modules()) == (method == "perforate")
    assert not any(isinstance(module, AttachedLayer) for module in model.modules())


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run"):
        rg.load_run(tmp_path)
    folder = run(tmp_path / "run")
    description = files.read_json(folder / files.RUN)
    description["recipe"]["model_options"] = {"widths": (16,)}
    files.write_json(folder / files.RUN, description)
    with pytest.raises(RunError, match="does not fit mlp"):
        rg.load_run(folder)
    (folder / files.MODEL).unlink()
    with pytest.raises(RunError, match=r"has no model\.safetensors"):
        rg.load_run(folder)

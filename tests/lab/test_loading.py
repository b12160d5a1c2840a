"""The network of a finished run, as a module again."""

import sys
from pathlib import Path

import pytest
import torch

import retrograde as rg
from retrograde.engine.layers import AttachedLayer
from retrograde.errors import OptionError, RunError
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


def test_a_folder_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even to find out that it is no network; where the code is named, it is the network."""
    (tmp_path / "own_code.py").write_text(
        "from pathlib import Path\nfrom torch import nn\nPath('ran').touch()\n"
        "def net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = run(tmp_path / "run", model="own_code:net", model_options={}, epochs=1)
    (tmp_path / "ran").unlink()
    monkeypatch.delitem(sys.modules, "own_code")
    with pytest.raises(OptionError, match=r"names code.*model='own_code:net'"):
        rg.load_run(folder)
    assert not (tmp_path / "ran").exists()
    assert isinstance(rg.load_run(folder, model="own_code:net")[1], torch.nn.Linear)


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

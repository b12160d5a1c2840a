"""The experiment on smaller networks: equal multiply-adds for all, one trained network for all variants."""

from pathlib import Path
from typing import Any

import pytest
import torch

from retrograde.lab.experiments import factorisation
from retrograde.lab.experiments.base import Context
from retrograde.lab.experiments.factorisation import Factorisation

METHODS = ("spectral", "weights", "schedule", "pruning")


@pytest.fixture(autouse=True)
def _digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(factorisation._NETWORKS, "mlp", ("digits", "mlp-small", {}))
    monkeypatch.setattr(factorisation, "_ROUNDS", {1: 2, 128: 2})


def run(folder: Path, trial: bool = False, **options: Any) -> dict[str, float]:
    folder.mkdir(exist_ok=True)
    chosen: dict[str, Any] = {"network": "mlp", "limit": None, "epochs": 4, "tune_epochs": 2, "share": 0.5}
    return Factorisation(**(chosen | options)).run(Context(folder, trial=trial))


def test_every_variant_starts_from_one_network_and_ends_at_equal_multiply_adds(tmp_path: Path):
    pytest.importorskip("torch_pruning")
    plain = run(tmp_path / "original", method="original")
    assert plain["macs_share"] == 1
    assert plain["accuracy"] > 0.8
    (network,) = tmp_path.glob("*.pt")
    written = network.stat().st_mtime_ns
    for method in METHODS:
        found = run(tmp_path / method, method=method)
        assert 0.45 < found["macs_share"] <= 0.5, method
        assert found["model_bytes"] < 0.6 * plain["model_bytes"], method
        assert found["accuracy"] > 0.7, method
        assert found.keys() == plain.keys()
    assert network.stat().st_mtime_ns == written


def test_a_trial_reads_the_validation_split_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    accuracy = factorisation._accuracy

    def counted(model: torch.nn.Module, split: Any) -> float:
        sizes.append(len(split))
        return accuracy(model, split)

    monkeypatch.setattr(factorisation, "_accuracy", counted)
    found = run(tmp_path / "trial", trial=True)
    assert set(found) == {"accuracy", "accuracy_untuned"}
    run(tmp_path / "run")
    assert sizes[0] == sizes[1] != sizes[2] == sizes[3]


def test_it_can_be_stopped(tmp_path: Path):
    context = Context(tmp_path / "run", stop=lambda: True)
    context.folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        Factorisation(network="mlp", limit=None).run(context)
    assert not list(tmp_path.glob("*.pt"))

"""Claims that run an experiment: searched, run, summed up and refused like those that train."""

from pathlib import Path
from typing import Any, ClassVar

import pytest

from retrograde.errors import OptionError
from retrograde.lab import experiments
from retrograde.lab.claims import definition
from retrograde.lab.claims.definition import Claim
from retrograde.lab.claims.grid import Grid, Places
from retrograde.lab.claims.library import Library
from retrograde.lab.experiments.base import Context, Experiment


class Throw(Experiment):
    """How far a ball flies."""

    strength: float = 1.0
    runs: ClassVar[list[tuple[float, int, bool]]] = []

    def run(self, context: Context) -> dict[str, float]:
        context.note(0.5)
        self.runs.append((self.strength, self.seed, context.trial))
        return {"accuracy": 1 - (self.strength - 3) ** 2 / 100 + self.seed / 1000, "captured": self.strength}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(definition, "experiment", lambda name: Throw)
    Throw.runs.clear()


def claim(**changes: Any) -> Claim:
    fields: dict[str, Any] = {
        "id": "balls/throw",
        "title": "Throwing",
        "claim": "Far",
        "source": "a field",
        "experiment": "throw",
        "seeds": 2,
        "contestants": {"weak": {"recipe": {"strength": 1.0}}, "strong": {"recipe": {"strength": 2.5}}},
        "checks": [
            {"says": "farther", "of": "strong", "metric": "captured", "minus": "weak", "at_least": 1.0}
        ],
        "table": ["accuracy", "captured"],
    }
    return Claim.model_validate({**fields, **changes})


def test_a_claim_with_an_experiment(tmp_path: Path) -> None:
    """Every variant and seed once, resumed for nothing; figures, checks and verdict as of any claim."""
    result = Grid(claim(), Places(tmp_path)).run()
    assert sorted(Throw.runs) == [(s, seed, False) for s in (1.0, 2.5) for seed in (0, 1)]
    assert [run.metrics["captured"] for run in result.runs] == [1.0, 2.5, 1.0, 2.5]
    assert result.verdict == "reproduced"
    assert result.findings[0].value == 1.5
    again = Grid(claim(), Places(tmp_path)).run()
    assert len(Throw.runs) == 4
    assert again.summaries == result.summaries


def test_its_settings_are_searched(tmp_path: Path) -> None:
    """On what a trial calls accuracy; the best is what runs."""
    tuning = {"trials": 4, "space": {"strength": [1.0, 3.0]}, "recipe": {}}
    result = Grid(claim(tuning=tuning, seeds=1), Places(tmp_path)).run()
    assert sum(trial for *_, trial in Throw.runs) == 8
    best = result.contestants["weak"].changes["strength"]
    tried = {t.changes["strength"]: t.accuracy for t in result.contestants["weak"].trials}
    assert tried[best] == max(tried.values())


def test_interrupted_it_keeps_what_is_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Grid(claim(), Places(tmp_path)).run(stop=lambda: len(Throw.runs) == 2)
    Grid(claim(), Places(tmp_path)).run()
    assert len(Throw.runs) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"equal": "seconds"}, "neither methods"),
        ({"contestants": {"one": {"methods": {"exact": {}}}}, "checks": []}, "neither methods"),
        ({"measures": ["sharpness"]}, "neither methods"),
    ],
)
def test_what_belongs_to_training_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        claim(**changes)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(OptionError, match=r"balls/throw, variant 'weak': speed is refused: Extra inputs"):
        claim().recipe_of("weak", {"speed": 3})


def test_a_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="runs on the CPU"):
        Grid(claim(), Places(tmp_path, device="cpu"))


@pytest.mark.parametrize("name", experiments.NAMES)
def test_every_experiment_is_found(name: str) -> None:
    assert issubclass(experiments.experiment(name), Experiment)


def test_an_unknown_experiment() -> None:
    with pytest.raises(OptionError, match=r"there is no experiment 'trackin'.*tracking"):
        experiments.experiment("trackin")


def test_other_claims_stay_as_they_were() -> None:
    """A result belongs to its definition: a field that it does not use must not make it stale."""
    assert Library(Path(__file__).parents[3] / "repro").entry("exact/imdb-cnn").status == "run"

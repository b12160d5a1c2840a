"""The search for each variant's settings: Optuna on the validation split, as many trials for all."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from retrograde.errors import RetrogradeError
from retrograde.extras import require
from retrograde.lab import files
from retrograde.lab.claims.cells import Cell, DataSets, train_together, weight
from retrograde.lab.claims.definition import Claim, Range, Space, Tuning, content_hash
from retrograde.lab.claims.jobs import Stop, Tell
from retrograde.lab.experiments import Experiment
from retrograde.lab.recipe import Recipe
from retrograde.lab.record import Outcome

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Search:
    """One variant's search; what was found is kept under a hash of all that it depends on.

    Attributes:
        claim: with its tuning.
        name: of the variant.
        folder: of all searches of the claim.
    """

    claim: Claim
    name: str
    folder: Path

    @property
    def path(self) -> Path:
        """Where the trials are kept."""
        whole = {
            "recipe": self._recipe({}).model_dump(mode="json"),
            "start": self._start(),
            "space": {key: TypeAdapter(Space).dump_python(space) for key, space in self._space().items()},
        }
        return self.folder / f"{self.name}-{content_hash(whole)}.json"

    def trials(self) -> list[dict[str, Any]]:
        """What has been tried: ``changes`` to the recipe, ``accuracy`` on the validation split, ``error`` if any."""
        found: list[dict[str, Any]] = files.read_json(self.path)["trials"] if self.path.is_file() else []
        return found[: self._tuning.trials]

    def waiting(self) -> int:
        """Trials still to run."""
        return self._tuning.trials - len(self.trials())

    def epochs(self) -> int:
        """Of one trial."""
        return weight(self._recipe({}))

    def best(self) -> dict[str, Any]:
        """The changes with the best validation accuracy; the first of equals."""
        best: dict[str, Any] = max(self.trials(), key=lambda trial: trial["accuracy"])["changes"]
        return best

    def run(self, data_dir: Path | None, tell: Tell, stop: Stop) -> None:
        """Run what is waiting. The sampler is led through the known trials again, so a resumed search is the same."""
        study, known = _study(self._tuning.seed), self.trials()
        study.enqueue_trial(self._start())
        first, share = len(known), 1 / max(1, self.waiting())
        sets: DataSets = {}
        for number in range(self._tuning.trials):
            trial = study.ask()
            changes = {key: _suggest(trial, key, space) for key, space in self._space().items()}
            if number >= first:

                def part(done: float, before: int = number - first) -> None:
                    tell((before + done) * share)

                known.append(self._try(changes, data_dir, sets, part, stop))
                files.write_json(self.path, {"trials": known})
            study.tell(trial, known[number]["accuracy"])

    def _try(
        self,
        changes: dict[str, Any],
        data_dir: Path | None,
        sets: DataSets,
        tell: Tell,
        stop: Stop,
    ) -> dict[str, Any]:
        recipe = self._recipe(changes)
        folder = self.folder / f"{self.name}-{content_hash(recipe.model_dump(mode='json'))}"
        cell = Cell(self.name, recipe, folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        error = None
        try:
            train_together([cell], data_dir, tell, stop, trial=True, sets=sets)
            outcome = cell.outcome() or Outcome()
            best = isinstance(recipe, Recipe) and recipe.keep == "best"
            accuracy = outcome.score("best_validation" if best else "validation") or 0.0
        except (RetrogradeError, ArithmeticError, RuntimeError) as broken:
            if not self.trials():
                # By its own settings it cannot train: a package is missing, or a definition is wrong.
                raise
            # Searched settings under which training breaks down are a result, and a bad one.
            accuracy, error = 0.0, str(broken)
        shutil.rmtree(folder, ignore_errors=True)
        return {"changes": changes, "accuracy": accuracy, "error": error}

    @property
    def _tuning(self) -> Tuning:
        assert self.claim.tuning is not None, "a claim without tuning has no searches"
        return self.claim.tuning

    def _recipe(self, changes: dict[str, Any]) -> Recipe | Experiment:
        shorter = {**self._tuning.recipe, "seed": self._tuning.seed}
        return self.claim.recipe_of(self.name, {**shorter, **changes})

    def _space(self) -> dict[str, Space]:
        return {**self._tuning.space, **self.claim.contestants[self.name].space}

    def _start(self) -> dict[str, Any]:
        """The recipe's own values, as far as they lie within the space."""
        recipe = self.claim.recipe_of(self.name).model_dump()
        found: dict[str, Any] = {}
        for key, space in self._space().items():
            value: Any = recipe
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None and value in space:
                found[key] = value
        return found


def _study(seed: int) -> "optuna.Study":
    require("the search for settings, which trials=0 leaves out,", "repro", ["optuna"])
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Random at first; the estimator learns from the third trial on.
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=3)
    return optuna.create_study(direction="maximize", sampler=sampler)


def _suggest(trial: "optuna.Trial", key: str, space: Space) -> Any:
    if isinstance(space, Range):
        return trial.suggest_float(key, space.low, space.high, log=space.log)
    return trial.suggest_categorical(key, space)

"""The whole grid of a claim: searches, an equal time where it is asked for, then every seed; resumable at any point."""

import contextlib
import os
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from retrograde.errors import OptionError
from retrograde.lab import files, machine
from retrograde.lab.claims.cells import Cell, pace, train_together, weight
from retrograde.lab.claims.definition import Claim, content_hash
from retrograde.lab.claims.jobs import Job, Show, State, Stop, run_all
from retrograde.lab.claims.metrics import of_run, summary
from retrograde.lab.claims.result import Entry, Result, Run, Trial
from retrograde.lab.claims.tuning import Search
from retrograde.lab.claims.verdict import complete
from retrograde.lab.experiments import Experiment
from retrograde.lab.recipe import Recipe
from retrograde.lab.record import Outcome, read_run
from retrograde.lab.trainer import pick_device

RUNS = "runs"
"""The folder of the run folders, in that of a claim."""

PACE_STEPS = 1000
"""Of each variant, to learn how many of them take an equal time."""


@dataclass(frozen=True)
class Places:
    """Where a claim is run.

    Attributes:
        folder: of its runs and searches.
        data_dir: where data sets lie.
        jobs: searches or seeds at once, each in a process of its own with an equal share of the cores. The last
            seeds, where there are fewer of them than jobs, are shared out by variants, without turns.
        device: of all recipes; None leaves them as they are.
    """

    folder: Path
    data_dir: Path | None = None
    jobs: int = 1
    device: str | None = None


class Grid:
    """All that a claim needs to be run.

    Args:
        claim: its definition, already shortened for a quick run.
        places: where.
    """

    def __init__(self, claim: Claim, places: Places) -> None:
        if places.jobs < 1:
            raise OptionError(f"jobs={places.jobs} runs nothing: give 1 or more.")
        self._hash = claim.hash
        if places.device is not None and claim.experiment is not None:
            raise OptionError(f"{claim.id} runs on the CPU: leave device={places.device!r} out.")
        if places.device is not None:
            pick_device(places.device)
            claim = claim.model_copy(update={"recipe": {**claim.recipe, "device": places.device}})
        self.claim, self.places = claim, places
        self.labels = {
            # What differs in the recipe alone is plain backpropagation by its methods: its name says more.
            name: one.label or _label(claim.recipe_of(name), name)
            for name, one in claim.contestants.items()
        }
        folder = places.folder / "search"
        self.searches = [Search(claim, name, folder) for name in claim.contestants] if claim.tuning else []

    def run(
        self,
        *,
        quick: bool = False,
        command: str = "",
        show: Show = lambda what, done, total: None,
        stop: Stop = lambda: False,
    ) -> Result:
        """Run what is not there yet, and sum it up; nothing is written of the sum.

        Args:
            quick: said in the result.
            command: how to make it again, for the result.
            show: called as work goes on.
            stop: asked after every step; true leaves everything resumable and raises KeyboardInterrupt.
        """
        self.places.folder.mkdir(parents=True, exist_ok=True)
        tuning = [
            Job(
                f"search for {self.labels[search.name]}",
                search.waiting() * search.epochs(),
                partial(search.run, self.places.data_dir),
            )
            for search in self.searches
            if search.waiting()
        ]
        epochs = sum(weight(self.claim.recipe_of(name)) for name in self.claim.contestants)
        epochs *= 1 + sum(self.claim.budgets)
        state = State(show, sum(job.weight for job in tuning) + self.claim.seeds * epochs)
        run_all(tuning, self.places.jobs, state, stop)
        changes = self._changes(state, stop)
        seeds = self._seed_jobs(changes)
        # Some seeds may have run before, and an equal time may make them longer or shorter.
        state.total = state.finished + sum(job.weight for job in seeds)
        run_all(seeds, self.places.jobs, state, stop)
        return self._sum_up(changes, quick=quick, command=command)

    @property
    def _threads(self) -> int:
        """Of each job."""
        return max(1, torch.get_num_threads() // self.places.jobs)

    def cells(self, seed: int, changes: dict[str, dict[str, Any]]) -> tuple[Cell, ...]:
        """The runs of one seed, with what the searches found, whole ones first."""
        budgets = (1.0, *sorted(self.claim.budgets, reverse=True))
        return tuple(
            self.cell(name, seed, changes[name], budget)
            for budget in budgets
            for name in self.claim.contestants
        )

    def cell(self, name: str, seed: int, changes: dict[str, Any], budget: float = 1.0) -> Cell:
        """One run, of a share of the claim's epochs."""
        recipe = self.claim.recipe_of(name, {**changes, "seed": seed})
        if budget < 1:
            assert isinstance(recipe, Recipe)
            recipe = recipe.model_copy(update={"epochs": round(recipe.epochs * budget)})
        whole = recipe.model_dump(mode="json")
        # What is measured of a trained model belongs to its run: another figure is another run.
        key = content_hash({**whole, "measures": self.claim.measures} if self.claim.measures else whole)
        folder = self.places.folder / RUNS / f"{name}-{seed}-{key}"
        return Cell(name, recipe, folder, self.claim.title, self.labels[name], budget)

    def _changes(self, state: State, stop: Stop) -> dict[str, dict[str, Any]]:
        """What searches, and timing where the time is to be equal, made of each variant's recipe."""
        found = {name: {} for name in self.claim.contestants} | {s.name: s.best() for s in self.searches}
        if self.claim.equal == "steps":
            return found
        recipes = {name: self.claim.recipe_of(name, one) for name, one in found.items()}
        key = content_hash({name: recipe.model_dump(mode="json") for name, recipe in recipes.items()})
        path = self.places.folder / f"pace-{key}.json"
        if not path.is_file():
            state.what = "timing a step of each variant"
            state.show()
            cells = [
                Cell(name, recipe, self.places.folder / "pace" / name) for name, recipe in recipes.items()
            ]
            with _threads(self._threads):
                seconds, steps = pace(cells, PACE_STEPS, self.places.data_dir, stop)
            files.write_json(path, {"step_seconds": seconds, "steps": steps})
        timed = files.read_json(path)
        whole: float = timed["steps"] * timed["step_seconds"][self.claim.baseline]
        return {
            name: {**one, "steps": max(1, round(whole / timed["step_seconds"][name]))}
            for name, one in found.items()
        }

    def _seed_jobs(self, changes: dict[str, dict[str, Any]]) -> list[Job]:
        """Seeds that are not finished."""
        seeds = [(seed, self.cells(seed, changes)) for seed in range(self.claim.seeds)]
        waiting = [(seed, cells) for seed, cells in seeds if any(cell.outcome() is None for cell in cells)]
        # Processes that would wait for the last seeds take variants of theirs.
        whole = len(waiting) - len(waiting) % self.places.jobs
        jobs = [(f"seed {seed}", cells) for seed, cells in waiting[:whole]]
        for seed, cells in waiting[whole:]:
            jobs += [
                (
                    f"seed {seed}, {self.labels[cell.name]}" + f", {cell.budget:.0%}" * (cell.budget < 1),
                    (cell,),
                )
                for cell in cells
            ]
        return [
            Job(
                what,
                sum(weight(cell.recipe) for cell in cells),
                partial(train_together, cells, self.places.data_dir, measures=self.claim.measures),
            )
            for what, cells in jobs
        ]

    def _sum_up(self, changes: dict[str, dict[str, Any]], *, quick: bool, command: str) -> Result:
        claim = self.claim
        cells = [cell for seed in range(claim.seeds) for cell in self.cells(seed, changes)]
        trials = {search.name: search.trials() for search in self.searches}
        result = Result(
            claim=claim.id,
            hash=self._hash,
            quick=quick,
            title=claim.title,
            sentence=claim.claim,
            source=claim.source,
            note=claim.note,
            command=command,
            machine=machine.describe(_device(claim.recipe_of(claim.baseline))),
            jobs=self.places.jobs,
            threads=self._threads,
            seeds=list(range(claim.seeds)),
            equal=claim.equal,
            target=claim.target,
            table=claim.table,
            contestants={
                name: Entry(
                    label=self.labels[name],
                    recipe=claim.recipe_of(name, changes[name]).model_dump(mode="json", exclude={"seed"}),
                    changes=changes[name],
                    trials=[Trial.model_validate(trial) for trial in trials.get(name, [])],
                    source=one.source,
                )
                for name, one in claim.contestants.items()
            },
            runs=[run_of(cell) for cell in cells if cell.budget == 1],
            shorter=[run_of(cell) for cell in cells if cell.budget < 1],
        )
        return complete(result, claim.checks)


@contextlib.contextmanager
def _threads(count: int) -> Generator[None]:
    """Time as jobs will run: work that does not use several threads is cheaper beside the rest with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _label(recipe: Recipe | Experiment, name: str) -> str:
    return recipe.label if isinstance(recipe, Recipe) and (recipe.methods or recipe.peers) else name


def _device(recipe: Recipe | Experiment) -> torch.device:
    return pick_device(recipe.device if isinstance(recipe, Recipe) else "cpu")


def run_of(cell: Cell) -> Run:
    """A finished cell, for the result."""
    if isinstance(cell.recipe, Experiment):
        outcome = cell.outcome() or Outcome()
        return Run(
            contestant=cell.name,
            seed=cell.recipe.seed,
            commit=machine.commit(),
            metrics=of_run(outcome),
            flops={},
            peak_memory_bytes=outcome.peak_memory_bytes,
            curve=[],
        )
    return summary(read_run(cell.folder), cell.name)


def default_folder(claim: str, *, quick: bool) -> Path:
    """Where a claim's runs go."""
    root = os.environ.get("RETROGRADE_RUNS", "runs")
    return Path(root, "repro", claim, "quick" if quick else "full")

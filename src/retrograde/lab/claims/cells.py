"""Cells: one variant's run with one seed each, trained in turns with the other variants of that seed."""

import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from retrograde.lab import files, measure
from retrograde.lab.claims.definition import Claim
from retrograde.lab.claims.jobs import Stop, Tell
from retrograde.lab.data import Data, steps_in_epoch
from retrograde.lab.experiments import Experiment
from retrograde.lab.experiments.base import Context
from retrograde.lab.recipe import Recipe
from retrograde.lab.record import Outcome, read_outcome, read_run
from retrograde.lab.trainer import Progress, Trainer

DataSets = dict[tuple[Any, ...], Data]
"""Loaded data sets, by what they depend on."""

_TURNS = 10
_FORWARD = 1 / 3
"""What a batch that is only evaluated takes of a training step."""

_TRIED_STEPS = 10
"""Of each run beforehand: the first ones compile and choose kernels, the others tell how long a step takes."""

_OVERHEAD = 1.3
"""Time of a run over that of its steps and evaluations: setting up, writing checkpoints."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        name: of the variant.
        recipe: with its seed; for a claim that trains nothing by one, the experiment.
        folder: of the run; its name holds a hash of the recipe, so that another recipe has another folder.
        group: of the runs that it is compared with, in reports.
        label: of the variant, in reports.
        budget: share of the claim's epochs.
    """

    name: str
    recipe: Recipe | Experiment
    folder: Path
    group: str | None = None
    label: str | None = None
    budget: float = 1.0

    def outcome(self) -> Outcome | None:
        """Of the finished run; None before that."""
        found = read_outcome(self.folder)
        return found if found is not None and found.status == "finished" else None


def train_together(
    cells: Sequence[Cell],
    data_dir: Path | None,
    tell: Tell,
    stop: Stop,
    *,
    measures: Sequence[str] = (),
    trial: bool = False,
    sets: DataSets | None = None,
) -> None:
    """Train what is not finished yet, one epoch each in turn; what was begun goes on.

    Args:
        cells: runs that share their seed.
        data_dir: where data sets lie.
        tell: told how much is done.
        stop: asked after every step; true writes all checkpoints and raises KeyboardInterrupt.
        measures: figures to take of the trained models.
        trial: of a search: no test set is read, and no model kept.
        sets: data sets that are loaded already; what else is needed is added.
    """
    waiting = [cell for cell in cells if cell.outcome() is None]
    for number, cell in enumerate(waiting):
        if isinstance(cell.recipe, Experiment):
            _run(cell.recipe, cell.folder, data_dir, trial, partial(_part, tell, number, len(waiting)), stop)
    waiting = [cell for cell in waiting if isinstance(cell.recipe, Recipe)]
    done = dict.fromkeys((cell.folder for cell in waiting), 0.0)
    sets = {} if sets is None else sets
    trainers: list[Trainer] = []

    def note(cell: Cell, now: Progress) -> None:
        done[cell.folder] = now.step / now.steps
        tell(sum(done.values()) / len(done))

    try:
        for cell in waiting:
            recipe = _trained(cell)
            trainer = Trainer(
                recipe,
                cell.folder,
                _load(recipe, data_dir, sets),
                resume=(cell.folder / files.CHECKPOINT).exists(),
                progress=partial(note, cell),
                stop=stop,
                group=cell.group,
                label=cell.label,
            )
            trainers.append(trainer)
        _take_turns([trainer.epochs() for trainer in trainers])
    except BaseException:
        for trainer in trainers:
            trainer.keep()
        raise
    for cell, trainer in zip(waiting, trainers, strict=True):
        trainer.finish(trial=trial, measures=measures)
        # Finished, it will not go on: only the checkpoint is large.
        (cell.folder / files.CHECKPOINT).unlink(missing_ok=True)
        shutil.rmtree(cell.folder / "tensorboard", ignore_errors=True)


def pace(
    cells: Sequence[Cell], steps: int, data_dir: Path | None, stop: Stop, sets: DataSets | None = None
) -> tuple[dict[str, float], int]:
    """Seconds of a step of each variant, and the steps of the first one's whole run.

    They run `steps` steps, or the first one's own where it has fewer, in ten turns, of which the second half counts:
    methods warm up. The median of what a turn
    takes over the first variant's own turn beside it: a machine that is disturbed for a while is so for all. The data
    sets that it loads are added to `sets`.
    """
    sets = {} if sets is None else sets
    trainers: dict[str, Trainer] = {}
    first = _trained(cells[0])
    whole = first.length(_load(first, data_dir, sets))
    part = max(1, min(steps, whole) // _TURNS)
    for cell in cells:
        recipe = _trained(cell)
        short = recipe.model_copy(
            update={"limit": recipe.batch_size * part, "epochs": _TURNS, "steps": None, "evaluations": 1}
        )
        shutil.rmtree(cell.folder, ignore_errors=True)
        trainers[cell.name] = Trainer(short, cell.folder, _load(short, data_dir, sets), stop=stop)
    _take_turns([trainer.epochs() for trainer in trainers.values()])
    turns: dict[str, list[float]] = {}
    for cell in cells:
        counted = list(itertools.pairwise(read_run(cell.folder).epochs))[_TURNS // 2 - 1 :]
        turns[cell.name] = [(b.seconds - a.seconds) / (b.step - a.step) for a, b in counted]
        trainers[cell.name].close()
        shutil.rmtree(cell.folder)
    base = turns[cells[0].name]
    found = {
        name: median(base) * median(ours / theirs for ours, theirs in zip(mine, base, strict=True))
        for name, mine in turns.items()
    }
    return found, whole


def seconds_of_seed(
    claim: Claim, folder: Path, data_dir: Path | None = None, stop: Stop = lambda: False
) -> float:
    """What one seed of all variants should take, from a few steps of each, which also bring their kernels."""
    cells = [Cell(name, claim.recipe_of(name), folder / name) for name in claim.contestants]
    sets: DataSets = {}
    seconds, steps = pace(cells, _TRIED_STEPS, data_dir, stop, sets)
    folder.rmdir()
    recipe = _trained(cells[0])
    data = _load(recipe, data_dir, sets)
    readings = recipe.evaluations * steps / steps_in_epoch(data.train, recipe.batch_size)
    rows = readings * len(data.validation) + len(data.test)
    return _OVERHEAD * sum(seconds.values()) * (steps + _FORWARD * rows / recipe.batch_size)


def weight(recipe: Recipe | Experiment) -> int:
    """Of a run among others, for a display: epochs; experiments are all alike."""
    return recipe.epochs if isinstance(recipe, Recipe) else 1


def _trained(cell: Cell) -> Recipe:
    assert isinstance(cell.recipe, Recipe)
    return cell.recipe


def _run(
    settings: Experiment, folder: Path, data_dir: Path | None, trial: bool, tell: Tell, stop: Stop
) -> None:
    """Run an experiment whole; interrupted, it begins again."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    figures = settings.run(Context(folder, data_dir, trial, tell, stop))
    outcome = Outcome(
        status="finished",
        seconds=time.perf_counter() - start,
        measures=dict(figures),
        peak_memory_bytes=measure.peak_memory(torch.device("cpu")),
    )
    accuracy = {"accuracy": figures.get("accuracy")}
    outcome = outcome.model_copy(update={"validation" if trial else "test": accuracy})
    files.write_json(folder / files.RESULT, outcome.model_dump(mode="json", by_alias=True))


def _part(tell: Tell, number: int, count: int, share: float) -> None:
    tell((number + share) / count)


def _load(recipe: Recipe, data_dir: Path | None, sets: DataSets) -> Data:
    if recipe.data_key not in sets:
        sets[recipe.data_key] = recipe.load_data(data_dir)
    return sets[recipe.data_key]


def _take_turns(runs: Sequence[Iterator[int]]) -> None:
    """An epoch each, round by round, until the last has ended: what the machine does, it does to all."""
    running = list(runs)
    while running:
        running = [run for run in running if next(run, None) is not None]

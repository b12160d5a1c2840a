"""Contestants side by side: paired seeds, interleaved epochs, one table."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from retrograde.lab import data as lab_data
from retrograde.lab import machine
from retrograde.lab.files import write_json
from retrograde.lab.recipe import Recipe
from retrograde.lab.trainer import Progress, Trainer, pick_device

FILE = "comparison.json"
SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One contestant on one model, over all seeds. Shares are of the dense-equivalent FLOPs.

    `seconds_ratio` is the mean over seeds of the ratio to plain backpropagation with the same seed: the runs take turns
    epoch by epoch, so both saw the same machine.
    """

    model: str
    label: str
    accuracy: float
    accuracy_deviation: float
    zeros: float | None
    own_zeros: float | None
    needed: float
    executed: float
    parameters: int
    saved_bytes: int
    seconds: float
    seconds_ratio: float


def compare(
    recipes: Sequence[Recipe],
    methods: Sequence[dict[str, dict[str, Any]]],
    folder: Path,
    *,
    seeds: int,
    what: str,
    command: str,
    data_dir: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Row]:
    """Train plain backpropagation and every contestant by every recipe with every seed.

    Args:
        recipes: one for each model; their methods and seed are replaced.
        methods: contestants, each as a recipe's `methods`; plain backpropagation is added in front.
        folder: parent of the run folders; the rows go into ``comparison.json`` there.
        seeds: number of paired seeds.
        what: the comparison in words.
        command: how to make it again.
        data_dir: where data sets lie.
        progress: called with (what, steps done, steps in all).

    Returns:
        The rows, plain backpropagation first for each model.
    """
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    counter = _Counter(progress)
    for recipe in recipes:
        for seed in range(seeds):
            data = lab_data.load(
                recipe.data, data_dir=data_dir, validation=recipe.validation, seed=seed, limit=recipe.limit
            )
            counter.what = f"{recipe.data} · {recipe.model}"
            trainers: list[Trainer] = []
            for number, chosen in enumerate(({}, *methods)):
                mine = recipe.model_copy(update={"methods": chosen, "seed": seed})
                name = f"{recipe.model}-{number}-{'+'.join(chosen) or 'plain'}-{seed}"
                trainers.append(Trainer(mine, folder / name, data, progress=counter.count))
            counter.total = counter.total or sum(t.steps for t in trainers) * seeds * len(recipes)
            # Turn by turn: whatever the machine does meanwhile, it does to all of them.
            for _ in zip(*(trainer.epochs() for trainer in trainers), strict=True):
                pass
            for trainer in trainers:
                results.setdefault((recipe.model, trainer.recipe.label), []).append(trainer.finish())
    rows = [_row(model, label, found, results[model, "plain"]) for (model, label), found in results.items()]
    write_json(
        folder / FILE,
        {
            "schema": SCHEMA,
            "what": what,
            "command": command,
            "seeds": seeds,
            "recipes": [recipe.model_dump() for recipe in recipes],
            "machine": machine.describe(pick_device(recipes[0].device)),
            "commit": machine.commit(),
            "rows": [asdict(row) for row in rows],
        },
    )
    return rows


class _Counter:
    """Steps of all runs together."""

    def __init__(self, progress: Callable[[str, int, int], None]) -> None:
        self._progress = progress
        self.what, self.done, self.total = "", 0, 0

    def count(self, state: Progress) -> None:
        self.done += 1
        self._progress(self.what, self.done, self.total)


def _row(model: str, label: str, found: list[dict[str, Any]], plain: list[dict[str, Any]]) -> Row:
    accuracies = [r["test"]["accuracy"] for r in found]
    zeros = [r["zeros"] for r in found if r["zeros"] is not None]
    own = [r["own_zeros"] for r in found if r["own_zeros"] is not None]
    return Row(
        model=model,
        label=label,
        accuracy=mean(accuracies),
        accuracy_deviation=stdev(accuracies) if len(accuracies) > 1 else 0.0,
        zeros=mean(zeros) if zeros else None,
        own_zeros=mean(own) if own else None,
        needed=mean(r["flops"]["needed"] / r["flops"]["dense"] for r in found),
        executed=mean(r["flops"]["executed"] / r["flops"]["dense"] for r in found),
        parameters=found[0]["parameters"],
        saved_bytes=found[0]["saved_activation_bytes"],
        seconds=mean(r["seconds"] for r in found),
        seconds_ratio=mean(r["seconds"] / p["seconds"] for r, p in zip(found, plain, strict=True)),
    )

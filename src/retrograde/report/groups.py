"""Runs that may be compared: groups of contestants, and the pairing of their runs with the baseline's by seed."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from retrograde.report.runs import Run
from retrograde.report.spread import Spread, mean, spread


@dataclass(frozen=True)
class Contestant:
    """One setting: a run, or runs of one label that differ in their seed, in the seeds' order."""

    label: str
    runs: tuple[Run, ...]

    @property
    def baseline(self) -> bool:
        """Whether the others are compared with it."""
        return self.runs[0].description.baseline

    def spread(self, value: Callable[[Run], float | None]) -> Spread | None:
        """Mean and deviation over the seeds."""
        return spread(map(value, self.runs))

    def mean(self, value: Callable[[Run], float | None]) -> float | None:
        """Mean over the seeds."""
        return mean(map(value, self.runs))

    def layers(self) -> list[str]:
        """Names of the layers that any run has numbers of, in the network's order."""
        return list(dict.fromkeys(name for run in self.runs for name in run.layers))

    def seed_label(self, run: Run) -> str:
        """The name of one of the runs: the contestant's own if there is only one."""
        return self.label if len(self.runs) == 1 else f"{self.label}, seed {run.seed}"


@dataclass(frozen=True)
class Group:
    """Contestants that may be compared with each other, baselines first, with a distinct label each."""

    name: str
    contestants: tuple[Contestant, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """Every run of every contestant."""
        return tuple(run for contestant in self.contestants for run in contestant.runs)

    @property
    def metric(self) -> str:
        """The metric that the runs are judged by."""
        return self.contestants[0].runs[0].description.metric

    @property
    def baselines(self) -> tuple[Contestant, ...]:
        """The contestants that the others are compared with."""
        return tuple(contestant for contestant in self.contestants if contestant.baseline)

    @property
    def seeded(self) -> bool:
        """Whether any contestant ran with several seeds."""
        return any(len(contestant.runs) > 1 for contestant in self.contestants)

    def base(self, value: Callable[[Run], float | None], seed: int | None = None) -> float | None:
        """The mean of the baselines' values, all of them or those of one seed."""
        runs = [run for contestant in self.baselines for run in contestant.runs]
        return mean(value(run) for run in runs if seed is None or run.seed == seed)

    def paired(
        self,
        contestant: Contestant,
        value: Callable[[Run], float | None],
        compare: Callable[[float, float], float | None],
    ) -> Spread | None:
        """Compare each run with the baseline of its own seed, then take the mean and deviation over seeds.

        Where no seed is shared the means are compared instead, and there is no deviation.
        """

        def against(own: float | None, base: float | None) -> float | None:
            return None if own is None or base is None else compare(own, base)

        runs = [run for run in contestant.runs if run.seed is not None]
        found = spread(against(value(run), self.base(value, run.seed)) for run in runs)
        return found or spread([against(contestant.mean(value), self.base(value))])


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The runs by group, groups in order of first appearance."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(run.description.group, []).append(run)
    return [Group(name, _contestants(found)) for name, found in members.items()]


def differing(contestant: Contestant) -> list[str]:
    """The recipe's fields, other than the seed, in which a contestant's runs differ."""
    recipes = [run.description.recipe for run in contestant.runs]
    names = sorted({name for recipe in recipes for name in recipe} - {"seed"})
    return [name for name in names if len({json.dumps(r.get(name), sort_keys=True) for r in recipes}) > 1]


def _contestants(runs: Sequence[Run]) -> tuple[Contestant, ...]:
    labelled: dict[tuple[bool, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: not run.description.baseline):
        labelled.setdefault((run.description.baseline, run.label), []).append(run)
    parts: list[list[Run]] = []
    for found in labelled.values():
        seeds = [run.seed for run in found]
        # Runs that share a seed too are no repetition: nothing says what tells them apart.
        distinct = None not in seeds and len(set(seeds)) == len(seeds)
        parts += [sorted(found, key=lambda run: run.seed or 0)] if distinct else [[run] for run in found]
    count = Counter(part[0].label for part in parts)
    labels = [
        part[0].label if count[part[0].label] == 1 else f"{part[0].label} · {part[0].description.name}"
        for part in parts
    ]
    # Copies of one run share label and name; only their folders tell them apart.
    count = Counter(labels)
    return tuple(
        Contestant(label if count[label] == 1 else f"{label} · {part[0].folder.name}", tuple(part))
        for label, part in zip(labels, parts, strict=True)
    )

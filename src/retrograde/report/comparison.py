"""What the page compares: a result, with the records of its runs where their folders are at hand.

Run folders become results: runs of one group are compared with each other, those of one label are the seeds of one
variant, and plain backpropagation comes first, as the baseline.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from retrograde.lab.claims.metrics import summary
from retrograde.lab.claims.result import Entry, Result
from retrograde.lab.claims.statistics import Estimate, estimate
from retrograde.lab.claims.verdict import complete
from retrograde.lab.record import RunRecord, collect, number
from retrograde.report.table import Swatch

# Okabe and Ito's palette without black, which the baseline takes. Yellow is last, as it is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
DASHES = ("solid", "dash", "dot", "dashdot")
INK = "#80868b"

TABLE = ("accuracy", "zeros", "own_zeros", "needed", "executed", "saved_bytes", "parameters")
"""Metrics of run folders; their time stands beside the baseline's."""


@dataclass(frozen=True)
class Variant:
    """What was run by one setting, with the records of its seeds; none of a result without run folders."""

    name: str
    swatch: Swatch
    records: tuple[RunRecord, ...] = ()

    @property
    def label(self) -> str:
        """For people."""
        return self.swatch.label

    def estimate(self, value: Callable[[RunRecord], float | None]) -> Estimate | None:
        """Mean and interval over the seeds that have a finite value; None where none has."""
        known = [found for found in map(number, map(value, self.records)) if found is not None]
        return estimate(known) if known else None

    def mean(self, value: Callable[[RunRecord], float | None]) -> float | None:
        """Mean over the seeds that have a finite value; None where none has."""
        found = self.estimate(value)
        return found.mean if found else None

    def layers(self) -> list[str]:
        """Names of the layers that any run has numbers of, in the network's order."""
        return list(dict.fromkeys(name for run in self.records for name in run.layers))

    def seed_label(self, run: RunRecord) -> str:
        """The name of one of the runs: the variant's own if there is only one."""
        return self.label if len(self.records) == 1 else f"{self.label}, seed {run.seed}"


@dataclass(frozen=True)
class Comparison:
    """A result; `records` holds its runs' records by variant, nothing for a result that is read from a file."""

    result: Result
    records: dict[str, tuple[RunRecord, ...]]

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """All variants, the baseline first, each with its colour and dash: the same in all plots."""
        found: list[Variant] = []
        for at, (name, entry) in enumerate(self.result.contestants.items(), -1):
            swatch = Swatch(entry.label, INK, run=name, ink=True)
            if at >= 0:
                dash = DASHES[at // len(COLOURS) % len(DASHES)]
                swatch = Swatch(entry.label, COLOURS[at % len(COLOURS)], dash=dash, run=name)
            found.append(Variant(name, swatch, self.records.get(name, ())))
        return tuple(found)

    @property
    def recorded(self) -> bool:
        """Whether there are records of the runs."""
        return bool(self.records)

    @property
    def seeded(self) -> bool:
        """Whether any variant ran with several seeds."""
        return any(len(self.result.seeds_of(name)) > 1 for name in self.result.contestants)


def of_folders(paths: Iterable[Path]) -> list[Comparison]:
    """The runs of run folders, or of folders of them, by group, in order of first appearance.

    Raises:
        RunError: a path does not exist, holds no run, or holds one that cannot be read.
    """
    members: dict[str, list[RunRecord]] = {}
    for run in collect(paths):
        members.setdefault(run.description.group, []).append(run)
    return [_of_group(name, runs) for name, runs in members.items()]


def _of_group(name: str, runs: Sequence[RunRecord]) -> Comparison:
    variants = _variants(runs)
    first = next(iter(variants.values()))[0]
    figures = [summary(run, label) for label, found in variants.items() for run in found]
    result = Result(
        claim="",
        hash="",
        quick=False,
        title=name,
        sentence="",
        source="",
        note="",
        command="",
        machine=first.description.machine,
        jobs=1,
        threads=first.description.machine.get("threads", 1),
        seeds=sorted({run.seed for run in runs}),
        equal="steps",
        target=None,
        table=[metric for metric in TABLE if any(run.metrics[metric] is not None for run in figures)],
        contestants={
            label: Entry(label=label, recipe=found[0].description.recipe, changes={}, trials=[], source={})
            for label, found in variants.items()
        },
        runs=figures,
    )
    return Comparison(complete(result, []), variants)


def _variants(runs: Sequence[RunRecord]) -> dict[str, tuple[RunRecord, ...]]:
    """Runs by a distinct label, each in the seeds' order, plain backpropagation first."""
    labelled: dict[tuple[bool, str], list[RunRecord]] = {}
    for run in sorted(runs, key=lambda run: not run.description.baseline):
        labelled.setdefault((run.description.baseline, run.label), []).append(run)
    parts: list[list[RunRecord]] = []
    for found in labelled.values():
        # Runs that share a seed too are no repetition: nothing says what distinguishes them.
        distinct = len({run.seed for run in found}) == len(found)
        parts += [sorted(found, key=lambda run: run.seed)] if distinct else [[run] for run in found]
    labels = [part[0].label for part in parts]
    # Copies of one run share label and name; only their folders distinguish them.
    for distinguishing in (
        [part[0].description.name for part in parts],
        [part[0].folder.name for part in parts],
        [str(part[0].folder) for part in parts],
    ):
        count = Counter(labels)
        both = zip(labels, distinguishing, strict=True)
        labels = [label if count[label] == 1 else f"{label} · {further}" for label, further in both]
    return {label: tuple(part) for label, part in zip(labels, parts, strict=True)}

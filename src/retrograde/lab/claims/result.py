"""The result of a claim: everything that tables, plots and verdicts are made of, in one JSON file with a schema."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from retrograde.errors import RunError
from retrograde.lab import files
from retrograde.lab.claims.statistics import Estimate

SCHEMA = 1

Verdict = Literal["reproduced", "partly", "not reproduced", "exceeded", "no checks"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Reading(_Part):
    """The validation accuracy after so many steps, and after so many seconds of training, all overhead included."""

    step: int
    seconds: float
    accuracy: float


class Run(_Part):
    """One variant with one seed.

    Attributes:
        contestant: by name.
        seed: paired: the same initial weights and order of data for all variants.
        commit: of the checkout that trained it.
        folder: its name, in the claim's folder of runs; empty where there is none.
        metrics: see `retrograde.lab.claims.metrics`; None where a figure does not apply or was not reached.
        flops: dense, needed, executed and discounted FLOPs of the whole run, and the method's overhead.
        peak_memory_bytes: of the process that trained all variants of the seed.
        curve: readings in order.
    """

    contestant: str
    seed: int
    commit: str | None
    folder: str = ""
    metrics: dict[str, float | None]
    flops: dict[str, float]
    peak_memory_bytes: int | None
    curve: list[Reading]


class Trial(_Part):
    """A trial of a search: recipe fields and the validation accuracy that they gave; an error counts as 0."""

    changes: dict[str, Any]
    accuracy: float
    error: str | None


class Entry(_Part):
    """A variant.

    Attributes:
        label: in tables.
        recipe: what it ran by, the seed aside.
        changes: what the search, and an equal time, made of the definition's recipe.
        trials: of the search.
        source: the source's figures, by metric.
    """

    label: str
    recipe: dict[str, Any]
    changes: dict[str, Any]
    trials: list[Trial]
    source: dict[str, float]


class Ratio(_Part):
    """A figure over the baseline's, seed by seed, and their difference."""

    minus: Estimate
    over: Estimate | None


class Finding(_Part):
    """What came of a check.

    Attributes:
        says: the check in words.
        metric: that it looks at.
        kind: the figure itself, or its difference or ratio to another variant's.
        value: the mean that it looks at; None where a seed has no figure.
        low: lower end of its 95 % interval.
        high: upper end.
        bound: what it is held against.
        direction: whether it must be so much at least or at most.
        by: what of it is held against the bound.
        holds: whether it does.
        exceeds: whether the source's figure is exceeded; None where the check does not ask.
        remark: what a reader must know of the figure.
    """

    says: str
    metric: str
    kind: Literal["figure", "difference", "ratio"]
    value: float | None
    low: float | None
    high: float | None
    bound: float
    direction: Literal["at least", "at most"]
    by: Literal["mean", "interval"]
    holds: bool
    exceeds: bool | None = None
    remark: str = ""


class Result(_Part):
    """A claim's result.

    Attributes:
        schema_version: of this file.
        claim: id.
        hash: of the definition; another definition makes the result stale.
        quick: a short form, which decides nothing.
        title: of the claim.
        sentence: what the source says.
        source: where.
        note: how this differs from the source.
        command: how to make it again.
        machine: processor, cores, versions.
        jobs: seeds trained at once.
        threads: of each.
        seeds: all of them.
        equal: what variants have the same of.
        target: whose best validation accuracy times are taken to, or at whose end where there are shorter runs.
        table: metrics of its table, in order.
        contestants: by name, the baseline first.
        runs: all whole ones.
        shorter: runs of a share of the epochs, each with its own whole schedule, for the time to the target.
        summaries: variant → metric → estimate over seeds.
        against_baseline: variant → metric → paired with the baseline.
        findings: of the checks.
        verdict: of all of them.
    """

    schema_version: Literal[1] = SCHEMA
    claim: str
    hash: str
    quick: bool
    title: str
    sentence: str
    source: str
    note: str
    command: str
    machine: dict[str, Any]
    jobs: int
    threads: int
    seeds: list[int]
    equal: str
    target: str | list[str] | None
    table: list[str]
    contestants: dict[str, Entry]
    runs: list[Run]
    shorter: list[Run] = Field(default_factory=list)
    summaries: dict[str, dict[str, Estimate]] = Field(default_factory=dict)
    against_baseline: dict[str, dict[str, Ratio]] = Field(default_factory=dict)
    findings: list[Finding] = Field(default_factory=list)
    verdict: Verdict = "no checks"

    @property
    def baseline(self) -> str:
        """What the others are compared with: the first one."""
        return next(iter(self.contestants))

    @property
    def target_label(self) -> str:
        """Whose accuracy the target is, in words."""
        return " or ".join(self.contestants[name].label for name in targets_of(self.target))

    def goals(self) -> dict[int, float]:
        """The target's validation accuracy, seed by seed: at its end, where there are shorter runs."""
        found: dict[int, float] = {}
        for run in self.runs:
            best = run.metrics.get("best_validation")
            one = run.curve[-1].accuracy if self.shorter and run.curve else best
            if run.contestant in targets_of(self.target) and one is not None:
                found[run.seed] = max(one, found.get(run.seed, one))
        return found

    def ends(self, run: Run) -> list[Reading]:
        """The last readings of this variant's and seed's runs, from the shortest to the whole one."""
        same = [one for one in self.shorter if (one.contestant, one.seed) == (run.contestant, run.seed)]
        return sorted((one.curve[-1] for one in (*same, run) if one.curve), key=lambda end: end.step)

    def seeds_of(self, name: str) -> list[int]:
        """The seeds that a variant ran with: all of them in a claim, some in a folder of runs."""
        ran = {run.seed for run in self.runs if run.contestant == name}
        return [seed for seed in self.seeds if seed in ran]

    def figures(self, name: str, metric: str, seeds: Sequence[int] | None = None) -> list[float | None]:
        """A metric of a variant, one for each of `seeds`, which are all by default."""
        by_seed = {run.seed: run.metrics.get(metric) for run in self.runs if run.contestant == name}
        return [by_seed.get(seed) for seed in (self.seeds if seeds is None else seeds)]

    def ratios(self, name: str) -> dict[str, Estimate]:
        """A variant's figures over the baseline's, by metric."""
        paired = self.against_baseline.get(name, {})
        return {metric: ratio.over for metric, ratio in paired.items() if ratio.over is not None}


def targets_of(target: str | list[str] | None) -> list[str]:
    """The variants that a target names."""
    return [target] if isinstance(target, str) else target or []


def write_result(result: Result, path: Path) -> None:
    """Write the result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, result.model_dump(mode="json"))


def read_result(path: Path) -> Result:
    """Read and check a result.

    Raises:
        RunError: it is missing, damaged, or does not fit the schema.
    """
    try:
        return Result.model_validate(files.read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise RunError(
            f"{path} does not fit its schema: {'.'.join(map(str, first['loc']))}: {first['msg']}. Run the claim again."
        ) from error


def schema() -> dict[str, Any]:
    """The JSON Schema of a result."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Result.model_json_schema()}

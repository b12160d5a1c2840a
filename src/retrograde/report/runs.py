"""Run folders, as a training run leaves them behind.

A run folder holds ``run.json`` (what was asked for), ``metrics.jsonl`` (what happened, one line per event)
and ``result.json`` (what came out; absent while the run is going or after it was killed). ``seconds`` in an
event is the time since the run started. A null field reads like an absent one, and unknown fields are kept:
methods add their own.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from retrograde.errors import RunError

SCHEMA = 1
Scores = dict[str, float | None]


class Record(BaseModel):
    """A JSON object of a run folder: null fields take their defaults, unknown fields are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in cast(Mapping[str, object], data).items() if value is not None}


class Product(Record):
    """FLOPs of one of the three products of a layer: forward, input gradient or weight gradient."""

    dense: float | None = None
    needed: float | None = None
    executed: float | None = None
    discounted: float | None = None


class Flops(Product):
    """FLOPs of all three products together, and of each."""

    overhead: float | None = None
    forward: Product = Product()
    input_grad: Product = Product()
    weight_grad: Product = Product()


class LayerPlan(Record):
    """One row of the plan: a layer, what is attached to it and why."""

    name: str
    type: str | None = None
    shape: str | None = None
    parameters: int | None = None
    methods: tuple[str, ...] = ()
    kernel: str | None = None
    status: str | None = None
    why: str | None = None


class Plan(Record):
    """What was attached to each layer."""

    layers: tuple[LayerPlan, ...] = ()


class Description(Record):
    """``run.json``: the run's name, its settings and the machine."""

    name: str
    label: str = ""
    baseline: bool = False
    group: str = "Runs"
    metric: str = "accuracy"
    started: str | None = None
    recipe: dict[str, Any] = Field(default_factory=dict[str, Any])
    machine: dict[str, Any] = Field(default_factory=dict[str, Any])
    plan: Plan = Plan()


class Step(Record):
    """A ``step`` line of ``metrics.jsonl``."""

    step: int
    epoch: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    seconds: float | None = None


class LayerNumbers(Record):
    """What a method counted in one layer over one epoch; further numbers are in ``model_extra``."""

    zeros: float | None = None
    own_zeros: float | None = None
    bits: float | None = None
    largest_level: float | None = None
    fallbacks: int | None = None
    step: float | None = None


class Epoch(Record):
    """An ``epoch`` line of ``metrics.jsonl``."""

    epoch: int
    step: int | None = None
    train: Scores = Field(default_factory=dict[str, float | None])
    validation: Scores = Field(default_factory=dict[str, float | None])
    seconds: float | None = None
    step_seconds: float | None = None
    zeros: float | None = None
    own_zeros: float | None = None
    flops: Flops = Flops()
    layers: dict[str, LayerNumbers] = Field(default_factory=dict[str, LayerNumbers])


class Result(Record):
    """``result.json``: what the whole run reached and cost."""

    status: str = "unfinished"
    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None
    step_seconds: float | None = None
    parameters: int | None = None
    best_validation: Scores = Field(default_factory=dict[str, float | None])
    test: Scores = Field(default_factory=dict[str, float | None])
    zeros: float | None = None
    own_zeros: float | None = None
    flops: Flops = Flops()
    peak_memory_bytes: float | None = None
    saved_activation_bytes: float | None = None
    model_file: str | None = None


@dataclass(frozen=True)
class Run:
    """A run folder, read. ``result`` of a run that has not ended is empty, with status ``unfinished``."""

    folder: Path
    description: Description
    steps: tuple[Step, ...]
    epochs: tuple[Epoch, ...]
    result: Result

    @property
    def label(self) -> str:
        """The run's name for people."""
        return self.description.label or self.description.name

    @property
    def test(self) -> float | None:
        """The test score in the run's own metric."""
        return self.result.test.get(self.description.metric)

    @property
    def layers(self) -> dict[str, LayerNumbers]:
        """Each layer's numbers in the last epoch that has any."""
        return next((epoch.layers for epoch in reversed(self.epochs) if epoch.layers), {})

    @property
    def fallbacks(self) -> int:
        """How often any layer took the exact path instead, over all epochs."""
        return sum(layer.fallbacks or 0 for epoch in self.epochs for layer in epoch.layers.values())


@dataclass(frozen=True)
class Group:
    """Runs that may be compared with each other, baselines first, and a distinct label for each."""

    name: str
    runs: tuple[Run, ...]
    labels: tuple[str, ...]

    @property
    def metric(self) -> str:
        """The metric that the runs are judged by."""
        return self.runs[0].description.metric

    @property
    def baselines(self) -> tuple[Run, ...]:
        """The runs that the others are compared with."""
        return tuple(run for run in self.runs if run.description.baseline)


def collect(paths: Iterable[Path]) -> list[Run]:
    """Read every run under ``paths``, each a run folder or a folder of run folders, in order and once each.

    Raises:
        RunError: a path does not exist, holds no run, or holds one that cannot be read.
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        found = [path] if _is_run(path) else [child for child in _children(path) if _is_run(child)]
        if not found:
            raise RunError(
                f"No runs found in {path}: neither the folder nor a folder in it has a run.json. "
                "Name a run folder, or the folder that holds them."
            )
        folders.update(dict.fromkeys(folder.resolve() for folder in found))
    if not folders:
        raise RunError("No runs found: no path was given. Name at least one run folder.")
    return [read(folder) for folder in folders]


def read(folder: Path) -> Run:
    """Read one run folder.

    A cut-off last line of ``metrics.jsonl`` is left out, as a killed run leaves one. Where a resumed run
    repeats an epoch or a step, the later line counts.

    Raises:
        RunError: a file is missing, is no JSON, has another schema, or lacks a field.
    """
    source = folder / "run.json"
    if not source.is_file():
        raise RunError(
            f"{source} is missing, so {folder} is not a run folder or was copied in part. "
            "Copy the folder again, or leave it out."
        )
    description = _parse(Description, _load(source), source)
    steps: dict[int, Step] = {}
    epochs: dict[int, Epoch] = {}
    for where, event in _events(folder / "metrics.jsonl"):
        if event.get("event") == "step":
            step = _parse(Step, event, where)
            steps[step.step] = step
        elif event.get("event") == "epoch":
            epoch = _parse(Epoch, event, where)
            epochs[epoch.epoch] = epoch
    source = folder / "result.json"
    result = _parse(Result, _load(source), source) if source.is_file() else Result()
    return Run(
        folder=folder,
        description=description,
        steps=tuple(steps[key] for key in sorted(steps)),
        epochs=tuple(epochs[key] for key in sorted(epochs)),
        result=result,
    )


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The runs by group, groups in order of first appearance."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(run.description.group, []).append(run)
    return [_group(name, found) for name, found in members.items()]


def _group(name: str, runs: list[Run]) -> Group:
    ordered = sorted(runs, key=lambda run: not run.description.baseline)
    count = Counter(run.label for run in ordered)
    labels = [
        run.label if count[run.label] == 1 else f"{run.label} · {run.description.name}" for run in ordered
    ]
    # Copies of one run share label and name; only their folders tell them apart.
    count = Counter(labels)
    pairs = zip(ordered, labels, strict=True)
    labels = [label if count[label] == 1 else f"{label} · {run.folder.name}" for run, label in pairs]
    return Group(name=name, runs=tuple(ordered), labels=tuple(labels))


def _is_run(folder: Path) -> bool:
    # A folder with a run's other files counts, so that its missing run.json is reported and not passed over.
    return any((folder / name).is_file() for name in ("run.json", "metrics.jsonl", "result.json"))


def _children(path: Path) -> list[Path]:
    if not path.is_dir():
        raise RunError(f"{path} is not a folder. Name a run folder, or the folder that holds them.")
    return sorted(child for child in path.iterdir() if child.is_dir())


def _load(source: Path) -> dict[str, Any]:
    try:
        data: object = json.loads(source.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{source} cannot be read: {error}. The file is damaged; copy it again, or leave the run out."
        ) from error
    if not isinstance(data, dict):
        raise RunError(
            f"{source} is not a JSON object, so no run wrote it. Copy it again, or leave the run out."
        )
    fields = cast(dict[str, Any], data)
    if fields.get("schema") != SCHEMA:
        raise RunError(
            f"{source} has schema {fields.get('schema')!r}, and this version reads schema {SCHEMA}. "
            "Use the version of retrograde that wrote the run, or run it again."
        )
    return fields


def _events(source: Path) -> list[tuple[str, dict[str, Any]]]:
    if not source.is_file():
        return []
    lines = [line for line in enumerate(source.read_bytes().split(b"\n"), start=1) if line[1].strip()]
    events: list[tuple[str, dict[str, Any]]] = []
    for number, line in lines:
        try:
            event: object = json.loads(line)
        except ValueError as error:
            if number == lines[-1][0]:
                break
            raise RunError(
                f"{source}, line {number} is not JSON: {error}. Only the last line of a killed run may be "
                "cut off, so the file is damaged; remove the line, or leave the run out."
            ) from error
        if isinstance(event, dict):
            events.append((f"{source}, line {number}", cast(dict[str, Any], event)))
    return events


_RecordT = TypeVar("_RecordT", bound=Record)


def _parse(kind: type[_RecordT], data: dict[str, Any], source: Path | str) -> _RecordT:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise RunError(
            f"{source} does not fit schema {SCHEMA}: {field}: {first['msg']}. "
            "Correct the field, or leave the run out."
        ) from error

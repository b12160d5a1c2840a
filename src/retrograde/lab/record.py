"""The record of a training run: what the trainer writes into a run folder, as types that everybody reads it by.

===================  ==================  ======================================================================
file                 type                what
===================  ==================  ======================================================================
``run.json``         `Description`       what was asked for, on which machine, and the plan
``metrics.jsonl``    `Step`, `Reading`,  what happened, one line per event; its ``seconds`` are those of training
                     `Epoch`
``result.json``      `Outcome`           what came out; absent while the run is going or after it was killed
===================  ==================  ======================================================================

A null field reads like an absent one, and unknown fields are kept: methods add their own, which `Part.number` and
`Part.mapping` read without taking anything for granted.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from retrograde.errors import RunError
from retrograde.lab import files

SCHEMA = 1

Scores = dict[str, float | None]
"""Figures by name; of a run that diverged None, which JSON has in place of NaN."""


def number(value: object) -> float | None:
    """`value` if it is a finite number. A run that diverged records NaN or infinity, which no plot has a place for."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if isfinite(value) else None


def mapping(value: object) -> Mapping[str, Any]:
    """`value` if it is a JSON object, else an empty one."""
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}


class Part(BaseModel):
    """A JSON object of a run folder: null fields take their defaults, unknown fields are kept."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in mapping(data).items() if value is not None}

    def number(self, key: str) -> float | None:
        """A finite number that a method added under `key`; None where there is none or it is something else."""
        return number((self.model_extra or {}).get(key))

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A JSON object that a method added under `key`; empty where there is none or it is something else."""
        return mapping((self.model_extra or {}).get(key))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self.model_dump(mode="json", by_alias=True)


class Product(Part):
    """FLOPs of one of the three products of a layer: forward, input gradient or weight gradient."""

    dense: float | None = None
    needed: float | None = None
    executed: float | None = None
    discounted: float | None = None


class Flops(Product):
    """FLOPs of all three products together, and of each; those of a plain model's backward pass are not split."""

    overhead: float | None = None
    forward: Product = Product()
    input_grad: Product | None = None
    weight_grad: Product | None = None

    def of_dense(self, count: str) -> float | None:
        """One of the counts as a share of the dense-equivalent."""
        part, whole = number(getattr(self, count)), number(self.dense)
        return part / whole if part is not None and whole else None

    @property
    def discounted_backward(self) -> float | None:
        """The backward pass's discounted FLOPs as a share of its dense-equivalent ones."""
        whole, forward = self, self.forward
        if None in (whole.discounted, forward.discounted, whole.dense, forward.dense):
            return None
        dense = (whole.dense or 0.0) - (forward.dense or 0.0)
        return ((whole.discounted or 0.0) - (forward.discounted or 0.0)) / (dense or 1.0)


class LayerPlan(Part):
    """One row of the plan: a layer, what is attached to it and why."""

    name: str
    type: str = ""
    shape: str = ""
    parameters: int | None = None
    methods: tuple[str, ...] = ()
    kernel: str = ""
    status: str = ""
    why: str = ""


class Plan(Part):
    """What was attached to each layer, and what a step was forecast to take; no `forecast` where none was made."""

    layers: tuple[LayerPlan, ...] = ()
    forecast: dict[str, Any] = Field(default_factory=dict[str, Any])


class Description(Part):
    """What was asked for, when, and of which machine.

    Attributes:
        schema_version: of the run folder's files.
        name: of the folder.
        label: the run's name for people.
        baseline: whether the others of its group are compared with it.
        group: runs of one group are compared with each other.
        recipe: fields of the recipe.
        machine: processor, cores, versions.
        commit: of the checkout; None outside of one.
        started: date and time, UTC.
        plan: what was attached where.
    """

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    name: str
    label: str = ""
    baseline: bool = False
    group: str = "Runs"
    recipe: dict[str, Any]
    machine: dict[str, Any] = Field(default_factory=dict[str, Any])
    commit: str | None = None
    started: str | None = None
    plan: Plan = Plan()


class Step(Part):
    """A training step."""

    event: Literal["step"] = "step"
    step: int
    epoch: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    seconds: float | None = None


class Reading(Part):
    """A look at the validation split within an epoch."""

    event: Literal["reading"] = "reading"
    epoch: int
    step: int
    validation: Scores = Field(default_factory=dict[str, float | None])
    seconds: float


class LayerNumbers(Part):
    """What was counted in one layer over one epoch; what methods added is in ``model_extra``."""

    zeros: float | None = None
    own_zeros: float | None = None
    fallbacks: int | None = None


class Epoch(Part):
    """The end of an epoch: scores, and what the methods did in it."""

    event: Literal["epoch"] = "epoch"
    epoch: int
    step: int
    train: Scores = Field(default_factory=dict[str, float | None])
    validation: Scores = Field(default_factory=dict[str, float | None])
    seconds: float
    step_seconds: float | None = None
    zeros: float | None = None
    own_zeros: float | None = None
    flops: Flops = Flops()
    layers: dict[str, LayerNumbers] = Field(default_factory=dict[str, LayerNumbers])


class Timing(Part):
    """Seconds of a step's backward passes of the attached layers, beside what was forecast when the run began.

    The forecast of bytes stands beside `Outcome.mean_saved_activation_bytes`.

    Attributes:
        forecast_ratio: of the whole forward and backward pass, attached to plain.
        backward_seconds: of the layers that have a forecast.
        backward_forecast: of the same.
        forecast_bytes: that the whole model keeps for the backward pass once the methods have warmed up.
        layers: layer → ``seconds`` and ``forecast``.
    """

    forecast_ratio: float | None = None
    forecast_bytes: float | None = None
    backward_seconds: float | None = None
    backward_forecast: float | None = None
    layers: dict[str, dict[str, float | None]] = Field(default_factory=dict[str, dict[str, float | None]])


class Outcome(Part):
    """What the whole run reached and cost.

    Attributes:
        schema_version: of the run folder's files.
        status: ``finished``, ``interrupted``, or ``unfinished`` where the run left no file.
        epochs: that were finished.
        steps: that were made.
        seconds: of training, all overhead included.
        step_seconds: their mean.
        backward_seconds: of a step's backward passes, their mean; None on a GPU.
        parameters: of the model at the end.
        best_validation: scores of the best reading, and its epoch; None before the first.
        validation: scores of the last reading.
        test: scores of the test set, which is read once, at the end.
        measures: other figures of the trained model.
        zeros: share in δ.
        own_zeros: the same before the method.
        fallbacks: how often a layer took the exact path instead.
        flops: of the whole model.
        saved_activation_bytes: kept for the backward pass, at most.
        mean_saved_activation_bytes: the same on average over the steps that were looked at.
        peak_memory_bytes: of the device's allocator, or of the process.
        timing: measured and forecast seconds, and forecast bytes; None where nothing is attached.
        model_file: name of the model's file; None where none was written.
    """

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    status: Literal["finished", "interrupted", "unfinished"] = "unfinished"
    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None
    step_seconds: float | None = None
    backward_seconds: float | None = None
    parameters: int | None = None
    best_validation: Scores | None = None
    validation: Scores | None = None
    test: Scores | None = None
    measures: Scores = Field(default_factory=dict[str, float | None])
    zeros: float | None = None
    own_zeros: float | None = None
    fallbacks: int = 0
    flops: Flops = Flops()
    saved_activation_bytes: int | None = None
    mean_saved_activation_bytes: float | None = None
    peak_memory_bytes: int | None = None
    timing: Timing | None = None
    model_file: str | None = None

    def score(self, split: Literal["best_validation", "validation", "test"]) -> float | None:
        """The accuracy of a split; None where it was not read, or is not finite."""
        found: Scores | None = getattr(self, split)
        return number(found.get("accuracy")) if found else None


@dataclass(frozen=True)
class RunRecord:
    """A run folder, read. The `outcome` of a run that has not ended is empty, with the status ``unfinished``."""

    folder: Path
    description: Description
    steps: tuple[Step, ...]
    readings: tuple[Reading | Epoch, ...]
    outcome: Outcome

    @property
    def label(self) -> str:
        """The run's name for people."""
        return self.description.label or self.description.name

    @property
    def seed(self) -> int:
        """The recipe's seed."""
        return int(self.description.recipe.get("seed", 0))

    @property
    def epochs(self) -> tuple[Epoch, ...]:
        """The readings at the ends of epochs."""
        return tuple(reading for reading in self.readings if isinstance(reading, Epoch))

    @property
    def layers(self) -> dict[str, LayerNumbers]:
        """Each layer's numbers in the last epoch that has any."""
        return next((epoch.layers for epoch in reversed(self.epochs) if epoch.layers), {})

    @property
    def step_seconds(self) -> float | None:
        """Seconds per step: the run's own figure, or for a run that has not ended that of its last epoch."""
        known = (self.outcome.step_seconds, *(epoch.step_seconds for epoch in reversed(self.epochs)))
        return next((found for found in map(number, known) if found), None)


_EVENTS: dict[Any, type[Step | Reading | Epoch]] = {"step": Step, "reading": Reading, "epoch": Epoch}


def is_run(folder: Path) -> bool:
    """Whether any of a run's files lies in `folder`; the missing ones are then an error, and not passed over."""
    return any((folder / name).is_file() for name in (files.RUN, files.METRICS, files.RESULT))


def collect(paths: Iterable[Path]) -> list[RunRecord]:
    """Read every run under `paths`, each a run folder or a folder of run folders, in order and once each.

    Raises:
        RunError: a path does not exist, holds no run, or holds one that cannot be read.
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise RunError(f"{path} is not a folder. Name a run folder, or the folder that holds them.")
        found = [path] if is_run(path) else [folder for folder in sorted(path.iterdir()) if is_run(folder)]
        if not found:
            raise RunError(
                f"No runs found in {path}: neither the folder nor a folder in it has a {files.RUN}. "
                "Name a run folder, or the folder that holds them."
            )
        folders.update(dict.fromkeys(folder.resolve() for folder in found))
    if not folders:
        raise RunError("No runs found: no path was given. Name at least one run folder.")
    return [read_run(folder) for folder in folders]


def read_run(folder: Path) -> RunRecord:
    """Read one run folder.

    A cut-off last line of the metrics is left out, as a killed run leaves one. Where a resumed run repeats an epoch or
    a step, the later line counts.

    Raises:
        RunError: a file is missing, is no JSON, has another schema, or lacks a field.
    """
    description = read_description(folder)
    steps: dict[int, Step] = {}
    readings: dict[tuple[int, float], Reading | Epoch] = {}
    for where, event in _events(folder / files.METRICS):
        kind = _EVENTS.get(event.get("event"))
        # None: of a later version.
        line = None if kind is None else _parse(kind, event, where)
        if isinstance(line, Step):
            steps[line.step] = line
        elif line is not None:
            # An epoch has one end, also where a resumed run reaches it in another number of steps.
            readings[line.epoch, inf if isinstance(line, Epoch) else line.step] = line
    return RunRecord(
        folder=folder,
        description=description,
        steps=tuple(steps[key] for key in sorted(steps)),
        readings=tuple(readings[key] for key in sorted(readings)),
        outcome=read_outcome(folder) or Outcome(),
    )


def read_description(folder: Path) -> Description:
    """What was asked for of the run in `folder`.

    Raises:
        RunError: there is none, or it is damaged.
    """
    source = folder / files.RUN
    if not source.is_file():
        raise RunError(
            f"there is no run in {folder}: {source} is missing. Give the folder of a run, or copy it again where it "
            "was copied in part."
        )
    return _parse(Description, _load(source), source)


def read_outcome(folder: Path) -> Outcome | None:
    """What came out of the run in `folder`; None while it is going, or where it was killed.

    Raises:
        RunError: it is damaged.
    """
    source = folder / files.RESULT
    return _parse(Outcome, _load(source), source) if source.is_file() else None


def _load(source: Path) -> dict[str, Any]:
    fields = files.read_json(source)
    if fields.get("schema") != SCHEMA:
        raise RunError(
            f"{source} has schema {fields.get('schema')!r}, and this version reads schema {SCHEMA}. "
            "Use the version of retrograde that wrote the run, or run it again."
        )
    return fields


def _events(source: Path) -> list[tuple[str, Mapping[str, Any]]]:
    lines = source.read_bytes().split(b"\n") if source.is_file() else []
    events: list[tuple[str, Mapping[str, Any]]] = []
    for at, line in enumerate(lines, start=1):
        try:
            if line.strip():
                events.append((f"{source}, line {at}", mapping(json.loads(line))))
        except ValueError as error:
            if any(map(bytes.strip, lines[at:])):
                raise RunError(
                    f"{source}, line {at} is not JSON: {error}. Only the last line of a killed run may be "
                    "cut off, so the file is damaged; remove the line, or leave the run out."
                ) from error
    return events


_PartT = TypeVar("_PartT", bound=Part)


def _parse(kind: type[_PartT], data: Mapping[str, Any], source: Path | str) -> _PartT:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise RunError(
            f"{source} does not fit schema {SCHEMA}: {field}: {first['msg']}. "
            "Correct the field, or leave the run out."
        ) from error

"""The JSON objects of a run folder, as types.

A null field reads like an absent one, and unknown fields are kept: methods add their own. Those are read with
:meth:`Record.number` and :meth:`Record.mapping`, which take nothing for granted.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

Scores = dict[str, float | None]


def number(value: object) -> float | None:
    """`value` if it is a finite number. A run that diverged records NaN or infinity, which no plot has a place for."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if isfinite(value) else None


def mapping(value: object) -> Mapping[str, Any]:
    """`value` if it is a JSON object, else an empty one."""
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}


class Record(BaseModel):
    """A JSON object of a run folder: null fields take their defaults, unknown fields are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        return {key: value for key, value in cast(Mapping[str, object], data).items() if value is not None}

    def number(self, key: str) -> float | None:
        """A finite number that a method added under `key`; None where there is none or it is something else."""
        return number((self.model_extra or {}).get(key))

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A JSON object that a method added under `key`; empty where there is none or it is something else."""
        return mapping((self.model_extra or {}).get(key))


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

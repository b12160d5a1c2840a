"""What is folded away under a contestant: each run's facts, plan, layers' numbers, recipe and machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retrograde.report import formats
from retrograde.report.formats import NONE
from retrograde.report.groups import Contestant
from retrograde.report.records import number
from retrograde.report.runs import Run

LAYER_FIELDS = ("zeros", "own_zeros", "bits", "largest_level", "fallbacks", "step")
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Details:
    """One run: pairs and tables ready for the template; ``plan_of`` names the run whose plan it shares."""

    label: str
    facts: Pairs
    plan: tuple[tuple[str, ...], ...]
    plan_of: str
    layer_columns: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    recipe: Pairs
    machine: Pairs


@dataclass(frozen=True)
class Fold:
    """A contestant and its runs."""

    label: str
    runs: tuple[Details, ...]


def fold(contestant: Contestant) -> Fold:
    """The contestant's runs in the seeds' order."""
    return Fold(
        contestant.label,
        tuple(_details(run, contestant) for run in contestant.runs),
    )


def _milliseconds(seconds: float | None) -> str:
    return NONE if seconds is None else f"{seconds * 1e3:.2f}{formats.SPACE}ms"


def _timing(timing: Mapping[str, Any]) -> Pairs:
    """What was forecast when the run began, and what it came to; nothing where there was no forecast."""
    ratio, forecast = number(timing.get("forecast_ratio")), number(timing.get("backward_forecast"))
    if ratio is None or forecast is None:
        return ()
    measured = number(timing.get("backward_seconds"))
    return (
        ("Forward and backward pass, forecast", f"{formats.ratio(ratio)} of the plain model’s time"),
        ("Attached backward passes in a step, forecast", _milliseconds(forecast)),
        ("Attached backward passes in a step, measured", _milliseconds(measured)),
    )


def _details(run: Run, contestant: Contestant) -> Details:
    result, description = run.result, run.description
    best = result.best_validation.get(description.metric)
    at = result.best_validation.get("epoch")
    facts = (
        ("Name", description.name),
        ("Started", description.started or NONE),
        ("Epochs", formats.count(result.epochs)),
        ("Steps", formats.count(result.steps)),
        (
            "Best validation",
            formats.score(best, description.metric) + (f" in epoch {at:.0f}" if at is not None else ""),
        ),
        ("Dense-equivalent", formats.flops(run.flops("dense"))),
        ("Method’s own overhead", formats.flops(run.flops("overhead"))),
        ("Peak memory", formats.size(result.peak_memory_bytes)),
        ("Saved activations", formats.size(result.saved_activation_bytes)),
        ("Model", result.model_file or NONE),
        *_timing(result.mapping("timing")),
    )
    plan = tuple(
        (
            row.name,
            row.type or NONE,
            row.shape or NONE,
            formats.count(row.parameters),
            ", ".join(row.methods) or NONE,
            row.kernel or NONE,
            row.status or NONE,
            row.why or NONE,
        )
        for row in description.plan.layers
    )
    first = contestant.runs[0]
    repeated = bool(plan) and run is not first and description.plan == first.description.plan
    numbers = {name: layer.model_dump() for name, layer in run.layers.items()}
    extra = {key for fields in numbers.values() for key, value in fields.items() if formats.is_scalar(value)}
    present = [key for key in LAYER_FIELDS if any(fields.get(key) is not None for fields in numbers.values())]
    columns = (*present, *sorted(extra - set(LAYER_FIELDS)))
    return Details(
        label=contestant.seed_label(run),
        facts=facts,
        plan=() if repeated else plan,
        plan_of=contestant.seed_label(first) if repeated else "",
        layer_columns=tuple(column.replace("_", " ") for column in columns),
        layers=tuple(
            (name, *(formats.cell(fields.get(column), column) for column in columns))
            for name, fields in numbers.items()
        ),
        recipe=tuple(formats.flat(description.recipe)),
        machine=tuple(formats.flat(description.machine)),
    )

"""The report as one HTML file that needs no network: text and tables here, plots from ``figures``."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import jinja2
import plotly.offline

from retrograde.errors import RunError
from retrograde.report import figures
from retrograde.report.figures import NONE, Chart, Swatch
from retrograde.report.runs import Group, Run, collect, grouped

__all__ = ["collect", "write"]

COLUMNS = (
    "Run",
    "Test",
    "Difference",
    "Zeros",
    "Own zeros",
    "Needed",
    "Executed",
    "Seconds",
    "Time ratio",
    "Parameters",
    "Status",
)
LAYER_FIELDS = ("zeros", "own_zeros", "bits", "largest_level", "fallbacks", "step")
# Scores that are better when smaller; all others are taken to be better when larger.
FALLING = ("loss", "perplexity", "error")


@dataclass(frozen=True)
class Row:
    """A run in the summary table: its legend entry and its cells after the first."""

    swatch: Swatch
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Details:
    """What is folded away under a run: facts, plan, layers' numbers, recipe and machine."""

    label: str
    facts: tuple[tuple[str, str], ...]
    plan: tuple[tuple[str, ...], ...]
    layer_columns: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    recipe: tuple[tuple[str, str], ...]
    machine: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Section:
    """A group of runs, ready for the template."""

    name: str
    metric: str
    headline: str
    caption: str
    rows: tuple[Row, ...]
    caveats: tuple[str, ...]
    charts: Mapping[str, Sequence[Chart]]
    details: tuple[Details, ...]


def write(runs: Sequence[Path], output: Path, title: str | None = None) -> Path:
    """Write the report of ``runs`` to ``output`` and return its path.

    Args:
        runs: run folders, or folders of run folders.
        output: the HTML file; folders above it are made.
        title: the page's heading; by default the name of the only group, or their number.

    The same runs give the same bytes.

    Raises:
        RunError: no run was found, one cannot be read, or ``output`` cannot be written.
    """
    text = render(collect(runs), title)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"The report cannot be written to {output}: {error}. Name another file.") from error
    return output


def render(runs: Sequence[Run], title: str | None = None) -> str:
    """The report of ``runs`` as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("retrograde.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "allow_nan": False}
    groups = grouped(runs)
    return environment.get_template("template.html.jinja").render(
        title=title or (groups[0].name if len(groups) == 1 else f"Training runs in {len(groups)} groups"),
        sections=[section(group) for group in groups],
        columns=COLUMNS,
        plotly=plotly.offline.get_plotlyjs(),
    )


def section(group: Group) -> Section:
    """A group's sentence, table, caveats, plots and details."""
    swatches = figures.swatches(group)
    base = _base(group)
    if base is None:
        compared = (
            "No run of this group is marked as the baseline, so there is no difference and no time ratio."
        )
    elif len(group.baselines) == 1:
        compared = f"Difference and time ratio are against {group.labels[0]}."
    else:
        compared = f"Difference and time ratio are against the mean of the {len(group.baselines)} baselines."
    return Section(
        name=group.name,
        metric=group.metric,
        headline=headline(group),
        caption=f"{compared} Needed and executed are FLOPs in per cent of the dense-equivalent.",
        rows=tuple(
            Row(swatch, _cells(run, group, base)) for run, swatch in zip(group.runs, swatches, strict=True)
        ),
        caveats=caveats(group),
        charts=figures.charts(group),
        details=tuple(_details(run, label) for run, label in zip(group.runs, group.labels, strict=True)),
    )


def headline(group: Group) -> str:
    """What the group's best run reaches, and at what cost, in plain words."""
    scored = [
        (run, label, run.test)
        for run, label in zip(group.runs, group.labels, strict=True)
        if not run.description.baseline and _known(run.test)
    ]
    base = _base(group)
    if not scored:
        number = len(group.runs)
        return f"{number} {'run' if number == 1 else 'runs'}; nothing to compare with the baseline yet."
    sign = -1.0 if group.metric in FALLING else 1.0
    run, label, best = max(scored, key=lambda entry: sign * cast(float, entry[2]))
    text = f"{label} reaches {_score(best, group)} test {group.metric}"
    if base is not None and base.test is not None:
        text += f", {_difference(best, base.test, group)} against the baseline’s {_score(base.test, group)}"
    text += ". "
    if len(scored) > 1:
        text += f"It is the best of {len(scored)} runs compared. "
    needed, executed = _of_dense(run, "needed"), _of_dense(run, "executed")
    if needed is not None:
        text += f"Skipping every zero would take {figures.share(needed)} of the dense-equivalent FLOPs. "
    costs: list[str] = []
    if executed is not None:
        costs.append(
            f"executed {figures.share(executed)} of {'them' if needed else 'the dense-equivalent FLOPs'}"
        )
    if base is not None and run.result.seconds and base.seconds:
        costs.append(f"took {run.result.seconds / base.seconds:.2f} times the baseline’s time")
    return (text + (f"It {' and '.join(costs)}." if costs else "")).strip()


def caveats(group: Group) -> tuple[str, ...]:
    """What a reader must know before trusting the group's numbers."""
    found: list[str] = []
    rows = [row for run in group.runs for row in run.description.plan.layers]
    if any(row.kernel == "reference" and row.methods for row in rows):
        found.append(
            "Reference kernels multiply zeros too: executed stays near dense and time is not saved. "
            "Needed says what a kernel that skips zeros would do."
        )
    if len(group.runs) > 1 and len(group.baselines) < 3:
        found.append(
            "A difference between two runs holds the chance of their seeds as well as the method’s effect. "
            "Repeat each setting with several seeds before trusting tenths of a point."
        )
    machines = {json.dumps(run.description.machine, sort_keys=True) for run in group.runs}
    if len(machines) > 1:
        found.append("The runs come from different machines or software, so their times cannot be compared.")
    for run, label in zip(group.runs, group.labels, strict=True):
        if run.result.status != "finished":
            found.append(f"{label} is {run.result.status}: it was not trained to the end.")
        if run.fallbacks:
            times = "once" if run.fallbacks == 1 else f"{_count(run.fallbacks)} times"
            found.append(f"{label} fell back to the exact backward pass {times}, counted over layers.")
    return tuple(found)


@dataclass(frozen=True)
class _Base:
    """The baseline's score and seconds, or the mean of several baselines'."""

    test: float | None
    seconds: float | None


def _base(group: Group) -> _Base | None:
    if not group.baselines:
        return None
    return _Base(
        test=_mean([run.test for run in group.baselines]),
        seconds=_mean([run.result.seconds for run in group.baselines]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and isfinite(value)]
    return fmean(known) if known else None


def _cells(run: Run, group: Group, base: _Base | None) -> tuple[str, ...]:
    result = run.result
    alone = run.description.baseline and len(group.baselines) == 1
    against = base if base and not alone else _Base(None, None)
    ratio = (
        result.seconds / against.seconds
        if _known(result.seconds) and result.seconds and against.seconds
        else None
    )
    return (
        _score(run.test, group),
        "baseline" if alone else _difference(run.test, against.test, group),
        figures.share(result.zeros),
        figures.share(result.own_zeros),
        figures.share(_of_dense(run, "needed")),
        figures.share(_of_dense(run, "executed")),
        _seconds(result.seconds),
        _ratio(ratio),
        _count(result.parameters),
        result.status,
    )


def _details(run: Run, label: str) -> Details:
    result, description = run.result, run.description
    best = result.best_validation.get(description.metric)
    at = result.best_validation.get("epoch")
    facts = (
        ("Name", description.name),
        ("Started", description.started or NONE),
        ("Epochs", _count(result.epochs)),
        ("Steps", _count(result.steps)),
        ("Best validation", _score(best, run) + (f" in epoch {at:.0f}" if at is not None else "")),
        ("Dense-equivalent", figures.flops(figures.flops_of(run, "dense"))),
        ("Method’s own overhead", figures.flops(figures.flops_of(run, "overhead"))),
        ("Peak memory", _bytes(result.peak_memory_bytes)),
        ("Saved activations", _bytes(result.saved_activation_bytes)),
        ("Model", result.model_file or NONE),
    )
    plan = tuple(
        (
            row.name,
            row.type or NONE,
            row.shape or NONE,
            _count(row.parameters),
            ", ".join(row.methods) or NONE,
            row.kernel or NONE,
            row.status or NONE,
            row.why or NONE,
        )
        for row in description.plan.layers
    )
    numbers = {name: layer.model_dump() for name, layer in run.layers.items()}
    extra = {key for fields in numbers.values() for key, value in fields.items() if _scalar(value)}
    present = [key for key in LAYER_FIELDS if any(fields.get(key) is not None for fields in numbers.values())]
    columns = (*present, *sorted(extra - set(LAYER_FIELDS)))
    return Details(
        label=label,
        facts=facts,
        plan=plan,
        layer_columns=tuple(column.replace("_", " ") for column in columns),
        layers=tuple(
            (name, *(_number(fields.get(column), column) for column in columns))
            for name, fields in numbers.items()
        ),
        recipe=tuple(_flat(description.recipe)),
        machine=tuple(_flat(description.machine)),
    )


def _flat(value: object, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in cast(list[object], value)):
        value = dict(enumerate(cast(list[object], value)))
    if isinstance(value, dict) and value:
        pairs = cast(dict[str, Any], value).items()
        return [row for key, inner in pairs for row in _flat(inner, f"{name}.{key}" if name else str(key))]
    return (
        [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))] if name else []
    )


def _of_dense(run: Run, key: str) -> float | None:
    part, whole = figures.flops_of(run, key), figures.flops_of(run, "dense")
    return part / whole if part is not None and whole else None


def _known(value: float | None) -> bool:
    return value is not None and isfinite(value)


def _scalar(value: object) -> bool:
    return isinstance(value, int | float | str)


def _score(value: float | None, of: Group | Run) -> str:
    metric = of.metric if isinstance(of, Group) else of.description.metric
    if figures.is_share(metric):
        return figures.share(value)
    return f"{value:.4g}" if value is not None and isfinite(value) else NONE


def _difference(value: float | None, base: float | None, group: Group) -> str:
    if value is None or base is None or not isfinite(value):
        return NONE
    if figures.is_share(group.metric):
        size, unit = f"{abs(value - base) * 100:.1f}", "\u00a0pt"
    else:
        size, unit = f"{abs(value - base):.3g}", ""
    sign = "±" if float(size) == 0 else "+" if value > base else "−"
    return f"{sign}{size}{unit}"


def _ratio(value: float | None) -> str:
    return f"{value:.2f}\u00a0×" if value is not None and isfinite(value) else NONE


def _seconds(value: float | None) -> str:
    if value is None or not isfinite(value):
        return NONE
    if value < 100:
        return f"{value:.1f}\u00a0s"
    return f"{_count(round(value))}\u00a0s"


def _count(value: float | None) -> str:
    return f"{value:,.0f}" if value is not None and isfinite(value) else NONE


def _bytes(value: float | None) -> str:
    if value is None or not isfinite(value):
        return NONE
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{value / factor:.1f}\u00a0{unit}"
    return f"{value:.0f}\u00a0B"


def _number(value: object, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value) if _scalar(value) else NONE
    if "zeros" in column or column.endswith(("sparsity", "share")):
        return figures.share(value)
    if not isfinite(value):
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"

"""The tables of a result, for the terminal, documents and the page: figures, checks, settings, searches, runs."""

from retrograde.lab.claims import metrics, wording
from retrograde.lab.claims.result import Entry, Finding, Result, Run, Trial
from retrograde.lab.record import RunRecord, number
from retrograde.report import formats
from retrograde.report.comparison import Comparison, Variant
from retrograde.report.formats import figure
from retrograde.report.prose import caption, commits_of
from retrograde.report.table import NONE, Column, Row, Table, make_table, pairs

TIME_RATIO = "time over the baseline’s"
SOURCE = "the source’s figures"


def figures_table(comparison: Comparison, *, source: bool = True) -> Table:
    """A row for each variant: the metrics of the result's table, and what they are over the baseline's.

    Args:
        comparison: what is compared.
        source: with a column of the source's figures, where it gives any; a terminal has no room for it.
    """
    result = comparison.result
    sourced = source and any(entry.source for entry in result.contestants.values())
    columns = [metrics.ALL[metric].label for metric in result.table]
    if comparison.recorded:
        columns.insert(1, "difference")
    rows: list[Row] = []
    for variant in comparison.variants:
        cells = [wording.cell(result, variant.name, metric) for metric in result.table]
        if comparison.recorded:
            cells.insert(1, _difference(result, variant))
        cells.append(time_ratio(result, variant.name))
        if sourced:
            cells.append(wording.source(result, variant.name))
        rows.append(Row((variant.label, *cells), variant.swatch))
    heads = (Column("variant", "text"), *map(Column, columns), Column(TIME_RATIO))
    return Table(
        (*heads, Column(SOURCE, "text")) if sourced else heads, tuple(rows), caption(comparison.result)
    )


def _difference(result: Result, variant: Variant) -> str:
    if variant.name == result.baseline:
        return "baseline"
    found = result.against_baseline[variant.name].get("accuracy")
    return wording.points(found.minus) if found else NONE


def time_ratio(result: Result, name: str) -> str:
    """Training time over the baseline's."""
    if name == result.baseline:
        return "×1"
    return wording.ratio(result, name, "seconds") or NONE


def checks_table(result: Result) -> Table:
    """What was asked, and what came out."""

    def row(finding: Finding) -> Row:
        remark = f"\n{finding.remark}" if finding.remark else ""
        return Row((finding.says + remark, held(finding), wording.found(finding), wording.bound(finding)))

    columns = (
        Column("check", "text"),
        Column("outcome", "badge"),
        Column("figure"),
        Column("bound", "text"),
    )
    return Table(columns, tuple(map(row, result.findings)))


def held(finding: Finding) -> str:
    """Whether a check holds, in a word or two."""
    return "exceeded" if finding.holds and finding.exceeds else "holds" if finding.holds else "fails"


def settings_table(result: Result) -> Table | None:
    """What the searches, or an equal time, made of each variant's recipe; None where nothing was searched."""
    found = [(entry, dict(changed(entry))) for entry in result.contestants.values()]
    keys = list(dict.fromkeys(key for _, one in found for key in one))
    if not keys:
        return None
    rows = [
        (entry.label, *(one.get(key, NONE) for key in keys), str(len(entry.trials))) for entry, one in found
    ]
    return make_table(("variant", *keys, "trials"), rows)


def changed(entry: Entry) -> list[tuple[str, str]]:
    """What the search, and an equal time, made of the definition's recipe."""
    return [(key, _written(value)) for key, value in entry.changes.items()]


def _written(value: object) -> str:
    """A setting: numbers drawn by a search have more digits than mean anything."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else ", ".join(text for _, text in formats.flat(value, " "))


def search_table(entry: Entry) -> Table:
    """All trials of a search, the one that was taken in bold."""
    keys = tuple(dict.fromkeys(key for trial in entry.trials for key in trial.changes))
    best = max(range(len(entry.trials)), key=lambda at: entry.trials[at].accuracy)

    def row(at: int, trial: Trial) -> Row:
        values = (_written(trial.changes[key]) if key in trial.changes else NONE for key in keys)
        reached = figure("best_validation", trial.accuracy) if trial.error is None else trial.error
        return Row((str(at + 1), *values, reached), tone="strong" if at == best else "plain")

    columns = (Column("trial", "text"), *map(Column, (*keys, "validation accuracy")))
    rows = tuple(row(at, trial) for at, trial in enumerate(entry.trials))
    return Table(columns, rows, "All trials of the search; the best one is bold")


def runs_table(result: Result) -> Table:
    """Every run with its figures."""
    names = dict.fromkeys((*result.table, "seconds"))

    def row(run: Run) -> tuple[str, ...]:
        values = (figure(metric, run.metrics.get(metric)) for metric in names)
        label = result.contestants[run.contestant].label
        return label, str(run.seed), *values, figure("saved_bytes", run.peak_memory_bytes), run.commit or NONE

    labels = (metrics.ALL[metric].label for metric in names)
    columns = ("variant", "seed", *labels, "peak memory of the process", "commit")
    return make_table(columns, map(row, result.runs), caption="Variants take turns, seed by seed")


def facts_table(result: Result) -> Table:
    """How to make a claim's result again."""
    return pairs(
        "Result",
        (
            ("Claim", result.claim),
            ("Definition", result.hash),
            ("Command", result.command),
            ("Seeds", ", ".join(map(str, result.seeds))),
            ("Seeds at once", str(result.jobs)),
            ("Threads of each", str(result.threads)),
            ("Commits", ", ".join(commits_of(result)) or NONE),
        ),
    )


# Of a single run.


def run_table(run: RunRecord) -> Table:
    """A run's own facts, its forecast beside what was measured included."""
    outcome, description = run.outcome, run.description
    best = outcome.best_validation or {}
    at = best.get("epoch")
    rows = [
        ("Name", description.name),
        ("Started", description.started or NONE),
        ("Status", outcome.status),
        ("Epochs", figure("steps", outcome.epochs)),
        ("Steps", figure("steps", outcome.steps)),
        (
            "Best validation",
            figure("best_validation", best.get("accuracy"))
            + (f" in epoch {at:.0f}" if at is not None else ""),
        ),
        ("Dense-equivalent", formats.flops(outcome.flops.dense)),
        ("Method’s own overhead", formats.flops(outcome.flops.overhead)),
        ("Peak memory", figure("saved_bytes", outcome.peak_memory_bytes)),
        ("Model", outcome.model_file or NONE),
    ]
    timing = outcome.timing
    if timing is not None and number(timing.forecast_ratio) is not None:
        forecast, measured = timing.backward_forecast, timing.backward_seconds
        rows += [
            (
                "Forward and backward pass, forecast",
                f"×{timing.forecast_ratio:.2f} of the plain model’s time",
            ),
            ("Attached backward passes in a step, forecast", figure("step_seconds", forecast)),
            ("Attached backward passes in a step, measured", figure("step_seconds", measured)),
        ]
    return pairs("Run", rows)


def plan_table(run: RunRecord) -> Table | None:
    """What is attached to each layer; None of a run without a plan."""
    layers = run.description.plan.layers
    if not layers:
        return None
    kinds = ("text", "text", "text", "number", "text", "text", "text", "text")
    names = ("layer", "type", "shape", "parameters", "methods", "kernel", "status", "why")
    rows = (
        (
            layer.name,
            layer.type,
            layer.shape,
            figure("parameters", layer.parameters),
            ", ".join(layer.methods),
            layer.kernel,
            layer.status,
            layer.why,
        )
        for layer in layers
    )
    return Table(
        tuple(Column(name, kind) for name, kind in zip(names, kinds, strict=True)),
        tuple(Row(tuple(cell or NONE for cell in row)) for row in rows),
        "Plan: what is attached to each layer, and why",
    )


def layers_table(run: RunRecord) -> Table | None:
    """What was counted in each layer in the last epoch; None where nothing was."""
    numbers = {name: layer.model_dump(exclude_none=True) for name, layer in run.layers.items()}
    columns = list(dict.fromkeys(key for fields in numbers.values() for key in fields))
    if not columns:
        return None
    rows = (
        (name, *(formats.cell(fields.get(column), column) for column in columns))
        for name, fields in numbers.items()
    )
    heads = ("layer", *(column.replace("_", " ") for column in columns))
    return make_table(heads, rows, caption="Layers in the last epoch")

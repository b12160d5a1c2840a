"""The tables of a result, for the terminal, documents and the page: figures, checks, settings, searches, runs."""

from retrograde.lab.claims import metrics, wording
from retrograde.lab.claims.result import Entry, Result, Run, Trial
from retrograde.lab.record import RunRecord, Timing, number
from retrograde.report import formats
from retrograde.report.comparison import Comparison
from retrograde.report.formats import figure
from retrograde.report.prose import caption, commits_of
from retrograde.report.table import NONE, Column, Row, Table, make_table, pairs


def figures_table(comparison: Comparison, *, source: bool = True) -> Table:
    """A row for each variant: the metrics of the result's table, and what they are over the baseline's.

    Args:
        comparison: what is compared.
        source: with a column of the source's figures, where it gives any; a terminal has no room for it.
    """
    result, recorded = comparison.result, comparison.recorded
    columns = [Column(metrics.ALL[metric].label) for metric in result.table]
    columns[1:1] = [Column("difference")] if recorded else []
    columns = [Column("variant", "text"), *columns, Column("time over the baseline’s")]
    sourced = source and any(entry.source for entry in result.contestants.values())
    columns += [Column("the source’s figures", "text")] if sourced else []
    rows: list[Row] = []
    for variant in comparison.variants:
        name, first = variant.name, variant.name == result.baseline
        cells = [wording.cell(result, name, metric) for metric in result.table]
        found = result.against_baseline.get(name, {}).get("accuracy")
        difference = "baseline" if first else wording.points(found.minus) if found else NONE
        cells[1:1] = [difference] if recorded else []
        cells.append("×1" if first else wording.ratio(result, name, "seconds") or NONE)
        cells += [wording.source(result, name)] if sourced else []
        rows.append(Row((variant.label, *cells), variant.swatch))
    return Table(tuple(columns), tuple(rows), caption(result))


def checks_table(result: Result) -> Table:
    """What was asked, and what came out."""
    columns = (Column("check", "text"), Column("outcome", "badge"), Column("figure"), Column("bound", "text"))
    rows = (
        (
            f"{one.says}\n{one.remark}".rstrip(),
            "fails" if not one.holds else "exceeded" if one.exceeds else "holds",
            wording.found(one),
            wording.bound(one),
        )
        for one in result.findings
    )
    return Table(columns, tuple(map(Row, rows)))


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
    best = max(entry.trials, key=lambda trial: trial.accuracy, default=None)

    def row(at: int, trial: Trial) -> Row:
        values = (_written(trial.changes[key]) if key in trial.changes else NONE for key in keys)
        reached = figure("best_validation", trial.accuracy) if trial.error is None else trial.error
        return Row((str(at + 1), *values, reached), tone="strong" if trial is best else "plain")

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
    """A run's own facts and figures, its forecast beside what was measured included."""
    outcome, description = run.outcome, run.description
    timing, epoch = outcome.timing or Timing(), (outcome.best_validation or {}).get("epoch")
    figures = (
        (metrics.ALL[name].label, figure(name, value)) for name, value in metrics.of_run(outcome).items()
    )
    rows = [
        ("Name", description.name),
        ("Label", run.label),
        ("Started", description.started),
        ("Status", outcome.status),
        ("Epochs", figure("steps", outcome.epochs)),
        *((f"{label[0].upper()}{label[1:]}", text) for label, text in figures),
        ("Epoch of the best validation", figure("steps", epoch)),
        ("Dense-equivalent", formats.flops(outcome.flops.dense)),
        ("Method’s own overhead", formats.flops(outcome.flops.overhead)),
        ("Fallbacks", str(outcome.fallbacks)),
        ("Peak memory", figure("saved_bytes", outcome.peak_memory_bytes)),
        ("Model", outcome.model_file),
    ]
    if number(timing.forecast_ratio) is not None:
        rows.append(
            ("Forward and backward pass, forecast", f"×{timing.forecast_ratio:.2f} of the plain model’s time")
        )
    rows.append(("Saved activations, forecast", figure("saved_bytes", timing.forecast_bytes)))
    for word, seconds in (("forecast", timing.backward_forecast), ("measured", timing.backward_seconds)):
        rows.append((f"Attached backward passes in a step, {word}", figure("step_seconds", seconds)))
    return pairs("Run", ((name, text) for name, text in rows if text and text != NONE))


def plan_table(run: RunRecord) -> Table:
    """What is attached to each layer."""

    def write(value: object) -> str:
        if isinstance(value, int):
            return figure("parameters", value)
        return (", ".join(value) if isinstance(value, tuple) else str(value or "")) or NONE

    names = ("type", "shape", "parameters", "methods", "kernel", "status", "why")
    rows = [
        Row((layer.name, *(write(getattr(layer, name)) for name in names)))
        for layer in run.description.plan.layers
    ]
    kinds = (Column(name, "number" if name == "parameters" else "text") for name in ("layer", *names))
    return Table(tuple(kinds), tuple(rows), "Plan: what is attached to each layer, and why")


def layers_table(run: RunRecord) -> Table:
    """What was counted in each layer in the last epoch."""
    numbers = {name: layer.model_dump(exclude_none=True) for name, layer in run.layers.items()}
    columns = list(dict.fromkeys(key for fields in numbers.values() for key in fields))
    rows = (
        (name, *(formats.cell(fields.get(column), column) for column in columns))
        for name, fields in numbers.items()
    )
    heads = ("layer", *(column.replace("_", " ") for column in columns))
    return make_table(heads, rows, caption="Layers in the last epoch")

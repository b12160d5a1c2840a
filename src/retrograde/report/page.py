"""The report as one HTML file that needs no network: from run folders, and from results of claims."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jinja2
import plotly.offline

from retrograde.errors import RunError
from retrograde.lab.claims.result import Entry, Result, read_result
from retrograde.lab.record import RunRecord
from retrograde.report import formats, tables
from retrograde.report.comparison import Comparison, Variant, of_folders
from retrograde.report.pictures import Gallery, galleries
from retrograde.report.prose import caveats, headline
from retrograde.report.table import Table, figure_parts, pairs, tone


@dataclass(frozen=True)
class Fold:
    """What is folded away: tables, of which empty ones are left out, and further folds."""

    label: str
    hint: str = ""
    text: str = ""
    tables: tuple[Table, ...] = ()
    folds: "tuple[Fold, ...]" = ()


@dataclass(frozen=True)
class Section:
    """A comparison, ready for the template; `badge` is empty where there is no verdict."""

    result: Result
    badge: str
    headline: str
    caveats: tuple[str, ...]
    figures: Table
    checks: Table
    galleries: tuple[Gallery, ...]
    note: tuple[str, ...]
    folds: tuple[Fold, ...]


def write(runs: Sequence[Path], output: Path, title: str | None = None) -> Path:
    """Write the report of `runs` to `output` and return its path.

    Args:
        runs: run folders, or folders of run folders; or else JSON files with results of claims.
        output: the HTML file; folders above it are made.
        title: the page's heading; by default the name of the only group or claim, or their number.

    The same runs give the same bytes.

    Raises:
        RunError: no run was found, one cannot be read, or `output` cannot be written.
    """
    if any(path.suffix == ".json" for path in runs):
        return write_claims(read_claims(runs), output, title)
    groups = of_folders(runs)
    name = groups[0].result.title if len(groups) == 1 else f"Training runs in {len(groups)} groups"
    return _save(_render(groups, "retrograde report", title or name), output)


def write_claims(results: Sequence[Result], output: Path, title: str | None = None, lead: str = "") -> Path:
    """Write the page of `results` to `output` and return its path; `lead` stands below its title.

    Raises:
        RunError: there is no result, or `output` cannot be written.
    """
    return _save(render_claims(results, title, lead), output)


def render_claims(results: Sequence[Result], title: str | None = None, lead: str = "") -> str:
    """The page of `results` as HTML; the same results give the same bytes.

    Raises:
        RunError: there is no result.
    """
    if not results:
        raise RunError("No results found: none was given. Name at least one result of a claim.")
    name = results[0].title if len(results) == 1 else f"{len(results)} claims"
    return _render([Comparison(result, {}) for result in results], "retrograde results", title or name, lead)


def read_claims(paths: Sequence[Path]) -> list[Result]:
    """The results in JSON files.

    Raises:
        RunError: a path is no such file, or its content is no result of a claim.
    """
    for path in paths:
        if path.suffix != ".json":
            raise RunError(
                f"{path} is no result of a claim, but others of the given paths are: they make different pages. "
                "Give run folders alone, or JSON files alone."
            )
        if (path.parent / "run.json").is_file():
            raise RunError(
                f"{path} belongs to a single run, and is no result of a claim. Name its folder, {path.parent}."
            )
    return [read_result(path) for path in paths]


def section(comparison: Comparison) -> Section:
    """A comparison's verdict, table, checks, plots and details."""
    result = comparison.result
    paragraphs = (" ".join(part.split()) for part in result.note.split("\n\n"))
    return Section(
        result=result,
        badge=badge(result),
        headline=headline(comparison),
        caveats=caveats(comparison),
        figures=tables.figures_table(comparison),
        checks=tables.checks_table(result),
        galleries=tuple(galleries(comparison)),
        note=tuple(filter(None, paragraphs)),
        folds=_folds(comparison),
    )


def badge(result: Result) -> str:
    """The verdict; that of a quick run is none, and where nothing is checked there is nothing to say."""
    if result.quick:
        return "quick: decides nothing"
    return result.verdict if result.findings else ""


def _folds(comparison: Comparison) -> tuple[Fold, ...]:
    result = comparison.result
    each = Fold("Each run", f"{len(result.runs)} runs", tables=(tables.runs_table(result),))
    if comparison.recorded:
        return (*map(_of_variant, comparison.variants), each)
    made = (tables.facts_table(result), pairs("Machine", formats.flat(result.machine)))
    how = Fold("How it was made", "command, commit, machine", tables=made)
    return (*map(_settings, result.contestants.values()), each, how)


def _settings(entry: Entry) -> Fold:
    """What a variant ran by, and the search that led to it."""
    changes = pairs("Found by the search, or for an equal time", tables.changed(entry))
    recipe = pairs("Recipe it ran by", formats.flat(entry.recipe))
    hint = f"{len(entry.trials)} trials" if entry.trials else "nothing searched"
    return Fold(entry.label, hint, tables=(changes, recipe, tables.search_table(entry)))


def _of_variant(variant: Variant) -> Fold:
    """A variant's runs: one fold, or one within it for each seed."""
    runs = tuple(_of_run(variant, run) for run in variant.records)
    return runs[0] if len(runs) == 1 else Fold(variant.label, f"{len(runs)} seeds", folds=runs)


def _of_run(variant: Variant, run: RunRecord) -> Fold:
    first = variant.records[0]
    repeated = run is not first and run.description.plan.layers == first.description.plan.layers
    facts = run.description
    shown = (
        *(() if repeated else (tables.plan_table(run),)),
        tables.layers_table(run),
        tables.run_table(run),
        pairs("Configuration", formats.flat(facts.recipe)),
        pairs("Machine", formats.flat(facts.machine)),
    )
    text = f"The plan is that of {variant.seed_label(first)}." if repeated else ""
    return Fold(variant.seed_label(run), text=text, tables=shown)


def _render(comparisons: Sequence[Comparison], kicker: str, title: str, lead: str = "") -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("retrograde.report", "template"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {
        "sort_keys": True,
        "allow_nan": False,
        "separators": (",", ":"),
    }
    cast(Any, environment.globals).update(figure_parts=figure_parts, tone=tone)
    return environment.get_template("page.html.jinja").render(
        kicker=kicker,
        title=title,
        lead=lead,
        sections=[section(comparison) for comparison in comparisons],
        plotly=plotly.offline.get_plotlyjs(),
    )


def _save(text: str, output: Path) -> Path:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Names of files that are not UTF-8 are shown with escapes.
        output.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise RunError(f"The report cannot be written to {output}: {error}. Name another file.") from error
    return output

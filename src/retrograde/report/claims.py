"""Results of claims as one HTML file that needs no network: what a source says, and what came of it here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retrograde.errors import RunError
from retrograde.lab.claims import metrics, wording
from retrograde.lab.claims.result import Entry, Finding, Result, Run, Trial, read_result
from retrograde.report import formats
from retrograde.report.details import Pairs
from retrograde.report.formats import NONE
from retrograde.report.page import save, templates
from retrograde.report.pictures import Chart
from retrograde.report.pictures.claims import claim_charts, swatches
from retrograde.report.table import Cell, Row, Table

TIME_RATIO = "time over the baseline’s"
SOURCE = "the source’s figures"


@dataclass(frozen=True)
class Badge:
    """The verdict for the eye; ``tone`` is good, part, bad or plain."""

    text: str
    tone: str


@dataclass(frozen=True)
class Checked:
    """A check's row."""

    says: str
    figure: str
    interval: str
    bound: str
    holds: str
    tone: str
    remark: str


@dataclass(frozen=True)
class Search:
    """A contestant's search: the rows of its trials, and which of them was taken."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: int


@dataclass(frozen=True)
class Settings:
    """What a contestant ran by; ``changes`` is what the search and an equal time made of the recipe."""

    label: str
    changes: Pairs
    recipe: Pairs
    search: Search | None


@dataclass(frozen=True)
class Grid:
    """A plain table."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ClaimSection:
    """A result, ready for the template."""

    claim: str
    title: str
    sentence: str
    source: str
    badge: Badge | None
    caption: str
    table: Table
    checks: tuple[Checked, ...]
    caveats: tuple[str, ...]
    note: tuple[str, ...]
    charts: tuple[Chart, ...]
    settings: tuple[Settings, ...]
    runs: Grid
    facts: Pairs
    machine: Pairs


def write_claims(results: Sequence[Result], output: Path, title: str | None = None, lead: str = "") -> Path:
    """Write the page of ``results`` to ``output`` and return its path; ``lead`` stands below its title.

    Raises:
        RunError: there is no result, or ``output`` cannot be written.
    """
    return save(render_claims(results, title, lead), output)


def render_claims(results: Sequence[Result], title: str | None = None, lead: str = "") -> str:
    """The page of ``results`` as HTML; the same results give the same bytes.

    Raises:
        RunError: there is no result.
    """
    import plotly.offline

    if not results:
        raise RunError("No results found: none was given. Name at least one result of a claim.")
    return (
        templates()
        .get_template("claims.html.jinja")
        .render(
            title=title or (results[0].title if len(results) == 1 else f"{len(results)} claims"),
            lead=lead,
            sections=[section(result) for result in results],
            plotly=plotly.offline.get_plotlyjs(),
        )
    )


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


def section(result: Result) -> ClaimSection:
    """A result's verdict, table, checks, plots and details."""
    return ClaimSection(
        claim=result.claim,
        title=result.title,
        sentence=result.sentence,
        source=result.source,
        badge=badge(result),
        caption=caption(result),
        table=_table(result),
        checks=tuple(map(_checked, result.findings)),
        caveats=caveats(result),
        note=tuple(" ".join(part.split()) for part in result.note.split("\n\n") if part.strip()),
        charts=tuple(claim_charts(result)),
        settings=tuple(map(_settings, result.contestants.values())),
        runs=_runs(result),
        facts=facts(result),
        machine=tuple(formats.flat(result.machine)),
    )


def badge(result: Result) -> Badge | None:
    """The verdict; that of a quick run is none, and where nothing is checked there is nothing to say."""
    if result.quick:
        return Badge("quick: decides nothing", "plain")
    if not result.findings:
        return None
    tones = {"reproduced": "good", "exceeded": "good", "partly": "part", "not reproduced": "bad"}
    return Badge(result.verdict, tones.get(result.verdict, "plain"))


def caption(result: Result) -> str:
    """What the table's figures are."""
    seeds = len(result.seeds)
    means = (
        f"Means over {seeds} seeds ± half of their 95 % interval." if seeds > 1 else "One seed: no intervals."
    )
    equal = "the same time" if result.equal == "seconds" else "the same number of steps"
    return f"{means} All contestants train for {equal}. The first one is the baseline."


def caveats(result: Result) -> tuple[str, ...]:
    """What a reader should know before trusting the figures."""
    found: list[str] = []
    if result.quick:
        held = f" Its checks would say “{result.verdict}”." if result.findings else ""
        found.append(f"This is a quick run, a short form of the claim: it decides nothing.{held}")
    if len(result.seeds) == 1:
        found.append("There is one seed: how far another one would differ is not known.")
    if result.jobs > 1:
        found.append(f"{result.jobs} seeds ran at once and took time from each other: times are inflated.")
    commits = _commits(result)
    if any(commit.endswith("-dirty") for commit in commits):
        found.append("Some runs were made from files that differ from their commit.")
    if len(commits) > 1:
        found.append(f"Runs were made at {len(commits)} different commits.")
    for entry in result.contestants.values():
        failed = sum(trial.error is not None for trial in entry.trials)
        if failed:
            found.append(
                f"{entry.label}: {failed} of {len(entry.trials)} trials of the search ended in an error."
            )
    return tuple(found)


def facts(result: Result) -> Pairs:
    """How to make the result again."""
    return (
        ("Claim", result.claim),
        ("Definition", result.hash),
        ("Command", result.command),
        ("Seeds", ", ".join(map(str, result.seeds))),
        ("Seeds at once", str(result.jobs)),
        ("Threads of each", str(result.threads)),
        ("Commits", ", ".join(_commits(result)) or NONE),
    )


def _commits(result: Result) -> tuple[str, ...]:
    return tuple(dict.fromkeys(run.commit for run in result.runs if run.commit))


def _table(result: Result) -> Table:
    look = swatches(result)
    sourced = any(entry.source for entry in result.contestants.values())

    def cells(name: str) -> dict[str, Cell]:
        found = {
            metrics.ALL[metric].label: _cell(wording.cell(result, name, metric)) for metric in result.table
        }
        found[TIME_RATIO] = _cell(time_ratio(result, name))
        return found | ({SOURCE: Cell(wording.source(result, name).replace(", ", "\n"))} if sourced else {})

    rows = tuple(Row(look[name], cells(name)) for name in result.contestants)
    return Table(tuple(rows[0].cells), rows)


def _cell(text: str) -> Cell:
    """A figure above half of its interval, so that many columns fit."""
    figure, sign, half = text.partition(" ± ")
    if not sign:
        return Cell(text)
    unit = half.partition(" ")[2]
    return Cell(figure if " " in figure or not unit else f"{figure} {unit}", f"± {half}")


def time_ratio(result: Result, name: str) -> str:
    """Training time over the baseline's."""
    if name == next(iter(result.contestants)):
        return "×1"
    return wording.ratio(result, name, "seconds") or NONE


def held(finding: Finding) -> str:
    """Whether a check holds, in a word or two."""
    return "exceeded" if finding.holds and finding.exceeds else "holds" if finding.holds else "fails"


def interval(finding: Finding) -> str:
    """A finding's 95 % interval."""
    if finding.low is None or finding.high is None:
        return NONE
    return f"{wording.found(finding, finding.low)} to {wording.found(finding, finding.high)}"


def _checked(finding: Finding) -> Checked:
    return Checked(
        says=finding.says,
        figure=NONE if finding.value is None else wording.found(finding, finding.value),
        interval=interval(finding),
        bound=wording.bound(finding),
        holds=held(finding),
        tone="good" if finding.holds else "bad",
        remark=finding.remark,
    )


def _settings(entry: Entry) -> Settings:
    return Settings(
        entry.label,
        changed(entry),
        tuple(formats.flat(entry.recipe)),
        _search(entry) if entry.trials else None,
    )


def changed(entry: Entry) -> Pairs:
    """What the search, and an equal time, made of the definition's recipe."""
    return tuple((key, _written(value)) for key, value in entry.changes.items())


def _written(value: object) -> str:
    """A setting: numbers drawn by a search have more digits than mean anything."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else ", ".join(text for _, text in formats.flat(value, " "))


def _search(entry: Entry) -> Search:
    keys = tuple(dict.fromkeys(key for trial in entry.trials for key in trial.changes))

    def row(at: int, trial: Trial) -> tuple[str, ...]:
        values = (_written(trial.changes[key]) if key in trial.changes else NONE for key in keys)
        return (
            str(at + 1),
            *values,
            wording.figure("best_validation", trial.accuracy) if trial.error is None else trial.error,
        )

    return Search(
        ("Trial", *keys, "Validation accuracy"),
        tuple(row(at, trial) for at, trial in enumerate(entry.trials)),
        max(range(len(entry.trials)), key=lambda at: entry.trials[at].accuracy),
    )


def _runs(result: Result) -> Grid:
    def row(run: Run) -> tuple[str, ...]:
        values = (run.metrics.get(metric) for metric in result.table)
        return (
            result.contestants[run.contestant].label,
            str(run.seed),
            *(
                NONE if value is None else wording.figure(metric, value)
                for metric, value in zip(result.table, values, strict=True)
            ),
            formats.size(run.peak_memory_bytes),
            run.commit or NONE,
        )

    labels = (metrics.ALL[metric].label for metric in result.table)
    return Grid(
        ("Contestant", "Seed", *labels, "peak memory of the process", "commit"), tuple(map(row, result.runs))
    )

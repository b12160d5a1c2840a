"""The report as one HTML file that needs no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import plotly.offline

from retrograde.errors import RunError
from retrograde.report.details import Fold, fold
from retrograde.report.groups import Contestant, Group, grouped
from retrograde.report.pictures import Chart, Swatch, charts, method_charts, swatches
from retrograde.report.prose import caption, caveats, headline
from retrograde.report.runs import Run, collect
from retrograde.report.table import Table, table


@dataclass(frozen=True)
class Deeds:
    """What one contestant's methods did: its legend entry, its seeds and its plots."""

    swatch: Swatch
    seeds: int
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Section:
    """A group of runs, ready for the template."""

    name: str
    metric: str
    headline: str
    caption: str
    table: Table
    caveats: tuple[str, ...]
    charts: Mapping[str, Sequence[Chart]]
    methods: tuple[Deeds, ...]
    details: tuple[Fold, ...]


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
    return save(render(collect(runs), title), output)


def save(text: str, output: Path) -> Path:
    """Write a page and return its path.

    Raises:
        RunError: ``output`` cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Names of files that are not UTF-8 are shown with escapes.
        output.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise RunError(f"The report cannot be written to {output}: {error}. Name another file.") from error
    return output


def templates() -> jinja2.Environment:
    """Where the pages' templates lie, and how they are filled in."""
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
    return environment


def render(runs: Sequence[Run], title: str | None = None) -> str:
    """The report of ``runs`` as HTML."""
    groups = grouped(runs)
    return (
        templates()
        .get_template("page.html.jinja")
        .render(
            title=title or (groups[0].name if len(groups) == 1 else f"Training runs in {len(groups)} groups"),
            sections=[section(group) for group in groups],
            plotly=plotly.offline.get_plotlyjs(),
        )
    )


def section(group: Group) -> Section:
    """A group's sentence, table, caveats, plots and details."""
    return Section(
        name=group.name,
        metric=group.metric,
        headline=headline(group),
        caption=caption(group),
        table=table(group),
        caveats=caveats(group),
        charts=charts(group),
        methods=tuple(
            deeds
            for entry in zip(group.contestants, swatches(group), strict=True)
            if (deeds := _deeds(*entry)).charts
        ),
        details=tuple(map(fold, group.contestants)),
    )


def _deeds(contestant: Contestant, swatch: Swatch) -> Deeds:
    return Deeds(swatch, len(contestant.runs), method_charts(contestant, swatch))

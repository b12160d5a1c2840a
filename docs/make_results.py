"""Makes ``results.md`` and its pictures from ``repro/`` and ``results/``; ``--check`` only says whether it is stale.

    python docs/make_results.py [--check] [--repro FOLDER] [--out FOLDER]

Results lie beside the definitions. Every figure on the page is read from a result or from a definition. The pictures
need Chromium.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from make_performance import draw, frame, is_stale, prose

from retrograde.lab.claims import metrics, wording
from retrograde.lab.claims.definition import Claim
from retrograde.lab.claims.library import Entry, Library
from retrograde.lab.claims.result import Result, schema
from retrograde.lab.files import write_json
from retrograde.report.comparison import Comparison
from retrograde.report.pictures.results import courses, time_chart
from retrograde.report.prose import caption, caveats
from retrograde.report.table import NONE, make_table
from retrograde.report.table import markdown_literally as plain
from retrograde.report.tables import changed, checks_table, figures_table

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ROOT = Path(__file__).parent.parent
PAGE = "results.md"
MORE_IS_BETTER = ("accuracy", "best_validation", "zeros", "own_zeros")

INTRODUCTION = """\
# Results

What the sources of the methods claim, and what came out when the claims were run here. This page and its pictures are
written by `docs/make_results.py` from the definitions in [`repro/`](../repro) and the results in
[`results/`](../results); no figure is typed by hand. A failed reproduction is published like any other.

## What counts, and how to run it again

- Each claim is a file `repro/METHOD/CLAIM.toml`, which says what is run, how each variant is tuned, and what decides.
  `retrograde repro run METHOD/CLAIM` runs it and writes `results/METHOD/CLAIM.json`; re-running the same command
  resumes an interrupted run. With `--quick` it runs a short form, which decides nothing and is not published.
  `retrograde repro verify` runs a random cell of a published result again, and `retrograde report FILE.json` makes a
  page with plots of a result.
- The data were not made by this project. Variants with the same seed have the same initial weights and order of data.
- Where settings are searched, every variant gets the same number of trials on the validation split. The test set is
  read once, at the end.
- Variants take turns on the same cores in one session. Where several seeds ran at once, the claim says so, and its
  times are not evidence. Training time includes all overhead of a method.
- ± is half of a mean's 95 % interval over seeds (Student's t). Differences and ratios are taken seed by seed.

## How a verdict is reached

A definition holds checks. A check compares a figure, or its difference from or ratio to another variant's, with a
bound. For a difference or a ratio the far end of the interval decides, unless the definition asks for the mean. A claim
is *reproduced* if all checks hold, *exceeded* if those that name the source's own figure also go beyond it, *partly*
reproduced if some hold, and *not reproduced* if none does.
"""


# Pieces of the document.


def picture(claim: str) -> str:
    return claim.replace("/", "-")


def anchor(claim: str) -> str:
    return f"claim-{picture(claim)}"


# The table of all claims.


def subject(claim: Claim) -> str | None:
    """The variant that a claim is about: that of its first check, else the first after the baseline."""
    if claim.checks:
        return claim.checks[0].of
    return next(iter([*claim.contestants][1:]), None)


def main_figures(claim: Claim) -> list[str]:
    """Metrics of the overview: those that the source gives of the subject, else that of the first check."""
    name = subject(claim)
    given = list(claim.contestants[name].source) if name in claim.contestants else []
    return given or [check.metric for check in claim.checks[:1]] or claim.table[:1]


def best_peer(claim: Claim, result: Result) -> str | None:
    """The peer with the best figure: a variant beside baseline and subject that runs by none of our methods.

    Variants of an experiment may be on other tasks, or ours too: its peers are those that a check sets the subject
    against.
    """
    metric, about = main_figures(claim)[0], subject(claim)
    if claim.experiment is None:
        rivals = {name for name, entry in result.contestants.items() if not entry.recipe.get("methods")}
    else:
        rivals = {rival for check in claim.checks if check.of == about for rival in (check.minus, check.over)}
    peers = {
        name: result.summaries[name][metric].mean
        for name in result.contestants
        if name in rivals - {claim.baseline, about} and metric in result.summaries[name]
    }
    best = max if metric in MORE_IS_BETTER else min
    return best(peers, key=lambda name: peers[name]) if peers else None


def figures_of(result: Result, name: str | None, names: Sequence[str]) -> str:
    if name not in result.contestants:
        return NONE
    return ", ".join(f"{metrics.ALL[metric].label} {wording.cell(result, name, metric)}" for metric in names)


def overview(entries: Sequence[Entry]) -> str:
    """A row for every claim."""
    columns = ("claim", "the source's figure", "ours", "best peer", "status", "verdict")
    return make_table(columns, map(overview_row, entries), texts=6).markdown(literal=False)


def overview_row(entry: Entry) -> tuple[str, ...]:
    claim, result = entry.claim, entry.result
    name, names = subject(claim), main_figures(claim)
    given = claim.contestants[name].source if name in claim.contestants else {}
    said = ", ".join(f"{metrics.ALL[m].label} {wording.figure(m, value)}" for m, value in given.items())
    source = said or plain(claim.claim)
    if result is None:
        why = f": {plain(claim.pending)}" if claim.pending else ""
        return f"`{claim.id}`", source, NONE, NONE, f"not run{why}", NONE
    peer = best_peer(claim, result)
    peers = f"{plain(result.contestants[peer].label)}: {figures_of(result, peer, names)}" if peer else NONE
    status = "the definition has changed since" if entry.status == "stale" else entry.status
    link = f"[`{claim.id}`](#{anchor(claim.id)})"
    # A source that gives no figure is met, or not, by the first check.
    first = result.findings[0] if result.findings and not given else None
    ours = f"{plain(first.says)}: {wording.outcome(first)}" if first else figures_of(result, name, names)
    return link, source, ours, peers, status, verdict(entry)


def verdict(entry: Entry) -> str:
    """In words; none of a quick result or of one that belongs to another definition."""
    assert entry.result is not None
    if entry.result.quick:
        return "quick: decides nothing"
    return f"*{entry.result.verdict}*" if entry.status == "run" else NONE


# A claim's section.


def section(entry: Entry, result: Result) -> list[str]:
    parts = [
        f'<a id="{anchor(entry.claim.id)}"></a>\n\n## {plain(result.title)}',
        f"**Verdict: {verdict(entry).strip('*')}** (`{result.claim}`)",
        "> " + prose(f"{plain(result.sentence)} — {plain(result.source)}").replace("\n", "\n> "),
    ]
    if entry.status == "stale":
        parts.append("*The definition has changed since this result was made.*")
    said = caveats(Comparison(result, {}))
    parts += ["\n".join(prose(f"- {plain(caveat)}", "  ") for caveat in said)] if said else []
    parts += [figures_table(Comparison(result, {})).markdown(), prose(plain(caption(result)))]
    parts += [checks_table(result).markdown()] if result.findings else []
    parts += [prose(plain(part)) for part in result.note.split("\n\n") if part.strip()]
    if has_picture(result):
        alt = f"Validation accuracy over seconds of training: {plain(result.title)}"
        parts.append(f"![{alt}](pictures/results-{picture(entry.claim.id)}.svg)")
    return [*parts, *settings(result), made_by(entry.claim.id, result)]


def settings(result: Result) -> list[str]:
    """What the searches, or an equal time, made of each variant's recipe, in a table."""
    found = [(entry, dict(changed(entry))) for entry in result.contestants.values()]
    keys = list(dict.fromkeys(key for _, one in found for key in one))
    if not keys:
        return []
    rows = [
        (entry.label, *(one.get(key, NONE) for key in keys), str(len(entry.trials))) for entry, one in found
    ]
    table = make_table(("variant", *keys, "trials"), rows)
    return ["Settings that the search, or an equal time, gave:", table.markdown()]


def made_by(claim: str, result: Result) -> str:
    """Machine, commit and command line."""
    machine = result.machine
    where = machine.get("gpu") or f"{machine.get('cpu', NONE)}, {machine.get('cores', NONE)} cores"
    commits = dict.fromkeys(run.commit for run in result.runs if run.commit)
    return prose(
        f"*{plain(str(where))}; torch {machine.get('torch', NONE)}; seeds {', '.join(map(str, result.seeds))} "
        f"({result.jobs} at once, {result.threads} threads each); commit {', '.join(commits) or NONE}; definition "
        f"{result.hash}. Made by `{result.command}`; all of it is in "
        f"[results/{claim}.json](../results/{claim}.json).*"
    )


# The pictures.


def has_picture(result: Result) -> bool:
    """Whether two variants or more have a line."""
    return sum(len(seeds[0]) > 1 for seeds in courses(result).values()) > 1


def pictures(entries: Sequence[Entry]) -> dict[str, "Figure"]:
    """Accuracy over time of every result where it makes sense, by the picture's name."""
    from plotly.graph_objects import Figure

    found: dict[str, Figure] = {}
    for entry in entries:
        chart = (
            time_chart(Comparison(entry.result, {})) if entry.result and has_picture(entry.result) else None
        )
        if chart is None:
            continue
        figure, span = Figure(chart.spec["data"]), chart.spec["layout"]["yaxis"]["range"]
        frame(figure, "seconds of training", "validation accuracy")
        figure.update_xaxes(type="linear", rangemode="tozero")
        figure.update_yaxes(type="linear", range=span, ticksuffix=" %", automargin=True, title_standoff=12)
        below = {
            "orientation": "h",
            "x": 0,
            "y": -0.16,
            "xanchor": "left",
            "yanchor": "top",
            "font": {"size": 13},
        }
        figure.update_layout(legend=below, margin={"l": 20, "r": 16})
        found[picture(entry.claim.id)] = figure
    return found


# The page.


def page(entries: Sequence[Entry]) -> str:
    """The document; it needs no result."""
    parts = [INTRODUCTION.strip(), "## All claims"]
    parts.append(overview(entries) if entries else "There is no definition yet.")
    for entry in entries:
        if entry.result is not None:
            parts += section(entry, entry.result)
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--repro", type=Path, default=ROOT / "repro")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    entries, document = Library(options.repro).entries(), options.out / PAGE
    text = page(entries)
    if options.check:
        return int(is_stale(document, text))
    for old in (options.out / "pictures").glob("results-*.svg"):
        old.unlink()
    if made := pictures(entries):
        draw(made, options.out / "pictures", "results")
    document.write_text(text, encoding="utf-8")
    write_json(options.repro / "claim.schema.json", schema())
    return 0


if __name__ == "__main__":
    sys.exit(main())

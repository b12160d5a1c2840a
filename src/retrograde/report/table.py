"""The summary table: a row per contestant."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from retrograde.report import formats
from retrograde.report.formats import NONE, SPACE
from retrograde.report.groups import Contestant, Group
from retrograde.report.pictures import Swatch, swatches
from retrograde.report.runs import Run
from retrograde.report.spread import Spread


@dataclass(frozen=True)
class Cell:
    """A cell: its text, and smaller below it a deviation or a ratio."""

    text: str
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """A contestant: its legend entry, and its cells by column."""

    swatch: Swatch
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Table:
    """The names of the columns after the first, and the rows."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def table(group: Group) -> Table:
    """The table of a group; seeds and saved activations have a column where there is something to say."""
    metric = group.metric
    shares: dict[str, Callable[[Run], float | None]] = {
        "Zeros": lambda run: run.result.zeros,
        "Own zeros": lambda run: run.result.own_zeros,
        "Needed": lambda run: run.of_dense("needed"),
        "Executed": lambda run: run.of_dense("executed"),
    }

    def cells(one: Contestant) -> dict[str, Cell]:
        found = {"Seeds": _seeds(one)} if group.seeded else {}
        found |= {
            "Test": _cell(
                one.spread(_test), lambda x: formats.score(x, metric), lambda x: formats.deviation(x, metric)
            ),
            "Difference": _difference(group, one),
        }
        for name, value in shares.items():
            found[name] = _cell(one.spread(value), formats.share, _share_deviation)
        found["Seconds"] = _cell(
            one.spread(_seconds), formats.seconds, lambda x: f"±{SPACE}{formats.seconds(x)}"
        )
        found["Time ratio"] = _time_ratio(group, one)
        if any(run.result.saved_activation_bytes for run in group.runs):
            found["Saved activations"] = _saved(group, one)
        return found | {"Parameters": _parameters(group, one), "Status": _status(one)}

    rows = [Row(*row) for row in zip(swatches(group), map(cells, group.contestants), strict=True)]
    return Table(tuple(rows[0].cells), tuple(rows))


def time_ratio(group: Group, one: Contestant) -> Spread | None:
    """Seconds of a contestant over those of the baseline, seed by seed."""
    return group.paired(one, _seconds, lambda own, base: own / base if own and base else None)


def score_difference(group: Group, one: Contestant) -> Spread | None:
    """Test score of a contestant less that of the baseline, seed by seed."""
    return group.paired(one, _test, lambda own, base: own - base)


def _test(run: Run) -> float | None:
    return run.test


def _seconds(run: Run) -> float | None:
    return run.result.seconds


def _parameter_count(run: Run) -> float | None:
    return run.result.parameters


def _saved_bytes(run: Run) -> float | None:
    return run.result.saved_activation_bytes


def _cell(found: Spread | None, write: Callable[[float], str], deviation: Callable[[float], str]) -> Cell:
    if found is None:
        return Cell(NONE)
    return Cell(write(found.mean), "" if found.deviation is None else deviation(found.deviation))


def _share_deviation(value: float) -> str:
    # Counts of the same work differ by nothing that is worth a line.
    return formats.deviation(value, "accuracy") if value >= 0.0005 else ""


def _alone(group: Group, one: Contestant) -> bool:
    return one.baseline and len(group.baselines) == 1


def _difference(group: Group, one: Contestant) -> Cell:
    if _alone(group, one):
        return Cell("baseline")
    return _cell(
        score_difference(group, one),
        lambda x: formats.difference(x, group.metric),
        lambda x: formats.deviation(x, group.metric),
    )


def _time_ratio(group: Group, one: Contestant) -> Cell:
    if _alone(group, one):
        return Cell(NONE)
    return _cell(time_ratio(group, one), formats.ratio, lambda x: f"±{SPACE}{x:.2f}")


def _seeds(one: Contestant) -> Cell:
    scored, number = one.spread(_test), len(one.runs)
    reached = scored.count if scored else 0
    return Cell(str(number) if reached in (0, number) else f"{reached} of {number}")


def _saved(group: Group, one: Contestant) -> Cell:
    value, base = one.mean(_saved_bytes), group.base(_saved_bytes)
    against = formats.ratio(value / base) if value is not None and base and not _alone(group, one) else ""
    return Cell(formats.size(value), against)


def _parameters(group: Group, one: Contestant) -> Cell:
    value, base = one.mean(_parameter_count), group.base(_parameter_count)
    more = formats.more(value - base) if value is not None and base is not None and value != base else ""
    return Cell(formats.count(value), more)


def _status(one: Contestant) -> Cell:
    states = Counter(run.result.status for run in one.runs)
    if len(states) == 1:
        return Cell(next(iter(states)))
    return Cell(", ".join(f"{number} {state}" for state, number in sorted(states.items())))

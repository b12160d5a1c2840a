"""One table, three renderers."""

import io

import pytest
from rich.console import Console

from retrograde.report.table import Column, Row, Table, figure_parts, make_table, pairs

TABLE = Table(
    (Column("check", "text"), Column("outcome", "badge"), Column("figure")),
    (
        Row(("as [b]fast[/b] | _as_ it is\nnearly", "holds", "97.66 ± 0.33 %")),
        Row(("b", "fails", "–"), tone="strong"),
    ),
    "The caption",
)


def shown(table: Table, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_terminal_takes_cells_literally_and_does_not_break_figures() -> None:
    text = shown(TABLE, 60)
    assert "as [b]fast[/b] | _as_ it is" in text
    assert "97.66 ± 0.33 %" in text
    assert "The caption" in text


@pytest.mark.parametrize("width", [40, 60, 90])
def test_no_terminal_cuts_a_figure_off(width: int) -> None:
    columns = ("a variant with a long name", "best validation accuracy", "time to target", "test accuracy")
    rows = [("preconditioners of 1024 at most", "54.29 ± 0.49 %", "38.0 ± 4.9 s", "3.1 s in 3 of 5")] * 2
    text = shown(make_table(columns, rows), width)
    assert max(map(len, text.splitlines())) <= width
    assert ("54.29 ± 0.49 %" in text) == (width == 90)
    for part in ("± 0.49 %", "± 4.9 s", "in 3 of 5"):
        assert part in text


def test_markdown_takes_cells_literally() -> None:
    assert TABLE.markdown().splitlines() == [
        "| check | outcome | figure |",
        "|---|---|---:|",
        r"| as \[b]fast\[/b] \| \_as\_ it is (nearly) | holds | 97.66 ± 0.33 % |",
        "| b | fails | – |",
    ]
    assert "_as_" in TABLE.markdown(literal=False)


def test_pairs_have_no_head() -> None:
    table = pairs("Machine", [("cpu", "two")])
    assert not table.headed
    assert TABLE.headed
    assert shown(table, 40).splitlines()[0].split() == ["cpu", "two"]
    assert [column.kind for column in make_table(("a", "b", "c"), [], texts=2).columns] == [
        "text",
        "text",
        "number",
    ]


@pytest.mark.parametrize(
    ("cell", "parts"),
    [
        ("97.66 ± 0.33 %", ("97.66 %", "± 0.33 %")),
        ("×1.84 ± 0.10", ("×1.84", "± 0.10")),
        ("+1.00 ± 0.20 points", ("+1.00 points", "± 0.20 points")),
        ("3.1 s in 3 of 5", ("3.1 s", "in 3 of 5")),
        ("a check\nwhat to know", ("a check", "what to know")),
        ("–", ("–", "")),
    ],
)
def test_half_an_interval_stands_below_its_figure(cell: str, parts: tuple[str, str]) -> None:
    assert figure_parts(cell) == parts

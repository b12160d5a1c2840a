"""Tables as data: columns, rows and a caption; one renderer each for the terminal, Markdown and the page.

A cell is text. What stands after a line end in it is smaller, and so is what follows a ± in the page, where that saves
width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.table import Table as RichTable

NONE = "–"
_NAME_WIDTH = 24
"""Columns that a terminal gives the names of the rows at the least, where they are as long."""

_NO_BREAK = "\N{NO-BREAK SPACE}"

Kind = Literal["text", "number", "badge"]


@dataclass(frozen=True)
class Swatch:
    """A legend entry, and a row's mark.

    Attributes:
        label: in words.
        colour: as CSS has it.
        mark: ``line`` or ``box``.
        dash: of a line, by plotly's names.
        run: the variant's name where a click may hide it.
        ink: drawn in the text's colour, which the theme decides.
    """

    label: str
    colour: str
    mark: Literal["line", "box"] = "line"
    dash: str = "solid"
    run: str = ""
    ink: bool = False

    @property
    def meta(self) -> dict[str, str | bool]:
        """What the page's script must know of a trace that has this entry."""
        return {"run": self.run, "ink": self.ink}


@dataclass(frozen=True)
class Column:
    """A column: text, numbers (to the right), or short words that the page shows as badges."""

    name: str
    kind: Kind = "number"


@dataclass(frozen=True)
class Row:
    """A row, its name first; `strong` is set in bold."""

    cells: tuple[str, ...]
    swatch: Swatch | None = None
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table, ready for any renderer; one without a head has unnamed columns."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    caption: str = ""

    @property
    def headed(self) -> bool:
        """Whether the columns have names."""
        return any(column.name for column in self.columns)

    def terminal(self, caption: str | None = None) -> "RichTable":
        """For `rich`; figures are not broken at their spaces."""
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(
            box=None,
            pad_edge=False,
            header_style="bold",
            caption_justify="left",
            caption=self.caption if caption is None else caption,
            show_header=self.headed,
        )
        for at, column in enumerate(self.columns):
            right = column.kind == "number"
            # The names of the rows are broken last: the heads of figures have spaces to break at.
            least = None if at else min(_NAME_WIDTH, max((len(row.cells[0]) for row in self.rows), default=0))
            table.add_column(
                column.name, justify="right" if right else "left", overflow="fold", min_width=least
            )
        for row in self.rows:
            table.add_row(
                *(
                    escape(cell.replace(" ", _NO_BREAK) if column.kind == "number" else cell)
                    for column, cell in zip(self.columns, row.cells, strict=True)
                ),
                style="bold" if row.strong else None,
            )
        return table

    def markdown(self, *, literal: bool = True) -> str:
        """For documents, without the caption.

        Args:
            literal: cells are taken literally; otherwise they may hold links and emphasis.
        """

        def write(cell: str) -> str:
            text, _, below = cell.partition("\n")
            cell = f"{text} ({below})" if below else text
            return markdown_literally(cell) if literal else cell

        rule = "|".join("---:" if column.kind == "number" else "---" for column in self.columns)
        head = " | ".join(column.name for column in self.columns)
        rows = (" | ".join(map(write, row.cells)) for row in self.rows)
        return "\n".join([f"| {head} |", f"|{rule}|", *(f"| {row} |" for row in rows)])


def make_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1, caption: str = ""
) -> Table:
    """A table whose first `texts` columns hold text and whose others hold numbers."""
    kinds = tuple(Column(name, "text" if at < texts else "number") for at, name in enumerate(columns))
    return Table(kinds, tuple(Row(tuple(row)) for row in rows), caption)


def pairs(caption: str, rows: Iterable[Sequence[str]]) -> Table:
    """Names and values, without a head."""
    return make_table(("", ""), rows, texts=2, caption=caption)


def markdown_literally(text: str) -> str:
    """Text in one line that Markdown takes literally, also within a table."""
    text = " ".join(text.split())
    for mark in "\\`*_|<[":
        text = text.replace(mark, f"\\{mark}")
    return text


def figure_parts(cell: str) -> tuple[str, str]:
    """A cell's figure, and what stands smaller below it: half of the figure's interval, or what is after a line end."""
    text, _, below = cell.partition("\n")
    figure, sign, half = text.partition(" ± ")
    if not sign:
        return text, below
    unit = half.partition(" ")[2]
    return (figure if " " in figure or not unit else f"{figure} {unit}"), f"± {half}"

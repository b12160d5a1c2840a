"""Tables as data: columns, rows and a caption; one renderer each for the terminal, Markdown and the page.

A cell is text. What stands after a line end in it is smaller, and so is what follows a ± in the page, where that saves
width.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table as RichTable

NONE = "–"
STYLES = {"plain": "", "strong": "bold", "good": "green", "part": "yellow", "bad": "bold red"}
"""Of a terminal, by tone; the page's style sheet has its own."""

_TONES = {
    "good": ("reproduced", "exceeded", "holds", "ok"),
    "part": ("partly", "note"),
    "bad": ("not reproduced", "fails", "failed"),
}

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
    """A row, its name first; `tone` is one of `STYLES`."""

    cells: tuple[str, ...]
    swatch: Swatch | None = None
    tone: str = "plain"


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

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """For `rich`: where the terminal is narrow, a figure's interval stands below it, as in the page."""
        from rich.measure import Measurement

        room = options.update(width=10_000)
        table = self._rich()
        if Measurement.get(console, room, table).maximum > options.max_width:
            table = self._rich(lambda name, cells: [*name.split(), *cells])
        if Measurement.get(console, room, table).minimum > options.max_width:
            table = self._rich(lambda name, cells: cells)
        yield table

    def _rich(self, unbroken: Callable[[str, list[str]], list[str]] | None = None) -> "RichTable":
        """`unbroken`: of a column of numbers in a narrow terminal, what is not broken: cells, and words of the head."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=None, pad_edge=False, header_style="bold", show_header=self.headed)
        table.caption, table.caption_justify = Text(self.caption) if self.caption else None, "left"
        columns: list[list[str]] = []
        for at, column in enumerate(self.columns):
            cells, number = [row.cells[at] for row in self.rows], column.kind == "number"
            width = None
            if number and unbroken:
                cells = ["\n".join(filter(None, figure_parts(cell))) for cell in cells]
                width = max(map(len, "\n".join(unbroken(column.name, cells)).splitlines()), default=None)
            name = Text(column.name)
            table.add_column(name, justify="right" if number else "left", overflow="fold", width=width)
            columns.append(cells)
        for row, *cells in zip(self.rows, *columns, strict=True):
            kinds = zip(self.columns, cells, strict=True)
            styles = (STYLES[tone(cell)] if column.kind == "badge" else "" for column, cell in kinds)
            table.add_row(*map(Text, cells, styles), style=STYLES[row.tone])
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


def tone(word: str) -> str:
    """The tone of a badge: whether what it says is good."""
    return next((name for name, words in _TONES.items() if word in words), "plain")


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
        figure, sign, seeds = text.partition(" in ")
        return figure, f"in {seeds}" if sign else below
    unit = half.partition(" ")[2]
    return (figure if " " in figure or not unit else f"{figure} {unit}"), f"± {half}"

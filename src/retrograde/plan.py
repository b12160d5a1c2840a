"""The plan: what happens to each layer of a model, and why; made by `retrograde.planning`."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

from retrograde.forecast import LayerForecast, StepForecast
from retrograde.patterns import PatternRow

Status = Literal["attached", "declined", "left", "bypassed"]

_NOTHING = "Nothing is attached: no layer would become faster on this machine. Train the plain model."
_TIMES = "ms a step"
_BYTES = "MiB kept"
_WIDTH = 140
_CELL = 40
"""Characters at which a cell is wrapped; the last column has what the others leave of the width, if that is more."""
_GAP = "  "


@dataclass(frozen=True)
class PlanRow:
    """One layer of the plan.

    Attributes:
        name: full name; ``"(root)"`` for the model itself.
        type: class name.
        shape: weight as inputs→outputs and kernel.
        parameters: number of the layer's own parameters.
        methods: names of the methods that act on it.
        kernel: which kernel computes the backward products: ``auto``, chosen for each product from its shape and zeros;
            ``reference``, torch's own, where numba is not installed; empty when nothing is attached.
        status: ``attached``, ``declined`` (plain, because attaching would make it slower), ``left`` (plain, for the
            reason given) or ``bypassed`` (its forward is never called).
        why: the reason, or what is special about the layer.
        forecast: what the layer takes and keeps in one step, plain and attached, where an example was given to try it
            with.
    """

    name: str
    type: str
    shape: str
    parameters: int
    methods: tuple[str, ...]
    kernel: str
    status: Status
    why: str
    forecast: LayerForecast | None = None


@dataclass(frozen=True)
class BlockRow:
    """One block of the plan, where a method grants work to whole blocks.

    Attributes:
        name: full name.
        type: class name of the module whose output is the block's.
        kind: ``branch`` or ``chain``, see `retrograde.engine.slots.Block`.
        parameters: number of parameters inside.
        layers: names of the attached layers inside.
        status: ``attached`` or ``left``.
        why: how it was found, or why it was left.
    """

    name: str
    type: str
    kind: str
    parameters: int
    layers: tuple[str, ...]
    status: Status
    why: str


@dataclass(frozen=True)
class Plan:
    """What happens to each layer of a model, and why. Print it, or read its rows.

    Attributes:
        rows: every layer with parameters, in the model's order.
        blocks: the blocks, where a method grants work to whole blocks.
        step: seconds of a forward and backward pass of the whole model, and bytes that it keeps in between, where an
            example was given.
        patterns: how many layers each of the user's patterns matched.
        notes: what methods say about the whole model.
    """

    rows: tuple[PlanRow, ...]
    blocks: tuple[BlockRow, ...] = ()
    step: StepForecast | None = None
    patterns: tuple[PatternRow, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def attached(self) -> tuple[PlanRow, ...]:
        """The rows that are attached."""
        return tuple(row for row in self.rows if row.status == "attached")

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, ready for JSON."""
        rows = [asdict(replace(row, forecast=None)) for row in self.rows]
        for row in rows:
            del row["forecast"]
        blocks = {"blocks": [asdict(row) for row in self.blocks]} if self.blocks else {}
        patterns = {"patterns": [asdict(row) for row in self.patterns]} if self.patterns else {}
        return {
            "layers": rows,
            **blocks,
            **patterns,
            **({"notes": list(self.notes)} if self.notes else {}),
            **({"forecast": found} if (found := self.forecast()) else {}),
        }

    def forecast(self) -> dict[str, Any] | None:
        """Seconds and bytes of a step, plain and as forecast, of the model and of each layer tried.

        Returns:
            The fields of `StepForecast`, its ``ratio``, and under ``layers`` those of `LayerForecast` by layer; None
            without an example.
        """
        if self.step is None:
            return None
        layers = {row.name: asdict(row.forecast) for row in self.rows if row.forecast}
        return {**asdict(self.step), "ratio": self.step.ratio, "layers": layers}

    def __rich__(self) -> Any:
        """The same as `str`, as wide as rich's console is, and with what is left plain dimmed."""
        from rich.console import Group
        from rich.text import Text

        return Group(*(_rich(part) if isinstance(part, _Table) else Text(part) for part in self._parts()))

    def __str__(self) -> str:
        return "\n".join(_text(part) if isinstance(part, _Table) else part for part in self._parts())

    def _parts(self) -> list["_Table | str"]:
        parts: list[_Table | str] = [_layer_table(self.rows)]
        if self.step:
            parts += ["", _step_line(self.step)]
            parts += self.step.notes if self.attached else [_NOTHING]
        if self.blocks:
            parts += ["", _block_table(self.blocks)]
        if self.patterns:
            parts += ["", *map(_pattern_line, self.patterns)]
        if self.notes:
            parts += ["", *self.notes]
        return parts


class _Table(NamedTuple):
    """Cells by row; the last column holds whole sentences."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    attached: list[bool]
    figures: tuple[str, ...]
    """Names of the columns whose cells end at the right."""


def _rich(table: _Table) -> Any:
    from rich.table import Table
    from rich.text import Text

    found = Table(box=None, pad_edge=False, header_style="bold")
    for name in table.header:
        found.add_column(name, justify="right" if name in table.figures else "left", overflow="fold")
    for row, attached in zip(table.rows, table.attached, strict=True):
        # Names of layers may look like markup.
        found.add_row(*map(Text, row), style=None if attached else "dim")
    return found


def _text(table: _Table) -> str:
    """Lines of at most `_WIDTH` characters, where the names leave room for it: cells are wrapped at their spaces."""
    names = table.header[:-1]
    narrow = [[_wrapped(cell, _CELL) for cell in row[:-1]] for row in (table.header, *table.rows)]
    widths = [max(len(line) for row in narrow for line in row[i]) for i in range(len(names))]
    room = max(_WIDTH - sum(widths) - len(_GAP) * len(widths), _CELL)
    lines: list[str] = []
    for cells, row in zip(narrow, (table.header, *table.rows), strict=True):
        for line in zip_longest(*cells, _wrapped(row[-1], room), fillvalue=""):
            padded = [
                cell.rjust(width) if name in table.figures else cell.ljust(width)
                for name, cell, width in zip(names, line[:-1], widths, strict=True)
            ]
            lines.append(_GAP.join([*padded, line[-1]]).rstrip())
    return "\n".join(lines)


def _wrapped(cell: str, width: int) -> list[str]:
    return textwrap.wrap(cell, width, break_long_words=False, break_on_hyphens=False) or [""]


def _layer_table(rows: Sequence[PlanRow]) -> _Table:
    tried = any(row.forecast for row in rows)
    measured = (_TIMES, _BYTES) if tried else ()
    cells = [
        (
            *(row.name, row.type, row.shape, f"{row.parameters:,}", row.status),
            *(", ".join(row.methods) or "–", row.kernel or "–"),
            *(_figures(row.forecast) if tried else []),
            row.why,
        )
        for row in rows
    ]
    header = ("layer", "type", "shape", "parameters", "status", "methods", "kernel", *measured, "why")
    return _Table(header, cells, [row.status == "attached" for row in rows], ("parameters", *measured))


def _block_table(rows: Sequence[BlockRow]) -> _Table:
    cells = [
        (
            *(row.name, row.type, row.kind, f"{row.parameters:,}", row.status),
            *(", ".join(row.layers) or "–", row.why),
        )
        for row in rows
    ]
    header = ("block", "type", "kind", "parameters", "status", "layers", "why")
    return _Table(header, cells, [row.status == "attached" for row in rows], ("parameters",))


def _figures(found: LayerForecast | None) -> tuple[str, str]:
    """Milliseconds and MiB of a layer, plain → attached."""
    if found is None:
        return "–", "–"
    kept = f"{mebibytes(found.plain_bytes)} → {mebibytes(found.attached_bytes)}"
    return f"{found.plain * 1e3:.2f} → {found.attached * 1e3:.2f}", kept


def mebibytes(count: float) -> str:
    """MiB of a number of bytes, as they are printed."""
    size = count / 2**20
    return f"{size:.1f}" if size >= 10 else f"{size:.2f}"


def _step_line(step: StepForecast) -> str:
    return (
        f"A step, plain → attached: {step.plain * 1e3:.1f} → {step.attached * 1e3:.1f} ms ({over(step)}), keeps "
        f"{mebibytes(step.plain_bytes)} → {mebibytes(step.attached_bytes)} MiB for the backward pass. Plain is "
        "measured, attached is forecast from each layer tried by itself, with quartiles of its rounds."
    )


def over(found: LayerForecast | StepForecast) -> str:
    """The time attached over the plain one, with its quartiles: ``"×0.80 [0.75–0.90]"``."""
    low, high = (each / found.plain for each in found.quartiles)
    return f"×{found.attached / found.plain:.2f} [{low:.2f}–{high:.2f}]"


def _pattern_line(row: PatternRow) -> str:
    layers = "1 layer" if row.matches == 1 else f"{row.matches} layers"
    partly = f", of like ones only {row.partly}" if row.partly else ""
    return f"{row.option}: {row.pattern!r} matches {layers}{partly}"

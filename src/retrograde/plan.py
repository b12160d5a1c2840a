"""The plan: what happens to each layer of a model, and why; made by `retrograde.planning`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from retrograde.forecast import LayerForecast, StepForecast
from retrograde.patterns import PatternRow

Status = Literal["attached", "declined", "left", "bypassed"]


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
            empty when nothing is attached.
        status: ``attached``, ``declined`` (plain, because attaching would make it slower), ``left`` (plain, for the
            reason given) or ``bypassed`` (its forward is never called).
        why: the reason, or what is special about the layer.
        forecast: what the layer takes in one step, plain and attached, where an example was given to try it with.
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
    """All layers with parameters, in the model's order, and the blocks. Print it, or read `rows` and `blocks`."""

    rows: tuple[PlanRow, ...]
    blocks: tuple[BlockRow, ...] = ()
    step: StepForecast | None = None
    """Forward and backward pass of the whole model, where an example was given."""
    patterns: tuple[PatternRow, ...] = ()
    """What each pattern of the user's matched."""

    @property
    def attached(self) -> tuple[PlanRow, ...]:
        """The rows that are attached."""
        return tuple(row for row in self.rows if row.status == "attached")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        rows = [asdict(replace(row, forecast=None)) for row in self.rows]
        for row in rows:
            del row["forecast"]
        blocks = {"blocks": [asdict(row) for row in self.blocks]} if self.blocks else {}
        patterns = {"patterns": [asdict(row) for row in self.patterns]} if self.patterns else {}
        return {
            "layers": rows,
            **blocks,
            **patterns,
            **({"forecast": found} if (found := self.forecast()) else {}),
        }

    def forecast(self) -> dict[str, Any] | None:
        """Seconds of a step, plain and as forecast, of the model and of each layer that was tried; None if none was."""
        if self.step is None:
            return None
        layers = {row.name: asdict(row.forecast) for row in self.rows if row.forecast}
        return {**asdict(self.step), "ratio": self.step.ratio, "layers": layers}

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("layer", "type", "shape"):
            table.add_column(name, overflow="fold")
        table.add_column("parameters", justify="right")
        for name in ("status", "methods", "kernel"):
            table.add_column(name, overflow="fold")
        tried = any(row.forecast for row in self.rows)
        if tried:
            table.add_column("ms a step, plain → attached", justify="right")
        table.add_column("why", overflow="fold")
        for row in self.rows:
            table.add_row(
                row.name,
                row.type,
                row.shape,
                f"{row.parameters:,}",
                row.status,
                ", ".join(row.methods) or "–",
                row.kernel or "–",
                *([_milliseconds(row.forecast)] if tried else []),
                row.why,
                style=None if row.status == "attached" else "dim",
            )
        parts: list[Any] = [table]
        if self.step:
            parts += ["", _step_line(self.step)]
        if self.blocks:
            parts += ["", _block_table(self.blocks)]
        if self.patterns:
            parts += ["", *map(_pattern_line, self.patterns)]
        return Group(*parts) if len(parts) > 1 else table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _milliseconds(found: LayerForecast | None) -> str:
    return f"{found.plain * 1e3:.2f} → {found.attached * 1e3:.2f}" if found else "–"


def _step_line(step: StepForecast) -> str:
    return (
        f"Forward and backward pass: {step.plain * 1e3:.1f} ms plain, measured; {step.attached * 1e3:.1f} ms forecast "
        f"(×{step.ratio:.2f}), from each layer tried by itself."
    )


def _pattern_line(row: PatternRow) -> str:
    layers = "1 layer" if row.matches == 1 else f"{row.matches} layers"
    partly = f", of like ones only {row.partly}" if row.partly else ""
    return f"{row.option}: {row.pattern!r} matches {layers}{partly}"


def _block_table(rows: Sequence[BlockRow]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("block", "type", "kind"):
        table.add_column(name, overflow="fold")
    table.add_column("parameters", justify="right")
    for name in ("status", "layers", "why"):
        table.add_column(name, overflow="fold")
    for row in rows:
        style = None if row.status == "attached" else "dim"
        cells = (
            row.name,
            row.type,
            row.kind,
            f"{row.parameters:,}",
            row.status,
            ", ".join(row.layers) or "–",
        )
        table.add_row(*cells, row.why, style=style)
    return table

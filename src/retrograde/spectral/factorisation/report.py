"""What factorising did to each layer, what it costs now, and why layers were left."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from retrograde.patterns import ROOT


@dataclass(frozen=True)
class FactorRow:
    """One linear or convolutional layer.

    Attributes:
        name: full name; ``"(root)"`` for the model itself.
        type: class name.
        shape: weight as outputs×inputs×kernel.
        status: ``factorised`` or ``left``.
        why: why it was left, or what is special about it.
        rank: r; None where it was left.
        largest: the rank below which two layers cost less than one.
        energy: share of the outputs' energy in the leading r directions; None where it was left.
        macs: multiply-adds for one example, before and after.
        parameters: before and after.
        seconds: of the layer's forward pass on the example, before and after; None where it was not timed.
    """

    name: str
    type: str
    shape: str
    status: Literal["factorised", "left"]
    why: str
    rank: int | None
    largest: int
    energy: float | None
    macs: tuple[float, float]
    parameters: tuple[int, int]
    seconds: tuple[float, float] | None = None


@dataclass(frozen=True)
class FactorReport:
    """What `retrograde.spectral.factorise` did. Print it, or read its rows.

    Multiply-adds are those of linear and convolutional layers, for one example of the data. They are counted, and a
    forecast of time only where arithmetic is what takes the time; `seconds` is measured.

    Attributes:
        rows: every linear and convolutional layer, in the model's order.
        budget: multiply-adds for one example that were asked for; None where an energy was.
        parameters: of the whole model, before and after.
        seconds: of the whole model's forward pass on the example, before and after, as measured in turns; None where
            nothing was timed.
    """

    rows: tuple[FactorRow, ...]
    budget: float | None
    parameters: tuple[int, int]
    seconds: tuple[float, float] | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks of the factorised layers: what `retrograde.spectral.with_ranks` takes."""
        return {row.name: row.rank for row in self.rows if row.rank is not None}

    @property
    def macs(self) -> tuple[float, float]:
        """Multiply-adds of all rows for one example, before and after."""
        return sum(row.macs[0] for row in self.rows), sum(row.macs[1] for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "macs": self.macs, "ranks": self.ranks}

    def __str__(self) -> str:
        header = ("layer", "type", "shape", "rank", "energy", "MACs", "parameters", "ms", "note")
        table = [header, *(_cells(row) for row in self.rows)]
        kept = [i for i in range(len(header)) if any(line[i] for line in table[1:])]
        widths = {i: max(len(line[i]) for line in table) for i in kept}
        lines = ["  ".join(line[i].ljust(widths[i]) for i in kept).rstrip() for line in table]
        before, after = self.macs
        lines.append(
            f"In all: {_change(before, after)} multiply-adds for one example (×{after / max(before, 1):.2f}), "
            f"{_change(*self.parameters)} parameters (×{self.parameters[1] / max(self.parameters[0], 1):.2f})."
        )
        if self.budget is not None and after > self.budget:
            lines.append(f"The budget was {_short(self.budget)}: no layer could be made smaller and faster.")
        lines.append(
            "Multiply-adds are counted, not timed: pass faster=True to keep only what measures faster here."
            if self.seconds is None
            else f"A forward pass took {_ms(self.seconds)} ms as measured here "
            f"(×{self.seconds[1] / self.seconds[0]:.2f}). Another machine or batch size may differ."
        )
        return "\n".join(lines)


def _cells(row: FactorRow) -> tuple[str, ...]:
    done = row.rank is not None
    return (
        row.name or ROOT,
        row.type,
        row.shape,
        f"{row.rank} of {row.largest}" if done else "",
        f"{row.energy:.4f}" if row.energy is not None else "",
        _change(*row.macs) if done else _short(row.macs[0]),
        _change(*row.parameters) if done else _short(row.parameters[0]),
        "" if row.seconds is None else _ms(row.seconds),
        row.why,
    )


def _change(before: float, after: float) -> str:
    return f"{_short(before)} → {_short(after)}"


def _ms(seconds: Sequence[float]) -> str:
    return " → ".join(f"{each * 1e3:.3g}" for each in seconds)


def _short(value: float) -> str:
    """12,345,678 as ``12.3M``."""
    size = min(int(math.log10(value)) // 3, 4) if value >= 1000 else 0
    return f"{value / 1000**size:.3g}{('', 'k', 'M', 'G', 'T')[size]}"

"""How the page writes what is no metric of a run. A number that is missing or not finite is a dash."""

import json
from typing import Any, cast

from retrograde.lab.claims import wording
from retrograde.lab.record import number
from retrograde.report.table import NONE

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def figure(metric: str, value: float | None) -> str:
    """A metric's figure, as everywhere."""
    value = number(value)
    return NONE if value is None else wording.figure(metric, value)


def flops(value: float | None) -> str:
    """1.2e9 as ``1.2 GFLOP``."""
    value = number(value)
    if value is None:
        return NONE
    factor, unit = flops_unit(value)
    return f"{value / factor:.3g} {unit}"


def flops_unit(value: float) -> tuple[float, str]:
    """The unit to write FLOPs of this size in, and its factor."""
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor:
            return factor, f"{prefix}FLOP"
    return 1.0, "FLOP"


def cell(value: object, column: str) -> str:
    """One of a layer's numbers, whose column says whether it is a share."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value if isinstance(value, str) else NONE
    if "zeros" in column or column.endswith(("sparsity", "share", "energy")):
        return figure("zeros", value)
    if number(value) is None:
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def flat(value: object, name: str = "") -> list[tuple[str, str]]:
    """A JSON object as rows of dotted names and values."""
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in cast(list[object], value)):
        value = dict(enumerate(cast(list[object], value)))
    if isinstance(value, dict) and value:
        inside = cast(dict[str, Any], value).items()
        return [row for key, inner in inside for row in flat(inner, f"{name}.{key}" if name else str(key))]
    if not name:
        return []
    return [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]

"""How the report writes its numbers for people. A number that is missing or not finite is a dash."""

import json
from typing import Any, cast

from retrograde.report.records import number

NONE = "–"
SPACE = "\u00a0"
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def is_share(metric: str) -> bool:
    """Whether the metric is a share of one, to be written in per cent."""
    return "accuracy" in metric or metric in ("f1", "precision", "recall")


def share(value: float | None) -> str:
    """0.974 as ``97.4 %``."""
    value = number(value)
    return NONE if value is None else f"{value * 100:.1f}{SPACE}%"


def flops(value: float | None) -> str:
    """1.2e9 as ``1.2 GFLOP``."""
    value = number(value)
    if value is None:
        return NONE
    factor, unit = flops_unit(value)
    return f"{value / factor:.3g}{SPACE}{unit}"


def flops_unit(value: float) -> tuple[float, str]:
    """The unit to write FLOPs of this size in, and its factor."""
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor:
            return factor, f"{prefix}FLOP"
    return 1.0, "FLOP"


def seconds_unit(value: float) -> tuple[float, str]:
    """The unit to write a time of this size in, and its factor."""
    return (1.0, "s") if value >= 1 else (1e-3, "ms") if value >= 1e-3 else (1e-6, "µs")


def score(value: float | None, metric: str) -> str:
    """A score in its metric: a share in per cent, all others as they are."""
    if is_share(metric):
        return share(value)
    value = number(value)
    return NONE if value is None else f"{value:.4g}"


def difference(value: float | None, metric: str) -> str:
    """A difference of two scores with its sign, in points where the metric is a share."""
    value = number(value)
    if value is None:
        return NONE
    size, unit = (f"{abs(value) * 100:.1f}", f"{SPACE}pt") if is_share(metric) else (f"{abs(value):.3g}", "")
    sign = "±" if float(size) == 0 else "+" if value > 0 else "−"
    return f"{sign}{size}{unit}"


def deviation(value: float | None, metric: str) -> str:
    """A standard deviation of scores, in the unit of :func:`score`; empty where there is none."""
    if value is None:
        return ""
    return f"±{SPACE}{value * 100:.1f}" if is_share(metric) else f"±{SPACE}{value:.2g}"


def ratio(value: float | None) -> str:
    """1.5 as ``1.50 ×``."""
    value = number(value)
    return NONE if value is None else f"{value:.2f}{SPACE}×"


def seconds(value: float | None) -> str:
    """12.34 as ``12.3 s``."""
    value = number(value)
    if value is None:
        return NONE
    return f"{value:.1f}{SPACE}s" if value < 100 else f"{count(round(value))}{SPACE}s"


def count(value: float | None) -> str:
    """1234 as ``1,234``."""
    value = number(value)
    return NONE if value is None else f"{value:,.0f}"


def more(value: float) -> str:
    """A difference of counts with its sign."""
    return ("+" if value > 0 else "−" if value < 0 else "±") + f"{abs(value):,.0f}"


def size(value: float | None) -> str:
    """3145728 bytes as ``3.0 MiB``."""
    value = number(value)
    if value is None:
        return NONE
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{value / factor:.1f}{SPACE}{unit}"
    return f"{value:.0f}{SPACE}B"


def cell(value: object, column: str) -> str:
    """One of a layer's numbers, whose column says whether it is a share."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value) if is_scalar(value) else NONE
    if "zeros" in column or column.endswith(("sparsity", "share", "energy")):
        return share(value)
    if number(value) is None:
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def is_scalar(value: object) -> bool:
    """Whether the value fits a table's cell."""
    return isinstance(value, int | float | str)


def flat(value: object, name: str = "") -> list[tuple[str, str]]:
    """A JSON object as rows of dotted names and values."""
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in cast(list[object], value)):
        value = dict(enumerate(cast(list[object], value)))
    if isinstance(value, dict) and value:
        pairs = cast(dict[str, Any], value).items()
        return [row for key, inner in pairs for row in flat(inner, f"{name}.{key}" if name else str(key))]
    if not name:
        return []
    return [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]

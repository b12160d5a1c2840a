"""FLOP formulas of our ops for `torch.utils.flop_counter`, registered when a model is attached, not on import.

The counter imports Triton where that is installed, which takes longer than all of retrograde.
"""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

_COUNTER = "torch.utils.flop_counter"

Formula = TypeVar("Formula", bound=Callable[..., int])

_waiting: list[tuple[Any, Callable[..., int]]] = []


def formula(op: Any) -> Callable[[Formula], Formula]:
    """Decorates the formula of `op`, an op packet: as `torch.utils.flop_counter.register_flop_formula`."""

    def keep(function: Formula) -> Formula:
        _waiting.append((op, function))
        if _COUNTER in sys.modules:
            register()
        return function

    return keep


def register() -> None:
    """Make torch's counter know all formulas that it does not know yet; counters made before this do not."""
    if not _waiting:
        return
    from torch.utils.flop_counter import register_flop_formula

    while _waiting:
        op, function = _waiting.pop()
        register_flop_formula(op)(function)

"""The gradient at a layer's output, dense or as integer levels times one step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from retrograde.kernels import compiled

_COUNTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)
"""Dtypes whose zeros a kernel counts."""
_SMALL = 1 << 15
"""Entries below which torch counts zeros faster than a kernel of ours is called."""


class Delta:
    """δ̃ = values × step, with the shape of the layer's output.

    Attributes:
        values: dense gradient, or integer levels (int8, or floating point for unbounded levels).
        step: the quantisation step of the levels; None for a dense gradient.
        counted: number of zeros where they have been counted; on a GPU a tensor that still lies there.
        assumed: the share of zeros to assume where they have not been counted; None to count them on demand.
        quantised: whether δ̃ is multiples of a step, in whichever form: one quantiser is enough.
    """

    __slots__ = ("assumed", "counted", "quantised", "step", "values")

    def __init__(
        self,
        values: Tensor,
        step: float | None = None,
        counted: "int | Tensor | None" = None,
        *,
        quantised: bool = False,
    ) -> None:
        self.values = values
        self.step = step
        self.counted = counted
        self.assumed: float | None = None
        self.quantised = quantised or step is not None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """δ̃ as an ordinary tensor of `dtype`."""
        if self.step is None:
            return self.values.to(dtype)
        # Levels may be beyond what float16 holds, and a step below it: their product is what fits.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.values.to(wide) * self.step).to(dtype)

    def count(self) -> "int | Tensor":
        """Number of zero entries, counted once; on a GPU it stays there, so that the host need not wait."""
        if self.counted is None:
            values = self.values
            if values.device.type != "cpu":
                self.counted = values.numel() - values.count_nonzero()
            elif values.numel() > _SMALL and values.dtype in _COUNTED and compiled.usable():
                from retrograde.kernels import cpu  # where it is needed: a compiler comes with it

                self.counted = cpu.count_zeros(values)
            else:
                self.counted = values.numel() - int(values.count_nonzero())
        return self.counted

    @property
    def zeros(self) -> int:
        """Number of zero entries. On a GPU the host waits for it."""
        return int(self.count())

    @property
    def nonzero_share(self) -> float:
        """Share of entries that are not zero: counted, where the count is at hand, or assumed."""
        if self.counted is None and self.assumed is None:
            self.count()
        if isinstance(self.counted, int):
            entries = self.values.numel()
            return 1 - self.counted / entries if entries else 0.0
        return 1 - (self.assumed or 0.0)


@dataclass(frozen=True)
class Levels:
    """Integer levels of a gradient, their number of zeros and their largest magnitude."""

    values: Tensor
    zeros: int
    largest: int

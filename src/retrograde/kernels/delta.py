"""The gradient at a layer's output, dense or as integer levels times one step."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Delta:
    """δ̃ = values × step, with the shape of the layer's output.

    Attributes:
        values: dense gradient, or integer levels (int8, or floating point for unbounded levels).
        step: the quantisation step of the levels; None for a dense gradient.
        counted: number of zeros, where whoever made it has counted them.
    """

    values: Tensor
    step: float | None = None
    counted: int | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """δ̃ as an ordinary tensor of `dtype`."""
        if self.step is None:
            return self.values.to(dtype)
        return self.values.to(dtype) * self.step

    def tell(self, zeros: int) -> None:
        """Take the number of zeros from whoever has read the entries anyway."""
        self.__dict__["zeros"] = zeros

    @cached_property
    def zeros(self) -> int:
        """Number of zero entries."""
        if self.counted is not None:
            return self.counted
        values = self.values
        if values.device.type == "cpu" and values.dtype in (torch.float32, torch.int8):
            from retrograde.kernels import cpu  # where it is needed: a compiler comes with it

            return cpu.count_zeros(values)
        return values.numel() - int(values.bool().sum())


@dataclass(frozen=True)
class Levels:
    """Integer levels of a gradient, their number of zeros and their largest magnitude."""

    values: Tensor
    zeros: int
    largest: int

"""The non-zeros of δ̃ of a convolution, listed once for both products."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from retrograde.kernels.cpu_lists import Lists, plane_lists
from retrograde.kernels.cpu_memory import in_memory_order


@dataclass(frozen=True)
class Sparse:
    """Non-zeros of δ̃ of shape (N, C_out, H', W'), for both products.

    Attributes:
        lists: the non-zeros, in the order of memory.
        shape: of δ̃.
        step: what every number is to be multiplied with.
        groups: of the convolution.
        channels_last: whether the rows of `lists` are pixels (and its columns channels of the group), not channels.
    """

    lists: Lists
    shape: tuple[int, int, int, int]
    step: float
    groups: int
    channels_last: bool

    def by_pixel(self) -> Lists:
        """For every output pixel, channels of the group."""
        return self.lists if self.channels_last else self.lists.transposed()

    def by_channel(self) -> Lists:
        """For every channel of the group, output pixels."""
        return self.lists.transposed() if self.channels_last else self.lists


def compact(values: Tensor, step: float | None, groups: int = 1) -> Sparse:
    """List the non-zeros of δ̃ once, for both products.

    Args:
        values: int8 levels or float32 δ, (N, C_out, H', W'), contiguous or channels-last; others are copied.
        step: of the levels; None for a dense gradient.
        groups: of the convolution.
    """
    channels_last, flat = in_memory_order(values)
    n, o, h, w = values.shape
    outputs, pixels = o // groups, h * w
    within = outputs if channels_last else outputs * pixels
    first = (np.arange(n)[:, None] * (o * pixels) + np.arange(groups) * within).reshape(-1)
    shape, stride = ((pixels, outputs), o) if channels_last else ((outputs, pixels), pixels)
    found = plane_lists(flat, first, shape, stride)
    return Sparse(found, (n, o, h, w), 1.0 if step is None else step, groups, channels_last)

"""Rows and columns of a gradient that are zero throughout: padded tokens, ignored labels, skipped samples, dead units.

A row that is not is known by its first non-zero, so that looking costs little where there is nothing to be found.
"""

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from retrograde.kernels.cpu_memory import PATTERNS, lies_channels_last, patterns
from retrograde.kernels.cpu_threads import jit, use_threads

_AT_ONCE = 64
"""Entries that are looked at at a time."""
_EVERY = 8
"""Rows after which columns are asked whether all are known to be kept."""


@jit
def _planes(bits: Any, mask: Any, kept: Any) -> None:
    """Whether ``bits[:, c]`` holds anything, for each c."""
    outer, planes, width = bits.shape
    for c in prange(planes):
        found, a = False, 0
        while a < outer and not found:
            j = 0
            while j < width and not found:
                some = mask & 0
                for k in range(j, min(width, j + _AT_ONCE)):
                    some |= bits[a, c, k]
                found = (some & mask) != 0
                j += _AT_ONCE
            a += 1
        kept[c] = found


@jit
def _columns(bits: Any, mask: Any, kept: Any) -> None:
    """Whether ``bits[:, c]`` holds anything, for each c."""
    rows, columns = bits.shape
    for part in prange((columns + _AT_ONCE - 1) // _AT_ONCE):
        low, high = part * _AT_ONCE, min(columns, (part + 1) * _AT_ONCE)
        some = np.zeros(_AT_ONCE, bits.dtype)
        r = 0
        while r < rows:
            for row in range(r, min(rows, r + _EVERY)):
                for c in range(low, high):
                    some[c - low] |= bits[row, c]
            r += _EVERY
            none = 0
            for c in range(high - low):
                none += (some[c] & mask) == 0
            if none == 0:
                break
        for c in range(low, high):
            kept[c] = (some[c - low] & mask) != 0


def rows(values: Tensor) -> Tensor:
    """Whether each row of a matrix, or each image of a batch, holds a non-zero: (n,), bool."""
    ordered = values.permute(0, 2, 3, 1) if lies_channels_last(values) else values
    bits, mask = patterns(ordered.detach())
    return _kept(_planes, bits.reshape(1, values.shape[0], -1), mask, values.shape[0])


def columns(values: Tensor) -> Tensor:
    """Whether each column of a matrix, or each channel of a batch of images, holds a non-zero: (o,), bool."""
    channels = values.shape[1]
    if values.dim() == 2 or lies_channels_last(values):
        ordered = values if values.dim() == 2 else values.permute(0, 2, 3, 1)
        bits, mask = patterns(ordered.detach())
        return _kept(_columns, bits.reshape(-1, channels), mask, channels)
    bits, mask = patterns(values.detach())
    return _kept(_planes, bits.reshape(values.shape[0], channels, -1), mask, channels)


def _kept(kernel: Any, bits: Any, mask: Any, size: int) -> Tensor:
    kept = np.empty(size, np.bool_)
    use_threads(bits.size)
    kernel(bits, mask, kept)
    return torch.from_numpy(kept)


def supports(values: Tensor) -> bool:
    """Whether its entries are of a known pattern."""
    return values.dtype in PATTERNS

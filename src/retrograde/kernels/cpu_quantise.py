"""Rounding of a dense operand to 8 bits on the CPU: to nearest, with one scale for each row, each column, or both.

    q = round(x / s),  s = max|x| / 127 along the row or column        (Jacob et al., arXiv 1712.05877, symmetric)

A product needs its scales outside of its sum: the forward product ``x Wᵀ`` scales for each row of x and of W, the
backward products ``δ W`` and ``δᵀ x`` for each column. The largest magnitudes of both come from one reading.
"""

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from retrograde.kernels.cpu_memory import array
from retrograde.kernels.cpu_threads import jit, use_threads

_LARGEST = np.float32(127)
_ROWS = 16
"""Rows in a task: a strip of them stays in the second-level cache between the two readings."""


@jit
def _peaks(x: Any, rows: Any, columns: Any) -> None:
    n = x.shape[0]
    for task in prange(columns.shape[0]):
        most = columns[task]
        most[:] = 0
        for r in range(task * _ROWS, min(n, (task + 1) * _ROWS)):
            # Magnitudes as bit patterns, which order as they do: a maximum of floats does not vectorise. NaN is the
            # largest, so a row or column that holds one keeps it.
            row, peak = x[r], np.int32(0)
            for j in range(row.size):
                magnitude = row[j] & np.int32(0x7FFFFFFF)
                peak = max(peak, magnitude)
                most[j] = max(most[j], magnitude)
            rows[r] = peak


@jit
def _round_rows(x: Any, factors: Any, out: Any) -> None:
    for r in prange(x.shape[0]):
        row, q, factor = x[r], out[r], factors[r]
        for j in range(row.size):
            q[j] = np.int8(np.int32(np.rint(row[j] * factor)))


@jit
def _round_columns(x: Any, factors: Any, out: Any) -> None:
    for r in prange(x.shape[0]):
        row, q = x[r], out[r]
        for j in range(row.size):
            q[j] = np.int8(np.int32(np.rint(row[j] * factors[j])))


@jit
def _rescale(z: Any, rows: Any, columns: Any, bias: Any, out: Any) -> None:
    for r in prange(z.shape[0]):
        source, target, factor = z[r], out[r], rows[r]
        for j in range(source.size):
            target[j] = np.float32(source[j]) * (factor * columns[j]) + bias[j]


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both roundings of a float32 matrix (n, i).

    Returns:
        int8 values by row (n, i) with scales (n,), and by column (n, i) with scales (i,). A row or column with an entry
        that is not finite has a scale that is not, and values of 0.
    """
    x, row_peaks, column_peaks = _read(matrix)
    return *_rounded(_round_rows, x, row_peaks), *_rounded(_round_columns, x, column_peaks)


def quantise_columns(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The rounding by column alone."""
    x, _, peaks = _read(matrix)
    return _rounded(_round_columns, x, peaks)


def _read(matrix: Tensor) -> tuple[Any, Any, Any]:
    """The matrix, and its largest magnitudes by row and by column, as bit patterns."""
    x = array(matrix)
    use_threads(x.size)
    rows = np.zeros(x.shape[0], np.int32)
    partial = np.empty((-(-x.shape[0] // _ROWS), x.shape[1]), np.int32)
    _peaks(x.view(np.int32), rows, partial)
    return x, rows, partial.max(0, initial=0)


def _rounded(kernel: Any, x: Any, peaks: Any) -> tuple[Tensor, Tensor]:
    scale, factors = _scales(peaks)
    values = torch.empty(x.shape, dtype=torch.int8)
    kernel(x, factors, array(values))
    return values, torch.from_numpy(scale)


@jit
def _widen(bits: Any, columns: Any, out: Any, out_bits: Any) -> None:
    for r in prange(bits.shape[0]):
        source, pattern, target = bits[r], out_bits[r], out[r]
        # A bfloat16 is the upper half of a float32.
        for j in range(source.size):
            pattern[j] = np.uint32(source[j]) << np.uint32(16)
        for j in range(source.size):
            target[j] *= columns[j]


def widen(matrix: Tensor, columns: Tensor) -> Tensor:
    """``matrix · columns`` in float32 for a bfloat16 matrix (n, i) and factors (i,)."""
    use_threads(matrix.numel())
    out = torch.empty(matrix.shape)
    whole = array(out)
    _widen(array(matrix.view(torch.uint16)), array(columns), whole, whole.view(np.uint32))
    return out


def _scales(peaks: Any) -> tuple[Any, Any]:
    """Scales, and the factors that divide by them; 0 for what is all zero or not finite."""
    largest = peaks.view(np.float32)
    scale = largest / _LARGEST
    with np.errstate(divide="ignore", over="ignore"):
        factor = _LARGEST / largest
    usable = np.isfinite(largest) & np.isfinite(factor)
    return scale, np.where(usable, factor, np.float32(0))


def rescale(sums: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """``sums · rows · columns + bias`` in float32 for int32 sums (n, o), rows (n,), columns (o,) and bias (o,)."""
    use_threads(sums.numel())
    out = torch.empty(sums.shape)
    shift = np.zeros(sums.shape[1], np.float32) if bias is None else array(bias)
    _rescale(array(sums), array(rows), array(columns), shift, array(out))
    return out

"""Weights (g, o, d) and their gradients turned in a few directions of the input, each in one pass over memory.

A product with a few columns is over before a matrix has come from memory, and torch takes one pass for each operation:
four to turn a gradient, six to turn a step. Here a tile of rows stays in the second-level cache, and a piece of the
directions in the first, until all is done.
"""

from typing import Any

import numpy as np
from numba import prange
from torch import Tensor

from retrograde.kernels.cpu_threads import inlined, jit, use_threads

_ROWS = 8
"""Rows of a tile."""
_PIECE = 1024
"""Columns at a time."""


@inlined
def _dots(row: Any, vectors: Any, count: Any, low: Any, high: Any, sums: Any) -> None:
    """``sums[j] += row · vectors[j]`` over these columns."""
    x, j = row[low:high], 0
    while j + 4 <= count:
        v0, v1, v2, v3 = (
            vectors[j, low:high],
            vectors[j + 1, low:high],
            vectors[j + 2, low:high],
            vectors[j + 3, low:high],
        )
        s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for c in range(x.size):
            s0 += x[c] * v0[c]
            s1 += x[c] * v1[c]
            s2 += x[c] * v2[c]
            s3 += x[c] * v3[c]
        sums[j] += s0
        sums[j + 1] += s1
        sums[j + 2] += s2
        sums[j + 3] += s3
        j += 4
    while j < count:
        v0, s0 = vectors[j, low:high], np.float32(0)
        for c in range(x.size):
            s0 += x[c] * v0[c]
        sums[j] += s0
        j += 1


@inlined
def _add(row: Any, vectors: Any, weights: Any, count: Any, low: Any, high: Any) -> None:
    """``row += Σ_j weights[j] · vectors[j]`` in these columns."""
    x, j = row[low:high], 0
    while j + 4 <= count:
        v0, v1, v2, v3 = (
            vectors[j, low:high],
            vectors[j + 1, low:high],
            vectors[j + 2, low:high],
            vectors[j + 3, low:high],
        )
        w0, w1, w2, w3 = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        for c in range(x.size):
            x[c] += w0 * v0[c] + w1 * v1[c] + w2 * v2[c] + w3 * v3[c]
        j += 4
    while j < count:
        v0, w0 = vectors[j, low:high], weights[j]
        for c in range(x.size):
            x[c] += w0 * v0[c]
        j += 1


@jit
def _turn(
    gradient: Any, scaled: Any, basis: Any, rows: Any, mean_scaled: Any, k: Any, centred: Any, scale: Any
) -> None:
    groups, outputs, d = gradient.shape
    tiles = (outputs + _ROWS - 1) // _ROWS
    for tile in prange(groups * tiles):
        g, first = tile // tiles, tile % tiles * _ROWS
        last = min(outputs, first + _ROWS)
        turned = np.zeros((_ROWS, k + 1), np.float32)
        for low in range(0, d, _PIECE):
            high = min(d, low + _PIECE)
            for r in range(first, last):
                _dots(gradient[g, r], scaled[g], k, low, high, turned[r - first])
        count = k + 1 if centred else k
        for r in range(first, last):
            own = turned[r - first]
            for j in range(k):
                own[j] = scale * (own[j] - rows[g, r] * mean_scaled[g, j]) if centred else scale * own[j]
            own[k] = -scale * rows[g, r] if centred else np.float32(0)
        for low in range(0, d, _PIECE):
            high = min(d, low + _PIECE)
            for r in range(first, last):
                row = gradient[g, r, low:high]
                for c in range(row.size):
                    row[c] *= scale
                _add(gradient[g, r], basis[g], turned[r - first], count, low, high)


@jit
def _advance(
    weight: Any,
    before: Any,
    scaled: Any,
    basis: Any,
    mean_basis: Any,
    k: Any,
    centred: Any,
    scale: Any,
    kept: Any,
    moved: Any,
) -> None:
    groups, outputs, d = weight.shape
    tiles = (outputs + _ROWS - 1) // _ROWS
    count = k + 1 if centred else k
    for tile in prange(groups * tiles):
        g, first = tile // tiles, tile % tiles * _ROWS
        last = min(outputs, first + _ROWS)
        turned = np.zeros((_ROWS, count), np.float32)
        decayed = np.zeros((_ROWS, 1), np.float32)
        for low in range(0, d, _PIECE):
            high = min(d, low + _PIECE)
            for r in range(first, last):
                now, then = weight[g, r, low:high], before[g, r, low:high]
                if centred and kept != 1:
                    _dots(before[g, r], scaled[g, k:], 1, low, high, decayed[r - first])
                for c in range(now.size):
                    then[c] = now[c] - kept * then[c]
                _dots(before[g, r], scaled[g], count, low, high, turned[r - first])
        for r in range(first, last):
            own = turned[r - first]
            if centred:
                along = own[k]
                for j in range(k):
                    along += own[j] * mean_basis[g, j]
                moved[g, r] = scale * along + (kept - np.float32(1)) * decayed[r - first, 0]
            for j in range(k):
                own[j] *= scale
        for low in range(0, d, _PIECE):
            high = min(d, low + _PIECE)
            for r in range(first, last):
                now, step = weight[g, r, low:high], before[g, r, low:high]
                for c in range(now.size):
                    now[c] += (scale - np.float32(1)) * step[c]
                _add(weight[g, r], basis[g], turned[r - first], k, low, high)


def _rows(matrix: Tensor) -> Any:
    """Columns (g, d, m) that lie in one piece each, as rows."""
    return matrix.detach().mT.numpy()


def turn(gradient: Tensor, scaled: Tensor, basis: Tensor, k: int, scale: float, rows: Tensor | None) -> None:
    """See `Coordinates.turn`."""
    s = _rows(scaled)
    nothing = np.zeros((1, 1), np.float32)
    centred = rows is not None
    mean_scaled = (scaled[..., :k].mT @ scaled[..., k:]).squeeze(-1).numpy() if centred else nothing
    own = nothing if rows is None else rows.contiguous().numpy()
    use_threads(gradient.numel())
    _turn(gradient.detach().numpy(), s, _rows(basis), own, mean_scaled, k, centred, np.float32(scale))


def advance(
    weight: Tensor,
    before: Tensor,
    scaled: Tensor,
    basis: Tensor,
    k: int,
    scale: float,
    kept: float,
    centred: bool,
) -> Tensor | None:
    """See `Coordinates.advance`."""
    nothing = np.zeros((1, 1), np.float32)
    moved = weight.new_empty(weight.shape[:2]) if centred else None
    mean_basis = (basis[..., :k].mT @ scaled[..., k:]).squeeze(-1).numpy() if centred else nothing
    out = nothing if moved is None else moved.numpy()
    use_threads(weight.numel())
    _advance(
        weight.detach().numpy(),
        before.numpy(),
        _rows(scaled),
        _rows(basis),
        mean_basis,
        k,
        centred,
        np.float32(scale),
        np.float32(kept),
        out,
    )
    return moved

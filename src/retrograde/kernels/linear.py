"""The products of a linear layer's backward pass, by every kernel: ``G D`` for a gradient G (a, m) and D (m, i).

Kernels, by what they round and what they visit:

- ``dense``: everything, in the operand's own precision;
- ``skip``: the non-zeros, in float32;
- ``bfloat16``: everything, D rounded to bfloat16, and so is the result;
- ``skip-bfloat16``: the non-zeros, D rounded to bfloat16, sums in float32;
- ``int8``: everything, each column of D rounded to 8 bits, sums in int32.

Levels are whole numbers of 8 bits, which bfloat16 holds exactly.
"""

from typing import Any

import torch
from torch import Tensor

from retrograde.kernels import cpu

KERNELS = ("dense", "skip", "bfloat16", "skip-bfloat16", "int8")
SKIPPING = ("skip", "skip-bfloat16")
"""Those that visit the non-zeros alone."""
PRECISION = {"bfloat16": "bfloat16", "skip-bfloat16": "bfloat16", "int8": "int8"}
"""What a kernel rounds to; others leave the operand's own precision."""
TILE = cpu.TILE
_LARGEST = 127.0


def run(
    kernel: str,
    values: Tensor,
    step: float | None,
    dense: Tensor,
    *,
    transposed: bool = False,
    lists: cpu.Lists | None = None,
) -> Tensor:
    """``G D``, shape (a, i), in the dtype of D.

    Args:
        kernel: one of `KERNELS`.
        values: G, (a, m), or (m, a) when `transposed`: float32, or int8 levels.
        step: of the levels; None for a gradient that is no multiple of one.
        dense: D, (m, i).
        transposed: whether `values` holds Gᵀ.
        lists: the index lists of `values`, where they are known.
    """
    scale = 1.0 if step is None else step
    if kernel in SKIPPING:
        sparse = cpu.lists(values) if lists is None else lists
        if transposed:
            sparse = sparse.transposed()
        packed = cpu.pack(dense, half=kernel == "skip-bfloat16" or dense.dtype == torch.bfloat16)
        return cpu.product(sparse, packed, dense.shape[1], scale).to(dense.dtype)
    factor = values.T if transposed else values
    if kernel == "int8":
        return _int8(factor, scale, dense)
    dtype = torch.bfloat16 if kernel == "bfloat16" else dense.dtype
    found = (factor.to(dtype) @ dense.to(dtype)).to(dense.dtype)
    return found if step is None else found.mul_(step)


def _int8(factor: Tensor, scale: float, dense: Tensor) -> Tensor:
    peaks = dense.abs().amax(0).clamp_min(torch.finfo(torch.float32).tiny).float()
    rounded = (dense * (_LARGEST / peaks)).round_().to(torch.int8)
    product: Any = torch._int_mm  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    found = product(factor.contiguous(), rounded)
    return found.to(dense.dtype).mul_(peaks * (scale / _LARGEST))

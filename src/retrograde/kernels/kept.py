"""Dense products without the rows and columns of δ̃ that are zero throughout, exact in every precision.

Padded tokens, ignored labels and skipped samples make zero rows, or whole images; dead units zero columns, or channels.
What stays is gathered, with its part of the other operand, multiplied by torch's own kernels, and written back between
zeros.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from retrograde.kernels import reference
from retrograde.kernels.cpu_memory import lies_channels_last
from retrograde.kernels.delta import Delta
from retrograde.kernels.geometry import Geometry

COMPACT = "compact"
"""The kernel's name."""
_LEAST = 1 / 32
"""Share of the rows or columns that must be zero for them to leave: moving the others costs about as much."""


@dataclass(frozen=True)
class Kept:
    """What stays of δ̃, a matrix (n, o) or a batch of images (n, o, …).

    Attributes:
        values: of δ̃, whole.
        step: of δ̃.
        rows: numbers of the rows that stay; None for all.
        columns: numbers of the columns that stay; None for all.
    """

    values: Tensor
    step: float | None
    rows: Tensor | None
    columns: Tensor | None

    @property
    def share(self) -> float:
        """Of the entries that stay."""
        n, o = self.values.shape[:2]
        rows = 1.0 if self.rows is None else self.rows.numel() / n
        return rows * (1.0 if self.columns is None else self.columns.numel() / o)

    @cached_property
    def delta(self) -> Delta:
        """What stays, gathered once for both products."""
        return Delta(_gathered(_gathered(self.values, self.rows, 0), self.columns, 1), self.step)

    def linear(self, dense: Tensor, *, transposed: bool) -> Tensor:
        """``δ̃ W``, or ``δ̃ᵀ x`` when `transposed`, for a matrix δ̃ (n, o); `dense` is W (o, i) or x (n, i)."""
        own, other = (self.columns, self.rows) if transposed else (self.rows, self.columns)
        rest = _gathered(dense, other, 0)
        shape = (self.delta.values.shape[1 if transposed else 0], dense.shape[1])
        if transposed:
            product = reference.linear_weight_grad(self.delta, rest)
        else:
            product = reference.linear_input_grad(self.delta, rest, shape)
        return _spread(product, own, self.values.shape[1 if transposed else 0])

    def input_grad(self, weight: Tensor, input_shape: tuple[int, ...], geometry: Geometry) -> Tensor:
        """dx of a convolution without groups, or of one whose channels all stay."""
        shape = (self.delta.values.shape[0], *input_shape[1:])
        rest = _gathered(weight, self.columns, 0)
        if 0 in self.delta.values.shape:
            return weight.new_zeros(input_shape)
        dx = reference.convolution_input_grad(self.delta, rest, shape, geometry)
        return _spread(dx, self.rows, input_shape[0])

    def weight_grad(self, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        """dW of a convolution without groups, or of one whose channels all stay."""
        if 0 in self.delta.values.shape:
            return torch.zeros_like(weight)
        rest = _gathered(weight, self.columns, 0)
        dw = reference.convolution_weight_grad(self.delta, _gathered(x, self.rows, 0), rest, geometry)
        return _spread(dw, self.columns, weight.shape[0])


def find(values: Tensor, step: float | None, *, columns: bool = True) -> Kept | None:
    """What stays of δ̃; None where all does, but for a few rows or columns.

    Args:
        values: of δ̃, (n, o) or (n, o, …), on a CPU.
        step: of δ̃.
        columns: whether columns may leave.
    """
    from retrograde.kernels import cpu_kept  # where it is needed: a compiler comes with it

    if not cpu_kept.supports(values):
        return None
    found = Kept(
        values, step, _few(cpu_kept.rows(values)), _few(cpu_kept.columns(values)) if columns else None
    )
    return None if found.rows is found.columns is None else found


def _few(kept: Tensor) -> Tensor | None:
    numbers = kept.nonzero().view(-1)
    return None if numbers.numel() > (1 - _LEAST) * kept.numel() else numbers


def _gathered(tensor: Tensor, numbers: Tensor | None, axis: int) -> Tensor:
    if numbers is None:
        return tensor
    if not lies_channels_last(tensor):
        return tensor.index_select(axis, numbers)
    return tensor.permute(0, 2, 3, 1).index_select(3 if axis else 0, numbers).permute(0, 3, 1, 2)


def _spread(product: Tensor, numbers: Tensor | None, size: int) -> Tensor:
    """Its rows at the places `numbers` among `size`, zeros at the others: written once."""
    if numbers is None:
        return product
    last = lies_channels_last(product)
    rows = product.permute(0, 2, 3, 1) if last else product
    out = rows.new_empty((size, *rows.shape[1:]))
    out.index_copy_(0, numbers, rows)
    absent = torch.ones(size, dtype=torch.bool)
    absent[numbers] = False
    out.index_fill_(0, absent.nonzero().view(-1), 0)
    return out.permute(0, 3, 1, 2) if last else out

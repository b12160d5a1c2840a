"""The forward pass of a linear layer in 8 bits, which leaves the operands of both backward products quantised.

    z = (q_x q_Wᵀ) · s_x s_Wᵀ + b        q = round(·/s) to nearest, one scale for each row of x and of W

Kept for the backward pass are x and W rounded once more, with one scale for each column, since the sums of ``δ W`` and
``δᵀ x`` run over rows: a quarter of the bytes of a float32 x, and no product needs a rounding of its own later. Weights
stay in their own precision; only what is multiplied is rounded. Sums are whole numbers of 32 bits, hence exact.

Reference: Banner, Hubara, Hoffer, Soudry, *Scalable methods for 8-bit training of neural networks*, arXiv 1805.11046
(their one scale for each tensor is finer here).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrograde.kernels import compiled, formulas

LARGEST = 127.0

_LIBRARY = torch.library.Library("retrograde", "FRAGMENT")
_LIBRARY.define(
    "int8_linear(Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@dataclass(frozen=True)
class Quantised:
    """A dense operand in 8 bits, with one scale for each column: ``values · scale``.

    Attributes:
        values: int8, (m, i).
        scale: float32, (i,); float64 for a float64 operand that a rule rounded.
        dtype: of the tensor that was rounded, and of the products with it.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """(m, i)."""
        return self.values.shape

    def dense(self) -> Tensor:
        """The operand as an ordinary tensor."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return (self.values.to(wide) * self.scale).to(self.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Quantised, Quantised]:
    """``z = x Wᵀ + b`` in 8 bits, (…, i) → (…, o), and x (rows, i) and W (o, i) as their backward products take them.

    A row of x, or of W, with an entry that is not finite gives NaN, as it should.
    """
    z, *parts = torch.ops.retrograde.int8_linear(x, weight, bias)
    return z, Quantised(parts[0], parts[1], x.dtype), Quantised(parts[2], parts[3], weight.dtype)


def int_product(first: Tensor, second: Tensor, out: Tensor | None = None) -> Tensor:
    """``first · second`` in int32, of int8 (a, m) and (m, i); into `out` where it is given, on the CPU."""
    if min(first.shape[0], *second.shape) == 0:
        return torch.zeros(first.shape[0], second.shape[1], dtype=torch.int32, device=first.device)
    if first.device.type == "cpu" and 1 not in (*first.shape, *second.shape):  # whose strides torch misreads
        product: Any = torch._int_mm  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        return product(first, second) if out is None else product(first, second, out=out)
    # Elsewhere it takes only some shapes. Sums in float64 are exact.
    return (first.double() @ second.double()).to(torch.int32)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    x_row, x_scale, x_column, x_columns = _quantise(rows)
    w_row, w_scale, w_column, w_columns = _quantise(weight)
    z = _rescale(int_product(x_row, w_row.T), x_scale, w_scale, bias)
    return z.to(x.dtype).view(*x.shape[:-1], weight.shape[0]), x_column, x_columns, w_column, w_columns


def quantise_columns(matrix: Tensor) -> Quantised:
    """A dense operand (m, i) rounded to 8 bits by column."""
    if _compiled(matrix):
        from retrograde.kernels import cpu_quantise  # where it is needed: a compiler comes with it

        return Quantised(*cpu_quantise.quantise_columns(matrix.float()), matrix.dtype)
    return Quantised(*quantise(matrix, 0), matrix.dtype)


def _quantise(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By row and by column: see `retrograde.kernels.cpu_quantise.quantise`."""
    if _compiled(matrix):
        from retrograde.kernels import cpu_quantise

        return cpu_quantise.quantise(matrix.float())
    return *quantise(matrix, 1), *quantise(matrix, 0)


def _rescale(sums: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    if _compiled(sums):
        from retrograde.kernels import cpu_quantise

        return cpu_quantise.rescale(sums, rows, columns, None if bias is None else bias.float())
    z = sums.float() * (rows[:, None] * columns)
    return z if bias is None else z + bias.float()


def _compiled(operand: Tensor) -> bool:
    return operand.device.type == "cpu" and compiled.usable()


def quantise(matrix: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Rounding to nearest along `dim` of a matrix (n, i), in plain torch: the yardstick of the fast one.

    Returns:
        int8 values (n, i) and scales, (n,) for ``dim=1`` or (i,) for ``dim=0``.
    """
    wide = matrix.float()
    # A zero beside what is there: the largest of nothing is 0.
    largest = torch.cat([wide, wide.new_zeros((*wide.shape[:dim], 1, *wide.shape[dim + 1 :]))], dim)
    largest = largest.abs().amax(dim, keepdim=True)
    # Of two tensors: a number divided by a tensor is its reciprocal times the number, one bit off now and then.
    factor = torch.full_like(largest, LARGEST) / largest
    factor = torch.where(largest.isfinite() & factor.isfinite(), factor, 0.0)
    # What is not finite is 0, and its scale carries it on.
    levels = torch.nan_to_num(wide * factor, 0.0, 0.0, 0.0).round().to(torch.int8)
    return levels, (largest / LARGEST).squeeze(dim)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, (outputs, inputs) = x.numel() // x.shape[-1], weight.shape
    return (
        x.new_empty((*x.shape[:-1], outputs)),
        x.new_empty((rows, inputs), dtype=torch.int8),
        x.new_empty(inputs, dtype=torch.float32),
        x.new_empty((outputs, inputs), dtype=torch.int8),
        x.new_empty(inputs, dtype=torch.float32),
    )


_LIBRARY.impl("int8_linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("retrograde::int8_linear", _fake, lib=_LIBRARY)


@formulas.formula(torch.ops.retrograde.int8_linear)
def _formula(  # pyright: ignore[reportUnusedFunction]
    x_shape: torch.Size, weight_shape: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    # Two for each multiply-add, at any precision, as torch counts.
    return 2 * torch.Size(x_shape).numel() * weight_shape[0]

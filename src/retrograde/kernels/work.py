"""What a product did: its value, by which kernel, and how many FLOPs; two for each multiply-add."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from retrograde.kernels.geometry import Geometry

DISCOUNTS = {"float64": 1.0, "float32": 1.0, "bfloat16": 0.5, "float16": 0.5, "int8": 0.25}
"""Weight of one FLOP by the precision that the product ran in. An assumption, stated wherever it is used."""
DTYPE_DISCOUNTS = {getattr(torch, name): weight for name, weight in DISCOUNTS.items()}


@dataclass(slots=True)
class Work:
    """One product of a backward call.

    Attributes:
        value: the result.
        kernel: what computed it.
        needed: FLOPs whose δ operand is not zero.
        executed: FLOPs that the kernel did: `needed`, where it leaves zeros out.
        discounted: `executed`, each counted at the precision that it ran in (`DISCOUNTS`).
    """

    value: Tensor
    kernel: str
    needed: float
    executed: float
    discounted: float


def discount(*precisions: str | None) -> float:
    """The least of the discounts; None stands for no rounding."""
    return min((DISCOUNTS[p] for p in precisions if p is not None), default=1.0)


def linear_flops(rows: int, outputs: int, inputs: int) -> int:
    """FLOPs of any one of ``x Wᵀ``, ``δ W`` and ``δᵀ x``: they cost the same."""
    return 2 * rows * outputs * inputs


def convolution_flops(
    input_shape: Sequence[int], weight_shape: Sequence[int], output_shape: Sequence[int], geometry: Geometry
) -> int:
    """FLOPs of any one of a convolution's three products; padding is counted as if it were data, as torch does."""
    positions = input_shape if geometry.transposed else output_shape
    return 2 * prod(positions) * prod(weight_shape[1:])

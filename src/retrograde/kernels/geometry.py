"""How a convolution lays its kernel over its input."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """Arguments of a convolution beside its tensors; every tuple has one entry for each spatial dimension.

    Padding is always explicit and zero: other padding modes and ``"same"`` are applied to the input beforehand.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

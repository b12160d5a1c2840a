"""How a convolution lays its kernel over its input."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """Arguments of a convolution beside its tensors; every tuple has one entry for each spatial dimension.

    Padding is always explicit and zero: other padding modes and ``"same"`` are applied to the input beforehand.

    Attributes:
        stride: steps of the kernel, in places.
        padding: zeros on either side of the input.
        dilation: distance of neighbouring kernel entries.
        transposed: whether it is a transposed convolution.
        output_padding: places added to one side of a transposed convolution's output.
        groups: parts of the channels that are convolved separately.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @classmethod
    def of(
        cls,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
    ) -> "Geometry":
        """From the sequences that ops take."""
        return cls(tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding), groups)

    @property
    def planar(self) -> "Geometry":
        """Of the same convolution over images of one row; this one has one spatial dimension."""
        return Geometry(
            (1, *self.stride),
            (0, *self.padding),
            (1, *self.dilation),
            self.transposed,
            (0, *self.output_padding),
            self.groups,
        )

"""The products of one backward call, each by the kernel that should be fastest, and the passes of dithering.

The reference runs where nothing faster is known: on other devices, in other dtypes, for small products.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retrograde.kernels import reference
from retrograde.kernels.cpu_memory import lies_channels_last
from retrograde.kernels.delta import Delta
from retrograde.kernels.geometry import Geometry
from retrograde.kernels.int8 import Quantised
from retrograde.maths import dither

if TYPE_CHECKING:
    from retrograde.kernels.cpu import Lists
    from retrograde.kernels.cpu_convolution import Sparse

_LADDER = {
    "float32": ("dense", "skip"),
    "bfloat16": ("dense", "skip", "bfloat16", "skip-bfloat16"),
    "int8": ("dense", "skip", "bfloat16", "skip-bfloat16", "int8"),
}
"""Kernels by the least precision that the operands may be rounded to."""
_OPERANDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}
"""Dense operands that kernels take."""
_GRAIN = 64
"""Shares of non-zeros are told apart in steps of one part in so many: kernels for close ones are the same."""


@dataclass(frozen=True)
class Done:
    """How a product was computed.

    Attributes:
        kernel: its name.
        precision: what it rounded its operands to; None for their own precision.
        skips_zeros: whether only non-zeros were multiplied.
    """

    kernel: str = reference.NAME
    precision: str | None = None
    skips_zeros: bool = reference.SKIPS_ZEROS


class Products:
    """Both products of one call.

    Args:
        delta: δ̃.
        precision: the least that operands may be rounded to: a key of `_LADDER`.
        wanted: how many of the two products will be asked for: they share the work of listing the non-zeros.
    """

    def __init__(self, delta: Delta, precision: str = "float32", wanted: int = 2) -> None:
        self._delta = delta
        self._allowed = _LADDER[precision] if delta.step is not None else _LADDER["float32"]
        self._wanted = max(wanted, 1)
        self._lists: Lists | None = None
        self._compacted: Sparse | None = None
        self._input_grad: tuple[Tensor, Done] | None = None

    def linear_input_grad(
        self, weight: Tensor | Quantised, input_shape: Sequence[int]
    ) -> tuple[Tensor, Done]:
        """`reference.linear_input_grad`, and how."""
        kernel = self._linear_kernel(weight, transposed=False)
        if kernel is None:
            return reference.linear_input_grad(self._delta, _dense(weight), input_shape), Done()
        found, done = self._linear(kernel, weight, transposed=False)
        return found.view(tuple(input_shape)), done

    def linear_weight_grad(self, x: Tensor | Quantised) -> tuple[Tensor, Done]:
        """`reference.linear_weight_grad`, and how; a quantised x comes as rows (n, i)."""
        rows = x if isinstance(x, Quantised) else x.reshape(x.shape[:-1].numel(), x.shape[-1])
        kernel = self._linear_kernel(rows, transposed=True)
        if kernel is None:
            return reference.linear_weight_grad(self._delta, _dense(x)), Done()
        return self._linear(kernel, rows, transposed=True)

    def convolution_input_grad(
        self, weight: Tensor, input_shape: Sequence[int], geometry: Geometry
    ) -> tuple[Tensor, Done]:
        """`reference.convolution_input_grad`, and how."""
        if self._input_grad is not None:
            return self._input_grad
        kernel = self._convolution_kernel("input", weight, weight, input_shape, geometry)
        if kernel is None:
            return reference.convolution_input_grad(self._delta, weight, input_shape, geometry), Done()
        from retrograde.kernels import convolution

        sparse = self._sparse(kernel, geometry)
        found = convolution.input_grad(kernel, self._delta, weight, input_shape, geometry, sparse)
        return found, _done(kernel, convolution)

    def convolution_weight_grad(
        self, x: Tensor, weight: Tensor, geometry: Geometry, *, joint: bool = True
    ) -> tuple[Tensor, Done]:
        """`reference.convolution_weight_grad`, and how.

        Args:
            x: the layer's input, or something narrower in its place.
            weight: whose gradient it is; only its shape is read, unless `joint`.
            geometry: of the convolution.
            joint: x and the weight are the layer's own, so that one call may compute dx too.
        """
        kernel = self._convolution_kernel("weight", x, weight, x.shape, geometry)
        shared = joint and self._wanted > 1 and kernel in (None, "bfloat16")
        if shared and self._convolution_kernel("input", weight, weight, x.shape, geometry) == kernel:
            return self._both(kernel, x, weight, geometry)
        if kernel is None:
            return reference.convolution_weight_grad(self._delta, x, weight, geometry), Done()
        from retrograde.kernels import convolution

        sparse = self._sparse(kernel, geometry)
        found = convolution.weight_grad(kernel, self._delta, x, weight, geometry, sparse)
        return found, _done(kernel, convolution)

    def _both(self, kernel: str | None, x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Done]:
        """dW, and dx kept for when it is asked for: one call of torch shares what it does to δ̃."""
        if kernel is None:
            (dx, dw), done = reference.convolution_grads(self._delta, x, weight, geometry), Done()
        else:
            from retrograde.kernels import convolution

            dx, dw = convolution.both(self._delta, x, weight, geometry)
            done = _done(kernel, convolution)
        self._input_grad = dx, done
        return dw, done

    def _linear_kernel(self, dense: Tensor | Quantised, *, transposed: bool) -> str | None:
        """The kernel for a product with `dense`; None for the reference."""
        values, levels = self._delta.values, self._delta.step is not None
        bare = dense.values if isinstance(dense, Quantised) else dense
        operand = _OPERANDS.get(bare.dtype)
        if operand is None or not _known(values, bare) or not (levels or operand == "float32"):
            return None
        m, i = dense.shape
        a = values.numel() // m
        # Imported where they are needed: a compiler comes with them.
        from retrograde.kernels import choose

        if not choose.worthwhile(a * m * i):
            return None
        share = 1 / self._wanted
        problem = choose.Problem(a, m, i, self._nonzeros(), levels, transposed, share, operand)
        kernel = choose.model().best(problem, self._kernels(operand))
        return None if kernel == "dense" else kernel

    def _kernels(self, operand: str) -> tuple[str, ...]:
        """Those that the precision allows; what has been rounded to 8 bits already loses nothing by any."""
        from retrograde.kernels import choose

        if operand == "int8":
            return choose.OPERANDS[operand]
        allowed = (*self._allowed, "skip-bfloat16") if operand == "bfloat16" else self._allowed
        return tuple(kernel for kernel in choose.OPERANDS[operand] if kernel in allowed)

    def _linear(self, kernel: str, dense: Tensor | Quantised, *, transposed: bool) -> tuple[Tensor, Done]:
        from retrograde.kernels import cpu, linear

        delta = self._delta
        matrix = delta.values.reshape(delta.values.shape[:-1].numel(), delta.values.shape[-1])
        if kernel in linear.SKIPPING and self._lists is None:
            self._lists = cpu.lists(matrix)
        found = linear.run(kernel, matrix, delta.step, dense, transposed=transposed, lists=self._lists)
        return found, _done(kernel, linear)

    def _convolution_kernel(
        self, product: str, dense: Tensor, weight: Tensor, x_shape: Sequence[int], geometry: Geometry
    ) -> str | None:
        values = self._delta.values
        if (
            values.dim() != 4
            or geometry.transposed
            or dense.dtype != torch.float32
            or not _known(values, dense)
        ):
            return None
        from retrograde.kernels import choose, convolution

        if not choose.worthwhile(values.numel() * weight[0].numel()) or not convolution.supports(
            self._delta, dense, weight, x_shape, geometry
        ):
            return None
        outputs, channels, height, width = weight.shape
        problem = choose.ConvolutionProblem(
            product,
            values.numel(),
            torch.Size(x_shape).numel(),
            (outputs, channels, height, width),
            geometry.groups,
            self._nonzeros(),
            levels=self._delta.step is not None,
            channels_last=not values.is_contiguous(),
            share=1 / self._wanted,
        )
        allowed = tuple(kernel for kernel in convolution.KERNELS if kernel in self._allowed)
        kernel = choose.model().best(problem, allowed)
        return None if kernel == "dense" else kernel

    def _sparse(self, kernel: str, geometry: Geometry) -> "Sparse | None":
        """δ̃'s non-zeros, listed once, where the kernel visits them alone."""
        from retrograde.kernels import convolution

        if kernel not in convolution.SKIPPING:
            return None
        if self._compacted is None:
            self._compacted = convolution.compact(self._delta, geometry)
        return self._compacted

    def _nonzeros(self) -> int:
        """Non-zeros of δ̃, rounded up to a part of its size: close shares make one decision."""
        size = self._delta.values.numel()
        return -(-(size - self._delta.zeros) * _GRAIN // size) * size // _GRAIN


def _known(values: Tensor, dense: Tensor) -> bool:
    """Whether there is more than the reference for these operands."""
    return (
        values.dtype in (torch.int8, torch.float32)
        and values.device.type == dense.device.type == "cpu"
        and min(values.numel(), dense.numel()) > 0
    )


def _dense(operand: Tensor | Quantised) -> Tensor:
    return operand.dense() if isinstance(operand, Quantised) else operand


def _done(kernel: str, kernels: ModuleType) -> Done:
    """By a kernel of `retrograde.kernels.linear` or of `retrograde.kernels.convolution`."""
    return Done(kernel, kernels.PRECISION.get(kernel), kernel in kernels.SKIPPING)


# Dithering.


def statistics(delta: Tensor, of: Delta | None = None) -> tuple[float, float]:
    """Standard deviation and peak of a gradient: `retrograde.maths.dither.statistics`.

    Args:
        delta: the gradient, any shape with at least one entry.
        of: what it belongs to, which is told the number of zeros where they are counted on the way.
    """
    if _triton_takes(delta):
        from retrograde.kernels import cuda

        return cuda.statistics(delta)
    if not _numba_takes(delta):
        return dither.statistics(delta)
    from retrograde.kernels import cpu

    found = cpu.statistics(delta.float())
    if of is not None:
        of.tell(found.zeros)
    return found.std, found.peak


def nsd(delta: Tensor, step: float, key: int, bits: int | None) -> tuple[Delta, int]:
    """The dithered gradient with noise from `key`, and the largest magnitude of its levels."""
    if bits is not None and _triton_takes(delta):
        from retrograde.kernels import cuda

        found = cuda.nsd(delta, step, key, bits)
    elif bits is not None and _numba_takes(delta):
        from retrograde.kernels import cpu

        found = cpu.nsd(delta.float(), step, key, bits)
    else:
        levels = reference.nsd(delta, step, key, bits)
        return Delta(levels, step), int(levels.abs().max())
    values = found.values
    if lies_channels_last(delta):
        values = values.contiguous(memory_format=torch.channels_last)
    return Delta(values, step, found.zeros), found.largest


def _numba_takes(delta: Tensor) -> bool:
    return delta.device.type == "cpu" and delta.dtype != torch.float64


def _triton_takes(delta: Tensor) -> bool:
    if delta.device.type != "cuda" or not delta.numel() or importlib.util.find_spec("triton") is None:
        return False
    from retrograde.kernels import cuda

    return cuda.supports(delta, delta)

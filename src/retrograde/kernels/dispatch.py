"""The products of one backward call, each by the kernel that should be fastest, and the passes of dithering.

The reference runs where nothing faster is known: on other devices, in other dtypes, for small products.
"""

import copy
import functools
import importlib.util
import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from retrograde.kernels import compiled, reference
from retrograde.kernels.cpu_memory import lies_channels_last
from retrograde.kernels.delta import Delta
from retrograde.kernels.geometry import Geometry
from retrograde.kernels.int8 import Quantised
from retrograde.kernels.work import DTYPE_DISCOUNTS, Work, convolution_flops, discount
from retrograde.maths import dither

if TYPE_CHECKING:
    from retrograde.kernels.cpu import Lists
    from retrograde.kernels.cpu_convolution import Sparse

_LADDER = {
    "float32": (None,),
    "bfloat16": (None, "bfloat16"),
    "int8": (None, "bfloat16", "int8"),
}
"""What kernels may round operands to, by the least precision that is allowed; None rounds nothing."""
_OPERANDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}
"""Dense operands that kernels take."""
SMALL = 10_000_000
"""Fewer multiply-adds take torch a tenth of a millisecond, which no choice repays."""
_ONE_THREAD = 1 << 15
"""Entries below which one call on one thread dithers faster than three passes on all."""
_GRAIN = 64
"""Shares of non-zeros are told apart in steps of one part in so many: kernels for close ones are the same."""


class Products:
    """Both backward products of one call, ``dx = δ̃ W`` and ``dW = δ̃ᵀ x``.

    Args:
        delta: δ̃.
        precision: the least that operands may be rounded to: a key of `_LADDER`.
        wanted: how many of the two products will be asked for: they share the work of listing the non-zeros.
        rounded: the precision that operands have been rounded to already, whatever they are stored in.
    """

    def __init__(
        self, delta: Delta, precision: str = "float32", wanted: int = 2, rounded: str | None = None
    ) -> None:
        self._delta = delta
        self._allowed = _LADDER[precision if delta.step is not None else "float32"]
        self._wanted = max(wanted, 1)
        self._rounded = rounded
        self._lists: Lists | None = None
        self._compacted: Sparse | None = None
        self._input_grad: Work | None = None
        self._planar: Products | None = None

    def linear_input_grad(self, weight: Tensor | Quantised, input_shape: Sequence[int]) -> Work:
        """`reference.linear_input_grad`."""
        products = self._delta.values.numel() * weight.shape[-1]
        kernel = None if products < SMALL else self._linear_kernel(weight, transposed=False)
        flops = 2.0 * products
        if kernel is None:
            found = reference.linear_input_grad(self._delta, _dense(weight), input_shape)
            return self._work(found, reference.NAME, None, flops, weight.dtype)
        found = self._linear(kernel, weight, transposed=False).view(tuple(input_shape))
        return self._work(found, kernel, _linear_kernels(), flops, weight.dtype)

    def linear_weight_grad(self, x: Tensor | Quantised) -> Work:
        """`reference.linear_weight_grad`; a quantised x comes as rows (n, i)."""
        products = self._delta.values.numel() * x.shape[-1]
        rows, flops = x, 2.0 * products
        kernel = None
        if products >= SMALL:
            rows = x if isinstance(x, Quantised) else x.reshape(-1, x.shape[-1])
            kernel = self._linear_kernel(rows, transposed=True)
        if kernel is None:
            found = reference.linear_weight_grad(self._delta, _dense(x))
            return self._work(found, reference.NAME, None, flops, x.dtype)
        found = self._linear(kernel, rows, transposed=True)
        return self._work(found, kernel, _linear_kernels(), flops, x.dtype)

    def convolution_input_grad(self, weight: Tensor, input_shape: Sequence[int], geometry: Geometry) -> Work:
        """`reference.convolution_input_grad`."""
        if self._is_line(geometry):
            shape = (*input_shape[:2], 1, *input_shape[2:])
            work = self._as_planes().convolution_input_grad(weight.unsqueeze(2), shape, geometry.planar)
            work.value = work.value.squeeze(2)
            return work
        if self._input_grad is not None:
            return self._input_grad
        kernel = self._convolution_kernel("input", weight, weight, input_shape, geometry)
        flops = convolution_flops(input_shape, weight.shape, self._delta.values.shape, geometry)
        if kernel is None:
            found = reference.convolution_input_grad(self._delta, weight, input_shape, geometry)
            return self._work(found, reference.NAME, None, flops, weight.dtype)
        from retrograde.kernels import convolution

        sparse = self._sparse(kernel, geometry)
        found = convolution.input_grad(kernel, self._delta, weight, input_shape, geometry, sparse)
        return self._work(found, kernel, convolution, flops, weight.dtype)

    def convolution_weight_grad(
        self, x: Tensor, weight: Tensor, geometry: Geometry, *, joint: bool = True
    ) -> Work:
        """`reference.convolution_weight_grad`.

        Args:
            x: the layer's input, or something narrower in its place.
            weight: whose gradient it is; only its shape is read, unless `joint`.
            geometry: of the convolution.
            joint: x and the weight are the layer's own, so that one call may compute dx too.
        """
        if self._is_line(geometry):
            work = self._as_planes().convolution_weight_grad(
                x.unsqueeze(2), weight.unsqueeze(2), geometry.planar, joint=joint
            )
            work.value = work.value.squeeze(2)
            return work
        kernel = self._convolution_kernel("weight", x, weight, x.shape, geometry)
        flops = convolution_flops(x.shape, weight.shape, self._delta.values.shape, geometry)
        # Where operands were rounded, the weight here is not the one that dx comes from.
        exact = self._rounded is None
        shared = joint and exact and self._wanted > 1 and kernel in (None, "bfloat16")
        if shared and self._convolution_kernel("input", weight, weight, x.shape, geometry) == kernel:
            return self._both(kernel, x, weight, geometry, flops)
        if kernel is None:
            found = reference.convolution_weight_grad(self._delta, x, weight, geometry)
            return self._work(found, reference.NAME, None, flops, x.dtype)
        from retrograde.kernels import convolution

        sparse = self._sparse(kernel, geometry)
        found = convolution.weight_grad(kernel, self._delta, x, weight, geometry, sparse)
        return self._work(found, kernel, convolution, flops, x.dtype)

    def _is_line(self, geometry: Geometry) -> bool:
        """Whether the convolution has one spatial dimension, which torch, too, takes for images of one row."""
        return len(geometry.stride) == 1 and self._delta.values.dim() == 3

    def _as_planes(self) -> "Products":
        """Those of the same call over images of one row."""
        if self._planar is None:
            own = self._delta
            delta = Delta(own.values.unsqueeze(2), own.step, own.counted, quantised=own.quantised)
            delta.assumed = own.assumed
            self._planar = copy.copy(self)
            self._planar._delta = delta
        return self._planar

    def _both(self, kernel: str | None, x: Tensor, weight: Tensor, geometry: Geometry, flops: float) -> Work:
        """dW, and dx kept for when it is asked for: one call of torch shares what it does to δ̃."""
        if kernel is None:
            name, kernels = reference.NAME, None
            dx, dw = reference.convolution_grads(self._delta, x, weight, geometry)
        else:
            from retrograde.kernels import convolution

            name, kernels = kernel, convolution
            dx, dw = convolution.both(self._delta, x, weight, geometry)
        self._input_grad = self._work(dx, name, kernels, flops, weight.dtype)
        return self._work(dw, name, kernels, flops, x.dtype)

    def _work(
        self, value: Tensor, kernel: str, kernels: ModuleType | None, flops: float, dtype: torch.dtype
    ) -> Work:
        """By a kernel of `retrograde.kernels.linear` or of `retrograde.kernels.convolution`, or by the reference."""
        needed = flops * self._delta.nonzero_share
        factor = DTYPE_DISCOUNTS[dtype]
        if kernels is None and self._rounded is None:
            return Work(value, kernel, needed, flops, flops * factor)
        executed, precision = flops, None
        if kernels is not None:
            precision = kernels.PRECISION.get(kernel)
            executed = needed if kernel in kernels.SKIPPING else flops
        if precision is not None or self._rounded is not None:
            factor = min(factor, discount(precision, self._rounded))
        return Work(value, kernel, needed, executed, executed * factor)

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

        share = 1 / self._wanted
        problem = choose.Problem(a, m, i, self._nonzeros(), levels, transposed, share, operand)
        kernel = choose.model().best(problem, self._kernels(operand))
        return None if kernel == "dense" else kernel

    def _kernels(self, operand: str) -> tuple[str, ...]:
        """Those that the precision allows; what has been rounded to 8 bits already loses nothing by any."""
        from retrograde.kernels import choose

        if self._delta.values.dtype != torch.int8:
            # Unbounded levels are no whole numbers of 8 bits.
            return ("dense", "skip")
        if operand == "int8":
            return choose.OPERANDS[operand]
        allowed = (*self._allowed, "bfloat16") if operand == "bfloat16" else self._allowed
        precision = _linear_kernels().PRECISION
        return tuple(k for k in choose.kernels_for(operand) if precision.get(k) in allowed)

    def _linear(self, kernel: str, dense: Tensor | Quantised, *, transposed: bool) -> Tensor:
        from retrograde.kernels import cpu, linear

        delta = self._delta
        matrix = delta.values.reshape(delta.values.shape[:-1].numel(), delta.values.shape[-1])
        if kernel in linear.LISTED and self._lists is None:
            self._lists = cpu.lists(matrix)
        return linear.run(kernel, matrix, delta.step, dense, transposed=transposed, lists=self._lists)

    def _convolution_kernel(
        self, product: str, dense: Tensor, weight: Tensor, x_shape: Sequence[int], geometry: Geometry
    ) -> str | None:
        values = self._delta.values
        if (
            values.dim() != 4
            or values.numel() * math.prod(weight.shape[1:]) < SMALL
            or geometry.transposed
            or dense.dtype != torch.float32
            or not _known(values, dense)
        ):
            return None
        from retrograde.kernels import choose, convolution

        if not convolution.supports(self._delta, dense, weight, x_shape, geometry):
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
        allowed = tuple(k for k in convolution.KERNELS if convolution.PRECISION.get(k) in self._allowed)
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
        return math.ceil(self._delta.nonzero_share * _GRAIN) * self._delta.values.numel() // _GRAIN


def _known(values: Tensor, dense: Tensor) -> bool:
    """Whether there is more than the reference for these operands."""
    return (
        values.dtype in (torch.int8, torch.float32)
        and values.device.type == dense.device.type == "cpu"
        and min(values.numel(), dense.numel()) > 0
        and compiled.usable()
    )


def _dense(operand: Tensor | Quantised) -> Tensor:
    return operand.dense() if isinstance(operand, Quantised) else operand


def _linear_kernels() -> ModuleType:
    from retrograde.kernels import linear  # where it is needed: a compiler comes with it

    return linear


# Dithering.


@functools.cache
def _numba() -> ModuleType:
    from retrograde.kernels import cpu  # where it is needed: a compiler comes with it

    return cpu


class Rounded(NamedTuple):
    """A dithered gradient; on a GPU the numbers are 0-dimensional tensors there, so that the host need not wait.

    Attributes:
        delta: δ̃; δ itself, or on a GPU its copy, where it does not vary or is not finite.
        step: Δ; 0 for δ itself.
        largest: magnitude of the largest level.
        finite: whether every entry of δ is.
    """

    delta: Delta
    step: float | Tensor
    largest: int | Tensor
    finite: bool | Tensor


def dithered(
    delta: Delta, scale: float, bits: int | None, key: int, *, small: bool, constant: bool = False
) -> Rounded:
    """δ rounded to multiples of Δ (`retrograde.maths.dither`); `delta` is told its zeros where they are counted.

    Args:
        delta: δ, with at least one entry.
        scale: s of Δ = s · std(δ).
        bits: width of the levels; None leaves them unbounded.
        key: 64-bit key of the noise.
        small: whether the products with δ̃ will be small, so that levels would save them nothing.
        constant: whether a δ that does not vary is rounded too; not with `small`.
    """
    values = delta.values
    if _waits(values):
        return _dithered_there(delta, scale, bits, key, constant=constant)
    small = small and bits is not None and values.dtype is torch.float32
    if small and bits is not None and values.numel() < _ONE_THREAD and compiled.usable():
        out, step, finite, delta.counted, zeros, largest = _numba().dither(values, scale, key, bits)
        if not step:
            return Rounded(delta, 0.0, 0, finite)
        if values.dim() == 4 and lies_channels_last(values):
            out = out.contiguous(memory_format=torch.channels_last)
        return Rounded(Delta(out, counted=zeros, quantised=True), step, largest, True)
    std, peak = statistics(values, delta)
    if not math.isfinite(peak) or (peak if constant else std) == 0:
        return Rounded(delta, 0.0, 0, math.isfinite(peak))
    step = dither.step_size(std if scale else 0.0, peak, scale, bits)
    quantised, largest = nsd(values, step, key, bits)
    if small:
        quantised = Delta(quantised.dense(values.dtype), counted=quantised.counted, quantised=True)
    return Rounded(quantised, step, largest, finite=True)


def _waits(values: Tensor) -> bool:
    """Whether the host would have to wait for a number that is computed from `values`."""
    return not values.is_cpu


def _dithered_there(delta: Delta, scale: float, bits: int | None, key: int, *, constant: bool) -> Rounded:
    """`dithered` without a word to the host: δ̃ is dense, as torch's own products take it."""
    values = delta.values
    if bits is not None and _triton_takes(values):
        from retrograde.kernels import cuda

        found = cuda.dither(values, scale, bits, key, constant=constant)
    else:
        found = _dither_in_torch(values, scale, bits, key, constant=constant)
    out, step, largest, finite, delta.counted, zeros = found
    if lies_channels_last(values):
        out = out.contiguous(memory_format=torch.channels_last)
    return Rounded(Delta(out, counted=zeros, quantised=True), step, largest, finite)


def _dither_in_torch(
    values: Tensor, scale: float, bits: int | None, key: int, *, constant: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`retrograde.kernels.cuda.dither` for every device, dtype and width."""
    wide = values if values.dtype == torch.float64 else values.float()
    low, high = torch.aminmax(wide)
    peak = torch.maximum(-low, high)
    varies = (peak if constant else high - low) > 0
    # In units of the peak: squares of small gradients would vanish.
    step = torch.std(wide / peak, correction=0) * peak * scale if scale else torch.zeros_like(peak)
    if bits is not None:
        step = torch.maximum(step, peak / dither.largest_level(bits))
    if values.dtype in (torch.bfloat16, torch.float16):
        near = step.to(values.dtype)
        step = torch.where(near < step, (near.view(torch.int16) + 1).view(values.dtype), near).float()
    finite = peak.isfinite()
    rounds = finite & varies & (step > 0) & step.isfinite()
    levels = reference.nsd(wide / torch.where(rounds, step, 1.0), 1.0, key, bits)
    out = torch.where(rounds, levels * step, wide).to(values.dtype)
    own, zeros = (each.numel() - each.count_nonzero() for each in (values, out))
    return out, torch.where(rounds, step, 0.0), torch.where(rounds, levels.abs().max(), 0), finite, own, zeros


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
        of.counted = found.zeros
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
        quantised = Delta(reference.nsd(delta, step, key, bits), step)
        # Whoever holds a share of zeros goes by every count.
        quantised.count()
        return quantised, int(quantised.values.abs().max())
    values = found.values
    if lies_channels_last(delta):
        values = values.contiguous(memory_format=torch.channels_last)
    return Delta(values, step, found.zeros), found.largest


def _numba_takes(delta: Tensor) -> bool:
    return delta.device.type == "cpu" and delta.dtype != torch.float64 and compiled.usable()


def _triton_takes(delta: Tensor) -> bool:
    if delta.device.type != "cuda" or not _has_triton():
        return False
    from retrograde.kernels import cuda

    return cuda.supports(delta)


@functools.cache
def _has_triton() -> bool:
    # Kept: where it is missing every path is searched, at every call.
    return importlib.util.find_spec("triton") is not None

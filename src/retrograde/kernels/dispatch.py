"""The products of one backward call, each by the kernel that should be fastest, and the passes of dithering.

The reference runs where nothing faster is known: on other devices, in other dtypes, for small products.
"""

import copy
import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from retrograde.kernels import compiled, reference
from retrograde.kernels.cpu_memory import lies_channels_last
from retrograde.kernels.delta import Delta
from retrograde.kernels.geometry import Geometry
from retrograde.kernels.int8 import Quantised
from retrograde.kernels.kept import COMPACT
from retrograde.kernels.work import DTYPE_DISCOUNTS, Work, convolution_flops, discount
from retrograde.maths import dither

if TYPE_CHECKING:
    from retrograde.kernels.cpu import Lists
    from retrograde.kernels.cpu_convolution import Sparse
    from retrograde.kernels.kept import Kept

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
_VISITED = 0.5
"""The largest share of non-zeros for which kernels that visit each of them are tried."""
_NARROW = 64
"""Columns of a dense operand below which gathering rows of δ takes as long as multiplying them."""
_SPARSE = 1 / 16
"""The share of non-zeros below which columns that are zero are not looked for."""
_FULL = 31 / 32
"""The share of non-zeros from which on rows and columns that are zero are not looked for."""


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
        self._looked, self._found = False, cast("Kept | None", None)

    def linear_input_grad(self, weight: Tensor | Quantised, input_shape: Sequence[int]) -> Work:
        """`reference.linear_input_grad`."""
        flops = 2.0 * self._delta.values.numel() * weight.shape[-1]
        kernel = self._linear_kernel(weight, flops, transposed=False)
        if kernel is None:
            found = reference.linear_input_grad(self._delta, _dense(weight), input_shape)
            return self._work(found, reference.NAME, None, flops, weight.dtype)
        found = self._linear(kernel, weight, transposed=False).view(tuple(input_shape))
        return self._work(found, kernel, _linear_kernels(), flops, weight.dtype)

    def linear_weight_grad(self, x: Tensor | Quantised) -> Work:
        """`reference.linear_weight_grad`; a quantised x comes as rows (n, i)."""
        flops = 2.0 * self._delta.values.numel() * x.shape[-1]
        rows = x if isinstance(x, Quantised) else x.reshape(x.shape[:-1].numel(), x.shape[-1])
        kernel = self._linear_kernel(rows, flops, transposed=True)
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
        compute = functools.partial(self._computed_input_grad, weight, input_shape, geometry)
        kernel = self._convolution_kernel("input", weight, weight, input_shape, geometry, compute)
        flops = convolution_flops(input_shape, weight.shape, self._delta.values.shape, geometry)
        if kernel is None:
            found = reference.convolution_input_grad(self._delta, weight, input_shape, geometry)
            return self._work(found, reference.NAME, None, flops, weight.dtype)
        return self._work(compute(kernel), kernel, _convolution_kernels(), flops, weight.dtype)

    def _computed_input_grad(
        self, weight: Tensor, input_shape: Sequence[int], geometry: Geometry, kernel: str
    ) -> Tensor:
        if kernel == COMPACT:
            return _some(self._kept(geometry)).input_grad(weight, tuple(input_shape), geometry)
        sparse = self._sparse(kernel, geometry)
        return _convolution_kernels().input_grad(kernel, self._delta, weight, input_shape, geometry, sparse)

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
        compute = functools.partial(self._computed_weight_grad, x, weight, geometry)
        kernel = self._convolution_kernel("weight", x, weight, x.shape, geometry, compute)
        flops = convolution_flops(x.shape, weight.shape, self._delta.values.shape, geometry)
        # Where operands were rounded, the weight here is not the one that dx comes from.
        exact = self._rounded is None
        if joint and exact and self._wanted > 1 and kernel in (None, "bfloat16"):
            other = functools.partial(self._computed_input_grad, weight, x.shape, geometry)
            if self._convolution_kernel("input", weight, weight, x.shape, geometry, other) == kernel:
                return self._both(kernel, x, weight, geometry, flops)
        if kernel is None:
            found = reference.convolution_weight_grad(self._delta, x, weight, geometry)
            return self._work(found, reference.NAME, None, flops, x.dtype)
        return self._work(compute(kernel), kernel, _convolution_kernels(), flops, x.dtype)

    def _computed_weight_grad(self, x: Tensor, weight: Tensor, geometry: Geometry, kernel: str) -> Tensor:
        if kernel == COMPACT:
            return _some(self._kept(geometry)).weight_grad(x, weight, geometry)
        sparse = self._sparse(kernel, geometry)
        return _convolution_kernels().weight_grad(kernel, self._delta, x, weight, geometry, sparse)

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
            name, kernels = kernel, _convolution_kernels()
            dx, dw = kernels.both(self._delta, x, weight, geometry)
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
        if kernel == COMPACT:
            executed = flops * _some(self._kept()).share
        elif kernels is not None:
            precision = kernels.PRECISION.get(kernel)
            executed = needed if kernel in kernels.SKIPPING else flops
        if precision is not None or self._rounded is not None:
            factor = min(factor, discount(precision, self._rounded))
        # Zeros may have been counted some steps ago.
        return Work(value, kernel, min(needed, executed), executed, executed * factor)

    def _linear_kernel(self, dense: Tensor | Quantised, flops: float, *, transposed: bool) -> str | None:
        """The kernel for a product with `dense`; None for the reference."""
        bare = dense.values if isinstance(dense, Quantised) else dense
        if flops < 2 * SMALL or not _known(self._delta.values, bare):
            return None
        narrow = dense.shape[1] < _NARROW
        kept = None if narrow or isinstance(dense, Quantised) else self._kept()
        allowed = self._allowed_for(dense, bare.dtype)
        if kept is not None:
            allowed = (*allowed, COMPACT)
        if len(allowed) < 2:
            return None
        # Imported where they are needed: a compiler comes with them.
        from retrograde.kernels import choose

        form = f"{_name(self._delta.values)} {_name(bare)}{'' if bare.is_contiguous() else ' turned'}"
        outputs = self._delta.values.shape[-1]
        problem = choose.Problem.of(
            "linear/weight" if transposed else "linear/input",
            form,
            (outputs, dense.shape[1]),
            self._delta.values.numel() // outputs,
            self._delta.nonzero_share,
            1.0 if kept is None else kept.share,
        )
        compute = functools.partial(self._linear, dense=dense, transposed=transposed)
        kernel = choose.chooser().best(problem, allowed, self._anew(compute))
        return None if kernel == "dense" else kernel

    def _anew(self, compute: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
        """With what both products share made again: each kernel's time is that of a call."""

        def run(kernel: str) -> Tensor:
            self._lists = self._compacted = None
            if self._found is not None:
                self._found = replace(self._found)
            return compute(kernel)

        return run

    def _allowed_for(self, dense: Tensor | Quantised, dtype: torch.dtype) -> tuple[str, ...]:
        """Kernels for elements of a linear layer's products; what has been rounded to 8 bits loses nothing by any."""
        values, levels = self._delta.values, self._delta.step is not None
        operand = _OPERANDS.get(dtype)
        if (
            operand is None
            or values.dtype not in (torch.int8, torch.float32)
            or not (levels or operand == "float32")
        ):
            return ("dense",)
        linear = _linear_kernels()
        if values.dtype != torch.int8:
            # Unbounded levels are no whole numbers of 8 bits.
            names: tuple[str, ...] = ("dense", "skip")
        elif operand == "float32":
            every = (*linear.KERNELS, *linear.registered())
            names = tuple(name for name in every if linear.PRECISION.get(name) in self._allowed)
        elif operand == "bfloat16":
            names = ("dense", "skip-bfloat16", *(("int8",) if "int8" in self._allowed else ()))
        else:
            # Of 8 bits bfloat16 loses nothing, but its result is rounded.
            rounds = "bfloat16" in self._allowed
            names = tuple(name for name in linear.KERNELS if rounds or name != "bfloat16")
        return tuple(name for name in names if self._is_likely(name, linear))

    def _is_likely(self, kernel: str, kernels: ModuleType) -> bool:
        """Whether a kernel can be the fastest here at all."""
        if kernel in kernels.SKIPPING:
            # A non-zero that is visited by itself takes several times its share of a dense product on any processor.
            return self._delta.nonzero_share <= _VISITED
        from retrograde.kernels import choose

        precision = kernels.PRECISION.get(kernel)
        return precision is None or kernel not in kernels.KERNELS or choose.fast_precision(precision)

    def _kept(self, geometry: Geometry | None = None) -> "Kept | None":
        """What δ̃ is without its zero rows and columns, looked for once; None where it has too few."""
        if self._looked:
            return self._found
        self._looked = True
        values = self._delta.values
        if geometry is None and values.dim() != 2:
            values = values.reshape(values.shape[:-1].numel(), values.shape[-1])
        if self._delta.nonzero_share < _FULL:
            from retrograde.kernels import kept

            # The channels of a group are not the others'.
            whole = geometry is not None and geometry.groups > 1
            # Looked for where the non-zeros are few, columns take longer than the product that visits those alone.
            visited = values.dtype in (torch.float32, torch.int8) and self._delta.nonzero_share < _SPARSE
            self._found = kept.find(values, self._delta.step, columns=not (whole or visited))
        return self._found

    def _linear(self, kernel: str, dense: Tensor | Quantised, *, transposed: bool) -> Tensor:
        if kernel == COMPACT:
            assert isinstance(dense, Tensor)
            return _some(self._kept()).linear(dense, transposed=transposed)
        from retrograde.kernels import cpu, linear

        delta = self._delta
        matrix = delta.values.reshape(delta.values.shape[:-1].numel(), delta.values.shape[-1])
        if kernel in linear.LISTED and self._lists is None:
            self._lists = cpu.lists(matrix)
        return linear.run(kernel, matrix, delta.step, dense, transposed=transposed, lists=self._lists)

    def _convolution_kernel(
        self,
        product: str,
        dense: Tensor,
        weight: Tensor,
        x_shape: Sequence[int],
        geometry: Geometry,
        compute: Callable[[str], Tensor],
    ) -> str | None:
        values = self._delta.values
        if (
            values.dim() != 4
            or values.numel() * math.prod(weight.shape[1:]) < SMALL
            or geometry.transposed
            or not _known(values, dense)
        ):
            return None
        from retrograde.kernels import choose, convolution

        allowed: tuple[str, ...] = ("dense",)
        if convolution.supports(self._delta, dense, weight, x_shape, geometry):
            allowed = tuple(
                name
                for name in convolution.KERNELS
                if convolution.PRECISION.get(name) in self._allowed and self._is_likely(name, convolution)
            )
        kept = self._kept(geometry)
        if kept is not None:
            allowed = (*allowed, COMPACT)
        if len(allowed) < 2:
            return None
        order = "contiguous" if values.is_contiguous() else "channels last"
        numbers = (*geometry.stride, *geometry.padding, *geometry.dilation, geometry.groups)
        places = math.prod(values.shape[2:])
        problem = choose.Problem.of(
            f"convolution/{product}",
            f"{_name(values)} {_name(dense)} {order}",
            # Images of about one size take about as long for each place.
            (*weight.shape, *numbers, places.bit_length()),
            values.shape[0] * places,
            self._delta.nonzero_share,
            1.0 if kept is None else kept.share,
        )
        kernel = choose.chooser().best(problem, allowed, self._anew(compute))
        return None if kernel == "dense" else kernel

    def _sparse(self, kernel: str, geometry: Geometry) -> "Sparse | None":
        """δ̃'s non-zeros, listed once, where the kernel visits them alone."""
        from retrograde.kernels import convolution

        if kernel not in convolution.SKIPPING:
            return None
        if self._compacted is None:
            self._compacted = convolution.compact(self._delta, geometry)
        return self._compacted


def _known(values: Tensor, dense: Tensor) -> bool:
    """Whether there is more than the reference for these operands."""
    return (
        values.device.type == dense.device.type == "cpu"
        and min(values.numel(), dense.numel()) > 0
        and compiled.usable()
    )


def _some(kept: "Kept | None") -> "Kept":
    assert kept is not None
    return kept


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _dense(operand: Tensor | Quantised) -> Tensor:
    return operand.dense() if isinstance(operand, Quantised) else operand


def _convolution_kernels() -> Any:
    from retrograde.kernels import convolution  # where it is needed: a compiler comes with it

    return convolution


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
        order = torch.channels_last if lies_channels_last(delta) else torch.contiguous_format
        return Delta(found.values.contiguous(memory_format=order), step, found.zeros), found.largest
    if bits is not None and _numba_takes(delta):
        from retrograde.kernels import cpu

        found = cpu.nsd(delta.float(), step, key, bits)
        return Delta(found.values, step, found.zeros), found.largest
    quantised = Delta(reference.nsd(delta, step, key, bits), step)
    # Whoever holds a share of zeros goes by every count.
    quantised.count()
    return quantised, int(quantised.values.abs().max())


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

"""The single kernels as registered torch ops, to be used alone, eager or under ``torch.compile(fullgraph=True)``.

    q = nsd(δ, Δ, key)                          integer levels of δ̃ = Δ q, with E[δ̃] = δ
    dx = delta_matmul(q, Δ, W) = δ̃ W            dW = delta_outer(q, Δ, x) = δ̃ᵀ x
    convolution_input_grad, convolution_weight_grad: the same two products over patches

Each product takes either levels with their step or a dense gradient with ``step=None``, and is computed by the kernel
with the least predicted time (`retrograde.kernels.dispatch`). Compilers see one opaque call each.

The functions below are what to call; ``torch.ops.retrograde.*`` take the same arguments, but for two things:

- ``key`` is an unsigned 64-bit number here, and there the signed one of the same bits: an op knows no other integers.
- ``step`` is a ``Scalar`` there, not a ``float``: only the former may be a number that compiled code computes itself,
  as in ``step = (scale * δ.std()).item()`` (with ``torch._dynamo.config.capture_scalar_outputs``). A step that comes
  from outside is a constant to the compiler, which compiles anew for each value. A key is not.

*No derivatives.* These are steps of a backward pass, and rounding has no useful derivative. Results require grad where
operands do, and going backward through them raises `DoubleBackwardError`; code compiled with such operands raises it
when it is compiled, as its backward pass is compiled along. A backward pass records no gradients anyway; elsewhere,
detach the operands. int8 levels never require grad, like any rounding to integers.

*Memory order.* What compilers are promised holds in eager execution too: levels, and gradients for a convolution's
input, are channels-last where the gradient they come from is; everything else is contiguous.

Reference: Wiedemann, Mehari, Kepp, Samek, *Dithered backprop*, arXiv 2004.04729.
"""

import math
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from retrograde.errors import DoubleBackwardError, OptionError
from retrograde.kernels import dispatch
from retrograde.kernels.cpu_memory import lies_channels_last
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import Products
from retrograde.kernels.geometry import Geometry
from retrograde.kernels.work import convolution_flops

PRECISIONS = ("float32", "bfloat16", "int8")
"""What the operands of a linear product may be rounded to."""

# A fragment: the namespace belongs to the layers' boundary, and either module may be imported first, or alone.
_LIBRARY = torch.library.Library("retrograde", "FRAGMENT")
_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, int groups"
_WORD = 1 << 64
_LEAST_BITS, _MOST_BITS = 2, 8


# What is called.


def nsd(delta: Tensor, step: float, key: int, bits: int | None = 8) -> Tensor:
    """Integer levels of the dithered gradient: unbiased stochastic rounding of δ to multiples of the step.

    Equation (2) of `retrograde.maths.dither`, bit for bit that of `retrograde.kernels.reference.nsd`: the noise is a
    function of the key and of the entry's index alone.

    Args:
        delta: δ, floating point, any shape, every entry finite.
        step: Δ > 0. Levels saturate, and are biased, where it is less than max|δ| / (2^(bits−1) − 1):
            `retrograde.maths.dither.step_size` gives one that is not.
        key: unsigned 64-bit number, see `retrograde.maths.philox.mix_key`: new noise needs a new key.
        bits: width of the signed levels, 2 to 8; None leaves them unbounded.

    Returns:
        q with the shape of `delta`: int8, or for unbounded levels float32 (float64 for a δ of that dtype).

    Raises:
        OptionError: a step that is not positive and finite in the precision of the division, a `bits` or `key` out of
            range, a `delta` that is not floating point or not finite.

    Source: arXiv 2004.04729.
    """
    if not 0 <= key < _WORD:
        raise OptionError(
            f"nsd: key={key} is no unsigned 64-bit number. Make one with retrograde.maths.philox.mix_key."
        )
    return torch.ops.retrograde.nsd(delta, step, key - _WORD if key >= _WORD // 2 else key, bits)


def delta_matmul(values: Tensor, step: float | None, weight: Tensor, precision: str = "float32") -> Tensor:
    """``dx = δ̃ W``: the gradient of a linear layer for its input.

    Args:
        values: δ̃ / step, (…, o): int8 or floating-point levels, or a dense gradient.
        step: of the levels, positive; None for a dense gradient.
        weight: W, (o, i), floating point.
        precision: the least precision that the operands may be rounded to, one of `PRECISIONS`; a dense gradient is
            never rounded.

    Returns:
        (…, i) in the dtype of `weight`.

    Raises:
        OptionError: shapes that do not fit, a dtype, step or precision that there is not.

    Source: arXiv 2004.04729.
    """
    return torch.ops.retrograde.delta_matmul(values, step, weight, precision)


def delta_outer(values: Tensor, step: float | None, x: Tensor, precision: str = "float32") -> Tensor:
    """``dW = δ̃ᵀ x``: the gradient of a linear layer for its weight, summed over all leading dimensions.

    Args:
        values: δ̃ / step, (…, o): int8 or floating-point levels, or a dense gradient.
        step: of the levels, positive; None for a dense gradient.
        x: the layer's input, (…, i), floating point.
        precision: as for `delta_matmul`.

    Returns:
        (o, i) in the dtype of `x`.

    Raises:
        OptionError: as `delta_matmul`.

    Source: arXiv 2004.04729.
    """
    return torch.ops.retrograde.delta_outer(values, step, x, precision)


def convolution_input_grad(
    values: Tensor,
    step: float | None,
    weight: Tensor,
    input_shape: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
) -> Tensor:
    """The gradient of a convolution, plain or transposed, in one to three dimensions, for its input.

    Args:
        values: δ̃ / step, (N, C_out, spatial'…): int8 or floating-point levels, or a dense gradient.
        step: of the levels, positive; None for a dense gradient.
        weight: (C_out, C_in/groups, kernel…), or (C_in, C_out/groups, kernel…) when transposed; floating point.
        input_shape: (N, C_in, spatial…).
        stride: one number, or one for each spatial dimension, as the following three.
        padding: explicit, with zeros.
        dilation: of the kernel.
        transposed: whether the convolution is a transposed one.
        output_padding: of a transposed convolution.
        groups: of channels.

    Returns:
        `input_shape` in the dtype of `weight`. Operands are never rounded.

    Raises:
        OptionError: shapes that do not fit, a dtype or step that there is not.

    Source: arXiv 2004.04729.
    """
    each = [_each(value, values.dim() - 2) for value in (stride, padding, dilation, output_padding)]
    return torch.ops.retrograde.convolution_input_grad(
        values, step, weight, input_shape, *each[:3], transposed, each[3], groups
    )


def convolution_weight_grad(
    values: Tensor,
    step: float | None,
    x: Tensor,
    weight_shape: Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
) -> Tensor:
    """The gradient of a convolution, plain or transposed, in one to three dimensions, for its weight.

    Args:
        values: δ̃ / step, (N, C_out, spatial'…): int8 or floating-point levels, or a dense gradient.
        step: of the levels, positive; None for a dense gradient.
        x: the layer's input, (N, C_in, spatial…), floating point.
        weight_shape: (C_out, C_in/groups, kernel…), or (C_in, C_out/groups, kernel…) when transposed.
        stride: this and the rest as for `convolution_input_grad`.
        padding: explicit, with zeros.
        dilation: of the kernel.
        transposed: whether the convolution is a transposed one.
        output_padding: of a transposed convolution.
        groups: of channels.

    Returns:
        `weight_shape` in the dtype of `x`. Operands are never rounded.

    Raises:
        OptionError: as `convolution_input_grad`.

    Source: arXiv 2004.04729.
    """
    each = [_each(value, values.dim() - 2) for value in (stride, padding, dilation, output_padding)]
    return torch.ops.retrograde.convolution_weight_grad(
        values, step, x, weight_shape, *each[:3], transposed, each[3], groups
    )


def _each(value: int | Sequence[int], dimensions: int) -> list[int]:
    return [value] * dimensions if isinstance(value, int) else list(value)


# What runs: below autograd, so nothing here is recorded.


def _nsd(delta: Tensor, step: float, key: int, bits: int | None) -> Tensor:
    _check_nsd(delta, bits)
    rounded = torch.tensor(step, dtype=_wide(delta), device="cpu").item()
    if not 0 < rounded < math.inf:
        raise OptionError(
            f"nsd: step={step} is {rounded} in {_wide(delta)}, where it must be positive and finite. Leave a gradient "
            "that is all zeros, or not finite, as it is."
        )
    if delta.numel() == 0:
        return _fake_nsd(delta, step, key, bits)
    peak = float(torch.stack(torch.aminmax(delta)).abs().max())
    if not math.isfinite(peak):
        raise OptionError(
            f"nsd: the largest magnitude of the gradient is {peak}, for which there is no level. Look at it first "
            "(retrograde.kernels.dispatch.statistics), and leave a gradient that is not finite as it is."
        )
    found, _ = dispatch.nsd(delta, float(step), key % _WORD, bits)
    return found.values.contiguous(memory_format=_order(delta))


def _delta_matmul(values: Tensor, step: float | None, weight: Tensor, precision: str = "float32") -> Tensor:
    shape = _matmul_shape(values, step, weight, precision)
    return (
        _products("delta_matmul", values, step, precision).linear_input_grad(weight, shape).value.contiguous()
    )


def _delta_outer(values: Tensor, step: float | None, x: Tensor, precision: str = "float32") -> Tensor:
    _outer_shape(values, step, x, precision)
    return _products("delta_outer", values, step, precision).linear_weight_grad(x).value.contiguous()


def _convolution_input_grad(
    values: Tensor, step: float | None, weight: Tensor, input_shape: Sequence[int], *geometry: Any
) -> Tensor:
    name = "convolution_input_grad"
    _check_convolution(name, values, step, weight, input_shape, weight.shape, Geometry.of(*geometry))
    products = _products(name, values, step)
    found = products.convolution_input_grad(weight, tuple(input_shape), Geometry.of(*geometry)).value
    return found.contiguous(memory_format=_order(values))


def _convolution_weight_grad(
    values: Tensor, step: float | None, x: Tensor, weight_shape: Sequence[int], *geometry: Any
) -> Tensor:
    name = "convolution_weight_grad"
    _check_convolution(name, values, step, x, x.shape, weight_shape, Geometry.of(*geometry))
    # The values of the weight play no part: only its shape is read.
    weight = x.new_empty(tuple(weight_shape))
    products = _products(name, values, step)
    return products.convolution_weight_grad(x, weight, Geometry.of(*geometry)).value.contiguous()


def _products(name: str, values: Tensor, step: float | None, precision: str = "float32") -> Products:
    if step is not None and not 0 < step < math.inf:
        raise OptionError(
            f"{name}: step={step} is not positive and finite. Give the step that the levels were made with, or None "
            "for a dense gradient."
        )
    return Products(Delta(values, None if step is None else float(step)), precision, wanted=1)


# What compilers are told: shapes, dtypes and memory order, found from the operands' alone.


def _fake_nsd(delta: Tensor, step: float, key: int, bits: int | None) -> Tensor:
    _check_nsd(delta, bits)
    dtype = _wide(delta) if bits is None else torch.int8
    return torch.empty(delta.shape, dtype=dtype, device=delta.device, memory_format=_order(delta))


def _fake_matmul(values: Tensor, step: float | None, weight: Tensor, precision: str = "float32") -> Tensor:
    return weight.new_empty(_matmul_shape(values, step, weight, precision))


def _fake_outer(values: Tensor, step: float | None, x: Tensor, precision: str = "float32") -> Tensor:
    return x.new_empty(_outer_shape(values, step, x, precision))


def _fake_input_grad(
    values: Tensor, step: float | None, weight: Tensor, input_shape: Sequence[int], *geometry: Any
) -> Tensor:
    g = Geometry.of(*geometry)
    _check_convolution("convolution_input_grad", values, step, weight, input_shape, weight.shape, g)
    return torch.empty(
        tuple(input_shape), dtype=weight.dtype, device=weight.device, memory_format=_order(values)
    )


def _fake_weight_grad(
    values: Tensor, step: float | None, x: Tensor, weight_shape: Sequence[int], *geometry: Any
) -> Tensor:
    g = Geometry.of(*geometry)
    _check_convolution("convolution_weight_grad", values, step, x, x.shape, weight_shape, g)
    return x.new_empty(tuple(weight_shape))


def _wide(delta: Tensor) -> torch.dtype:
    """The precision in which δ is divided by the step."""
    return torch.float64 if delta.dtype == torch.float64 else torch.float32


def _order(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if lies_channels_last(tensor) else torch.contiguous_format


# What is refused. Nothing here reads a step: compiled code may not know it yet.


def _check_nsd(delta: Tensor, bits: int | None) -> None:
    if not delta.is_floating_point():
        raise OptionError(f"nsd: delta is {delta.dtype}. Give a gradient of floating-point numbers.")
    if bits is not None and not _LEAST_BITS <= bits <= _MOST_BITS:
        raise OptionError(
            f"nsd: bits={bits}, and levels are signed integers of {_LEAST_BITS} to {_MOST_BITS} bits. Give a width in "
            "that range, or None for unbounded levels."
        )


def _check_operands(name: str, values: Tensor, step: float | None, dense: Tensor) -> None:
    if values.dtype != torch.int8 and not values.is_floating_point():
        raise OptionError(f"{name}: values are {values.dtype}. Give int8 levels, or floating-point numbers.")
    if values.dtype == torch.int8 and step is None:
        raise OptionError(
            f"{name}: values are int8 levels without a step (step=None says that a gradient is dense). Give their step."
        )
    if not dense.is_floating_point():
        raise OptionError(f"{name}: the other operand is {dense.dtype}. Give floating-point numbers.")


def _check_linear(name: str, values: Tensor, step: float | None, dense: Tensor, precision: str) -> None:
    _check_operands(name, values, step, dense)
    if precision not in PRECISIONS:
        raise OptionError(
            f"{name}: there is no precision {precision!r}. Give one of {', '.join(PRECISIONS)}."
        )


def _matmul_shape(values: Tensor, step: float | None, weight: Tensor, precision: str) -> tuple[int, ...]:
    _check_linear("delta_matmul", values, step, weight, precision)
    if values.dim() < 1 or weight.dim() != 2 or values.shape[-1] != weight.shape[0]:
        raise OptionError(
            f"delta_matmul: values of shape {tuple(values.shape)} do not multiply a weight of shape "
            f"{tuple(weight.shape)}. Give (…, o) and (o, i)."
        )
    return (*values.shape[:-1], weight.shape[1])


def _outer_shape(values: Tensor, step: float | None, x: Tensor, precision: str) -> tuple[int, ...]:
    _check_linear("delta_outer", values, step, x, precision)
    if values.dim() < 1 or values.dim() != x.dim() or values.shape[:-1] != x.shape[:-1]:
        raise OptionError(
            f"delta_outer: values of shape {tuple(values.shape)} and x of shape {tuple(x.shape)} have other rows. Give "
            "(…, o) and (…, i) with the same leading dimensions."
        )
    return values.shape[-1], x.shape[-1]


def _check_convolution(
    name: str,
    values: Tensor,
    step: float | None,
    dense: Tensor,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    g: Geometry,
) -> None:
    _check_operands(name, values, step, dense)
    shapes = f"values {tuple(values.shape)}, input {tuple(x_shape)} and weight {tuple(weight_shape)}"
    spatial = len(x_shape) - 2
    per_dimension = (g.stride, g.padding, g.dilation, g.output_padding)
    if (
        not 1 <= spatial <= 3
        or not values.dim() == len(weight_shape) == len(x_shape)
        or any(len(given) != spatial for given in per_dimension)
    ):
        raise OptionError(
            f"{name}: {shapes} with {g} are not those of one convolution. Give (N, C_out, spatial…), (N, C_in, "
            "spatial…) and (C_out, C_in/groups, kernel…) with the same one to three spatial dimensions, a single "
            "image as N = 1, and one number for each of them in the rest."
        )
    if (
        min(*g.stride, *g.dilation, g.groups) < 1
        or min(*g.padding, *g.output_padding) < 0
        or (any(g.output_padding) and not g.transposed)
    ):
        raise OptionError(
            f"{name}: there is no convolution with {g}. Give stride, dilation and groups from 1 up, padding from 0 up, "
            "and an output padding to transposed convolutions alone."
        )
    inputs, outputs = weight_shape[1] * g.groups, weight_shape[0]
    if g.transposed:
        inputs, outputs = outputs, inputs
    expected = (x_shape[0], outputs, *_output_sizes(x_shape[2:], weight_shape[2:], g))
    if x_shape[1] != inputs or weight_shape[0] % g.groups or tuple(values.shape) != expected:
        raise OptionError(
            f"{name}: {shapes} do not fit together: with {g} this weight takes {inputs} channels to {outputs}, so "
            f"values would be {expected}. Give the shapes of one layer, and its own geometry."
        )


def _output_sizes(sizes: Sequence[int], kernel: Sequence[int], g: Geometry) -> list[int]:
    found: list[int] = []
    for d, size in enumerate(sizes):
        reach = g.dilation[d] * (kernel[d] - 1) + 1 - 2 * g.padding[d]
        if g.transposed:
            found.append((size - 1) * g.stride[d] + reach + g.output_padding[d])
        else:
            found.append((size - reach) // g.stride[d] + 1)
    return found


# Registration.


def _register(name: str, arguments: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    def refuse(ctx: Any, *gradients: Tensor | None) -> None:
        raise DoubleBackwardError(
            f"a derivative of retrograde::{name} was asked for: it is a step of a backward pass, with random rounding "
            "before it, and has none. Call it on detached tensors, or under torch.no_grad()."
        )

    # Exact strides: the order that the fake read off its operands is then the one that they come in.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _LIBRARY.define(f"{name}({arguments}) -> Tensor", tags=tags)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"retrograde::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"retrograde::{name}", refuse, lib=_LIBRARY)


_register("nsd", "Tensor delta, Scalar step, SymInt key, int? bits", _nsd, _fake_nsd)
_register(
    "delta_matmul",
    'Tensor values, Scalar? step, Tensor weight, str precision="float32"',
    _delta_matmul,
    _fake_matmul,
)
_register(
    "delta_outer", 'Tensor values, Scalar? step, Tensor x, str precision="float32"', _delta_outer, _fake_outer
)
_register(
    "convolution_input_grad",
    f"Tensor values, Scalar? step, Tensor weight, SymInt[] input_shape, {_GEOMETRY}",
    _convolution_input_grad,
    _fake_input_grad,
)
_register(
    "convolution_weight_grad",
    f"Tensor values, Scalar? step, Tensor x, SymInt[] weight_shape, {_GEOMETRY}",
    _convolution_weight_grad,
    _fake_weight_grad,
)


# torch's FLOP counter sees the dense-equivalent work.


@register_flop_formula([torch.ops.retrograde.delta_matmul, torch.ops.retrograde.delta_outer])
def _linear_formula(  # pyright: ignore[reportUnusedFunction]
    values_shape: Sequence[int], step: Any, dense_shape: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return 2 * prod(values_shape) * dense_shape[-1]


@register_flop_formula(torch.ops.retrograde.convolution_input_grad)
def _input_grad_formula(  # pyright: ignore[reportUnusedFunction]
    values_shape: Sequence[int],
    step: Any,
    weight_shape: Sequence[int],
    input_shape: Sequence[int],
    *geometry: Any,
    **kwargs: Any,
) -> int:
    return convolution_flops(input_shape, weight_shape, values_shape, Geometry.of(*geometry))


@register_flop_formula(torch.ops.retrograde.convolution_weight_grad)
def _weight_grad_formula(  # pyright: ignore[reportUnusedFunction]
    values_shape: Sequence[int],
    step: Any,
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *geometry: Any,
    **kwargs: Any,
) -> int:
    return convolution_flops(input_shape, weight_shape, values_shape, Geometry.of(*geometry))

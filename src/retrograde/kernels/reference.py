"""Reference kernels: plain torch, every device and dtype, the yardstick of the fast ones.

Levels are turned back into a dense tensor and multiplied as such, so zeros cost as much as other values.

Index letters: ``n`` rows (all leading dimensions flattened), ``o`` outputs, ``i`` inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from retrograde.kernels.delta import Delta
from retrograde.kernels.geometry import Geometry
from retrograde.maths import dither
from retrograde.maths.philox import uniform

NAME = "reference"


def nsd(delta: Tensor, step: float, key: int, bits: int | None = 8) -> Tensor:
    """Integer levels of the dithered gradient (`retrograde.maths.dither`), noise from `key`."""
    return dither.levels(delta, step, uniform(key, delta.shape, delta.device), bits)


def linear_input_grad(delta: Delta, weight: Tensor, input_shape: Sequence[int]) -> Tensor:
    """``dx = δ̃ W``.

    Args:
        delta: δ̃ of shape (…, o).
        weight: (o, i).
        input_shape: (…, i).
    """
    found = _scaled(torch.mm(_factor(_rows(delta.values), delta, weight.dtype), weight), delta)
    return found if len(input_shape) == 2 else found.view(tuple(input_shape))


def linear_weight_grad(delta: Delta, x: Tensor) -> Tensor:
    """``dW = δ̃ᵀ x`` of shape (o, i), for δ̃ of shape (…, o) and x of shape (…, i)."""
    return _scaled(torch.mm(_factor(_rows(delta.values), delta, x.dtype).t(), _rows(x)), delta)


def convolution_input_grad(
    delta: Delta, weight: Tensor, input_shape: Sequence[int], geometry: Geometry
) -> Tensor:
    """Gradient of a (transposed, grouped) convolution for its input.

    Args:
        delta: δ̃ of shape (N, C_out, spatial…).
        weight: (C_out, C_in/groups, kernel…), or (C_in, C_out/groups, kernel…) when transposed.
        input_shape: (N, C_in, spatial…).
        geometry: stride, padding and the rest.
    """
    # The values of x play no part in dx: only its shape is read.
    x = weight.new_empty(()).expand(tuple(input_shape))
    dx, _, _ = _convolution_backward(delta, x, weight, geometry, [True, False, False])
    return _scaled(dx, delta)


def convolution_weight_grad(delta: Delta, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Gradient of a (transposed, grouped) convolution for its weight, shaped as `weight`."""
    _, dw, _ = _convolution_backward(delta, x, weight, geometry, [False, True, False])
    return _scaled(dw, delta)


def convolution_grads(delta: Delta, x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Both gradients of a convolution in one call, which shares what it does to δ̃."""
    dx, dw, _ = _convolution_backward(delta, x, weight, geometry, [True, True, False])
    return _scaled(dx, delta), _scaled(dw, delta)


def _convolution_backward(
    delta: Delta, x: Tensor, weight: Tensor, geometry: Geometry, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(
        _factor(delta.values, delta, x.dtype),
        x,
        weight,
        None,
        list(geometry.stride),
        list(geometry.padding),
        list(geometry.dilation),
        geometry.transposed,
        list(geometry.output_padding),
        geometry.groups,
        mask,
    )


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _factor(values: Tensor, delta: Delta, dtype: torch.dtype) -> Tensor:
    """δ̃'s factor in a product: the bare levels, exact even in bfloat16. They and their sums would overflow float16."""
    if dtype == torch.float16 and delta.step is not None:
        return Delta(values, delta.step).dense(dtype)
    # Small layers are called often: each call that does nothing counts.
    return values if values.dtype is dtype else values.to(dtype)


def _scaled(product: Tensor, delta: Delta) -> Tensor:
    """The step is applied once, to the product."""
    return product if delta.step is None or product.dtype == torch.float16 else product.mul_(delta.step)

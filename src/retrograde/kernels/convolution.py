"""The products of a convolution's backward pass, by every kernel.

- ``dense``: torch's own;
- ``skip``: the non-zeros of δ̃ alone, in float32 (`retrograde.kernels.cpu_convolution`);
- ``bfloat16``: torch's own on levels, which bfloat16 holds exactly, and the other operand rounded to it, as is the
  result.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from retrograde.kernels import cpu_convolution, reference
from retrograde.kernels.cpu_convolution import Sparse
from retrograde.kernels.delta import Delta
from retrograde.kernels.geometry import Geometry

KERNELS = ("dense", "skip", "bfloat16")
SKIPPING = ("skip",)
"""Those that visit the non-zeros alone."""
PRECISION = {"bfloat16": "bfloat16"}
"""What a kernel rounds to; others leave the operand's own precision."""


def supports(delta: Delta, dense: Tensor, weight: Tensor, x_shape: Sequence[int], geometry: Geometry) -> bool:
    """Whether ``skip`` can serve for a product with `dense`, which is x or the weight."""
    return dense.dtype == torch.float32 and cpu_convolution.supports(
        delta.values, weight, tuple(x_shape), geometry
    )


def compact(delta: Delta, geometry: Geometry) -> Sparse:
    """The non-zeros of δ̃, listed once for both products."""
    return cpu_convolution.compact(delta.values, delta.step, geometry.groups)


def input_grad(
    kernel: str,
    delta: Delta,
    weight: Tensor,
    input_shape: Sequence[int],
    geometry: Geometry,
    sparse: Sparse | None = None,
) -> Tensor:
    """`reference.convolution_input_grad` by `kernel`; `sparse` is δ̃ as `compact` gives it, where it is known."""
    if kernel == "dense":
        return reference.convolution_input_grad(delta, weight, input_shape, geometry)
    if kernel == "bfloat16":
        bare = Delta(delta.values)
        return _widened(
            reference.convolution_input_grad(bare, weight.bfloat16(), input_shape, geometry), delta
        )
    found = compact(delta, geometry) if sparse is None else sparse
    return cpu_convolution.convolution_input_grad(found, weight, tuple(input_shape), geometry)


def weight_grad(
    kernel: str, delta: Delta, x: Tensor, weight: Tensor, geometry: Geometry, sparse: Sparse | None = None
) -> Tensor:
    """`reference.convolution_weight_grad` by `kernel`."""
    if kernel == "dense":
        return reference.convolution_weight_grad(delta, x, weight, geometry)
    if kernel == "bfloat16":
        bare, half = Delta(delta.values), x.bfloat16()
        return _widened(reference.convolution_weight_grad(bare, half, weight.bfloat16(), geometry), delta)
    found = compact(delta, geometry) if sparse is None else sparse
    return cpu_convolution.convolution_weight_grad(found, x, tuple(weight.shape), geometry)


def both(delta: Delta, x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """dx and dW by ``bfloat16``, in one call, which shares what it does to δ̃."""
    dx, dw = reference.convolution_grads(Delta(delta.values), x.bfloat16(), weight.bfloat16(), geometry)
    return _widened(dx, delta), _widened(dw, delta)


def _widened(product: Tensor, delta: Delta) -> Tensor:
    wide = product.float()
    return wide if delta.step is None else wide.mul_(delta.step)

"""Backward products of a 2-D convolution on a CPU that visit the non-zeros of δ̃ alone.

Both products are sums of rows, and nothing else: one non-zero of δ̃ adds a contiguous row of the dense operand, times
itself, to a tile of the result that stays in registers. For ``dx`` the rows are the weight's, for ``dW`` the padded
input's. Each sum has one order, so the bits of both are the same on any number of threads. NaN and Inf propagate from
and to the non-zeros of δ̃; a zero of δ̃ is skipped whatever it would have met.

Index letters: ``n`` images, ``g`` groups, ``o`` outputs and ``c`` inputs of a group, ``kh kw`` kernel, ``p`` pixels of
the output. A *plane* is one group of one image.
"""

import torch
from torch import Tensor

from retrograde.kernels.cpu_convolution_input import convolution_input_grad
from retrograde.kernels.cpu_convolution_lists import Sparse, compact
from retrograde.kernels.cpu_convolution_weight import CACHE, convolution_weight_grad
from retrograde.kernels.geometry import Geometry

__all__ = ["Sparse", "compact", "convolution_input_grad", "convolution_weight_grad", "supports"]


def supports(values: Tensor, weight: Tensor, x_shape: tuple[int, ...], geometry: Geometry) -> bool:
    """Whether these kernels can serve; otherwise take `retrograde.kernels.reference`.

    Args:
        values: int8 levels or float32 δ, (N, C_out, H', W').
        weight: float32, (C_out, C_in/groups, kh, kw); the layer's input has its dtype.
        x_shape: (N, C_in, H, W).
        geometry: of an ordinary 2-D convolution.
    """
    if geometry.transposed or len(geometry.stride) != 2 or values.dim() != 4 or len(x_shape) != 4:
        return False
    if values.dtype not in (torch.int8, torch.float32) or weight.dtype != torch.float32:
        return False
    if values.device.type != "cpu" or weight.device.type != "cpu" or min(values.numel(), weight.numel()) == 0:
        return False
    # Indices are 32-bit numbers, counted in floats.
    h, w = (x_shape[2] + 2 * geometry.padding[0], x_shape[3] + 2 * geometry.padding[1])
    return max(x_shape[1] * h * w + CACHE, 32 * weight.numel(), values.shape[1:].numel()) < 2**31

"""A fixed budget of rows of a layer's input: what the weight multiplies, whatever the layer's kind.

A row of a linear layer's input is one example's features; of a convolution's, one patch. Statistics need a few thousand
of them, never all: patches of a whole batch would be larger than the batch by the size of the kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from retrograde.kernels.geometry import Geometry

_GOLDEN = 0.6180339887498949


def sample_rows(x: Tensor, weight: Tensor, geometry: Geometry | None, budget: int) -> Tensor:
    """Rows of the input, spread evenly over examples and positions, the same for the same shapes.

    Args:
        x: x̂, (…, i) or (N, C_in, spatial…).
        weight: the layer's weight; only its shape is read.
        geometry: None for a linear layer.
        budget: the most rows that are taken.

    Returns:
        (groups, rows, d) float32 or float64: d = i for a linear layer, C_in/groups · kernel for a convolution, and
        C_in/groups for a transposed one, whose weight sees single pixels of its input.
    """
    if geometry is None:
        rows = x.reshape(-1, x.shape[-1])
        return _wide(rows[_indices(rows.shape[0], budget, x.device)]).unsqueeze(0)
    if geometry.transposed:
        pixels = x.flatten(2).transpose(1, 2).reshape(-1, x.shape[1])
        pixels = pixels[_indices(pixels.shape[0], budget, x.device)]
        return _wide(pixels).unflatten(1, (geometry.groups, -1)).transpose(0, 1).contiguous()
    return _patches(x, weight.shape[2:], geometry, budget)


def weight_matrix(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """The weight as the matrix that multiplies the rows of `sample_rows`.

    Args:
        weight: (o, i), or a convolution's kernel in torch's layout.
        groups: of the convolution; 1 for a linear layer.
        transposed: whether the convolution is a transposed one.

    Returns:
        (groups, o, d); a transposed convolution has every output channel once for each place of its kernel.
    """
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    return matrix.mT if transposed else matrix


def weight_from_matrix(matrix: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    """The inverse of `weight_matrix`, for a weight of `shape`."""
    return (matrix.mT if transposed else matrix).reshape(shape)


def _patches(x: Tensor, kernel: torch.Size, geometry: Geometry, budget: int) -> Tensor:
    padded = F.pad(x, [side for p in reversed(geometry.padding) for side in (p, p)])
    spatial = len(kernel)
    places = [
        (size - dilation * (k - 1) - 1) // stride + 1
        for size, k, stride, dilation in zip(
            padded.shape[2:], kernel, geometry.stride, geometry.dilation, strict=True
        )
    ]
    flat = _indices(x.shape[0] * torch.Size(places).numel(), budget, x.device)
    # From a flat position to (example, place along each dimension), then to every pixel under the kernel there.
    coordinates: list[Tensor] = []
    for size in reversed(places):
        coordinates.append(flat % size)
        flat = flat // size
    index: list[Tensor] = [flat.view(-1, *[1] * spatial)]
    for axis, place in enumerate(reversed(coordinates)):
        offsets = torch.arange(kernel[axis], device=x.device) * geometry.dilation[axis]
        pixels = (place * geometry.stride[axis]).view(-1, *[1] * spatial) + offsets.view(
            *[-1 if a == axis else 1 for a in range(spatial)]
        )
        index.append(pixels)
    # Channels last for the gather: (rows, kernel…, C_in), then (groups, rows, C_in/groups · kernel).
    patches = padded.movedim(1, -1)[tuple(index)].movedim(-1, 1)
    grouped = patches.unflatten(1, (geometry.groups, -1)).transpose(0, 1)
    return _wide(grouped.flatten(2))


def _indices(total: int, budget: int, device: torch.device) -> Tensor:
    if total <= budget:
        return torch.arange(total, device=device)
    # Multiples of the golden ratio fall evenly and, unlike a fixed stride, in step with no image width.
    fractions = (torch.arange(budget, device=device, dtype=torch.float64) + 0.5) * _GOLDEN % 1.0
    return (fractions * total).long()


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()

"""The projected products of a layer, for every layer kind, and the matrix that its weight is.

Index letters: ``g`` groups, ``o`` outputs of a group, ``d`` inputs of a group (patches for a convolution, pixels for a
transposed one), ``k`` rank.
"""

from math import prod

import torch
from torch import Tensor

from retrograde.accounting.flops import convolution_flops, linear_flops
from retrograde.kernels.dispatch import Done, Products
from retrograde.kernels.geometry import Geometry


def keep(x: Tensor, basis: Tensor, kernel: tuple[int, ...], geometry: Geometry | None) -> Tensor:
    """x̂U: what stays of the input.

    Args:
        x: x̂, (…, i) or (N, C_in, spatial…).
        basis: U (g, d, k), of x's dtype.
        kernel: size of the convolution's kernel; empty for a linear layer.
        geometry: None for a linear layer.

    Returns:
        (…, k) for a linear layer; (N, g·k, spatial'…) for a convolution, its input convolved with the columns of U as
        filters; (N, g·k, spatial…) for a transposed one.
    """
    if geometry is None:
        return x @ basis[0]
    if geometry.transposed:
        pixels = x.flatten(2).unflatten(1, (geometry.groups, -1))
        return (basis.mT @ pixels).flatten(1, 2).unflatten(2, x.shape[2:])
    filters = basis.mT.reshape(basis.shape[0] * basis.shape[2], -1, *kernel)
    none = (0,) * len(kernel)
    return torch.convolution(
        x,
        filters,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        none,
        geometry.groups,
    )


def product(
    products: Products, kept: Tensor, basis: Tensor, weight: Tensor, geometry: Geometry | None
) -> tuple[Tensor, Done]:
    """``(δ̃ᵀ(x̂U)) Uᵀ``, shaped as `weight`, and how the product with δ̃ was computed.

    Args:
        products: of δ̃.
        kept: what `keep` returned.
        basis: the U that it was kept with, of the same dtype.
        weight: the layer's weight; only its shape is read.
        geometry: None for a linear layer.
    """
    if geometry is None:
        factor, done = products.linear_weight_grad(kept)
        return factor @ basis[0].mT, done
    groups, _, rank = basis.shape
    if geometry.transposed:
        narrow = kept.new_empty(groups * rank, *weight.shape[1:])
        factor, done = products.convolution_weight_grad(kept, narrow, geometry, joint=False)
        return (basis @ factor.reshape(groups, rank, -1)).reshape(weight.shape), done
    # The patches are gone into x̂U: what is left is a convolution of single pixels.
    ones = (1,) * (weight.dim() - 2)
    none = (0,) * len(ones)
    pixelwise = Geometry(ones, none, ones, False, none, groups)
    narrow = kept.new_empty(weight.shape[0], rank, *ones)
    factor, done = products.convolution_weight_grad(kept, narrow, pixelwise, joint=False)
    return (factor.reshape(groups, -1, rank) @ basis.mT).reshape(weight.shape), done


def flops(
    delta_shape: torch.Size, kept: Tensor, basis: Tensor, weight: Tensor, geometry: Geometry | None
) -> tuple[int, int]:
    """FLOPs of `product` with those of `keep`: (work whose operand is δ, work without it)."""
    groups, d, rank = basis.shape
    wide = kept.numel() // (groups * rank) * groups
    expansion = linear_flops(rank, weight.numel() // d, d)
    if geometry is not None and geometry.transposed:
        narrow = (groups * rank, *weight.shape[1:])
        factor = convolution_flops(kept.shape, narrow, delta_shape, geometry)
    else:
        factor = linear_flops(wide, weight.shape[0] // groups, rank)
    return factor, linear_flops(wide, rank, d) + expansion


def as_matrix(weight: Tensor, geometry: Geometry | None) -> Tensor:
    """The weight, or what is shaped like it, as (g, o, d)."""
    if geometry is None:
        return weight.unsqueeze(0)
    if geometry.transposed:
        return weight.reshape(geometry.groups, -1, prod(weight.shape[1:])).mT
    return weight.reshape(geometry.groups, weight.shape[0] // geometry.groups, -1)


def from_matrix(matrix: Tensor, weight: Tensor, geometry: Geometry | None) -> Tensor:
    """The inverse of `as_matrix`, shaped as `weight`."""
    turned = matrix.mT if geometry is not None and geometry.transposed else matrix
    return turned.reshape(weight.shape)

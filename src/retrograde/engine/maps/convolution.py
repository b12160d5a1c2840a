"""``(N, C_in, spatial…) → (N, C_out, spatial'…)``: convolutions in one to three dimensions, in groups or not.

A row of the input is a patch of C_in/groups · kernel values; patches are never formed but for a few that are sampled.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrograde.engine.maps.base import (
    Gradients,
    LayerKind,
    Map,
    Widening,
    register_layer,
    register_map,
    spread,
    wide,
)
from retrograde.kernels.dispatch import Products
from retrograde.kernels.geometry import Geometry
from retrograde.kernels.int8 import Quantised
from retrograde.kernels.work import Work, convolution_flops

_DIRECT: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True)
class SpatialMap(Map):
    """What convolutions and transposed ones have in common."""

    geometry: Geometry

    @property
    def groups(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of channels."""
        return self.geometry.groups

    @property
    def numbers(self) -> tuple[int, ...]:
        """Stride, padding, dilation and output padding of each dimension, then the groups."""
        g = self.geometry
        return (*g.stride, *g.padding, *g.dilation, *g.output_padding, g.groups)

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Self:
        """The map that `numbers` says."""
        n = len(numbers) // 4
        stride, padding, dilation, extra = (tuple(numbers[i * n : (i + 1) * n]) for i in range(4))
        return cls(Geometry(stride, padding, dilation, cls._transposed(), extra, numbers[-1]))

    @classmethod
    @abstractmethod
    def _transposed(cls) -> bool: ...

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(N, C_out, spatial'…)."""
        # Not torch.convolution: autocast does not know it, and dendrites are multiplied without the engine's own cast.
        g, dimensions = self.geometry, len(self.geometry.stride)
        if g.transposed:
            return _TRANSPOSED[dimensions - 1](
                x, weight, bias, g.stride, g.padding, g.output_padding, g.groups, g.dilation
            )
        return _DIRECT[dimensions - 1](x, weight, bias, g.stride, g.padding, g.dilation, g.groups)

    def input_grad(self, products: Products, weight: Tensor | Quantised, input_shape: Sequence[int]) -> Work:
        """(N, C_in, spatial…)."""
        assert isinstance(weight, Tensor)
        return products.convolution_input_grad(weight, input_shape, self.geometry)

    def weight_grad(self, products: Products, x: Tensor | Quantised, weight: Tensor) -> Work:
        """In the weight's shape."""
        assert isinstance(x, Tensor)
        return products.convolution_weight_grad(x, weight, self.geometry)

    def bias_grad(self, delta: Tensor) -> Tensor:
        """(C_out,)."""
        return delta.sum([0, *range(2, delta.dim())])

    def gradients(self, delta: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> Gradients:
        """In one call."""
        g = self.geometry
        sizes = [self.outputs(weight.shape)] if needs[2] else None
        return torch.ops.aten.convolution_backward(
            delta,
            x,
            weight,
            sizes,
            g.stride,
            g.padding,
            g.dilation,
            g.transposed,
            g.output_padding,
            g.groups,
            list(needs[:3]),
        )

    def axis(self, delta: Tensor) -> int:
        """The one before the spatial dimensions."""
        return -1 - len(self.geometry.stride)

    def flops(
        self, input_shape: Sequence[int], weight_shape: Sequence[int], output_shape: Sequence[int]
    ) -> int:
        """See `convolution_flops`."""
        return convolution_flops(input_shape, weight_shape, output_shape, self.geometry)

    def sketch(self, x: Tensor, basis: Tensor, chosen: Tensor) -> Tensor:
        """(N, g · (k + j), spatial…)."""
        ones, none = (1,) * len(self.geometry.stride), (0,) * len(self.geometry.stride)
        groups, channels, rank = basis.shape
        filters = basis.mT.reshape(groups * rank, channels, *ones)
        narrow = torch.convolution(x, filters, None, ones, none, ones, False, none, groups)
        if groups == 1:
            return torch.cat((narrow, x.index_select(1, chosen)), 1)
        parts = (
            narrow.unflatten(1, (groups, rank)),
            x.unflatten(1, (groups, channels)).index_select(2, chosen),
        )
        return torch.cat(parts, 2).flatten(1, 2)


@register_map
@dataclass(frozen=True)
class ConvolutionMap(SpatialMap):
    """A plain convolution: weight (C_out, C_in/groups, kernel…)."""

    name: ClassVar[str] = "convolution"

    @classmethod
    def _transposed(cls) -> bool:
        return False

    def outputs(self, weight_shape: Sequence[int]) -> int:
        """C_out."""
        return weight_shape[0]

    def narrow_width(self, weight: Tensor) -> int:
        """x U is smaller than x below the channels of a group times the stride's product."""
        return weight.shape[1] * prod(self.geometry.stride)

    def channels(self, weight: Tensor) -> int:
        """C_in/groups."""
        return weight.shape[1]

    def by_channel(self, rows: Tensor, channels: int) -> Tensor:
        """The pixels of patches."""
        return rows.unflatten(2, (channels, -1)).transpose(2, 3).flatten(1, 2)

    def sketch_weight_grad(
        self, products: Products, kept: Tensor | Quantised, wider: Widening, weight: Tensor
    ) -> Work:
        """The same convolution with k + j channels of input to a group, widened by V, and added to the channels J."""
        assert isinstance(kept, Tensor)
        basis, chosen, factors = wider
        groups, _, rank = basis.shape
        width = rank + chosen.numel()
        narrow = kept.new_empty(weight.shape[0], width, *weight.shape[2:])
        work = products.convolution_weight_grad(kept, narrow, self.geometry, joint=False)
        taps = work.value.reshape(groups, -1, width, weight[0, 0].numel())
        value = basis.unsqueeze(1) @ taps[:, :, :rank]
        value.index_add_(2, chosen, taps[:, :, rank:] * factors.unsqueeze(1))
        work.value = value.reshape(weight.shape)
        return work

    def rows(self, x: Tensor, weight: Tensor, budget: int) -> Tensor:
        """Patches, (groups, n, C_in/groups · kernel)."""
        return _patches(x, weight.shape[2:], self.geometry, budget)

    def narrow(self, x: Tensor, basis: Tensor, weight: Tensor) -> Tensor:
        """(N, g·k, spatial'…): the input convolved with the columns of U as filters."""
        g = self.geometry
        filters = basis.mT.reshape(basis.shape[0] * basis.shape[2], *weight.shape[1:])
        return torch.convolution(
            x, filters, None, g.stride, g.padding, g.dilation, False, g.output_padding, g.groups
        )

    def narrow_weight_grad(
        self, products: Products, kept: Tensor | Quantised, basis: Tensor, weight: Tensor
    ) -> Work:
        """The patches are gone into x U: what is left is a convolution of single pixels, then Uᵀ."""
        assert isinstance(kept, Tensor)
        ones, none = (1,) * (weight.dim() - 2), (0,) * (weight.dim() - 2)
        pixelwise = Geometry(ones, none, ones, False, none, self.groups)
        narrow = kept.new_empty(weight.shape[0], basis.shape[2], *ones)
        work = products.convolution_weight_grad(kept, narrow, pixelwise, joint=False)
        matrix = work.value.reshape(self.groups, -1, basis.shape[2])
        work.value = (matrix @ basis.mT).reshape(weight.shape)
        return work


@register_map
@dataclass(frozen=True)
class TransposedMap(SpatialMap):
    """A transposed convolution: weight (C_in, C_out/groups, kernel…), whose rows are single pixels of the input.

    As a matrix it has every output channel once for each place of the kernel.
    """

    name: ClassVar[str] = "transposed convolution"
    rows_are_outputs: ClassVar[bool] = False

    @classmethod
    def _transposed(cls) -> bool:
        return True

    def has_rows_of(self, other: Map) -> bool:
        """Pixels are pixels, whatever becomes of them: a U-Net asks each call for another size of output."""
        return isinstance(other, TransposedMap) and self.groups == other.groups

    def outputs(self, weight_shape: Sequence[int]) -> int:
        """C_out."""
        return weight_shape[1] * self.groups

    def narrow_width(self, weight: Tensor) -> int:
        """Channels of a group."""
        return weight.shape[0] // self.groups

    def channels(self, weight: Tensor) -> int:
        """C_in/groups."""
        return self.narrow_width(weight)

    def sketch_weight_grad(
        self, products: Products, kept: Tensor | Quantised, wider: Widening, weight: Tensor
    ) -> Work:
        """The same transposed convolution with k + j channels of input to a group, widened by V and J."""
        assert isinstance(kept, Tensor)
        basis, chosen, factors = wider
        groups, _, rank = basis.shape
        width = rank + chosen.numel()
        narrow = kept.new_empty(groups * width, *weight.shape[1:])
        work = products.convolution_weight_grad(kept, narrow, self.geometry, joint=False)
        channels = work.value.reshape(groups, width, -1)
        value = basis @ channels[:, :rank]
        value.index_add_(1, chosen, channels[:, rank:] * factors.unsqueeze(1))
        work.value = value.reshape(weight.shape)
        return work

    def rows(self, x: Tensor, weight: Tensor, budget: int) -> Tensor:
        """Pixels, (groups, n, C_in/groups)."""
        pixels = x.flatten(2).transpose(1, 2).reshape(-1, x.shape[1])
        pixels = pixels[spread(pixels.shape[0], budget, x.device)]
        return wide(pixels).unflatten(1, (self.groups, -1)).transpose(0, 1).contiguous()

    def matrix(self, weight: Tensor) -> Tensor:
        """(g, C_out/groups · kernel, C_in/groups)."""
        return super().matrix(weight).mT

    def from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrix`."""
        return matrix.mT.reshape(shape)

    def per_output(self, values: Tensor, weight_shape: Sequence[int]) -> Tensor:
        """A pixel reaches an output through kernel/stride of the kernel's places, on average."""
        return values.reshape(self.outputs(weight_shape), -1).sum(-1) / prod(self.geometry.stride)

    def per_row(self, values: Tensor, weight_shape: Sequence[int]) -> Tensor:
        """Every output's value at all its places."""
        places = values.unsqueeze(-1).expand(-1, prod(weight_shape[2:])) / prod(self.geometry.stride)
        return places.reshape(self.groups, -1)

    def narrow(self, x: Tensor, basis: Tensor, weight: Tensor) -> Tensor:
        """(N, g·k, spatial…)."""
        pixels = x.flatten(2).unflatten(1, (self.groups, -1))
        return (basis.mT @ pixels).flatten(1, 2).unflatten(2, x.shape[2:])

    def narrow_weight_grad(
        self, products: Products, kept: Tensor | Quantised, basis: Tensor, weight: Tensor
    ) -> Work:
        """The same transposed convolution with k channels of input, then U."""
        assert isinstance(kept, Tensor)
        groups, _, rank = basis.shape
        narrow = kept.new_empty(groups * rank, *weight.shape[1:])
        work = products.convolution_weight_grad(kept, narrow, self.geometry, joint=False)
        work.value = (basis @ work.value.reshape(groups, rank, -1)).reshape(weight.shape)
        return work


class ConvolutionKind(LayerKind):
    """`nn.Conv1d` to `nn.Conv3d`, with any stride, padding, padding mode, dilation and groups."""

    def map(self, layer: Any) -> ConvolutionMap:
        """As the layer is set now: segmentation models change dilation and padding after building."""
        settings = (
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.padding_mode,
            layer.groups,
        )
        if torch.compiler.is_compiling():
            return _make(*settings)
        try:
            return _known(*settings)
        except TypeError:  # users may have set lists
            return _make(*settings)

    def forward(self, layer: Any, product: Callable[..., Tensor], input: Tensor) -> Tensor:
        """Padding that is not by equal zeros on both sides is applied to the input beforehand."""
        # A parametrised weight is computed at each reading, which may step a power iteration: it is read once, below.
        if input.dim() == len(layer.kernel_size) + 1:
            return self.forward(layer, product, input.unsqueeze(0)).squeeze(0)
        if layer.padding_mode != "zeros":
            # (left, right) for each dimension, last dimension first: torch computes them when the layer is built.
            input = F.pad(input, list(layer._reversed_padding_repeated_twice), mode=layer.padding_mode)
        elif layer.padding == "same":
            kernel = layer.kernel_size
            dilation = _each(layer.dilation, kernel)
            odd = [d * (k - 1) % 2 for d, k in zip(dilation, kernel, strict=True)]
            if any(odd):
                input = F.pad(input, [side for extra in reversed(odd) for side in (0, extra)])
        return product(input, layer.weight, layer.bias, self.map(layer))

    def describe(self, layer: Any) -> str:
        """Channels and kernel."""
        groups = f" /{layer.groups}" if layer.groups > 1 else ""
        return f"{layer.in_channels}→{layer.out_channels} {'×'.join(map(str, layer.kernel_size))}{groups}"


def _make(
    kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, mode: str, groups: int
) -> ConvolutionMap:
    none, dilation = (0,) * len(kernel), _each(dilation, kernel)
    if mode != "zeros" or padding == "valid":
        padding = none
    elif padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    else:
        padding = _each(padding, kernel)
    return ConvolutionMap(Geometry(_each(stride, kernel), padding, dilation, False, none, groups))


_known = lru_cache(_make)


class TransposedKind(ConvolutionKind):
    """`nn.ConvTranspose1d` to `nn.ConvTranspose3d`."""

    def map(self, layer: Any) -> TransposedMap:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As the layer is set now."""
        return self._transposed(layer, layer.output_padding)

    def _transposed(self, layer: Any, extra: Any) -> TransposedMap:
        kernel = layer.kernel_size
        stride, padding, dilation, extra = (
            _each(v, kernel) for v in (layer.stride, layer.padding, layer.dilation, extra)
        )
        return TransposedMap(Geometry(stride, padding, dilation, True, extra, layer.groups))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, layer: Any, product: Callable[..., Tensor], input: Tensor, output_size: list[int] | None = None
    ) -> Tensor:
        """The output padding follows from `output_size`, where that is given."""
        if input.dim() == len(layer.kernel_size) + 1:
            return self.forward(layer, product, input.unsqueeze(0), output_size).squeeze(0)
        if output_size is None:
            return product(input, layer.weight, layer.bias, self.map(layer))
        kernel = layer.kernel_size
        stride, padding, dilation = (
            list(_each(v, kernel)) for v in (layer.stride, layer.padding, layer.dilation)
        )
        extra = layer._output_padding(
            input, output_size, stride, padding, list(kernel), len(kernel), dilation
        )
        return product(input, layer.weight, layer.bias, self._transposed(layer, tuple(extra)))


def _each(value: Any, kernel: Sequence[int]) -> tuple[int, ...]:
    """A setting of a convolution for each spatial dimension; users may have set one number for all."""
    return (value,) * len(kernel) if isinstance(value, int) else tuple(value)


def _patches(x: Tensor, kernel: torch.Size, geometry: Geometry, budget: int) -> Tensor:
    padded = F.pad(x, [side for p in reversed(geometry.padding) for side in (p, p)])
    spatial = len(kernel)
    places = [
        (size - dilation * (k - 1) - 1) // stride + 1
        for size, k, stride, dilation in zip(
            padded.shape[2:], kernel, geometry.stride, geometry.dilation, strict=True
        )
    ]
    flat = spread(x.shape[0] * torch.Size(places).numel(), budget, x.device)
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
    return wide(grouped.flatten(2))


for _type in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_layer(_type, ConvolutionKind())
for _type in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register_layer(_type, TransposedKind())

"""A layer that no library knows: a linear layer in groups, ``(…, g·i) → (…, g·o)``, with its weight (g, i, o)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import retrograde as rg


class GroupedLinear(nn.Module):
    """Each group of features has a linear map of its own.

    Args:
        inputs: g·i.
        outputs: g·o.
        groups: g.
    """

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        bound = 1 / math.sqrt(inputs // groups)
        kernel = torch.empty(groups, inputs // groups, outputs // groups).uniform_(-bound, bound)
        self.kernel = nn.Parameter(kernel)
        self.offset = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """(…, g·o)."""
        z = torch.einsum("...gi,gio->...go", x.unflatten(-1, (self.groups, -1)), self.kernel)
        return z.flatten(-2) + self.offset


@rg.register_map
@dataclass(frozen=True)
class GroupedMap(rg.Map):
    """``(n, g·i, 1, 1) → (n, g·o, 1, 1)``: as a convolution of single pixels, which has kernels that skip zeros."""

    name: ClassVar[str] = "grouped linear"

    groups: int = 1

    @property
    def numbers(self) -> tuple[int, ...]:
        return (self.groups,)

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "GroupedMap":
        return cls(numbers[0])

    @property
    def _geometry(self) -> rg.Geometry:
        return rg.Geometry((1, 1), (0, 0), (1, 1), False, (0, 0), self.groups)

    def factor(self, weight: Tensor) -> Tensor:
        """The filters, (g·o, i, 1, 1)."""
        return weight.mT.reshape(-1, weight.shape[1], 1, 1)

    def _unfactor(self, filters: Tensor, shape: torch.Size) -> Tensor:
        return filters.reshape(shape[0], shape[2], shape[1]).mT

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.conv2d(x, self.factor(weight), bias, groups=self.groups)

    def input_grad(self, products: rg.Products, weight: Any, input_shape: Sequence[int]) -> rg.Work:
        return products.convolution_input_grad(weight, input_shape, self._geometry)

    def weight_grad(self, products: rg.Products, x: Any, weight: Tensor) -> rg.Work:
        work = products.convolution_weight_grad(x, self.factor(weight), self._geometry)
        work.value = self._unfactor(work.value, weight.shape)
        return work

    def bias_grad(self, delta: Tensor) -> Tensor:
        return delta.sum((0, 2, 3))

    def gradients(self, delta: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> Any:
        n, g = delta.shape[0], self.groups
        rows, inputs = delta.view(n, g, -1).transpose(0, 1), x.view(n, g, -1).transpose(0, 1)
        dx = (rows @ weight.mT).transpose(0, 1).reshape(x.shape) if needs[0] else None
        dw = inputs.mT @ rows if needs[1] else None
        return dx, dw, self.bias_grad(delta) if needs[2] else None

    def outputs(self, weight_shape: Sequence[int]) -> int:
        return weight_shape[0] * weight_shape[2]

    def axis(self, delta: Tensor) -> int:
        return -3

    def flops(
        self, input_shape: Sequence[int], weight_shape: Sequence[int], output_shape: Sequence[int]
    ) -> int:
        return 2 * input_shape[0] * math.prod(weight_shape)

    def narrow_width(self, weight: Tensor) -> int:
        return weight.shape[1]

    def rows(self, x: Tensor, weight: Tensor, budget: int) -> Tensor:
        few = x[:: max(1, -(-x.shape[0] // budget))].view(-1, self.groups, weight.shape[1])
        few = few if few.dtype == torch.float64 else few.float()
        return few.transpose(0, 1).contiguous()

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.mT

    def narrow(self, x: Tensor, basis: Tensor, weight: Tensor) -> Tensor:
        kept = x.view(x.shape[0], self.groups, -1).transpose(0, 1) @ basis
        return kept.transpose(0, 1).reshape(x.shape[0], -1, 1, 1)

    def narrow_weight_grad(self, products: rg.Products, kept: Any, basis: Tensor, weight: Tensor) -> rg.Work:
        g, _, o = weight.shape
        narrow = kept.new_empty(g * o, basis.shape[2], 1, 1)
        work = products.convolution_weight_grad(kept, narrow, self._geometry, joint=False)
        work.value = basis @ self._unfactor(work.value, torch.Size((g, basis.shape[2], o)))
        return work


class GroupedKind(rg.LayerKind):
    """Reads a `GroupedLinear`."""

    weight = "kernel"
    bias = "offset"

    def map(self, layer: Any) -> GroupedMap:
        return GroupedMap(layer.groups)

    def forward(self, layer: Any, product: Callable[..., Tensor], x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1], 1, 1)
        z = product(rows, layer.kernel, layer.offset, self.map(layer))
        return z.view(*x.shape[:-1], -1)

    def describe(self, layer: Any) -> str:
        g, i, o = layer.kernel.shape
        return f"{g}×({i}→{o})"


rg.register_layer(GroupedLinear, GroupedKind())

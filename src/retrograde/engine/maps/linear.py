"""``(…, i) → (…, o)``: linear layers, with the weight as (o, i) or, as in GPT-2, as (i, o)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

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
from retrograde.kernels.int8 import Quantised
from retrograde.kernels.work import Work


@register_map
@dataclass(frozen=True)
class LinearMap(Map):
    """``z = x Wᵀ + b``.

    Args:
        turned: the weight lies as (i, o).
    """

    name: ClassVar[str] = "linear"
    plain_rows: ClassVar[bool] = True

    turned: bool = False

    @property
    def numbers(self) -> tuple[int, ...]:
        """Whether it is turned."""
        return (int(self.turned),)

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "LinearMap":
        """The map that `numbers` says."""
        return TURNED if numbers[0] else LINEAR

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(…, o)."""
        return F.linear(x, weight.T if self.turned else weight, bias)

    def input_grad(self, products: Products, weight: Tensor | Quantised, input_shape: Sequence[int]) -> Work:
        """(…, i)."""
        return products.linear_input_grad(weight, input_shape)

    def weight_grad(self, products: Products, x: Tensor | Quantised, weight: Tensor) -> Work:
        """(o, i), or (i, o)."""
        return self._turn(products.linear_weight_grad(x))

    def _turn(self, work: Work) -> Work:
        if self.turned:
            work.value = work.value.T
        return work

    def bias_grad(self, delta: Tensor) -> Tensor:
        """(o,)."""
        return (delta if delta.dim() == 2 else delta.reshape(prod(delta.shape[:-1]), delta.shape[-1])).sum(0)

    def gradients(self, delta: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> Gradients:
        """Two products and a sum."""
        flat = delta.dim() == 2
        rows = delta if flat else delta.reshape(prod(delta.shape[:-1]), delta.shape[-1])
        dx = dw = None
        if needs[0]:
            dx = torch.mm(rows, weight.t() if self.turned else weight)
            dx = dx if flat else dx.view(x.shape)
        if needs[1]:
            inputs = x if flat else x.reshape(rows.shape[0], x.shape[-1])
            dw = torch.mm(inputs.t(), rows) if self.turned else torch.mm(rows.t(), inputs)
        return dx, dw, rows.sum(0) if needs[2] else None

    def factor(self, weight: Tensor) -> Tensor:
        """(o, i)."""
        return weight.T if self.turned else weight

    def outputs(self, weight_shape: Sequence[int]) -> int:
        """O."""
        return weight_shape[1 if self.turned else 0]

    def axis(self, delta: Tensor) -> int:
        """The last."""
        return -1

    def flops(
        self, input_shape: Sequence[int], weight_shape: Sequence[int], output_shape: Sequence[int]
    ) -> int:
        """2·n·o·i."""
        return 2 * prod(output_shape) * input_shape[-1]

    def narrow_width(self, weight: Tensor) -> int:
        """I."""
        return weight.shape[0 if self.turned else 1]

    def rows(self, x: Tensor, weight: Tensor, budget: int) -> Tensor:
        """(1, n, i), one for each example or position."""
        rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
        if rows.shape[0] > budget:
            rows = rows[spread(rows.shape[0], budget, x.device)]
        return wide(rows).unsqueeze(0)

    def matrix(self, weight: Tensor) -> Tensor:
        """(1, o, i)."""
        return (weight.T if self.turned else weight).unsqueeze(0)

    def from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrix`."""
        return matrix[0].T if self.turned else matrix[0]

    def narrow(self, x: Tensor, basis: Tensor, weight: Tensor) -> Tensor:
        """(…, k)."""
        return x @ basis[0]

    def narrow_weight_grad(
        self, products: Products, kept: Tensor | Quantised, basis: Tensor, weight: Tensor
    ) -> Work:
        """The product with x U, widened by Uᵀ."""
        work = products.linear_weight_grad(kept)
        work.value = work.value @ basis[0].mT
        return self._turn(work)

    def channels(self, weight: Tensor) -> int:
        """I."""
        return self.narrow_width(weight)

    def sketch(self, x: Tensor, basis: Tensor, chosen: Tensor) -> Tensor:
        """(…, k + j)."""
        return torch.cat((x @ basis[0], x.index_select(-1, chosen)), -1)

    def sketch_weight_grad(
        self, products: Products, kept: Tensor | Quantised, wider: Widening, weight: Tensor
    ) -> Work:
        """The product with what was kept, widened by V, and added to the columns J."""
        work = products.linear_weight_grad(kept)
        basis, chosen, factors = wider
        rank = basis.shape[2]
        value = work.value[:, :rank] @ basis[0].mT
        work.value = value.index_add_(1, chosen, work.value[:, rank:] * factors)
        return self._turn(work)


LINEAR, TURNED = LinearMap(), LinearMap(turned=True)


class LinearKind(LayerKind):
    """A layer that is one linear product of its weight.

    Args:
        turned: the weight lies as (i, o), as in ``transformers.pytorch_utils.Conv1D``.
        weight: name of the weight.
        bias: name of the bias.
    """

    def __init__(self, *, turned: bool = False, weight: str = "weight", bias: str = "bias") -> None:
        self._map = TURNED if turned else LINEAR
        self.weight, self.bias = weight, bias

    def map(self, layer: nn.Module) -> Map:
        """Always the same."""
        return self._map

    def forward(self, layer: Any, product: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """``x Wᵀ + b``; the input is the only argument, whatever its name."""
        (x,) = args or kwargs.values()
        return product(x, getattr(layer, self.weight), getattr(layer, self.bias, None), self._map)

    def describe(self, layer: nn.Module) -> str:
        """inputs→outputs."""
        weight = getattr(layer, self.weight)
        return f"{self._map.narrow_width(weight)}→{self._map.outputs(weight.shape)}"


register_layer(nn.Linear, LinearKind())
register_layer("transformers.pytorch_utils.Conv1D", LinearKind(turned=True))

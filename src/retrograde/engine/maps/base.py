"""What the engine and the rules ask of a layer: `Map`, one product ``z = W x + b``, and `LayerKind`, a layer type.

Index letters: ``g`` groups, ``o`` rows and ``d`` columns of a group's weight as a matrix, ``n`` rows of the input.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from retrograde.errors import OptionError
from retrograde.kernels.dispatch import Products
from retrograde.kernels.geometry import Geometry
from retrograde.kernels.int8 import Quantised
from retrograde.kernels.work import Work

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""dx, dW and db; None where autograd asked for nothing."""


class Widening(NamedTuple):
    """[V, E], by which products with a sketch become those of all channels.

    Attributes:
        basis: V, (g, channels, k).
        chosen: J, (j,): column i of E is ``factors[i]`` at channel ``chosen[i]``, and 0 elsewhere.
        factors: (j,).
    """

    basis: Tensor
    chosen: Tensor
    factors: Tensor


class Map(ABC):
    """One linear-like product: a value, made from whole numbers, that says how its tensors lie.

    ``map.matrix(weight)`` is the matrix that multiplies the rows of ``map.rows(x, …)``, whatever the kind: a
    convolution's rows are patches. Rules that work on matrices need nothing else.
    """

    name: ClassVar[str]
    """Its kind, unique among all maps: with `numbers` it stands for the map in compiled code."""
    plain_rows: ClassVar[bool] = False
    """Whether x is (…, d), so that rows of it are multiplied as they come: what 8-bit operands need."""
    rows_are_outputs: ClassVar[bool] = True
    """Whether each row of the matrix is one output."""
    groups: int = 1

    @property
    def numbers(self) -> tuple[int, ...]:
        """What `of` makes the map from."""
        return ()

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "Map":
        """The map that `numbers` says."""
        return cls()

    def has_rows_of(self, other: "Map") -> bool:
        """Whether rows have the same meaning as `other`'s, so that what was learnt from those holds for them."""
        return self == other

    # The three products.

    @abstractmethod
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """z."""

    @abstractmethod
    def input_grad(self, products: Products, weight: Tensor | Quantised, input_shape: Sequence[int]) -> Work:
        """``dx = δ̃ W``; `weight` as `factor` gives it, or rounded from that."""

    @abstractmethod
    def weight_grad(self, products: Products, x: Tensor | Quantised, weight: Tensor) -> Work:
        """``dW = δ̃ᵀ x``, shaped as `weight`."""

    @abstractmethod
    def bias_grad(self, delta: Tensor) -> Tensor:
        """``db = Σ δ``, (outputs,)."""

    @abstractmethod
    def gradients(self, delta: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> Gradients:
        """Plain backpropagation's dx, dW and db by torch's own kernels: what small layers take, exactly or dithered."""

    def factor(self, weight: Tensor) -> Tensor:
        """The weight as the products take it: (outputs, d) where rows are plain."""
        return weight

    # Shapes and costs.

    @abstractmethod
    def outputs(self, weight_shape: Sequence[int]) -> int:
        """Number of outputs, as many as entries of a bias."""

    @abstractmethod
    def axis(self, delta: Tensor) -> int:
        """The dimension of δ along which outputs lie."""

    @abstractmethod
    def flops(
        self, input_shape: Sequence[int], weight_shape: Sequence[int], output_shape: Sequence[int]
    ) -> int:
        """FLOPs of any one of the three products."""

    @abstractmethod
    def narrow_width(self, weight: Tensor) -> int:
        """The rank below which `narrow` keeps less than x."""

    # Rows and matrices.

    @abstractmethod
    def rows(self, x: Tensor, weight: Tensor, budget: int) -> Tensor:
        """At most `budget` rows of the input, (g, n, d), float32 or float64, the same for the same shapes."""

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight, or what is shaped like it, as (g, o, d)."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrix`, for a weight of `shape`."""
        return matrix.reshape(shape)

    def per_output(self, values: Tensor, weight_shape: Sequence[int]) -> Tensor:
        """``matrix(W) @ v``, (g, o), as what an input of v adds to each output, (outputs,)."""
        return values.flatten()

    def per_row(self, values: Tensor, weight_shape: Sequence[int]) -> Tensor:
        """The transpose of `per_output`: (outputs,) → (g, o)."""
        return values.reshape(self.groups, -1)

    # Products in a subspace.

    @abstractmethod
    def narrow(self, x: Tensor, basis: Tensor, weight: Tensor) -> Tensor:
        """``x U`` for U (g, d, k) of x's dtype, laid out so that `narrow_weight_grad` can multiply it."""

    @abstractmethod
    def narrow_weight_grad(
        self, products: Products, kept: Tensor | Quantised, basis: Tensor, weight: Tensor
    ) -> Work:
        """``(δ̃ᵀ (x U)) Uᵀ``, shaped as `weight`; counted are the FLOPs of the product with δ̃ alone."""

    # Products with some channels of the input: of all d entries of a row or, in a convolution, of a group's channels at
    # every pixel.

    def channels(self, weight: Tensor) -> int:
        """Channels of a group; 0 where `sketch` is not there."""
        return 0

    def by_channel(self, rows: Tensor, channels: int) -> Tensor:
        """Rows (g, n, d), of the input or of the weight, cut into vectors of the channels, (g, n', channels)."""
        return rows

    def sketch(self, x: Tensor, basis: Tensor, chosen: Tensor) -> Tensor:
        """``[x U, x_J]`` of every vector, for U (g, channels, k) of x's dtype and J, (j,), numbers of channels."""
        raise NotImplementedError

    def sketch_weight_grad(
        self, products: Products, kept: Tensor | Quantised, wider: Widening, weight: Tensor
    ) -> Work:
        """``(δ̃ᵀ [x U, x_J]) [V, E]ᵀ``, shaped as `weight`; counted are the FLOPs of the product with δ̃ alone.

        Args:
            products: with δ̃.
            kept: from `sketch`.
            wider: V and E.
            weight: in whose shape.
        """
        raise NotImplementedError


M = TypeVar("M", bound=Map)


class LayerKind(ABC):
    """A layer type whose forward pass is made of linear-like products of one weight.

    Attributes:
        weight: name of the parameter that is multiplied.
        bias: name of the parameter that is added; a layer may lack it.
    """

    weight: str = "weight"
    bias: str = "bias"

    @abstractmethod
    def map(self, layer: nn.Module) -> Map:
        """The product as the layer's present settings make it."""

    @abstractmethod
    def forward(self, layer: Any, product: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """The layer's forward pass, with ``product(x, weight, bias, map) → z`` in place of its own products.

        It runs under autograd, in training alone.
        """

    def names(self, layer: nn.Module) -> tuple[str, str]:
        """Of the parameters that are multiplied and added; empty for what is computed in every forward pass."""
        own = layer._parameters  # pyright: ignore[reportPrivateUsage]
        return self.weight if self.weight in own else "", self.bias if self.bias in own else ""

    @property
    def origin(self) -> "LayerKind":
        """What is registered, where this is that kind bound to a layer."""
        return self

    def bound(self, layer: nn.Module) -> "LayerKind":
        """The kind for this layer, where it depends on the layer."""
        return self

    def refuse(self, layer: nn.Module) -> str | None:
        """Why this layer cannot be attached; None when it can."""
        return None

    def describe(self, layer: nn.Module) -> str:
        """Its weight as inputs→outputs."""
        weight = getattr(layer, self.weight, None)
        return "×".join(map(str, weight.shape)) if isinstance(weight, Tensor) else ""


@dataclass(frozen=True)
class Operands:
    """What a layer multiplies.

    Attributes:
        x: input, (…, i) for a linear layer, (N, C_in, spatial…) for a convolution, padded where needed.
        weight: (o, i), or the convolution's kernel in torch's layout.
        bias: (o,) or None.
        geometry: None for a linear layer.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry | None = None


class OperandsKind(LayerKind):
    """A layer type by a function that returns its operands.

    Where the weight is a parameter, or one transposed, methods see that parameter; any other weight counts as computed.
    Which it is follows from the function's answer to an input of one row, layer by layer.
    """

    def __init__(self, operands: Callable[..., Operands]) -> None:
        self._operands = operands
        self._origin = self
        self.weight, self._turned = "", False
        self._geometry: Geometry | None = None

    @property
    def origin(self) -> LayerKind:
        """What is registered."""
        return self._origin

    def bound(self, layer: nn.Module) -> "OperandsKind":
        """For this layer."""
        own = dict(layer.named_parameters(recurse=False))
        made = OperandsKind(self._operands)
        made._origin = self._origin
        for size in [size for parameter in own.values() for size in parameter.shape]:
            with contextlib.suppress(Exception), torch.no_grad():
                answer = self._operands(layer, next(iter(own.values())).new_zeros(1, size))
                made.weight, made._turned = _which(own, answer.weight)
                made._geometry = answer.geometry
                break
        return made

    def map(self, layer: nn.Module) -> Map:
        """As the function has answered; a linear map where it could not be asked."""
        return self._map(self._geometry)

    def _map(self, g: Geometry | None) -> Map:
        if g is None:
            return map_of("linear", (int(self._turned),))
        numbers = (*g.stride, *g.padding, *g.dilation, *g.output_padding, g.groups)
        return map_of("transposed convolution" if g.transposed else "convolution", numbers)

    def forward(self, layer: Any, product: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """One product of the operands."""
        if self is self._origin:
            return self.bound(layer).forward(layer, product, *args, **kwargs)
        operands = self._operands(layer, *args, **kwargs)
        weight = getattr(layer, self.weight) if self.weight else operands.weight
        map, x, g = self._map(operands.geometry), operands.x, operands.geometry
        if g is not None and x.dim() == len(g.stride) + 1:
            return product(x.unsqueeze(0), weight, operands.bias, map).squeeze(0)
        return product(x, weight, operands.bias, map)


def _which(own: dict[str, nn.Parameter], weight: Tensor) -> tuple[str, bool]:
    """The parameter that `weight` is, or none, and whether it is turned."""
    for name, parameter in own.items():
        if weight.data_ptr() == parameter.data_ptr() and weight.dim() == parameter.dim():
            if weight.shape == parameter.shape and weight.stride() == parameter.stride():
                return name, False
            turned = weight.dim() == 2 and weight.shape == parameter.shape[::-1]
            if turned and weight.stride() == parameter.stride()[::-1]:
                return name, True
    return "", False


_KINDS: dict[type[nn.Module], LayerKind] = {}
_NAMED: dict[str, LayerKind] = {}
_MAPS: dict[str, type[Map]] = {}


def register_layer(layer_type: type[nn.Module] | str, kind: "LayerKind | Callable[..., Operands]") -> None:
    """Register a layer type, so that methods attach to it.

    Args:
        layer_type: a module class, or ``"module.Class"``, which need not be installed.
        kind: how to read the layer; or a function that is called with the layer and the arguments of its ``forward``
            and returns the `Operands` of its one product.

    Raises:
        OptionError: `layer_type` is not a module class or its name, or `kind` is neither of the two.

    Examples:
        A linear layer whose weight lies as (i, o)::

            rg.register_layer(Conv1D, rg.LinearKind(turned=True))
            rg.register_layer(Conv1D, lambda layer, x: rg.Operands(x, layer.weight.T, layer.bias))  # the same
    """
    if not isinstance(kind, LayerKind):
        if not callable(kind):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(f"register_layer needs a retrograde.LayerKind or a function, not {kind!r}.")
        kind = OperandsKind(kind)
    if isinstance(layer_type, str):
        _NAMED[layer_type] = kind
    elif isinstance(layer_type, type) and issubclass(layer_type, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        _KINDS[layer_type] = kind
    else:
        raise OptionError(f"register_layer needs a class of torch.nn.Module, not {layer_type!r}.")


def register_map(map_type: type[M]) -> type[M]:
    """Register a map under its name, by which compiled code finds it; usable as a decorator.

    Raises:
        OptionError: another map has this name.
    """
    if _MAPS.setdefault(map_type.name, map_type) is not map_type:
        raise OptionError(
            f"a map named {map_type.name!r} is registered already. Give {map_type.__name__} another name."
        )
    return map_type


def map_of(name: str, numbers: Sequence[int]) -> Map:
    """The map that compiled code names."""
    return _MAPS[name].of(numbers)


def kind_of(cls: type[nn.Module]) -> LayerKind | None:
    """What is registered for exactly this class."""
    known = _KINDS.get(cls)
    return known if known is not None else _NAMED.get(f"{cls.__module__}.{cls.__qualname__}")


def wide(rows: Tensor) -> Tensor:
    """In the precision of statistics: float64 stays, all else is float32."""
    return rows if rows.dtype == torch.float64 else rows.float()


def spread(total: int, budget: int, device: torch.device) -> Tensor:
    """Indices of at most `budget` of `total` rows, evenly spread, the same for the same numbers."""
    if total <= budget:
        return torch.arange(total, device=device)
    # Multiples of the golden ratio fall evenly and, unlike a fixed stride, in step with no image width.
    fractions = (torch.arange(budget, device=device, dtype=torch.float64) + 0.5) * _GOLDEN % 1.0
    return (fractions * total).long()


_GOLDEN = 0.6180339887498949

"""`check_layer`: that a layer kind and its map say of a layer what the layer itself computes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retrograde.engine.layers import find_kind
from retrograde.engine.maps.base import LayerKind, Map, map_of, register_layer
from retrograde.engine.slots import Method
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import Products
from retrograde.testing.cases import METHODS, Bystander, Case, Layer, gradients, require_same
from retrograde.testing.method import check_method, declined, told

_EXACT = 1e-9
"""Tolerance in float64, of the largest magnitude."""
_EVERYTHING = 1 << 30
_BUDGET = 3


def check_layer(
    make_layer: Callable[[], nn.Module],
    input_shape: Sequence[int],
    *,
    kind: LayerKind | None = None,
    methods: Mapping[str, Callable[[], Method]] | None = None,
    checks: Iterable[str] | None = None,
) -> dict[str, str]:
    """Check what is registered for a layer type against the layer's own forward pass, and train it by all methods.

    In float64: the forward pass; all gradients, of exact and of integer δ̃; rows and matrix; `per_output` and
    `per_row`; products in a subspace; sizes and FLOPs; compiled code's way to the map. Then `check_method` for each
    method on this layer, and for all of them together.

    Args:
        make_layer: makes the layer, with a parameter as its weight; its ``forward`` takes one tensor.
        input_shape: of that tensor.
        kind: registered for the layer's type first; None takes what is registered already.
        methods: makers of methods by name; None for the five of this library (`METHODS`).
        checks: of `check_method`; None for all.

    Returns:
        Why a method declines the layer, by the names of those that do.

    Raises:
        AssertionError: something differs; the message says what, and which method of the kind or the map computes it.
    """
    layer, shape = make_layer(), tuple(input_shape)
    if kind is not None:
        register_layer(type(layer), kind)
    name = type(layer).__name__
    try:
        _check_products(layer, shape)
        _check_gradients(Layer(name, make_layer, shape))
    except Exception as error:
        raise AssertionError(f"{name}: {told(error)}") from error
    makers = METHODS if methods is None else methods
    where, reasons = [Layer(name, make_layer, shape)], dict[str, str]()
    for method, make in makers.items():
        if reason := declined(make, where[0]):
            reasons[method] = reason
        else:
            check_method(make, layers=where, checks=checks)
    acting = [make for method, make in makers.items() if method not in reasons]
    if len(acting) > 1:
        check_method(lambda: [make() for make in acting], layers=where, checks=checks)
    return reasons


class _Product:
    """Stands for a program: notes the products of a forward pass, and computes them by their maps."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, Map]] = []

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, map: Map) -> Tensor:
        self.calls.append((x.detach(), weight.detach(), None if bias is None else bias.detach(), map))
        return map.forward(x, weight, bias)


def _check_products(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """The kind makes the layer's forward pass of products, and each product is what its map says of it."""
    kind = find_kind(layer)
    if not isinstance(kind, LayerKind):
        raise AssertionError(kind or "the type is not registered: register_layer makes it known.")
    _require(isinstance(kind.describe(layer), str), "LayerKind.describe must return a string.")  # pyright: ignore[reportUnnecessaryIsInstance]
    layer, x = layer.double(), _normal(shape, 1)
    weight, _bias = kind.names(layer)
    _require(weight in layer._parameters, f"LayerKind.names: {weight!r} is not a parameter of the layer.")  # pyright: ignore[reportPrivateUsage]
    product = _Product()
    found, expected = kind.forward(layer, product, x), layer(x)
    _same("forward", found, expected, "LayerKind.forward differs from the layer's own.")
    _require(bool(product.calls), "LayerKind.forward multiplies without product(x, weight, bias, map).")
    for call in product.calls:
        _check_map(*call)
    map = product.calls[0][3]
    _require(
        kind.map(layer) == map, f"LayerKind.map says {kind.map(layer)}, and forward multiplies by {map}."
    )


def _check_gradients(layer: Layer) -> None:
    """A layer attached by a method that does nothing has autograd's gradients."""
    case = Case(Bystander, layer)
    (model, _session), plain, x = case.attached(), case.plain(), case.batch()
    why = "An attached layer's gradients are not autograd's."
    require_same(gradients(model, [x]), gradients(plain, [x]), 1e-5, why)


def _check_map(x: Tensor, weight: Tensor, bias: Tensor | None, map: Map) -> None:
    z = map.forward(x, weight, bias)
    _check_sizes(x, weight, bias, map, z)
    for delta in (Delta(_normal(z.shape, 2)), Delta(_normal(z.shape, 2).mul(3).round().to(torch.int8), 0.5)):
        _check_backward(x, weight, bias, map, delta)
        _check_narrow(x, weight, map, delta)
    _check_rows(x, weight, map, map.forward(x, weight, None))


def _check_sizes(x: Tensor, weight: Tensor, bias: Tensor | None, map: Map, z: Tensor) -> None:
    again = map_of(map.name, map.numbers)
    _require(again == map, f"Map.of(Map.numbers) is {again}, not {map}: compiled code would take that.")
    whole = all(isinstance(number, int) for number in map.numbers)  # pyright: ignore[reportUnnecessaryIsInstance]
    _require(whole, f"Map.numbers must be whole numbers, not {map.numbers}.")
    outputs = map.outputs(weight.shape)
    _require(
        z.shape[map.axis(z)] == outputs, f"Map.axis: {map.axis(z)} of {tuple(z.shape)} is not {outputs}."
    )
    _require(bias is None or bias.numel() == outputs, f"Map.outputs: {outputs} are not as many as biases.")
    matrix = map.matrix(weight)
    _require(
        matrix.dim() == 3 and matrix.shape[0] == map.groups and matrix.numel() == weight.numel(),
        f"Map.matrix: {tuple(matrix.shape)} is not (groups, o, d) of a weight {tuple(weight.shape)}.",
    )
    _same(
        "weight", map.from_matrix(matrix, weight.shape), weight, "Map.from_matrix does not undo Map.matrix."
    )
    if map.plain_rows:
        product = x @ map.factor(weight).mT
        _same("z", product, map.forward(x, weight, None), "Map.factor: x times it is not z.")


def _check_backward(x: Tensor, weight: Tensor, bias: Tensor | None, map: Map, delta: Delta) -> None:
    """The three products and their FLOPs, by the kernels and by torch alone."""
    exact = _autograd(x, weight, bias, map, delta)
    products = Products(delta)
    dw = map.weight_grad(products, x, weight)
    dx = map.input_grad(products, map.factor(weight), x.shape)
    flops = map.flops(x.shape, weight.shape, delta.values.shape)
    for name, work in (("input_grad", dx), ("weight_grad", dw)):
        _same(name, work.value, exact[name], f"Map.{name} is not autograd's.")
        _require(
            0 <= work.needed <= work.executed <= flops,
            f"Map.{name} counts {work.needed:g} needed and {work.executed:g} executed of {flops} FLOPs.",
        )
    if "bias_grad" in exact:
        found = map.bias_grad(delta.dense(x.dtype))
        _same("bias_grad", found, exact["bias_grad"], "Map.bias_grad is not autograd's.")
    if delta.step is not None:
        return
    for needs in ((True, True, True), (True, False, False), (False, True, True)):
        found = map.gradients(delta.values, x, weight, needs)
        for name, need, value in zip(("input_grad", "weight_grad", "bias_grad"), needs, found, strict=True):
            if not need:
                _require(value is None, f"Map.gradients computes {name}, which was not asked for.")
            elif name in exact:
                _require(value is not None, f"Map.gradients leaves out {name}.")
                _same(name, value, exact[name], "Map.gradients is not autograd's.")


def _autograd(x: Tensor, weight: Tensor, bias: Tensor | None, map: Map, delta: Delta) -> dict[str, Tensor]:
    leaves = {"input_grad": x, "weight_grad": weight} | ({} if bias is None else {"bias_grad": bias})
    leaves = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    z = map.forward(leaves["input_grad"], leaves["weight_grad"], leaves.get("bias_grad"))
    return dict(zip(leaves, torch.autograd.grad(z, [*leaves.values()], delta.dense(x.dtype)), strict=True))


def _check_narrow(x: Tensor, weight: Tensor, map: Map, delta: Delta) -> None:
    """What is kept in a subspace is smaller, and gives the gradient's projection to it."""
    matrix, exact = map.matrix(weight), _autograd(x, weight, None, map, delta)["weight_grad"]
    groups, _, d = matrix.shape
    rank = max(1, min(d, map.narrow_width(weight)) // 2)
    basis = torch.linalg.qr(_normal((groups, d, rank), 3))[0]
    kept = map.narrow(x, basis, weight)
    if x.numel() and rank < map.narrow_width(weight):
        _require(
            kept.numel() < x.numel(), f"Map.narrow keeps {kept.numel()} numbers of {x.numel()} at k={rank}."
        )
    found = map.narrow_weight_grad(Products(delta), kept, basis, weight).value
    projected = map.from_matrix(map.matrix(exact) @ basis @ basis.mT, weight.shape)
    _same("narrow_weight_grad", found, projected, "Map.narrow_weight_grad is not dW U Uᵀ.")


def _check_rows(x: Tensor, weight: Tensor, map: Map, z: Tensor) -> None:
    """Rows times the matrix is z without its bias, FLOPs are two for each multiply-add, means reach the outputs."""
    rows, matrix = map.rows(x, weight, _EVERYTHING), map.matrix(weight)
    groups, o, d = matrix.shape
    _require(rows.shape[::2] == (groups, d), f"Map.rows: {tuple(rows.shape)} is not ({groups}, n, {d}).")
    few = map.rows(x, weight, _BUDGET)
    _require(few.shape[1] <= _BUDGET, f"Map.rows returns {few.shape[1]} rows, {_BUDGET} are the budget.")
    _same(
        "rows", map.rows(x, weight, _BUDGET), few, "Map.rows must choose the same rows for the same shapes."
    )
    flops, expected = map.flops(x.shape, weight.shape, z.shape), 2 * rows.numel() * o
    _require(flops == expected, f"Map.flops: {flops}, where rows and matrix make {expected}.")
    outputs = map.outputs(weight.shape)
    values, biases = _normal((groups, o), 4), _normal((outputs,), 5)
    forth = (map.per_output(values, weight.shape) * biases).sum()
    back = (values * map.per_row(biases, weight.shape)).sum()
    _same("per_row", back, forth, "Map.per_row is not the transpose of Map.per_output.")
    if not map.rows_are_outputs:
        return
    products = (rows @ matrix.mT).transpose(0, 1).flatten(1)
    flat = z.movedim(map.axis(z), -1).reshape(-1, outputs)
    # In whatever order: both along one direction, sorted.
    direction = _normal((outputs,), 6)
    found, wanted = ((each @ direction).sort().values for each in (products, flat))
    _same("rows", found, wanted, "Map.rows times Map.matrix is not z.")
    mean = (matrix @ rows.mean(1).unsqueeze(-1)).squeeze(-1)
    _same(
        "per_output",
        map.per_output(mean, weight.shape),
        flat.mean(0),
        "Map.per_output: a mean's output is off.",
    )


def _normal(shape: Iterable[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def _same(name: str, found: Any, expected: Tensor, why: str) -> None:
    _require(isinstance(found, Tensor), f"{why} It returns {type(found).__name__}.")
    require_same({name: found.detach()}, {name: expected.detach()}, _EXACT, why)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)

"""Maps: every kind's products against autograd, its matrix against its rows, its subspace against the whole."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import retrograde as rg
from cases import LAYERS, Case, batch, seeded
from retrograde.engine.layers import find_kind
from retrograde.engine.maps import base
from retrograde.engine.maps.base import LayerKind, Map, kind_of, map_of, spread
from retrograde.engine.maps.convolution import ConvolutionMap, TransposedMap
from retrograde.engine.maps.linear import LINEAR, TURNED, LinearMap
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import Products
from retrograde.kernels.geometry import Geometry
from retrograde.kernels.int8 import Quantised, quantise
from retrograde.kernels.work import Work

EVERYTHING = 10**6
DOUBLE = torch.float64


class Turned(nn.Module):
    """A linear layer whose weight lies as (i, o), as GPT-2 has it."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias


TURNED_CASES = [
    Case("turned_1d", lambda: Turned(6, 5), (6,)),
    Case("turned_2d", lambda: Turned(6, 5), (7, 6)),
    Case("turned_3d", lambda: Turned(6, 5), (3, 4, 6)),
    Case("turned_square", lambda: Turned(6, 6), (7, 6)),
    Case("turned_no_bias", lambda: Turned(6, 5, bias=False), (7, 6)),
    Case("turned_empty", lambda: Turned(6, 5), (0, 6)),
    Case("turned_one_output", lambda: Turned(6, 1), (7, 6)),
]
CASES = [*LAYERS, *TURNED_CASES]
FULL = [case for case in CASES if 0 not in case.shape]


@dataclass
class Read:
    """A layer with what its kind multiplies: x padded and batched, where that is needed."""

    layer: nn.Module
    kind: LayerKind
    map: Map
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    z: Tensor


def read(case: Case, dtype: torch.dtype = DOUBLE) -> Read:
    """What the kind gives to the one product of its forward pass, and what it makes of that."""
    layer = seeded(case.make).to(dtype)
    kind = rg.LinearKind(turned=True) if isinstance(layer, Turned) else find_kind(layer)
    assert isinstance(kind, LayerKind)
    calls: list[tuple[Any, ...]] = []

    def product(x: Tensor, weight: Tensor, bias: Tensor | None, map: Map) -> Tensor:
        calls.append((map, x, weight, bias))
        return map.forward(x, weight, bias)

    with torch.no_grad():
        z = kind.forward(layer, product, batch(case.shape, dtype=dtype), **case.call)
    ((map, x, weight, bias),) = calls
    return Read(layer, kind, map, x, weight.detach(), None if bias is None else bias.detach(), z)


def delta_of(found: Read, seed: int = 5) -> Tensor:
    return batch(tuple(found.map.forward(found.x, found.weight, None).shape), seed, found.x.dtype)


def autograd(found: Read, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dW and db by torch."""
    x, weight = found.x.clone().requires_grad_(), found.weight.clone().requires_grad_()
    bias = torch.zeros(found.map.outputs(weight.shape), dtype=x.dtype, requires_grad=True)
    return torch.autograd.grad(found.map.forward(x, weight, bias), (x, weight, bias), delta)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, check_stride=False)


# The three products.


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_is_the_layer(case: Case) -> None:
    """The kind's forward pass, its product by the map, is the layer's own."""
    found = read(case)
    expected = found.layer(batch(case.shape, dtype=DOUBLE), **case.call)
    assert found.z.shape == expected.shape
    close(found.z, expected.detach())
    if not case.call and "same" not in case.name:
        assert found.map == found.kind.map(found.layer)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_autograd(case: Case) -> None:
    """All that was asked for, and nothing else."""
    found = read(case)
    delta = delta_of(found)
    exact = autograd(found, delta)
    for needs in itertools.product([False, True], repeat=3):
        ours = found.map.gradients(delta, found.x, found.weight, needs)
        for mine, expected, need in zip(ours, exact, needs, strict=True):
            assert (mine is not None) == need, needs
            if mine is not None:
                close(mine, expected)


@pytest.mark.parametrize("kind", ["dense", "levels"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_autograd(case: Case, kind: str) -> None:
    """dx from the weight's factor, dW from x and db from δ, of a gradient as it is and of one in levels."""
    found = read(case)
    values, step = delta_of(found), None
    if kind == "levels":
        values, step = (values * 10).round().to(torch.int8), 0.125
    delta = Delta(values, step)
    dx, dw, db = autograd(found, delta.dense(DOUBLE))
    products = Products(delta)
    of_input = found.map.input_grad(products, found.map.factor(found.weight), found.x.shape)
    of_weight = found.map.weight_grad(products, found.x, found.weight)
    close(of_input.value, dx)
    close(of_weight.value, dw)
    close(found.map.bias_grad(delta.dense(DOUBLE)), db)
    flops = found.map.flops(found.x.shape, found.weight.shape, values.shape)
    for work in (of_input, of_weight):
        assert isinstance(work, Work)
        assert work.executed == work.discounted == flops


@pytest.mark.parametrize("case", TURNED_CASES, ids=str)
def test_turned_is_the_transpose(case: Case) -> None:
    """A weight that lies as (i, o) does all that its transpose does, and its gradient lies as it does."""
    found = read(case)
    delta = delta_of(found)
    assert found.map is TURNED
    close(found.map.forward(found.x, found.weight, None), LINEAR.forward(found.x, found.weight.T, None))
    assert torch.equal(found.map.factor(found.weight), found.weight.T)
    assert torch.equal(found.map.matrix(found.weight), LINEAR.matrix(found.weight.T))
    mine = found.map.weight_grad(Products(Delta(delta)), found.x, found.weight).value
    close(mine, LINEAR.weight_grad(Products(Delta(delta)), found.x, found.weight.T).value.T)


@pytest.mark.parametrize("turned", [False, True])
def test_quantised_operands(turned: bool) -> None:
    """Where rows are plain, operands may come in 8 bits: as rows of x, and as the weight's factor."""
    map = LinearMap(turned=turned)
    assert map.plain_rows
    assert not ConvolutionMap.plain_rows
    assert not TransposedMap.plain_rows
    weight, x, delta = batch((6, 5) if turned else (5, 6), 1), batch((7, 6), 2), batch((7, 5), 3)
    factor = Quantised(*quantise(map.factor(weight), 0), torch.float32)
    kept = Quantised(*quantise(x, 0), torch.float32)
    products = Products(Delta(delta))
    found = map.input_grad(products, factor, x.shape).value
    torch.testing.assert_close(found, delta @ factor.dense())
    found = map.weight_grad(products, kept, weight).value
    torch.testing.assert_close(found, (delta.T @ kept.dense()).T if turned else delta.T @ kept.dense())
    assert found.shape == weight.shape


# Shapes and costs.


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_their_axis(case: Case) -> None:
    """As many as the bias has entries, and where they lie in δ, with examples and without."""
    found = read(case)
    delta = delta_of(found)
    outputs = found.map.outputs(found.weight.shape)
    if found.bias is not None:
        assert found.bias.shape == (outputs,)
    axis = found.map.axis(delta)
    assert axis < 0
    assert delta.shape[axis] == outputs
    # A bias that differs from output to output moves δ's entries along that axis, and no other.
    bias = torch.arange(outputs, dtype=DOUBLE)
    moved = found.map.forward(found.x, found.weight, bias) - found.map.forward(found.x, found.weight, None)
    close(moved, bias.view(-1, *[1] * (-1 - axis)).expand(moved.shape))


@pytest.mark.parametrize("case", FULL, ids=str)
def test_flops_are_torchs(case: Case) -> None:
    """As many as torch counts in the forward product."""
    found = read(case)
    with FlopCounterMode(display=False) as counter:
        z = found.map.forward(found.x, found.weight, None)
    assert counter.get_total_flops() == found.map.flops(found.x.shape, found.weight.shape, z.shape) > 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_round_trip(case: Case) -> None:
    """Name and numbers make the same map again, in this process and in compiled code."""
    map = read(case).map
    assert all(type(number) is int for number in map.numbers)
    again = map_of(map.name, map.numbers)
    assert again == map
    assert type(again) is type(map)
    assert hash(again) == hash(map)
    assert map_of(map.name, torch.Size(map.numbers)) == map


def test_numbers_tell_maps_apart() -> None:
    """No setting is lost: each changes the numbers, and comes back by them."""
    plain = {
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "transposed": True,
        "output_padding": (0, 0),
        "groups": 1,
    }
    changes = {"stride": (1, 2), "padding": (3, 0), "dilation": (4, 5), "output_padding": (0, 6), "groups": 7}
    maps = [TransposedMap(Geometry(**plain | {name: value})) for name, value in changes.items()]
    maps.append(TransposedMap(Geometry(**plain)))
    assert len({map.numbers for map in maps}) == len(maps)
    for map in maps:
        assert TransposedMap.of(map.numbers).geometry == map.geometry
        assert TransposedMap.of(map.numbers).groups == map.geometry.groups
    assert LinearMap.of((0,)) == LINEAR != TURNED == LinearMap.of((1,))


def test_a_map_of_another_kind_needs_another_name() -> None:
    """Compiled code knows maps by name: the same class may come again, another one may not."""

    class Other(LinearMap):
        name = "linear"

    assert base.register_map(LinearMap) is LinearMap
    with pytest.raises(
        rg.errors.OptionError, match=r"'linear' is registered already\. Give Other another name"
    ):
        rg.register_map(Other)
    assert map_of("linear", (0,)) is LINEAR


# Rows and matrices.


@pytest.mark.parametrize("case", [c for c in CASES if not c.name.startswith("transposed")], ids=str)
def test_rows_times_matrix_is_the_layer(case: Case) -> None:
    """All rows: each is one position of the output, in order, channel by channel of each group."""
    found = read(case)
    rows = found.map.rows(found.x, found.weight, EVERYTHING)
    z = (rows @ found.map.matrix(found.weight).mT).transpose(0, 1).flatten(1)
    expected = found.map.forward(found.x, found.weight, None)
    axis = found.map.axis(expected)
    close(z, expected.movedim(axis, -1).reshape(z.shape))
    assert found.map.rows_are_outputs
    assert z.shape[1] == found.map.outputs(found.weight.shape)


@pytest.mark.parametrize("case", [c for c in CASES if c.name.startswith("transposed")], ids=str)
def test_transposed_rows_times_matrix_is_the_layer(case: Case) -> None:
    """All rows: each is one pixel of the input, and its products, laid where they belong, add up to the output."""
    found = read(case)
    g = found.map.geometry
    rows = found.map.rows(found.x, found.weight, EVERYTHING)
    products = rows @ found.map.matrix(found.weight).mT
    assert not found.map.rows_are_outputs
    assert (
        products.shape[1] == found.x.shape[0] * found.x[0, 0].numel()
        if len(found.x)
        else products.shape[1] == 0
    )
    expected = found.map.forward(found.x, found.weight, None)
    kernel, size = found.weight.shape[2:], found.x.shape[2:]
    # (groups, N·pixels, C_out/groups·kernel) → (N, pixels…, C_out, kernel…).
    places = products.transpose(0, 1).reshape(found.x.shape[0], *size, expected.shape[1], *kernel)
    z = torch.zeros_like(expected)
    for pixel in itertools.product(*map(range, size)):
        for tap in itertools.product(*map(range, kernel)):
            at = [
                i * s - p + k * d
                for i, k, s, p, d in zip(pixel, tap, g.stride, g.padding, g.dilation, strict=True)
            ]
            if all(0 <= a < n for a, n in zip(at, z.shape[2:], strict=True)):
                z[(slice(None), slice(None), *at)] += places[(slice(None), *pixel, slice(None), *tap)]
    close(z, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrix_round_trip(case: Case) -> None:
    """There and back, from either side and however the matrix lies in memory."""
    found = read(case)
    map, shape = found.map, found.weight.shape
    matrix = map.matrix(found.weight)
    rows = map.rows(found.x, found.weight, 4)
    assert matrix.shape[0] == rows.shape[0] == map.groups
    assert matrix.shape[2] == rows.shape[2]
    assert torch.equal(map.from_matrix(matrix, shape), found.weight)
    for other in (batch(tuple(matrix.shape), 3, DOUBLE), batch(tuple(matrix.mT.shape), 4, DOUBLE).mT):
        weight = map.from_matrix(other, shape)
        assert weight.shape == shape
        assert torch.equal(map.matrix(weight), other)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_per_output_and_per_row_are_adjoint(case: Case) -> None:
    """⟨per_output(u), y⟩ = ⟨u, per_row(y)⟩, and where rows are outputs they are each other's inverse."""
    found = read(case)
    map, shape = found.map, found.weight.shape
    groups, rows, _ = map.matrix(found.weight).shape
    outputs = map.outputs(shape)
    u, y = batch((groups, rows), 2, DOUBLE), batch((outputs,), 3, DOUBLE)
    there, back = map.per_output(u, shape), map.per_row(y, shape)
    assert there.shape == (outputs,)
    assert back.shape == (groups, rows)
    close(torch.dot(there, y), (u * back).sum())
    if map.rows_are_outputs:
        assert torch.equal(map.per_output(back, shape), y)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_per_output_is_what_a_constant_input_adds(case: Case) -> None:
    """Of an input that is v at every position, matrix(W) v is what reaches each output, away from the edges."""
    found = read(case)
    map, weight = found.map, found.weight
    matrix = map.matrix(weight)
    if isinstance(map, LinearMap):
        v = batch((found.x.shape[-1],), 7, DOUBLE)
        mean = map.forward(v.expand(5, -1), weight, None).mean(0)
        row = v.view(1, -1)
    else:
        g = map.geometry
        inside = TransposedMap if isinstance(map, TransposedMap) else ConvolutionMap
        none = (0,) * len(g.stride)
        # Of the same map without padding, what lies a kernel's reach from the edge, in whole strides.
        free = inside(Geometry(g.stride, none, g.dilation, g.transposed, none, g.groups))
        v = batch((found.x.shape[1],), 7, DOUBLE)
        z = free.forward(v.view(1, -1, *[1] * len(none)).expand(1, -1, *[12] * len(none)), weight, None)
        reach = [d * (k - 1) + 1 for d, k in zip(g.dilation, weight.shape[2:], strict=True)]
        for dim, (stride, far) in enumerate(zip(g.stride, reach, strict=True), start=2):
            margin = far if isinstance(map, TransposedMap) else 0
            whole = (z.shape[dim] - 2 * margin) // stride * stride
            assert whole > 0
            z = z.narrow(dim, margin, whole)
        mean = z.flatten(2).mean((0, 2))
        # A row holds each channel of its group once for each place that it covers.
        row = v.view(g.groups, -1)
        row = row.repeat_interleave(matrix.shape[2] // row.shape[1], 1)
    reached = torch.einsum("god,gd->go", matrix, row)
    close(map.per_output(reached, weight.shape), mean)


@pytest.mark.parametrize("turned", [False, True])
def test_budget_is_spread(turned: bool) -> None:
    """A budget is kept, deterministic, and its rows come from all over the batch."""
    x = torch.arange(1000.0).unsqueeze(1)
    rows = LinearMap(turned=turned).rows(x, torch.zeros(1, 1), 50)
    assert rows.shape == (1, 50, 1)
    assert torch.equal(rows, LinearMap(turned=turned).rows(x.view(10, 100, 1), torch.zeros(1, 1), 50))
    assert len(set(rows.flatten().tolist())) == 50
    counts = torch.histc(rows, 10, 0, 1000)
    assert int(counts.min()) >= 4
    assert int(counts.max()) <= 6


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_budget_takes_some_of_all_rows(case: Case) -> None:
    """Fewer rows are rows of the whole, the same ones for the same shapes."""
    found = read(case)
    everything = found.map.rows(found.x, found.weight, EVERYTHING)
    budget = max(1, everything.shape[1] // 3)
    some = found.map.rows(found.x, found.weight, budget)
    assert some.shape == (everything.shape[0], budget, everything.shape[2])
    index = spread(everything.shape[1], budget, torch.device("cpu"))
    assert torch.equal(some, everything[:, index])
    other = found.map.rows(found.x + 1, torch.zeros_like(found.weight), budget)
    if isinstance(found.map, LinearMap) or not any(found.map.geometry.padding):
        close(other, some + 1)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_low_precision_is_widened(case: Case) -> None:
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (DOUBLE, DOUBLE)):
        found = read(case)
        assert found.map.rows(found.x.to(dtype), found.weight.to(dtype), 2).dtype == wide


# Products in a subspace.


def basis_of(found: Read, rank: int) -> Tensor:
    """Random orthonormal directions, (g, d, rank)."""
    groups, _, width = found.map.matrix(found.weight).shape
    return torch.linalg.qr(batch((groups, width, width), 9, DOUBLE))[0][..., :rank].contiguous()


@pytest.mark.parametrize("kind", ["dense", "levels"])
@pytest.mark.parametrize("rank", [1, 2, None], ids=["one", "two", "all"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_narrow_weight_gradient_is_the_projected_one(case: Case, rank: int | None, kind: str) -> None:
    """From x U alone comes dW U Uᵀ; from all directions, dW itself."""
    found = read(case)
    map = found.map
    width = map.matrix(found.weight).shape[2]
    if rank is not None and rank > width:
        pytest.skip(f"only {width} inputs")
    values, step = delta_of(found), None
    if kind == "levels":
        values, step = (values * 10).round().to(torch.int8), 0.125
    delta = Delta(values, step)
    basis = basis_of(found, width if rank is None else rank)
    kept = map.narrow(found.x, basis, found.weight)
    assert kept.dtype == found.x.dtype
    work = map.narrow_weight_grad(Products(delta), kept, basis, found.weight)
    _, dw, _ = autograd(found, delta.dense(DOUBLE))
    expected = map.from_matrix(map.matrix(dw) @ basis @ basis.mT, found.weight.shape)
    close(work.value, expected)
    if rank is None:
        close(work.value, dw)
    if values.numel() and isinstance(map, LinearMap):
        assert work.executed == 2 * values.numel() * basis.shape[2]


@pytest.mark.parametrize("case", FULL, ids=str)
def test_narrow_rows_are_the_projected_rows(case: Case) -> None:
    """What is kept of x are its rows times U, laid out as the output's positions, or the input's."""
    found = read(case)
    basis = basis_of(found, 1)
    kept = found.map.narrow(found.x, basis, found.weight)
    rows = found.map.rows(found.x, found.weight, EVERYTHING) @ basis
    flat = kept.movedim(-1 if isinstance(found.map, LinearMap) else 1, -1).reshape(-1, basis.shape[0])
    close(flat, rows[..., 0].T)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_work_of_the_narrow_product(case: Case) -> None:
    """Counted is the product with δ̃ alone: k in the place of d inputs."""
    found = read(case)
    delta, basis = Delta(delta_of(found)), basis_of(found, 1)
    kept = found.map.narrow(found.x, basis, found.weight)
    work = found.map.narrow_weight_grad(Products(delta), kept, basis, found.weight)
    whole = found.map.flops(found.x.shape, found.weight.shape, delta.values.shape)
    assert work.executed == pytest.approx(whole / found.map.matrix(found.weight).shape[2])


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(12, 5), (7, 12)),
        (lambda: Turned(12, 5), (7, 12)),
        (lambda: nn.Conv2d(6, 4, 3, padding=1), (2, 6, 8, 8)),
        (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (2, 6, 8, 8)),
        (lambda: nn.Conv2d(6, 4, (4, 2), stride=(4, 2)), (2, 6, 8, 8)),
        (lambda: nn.Conv2d(6, 4, 4, stride=2, padding=1, groups=2), (2, 6, 8, 8)),
        (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2), (2, 6, 4, 4)),
        (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), (2, 6, 4, 4)),
    ],
)
def test_narrow_width(make: Any, shape: tuple[int, ...]) -> None:
    """Below this rank x U is smaller than x, at it as large."""
    found = read(Case("", make, shape))
    limit = found.map.narrow_width(found.weight)
    sizes = {
        rank: found.map.narrow(found.x, basis_of(found, rank), found.weight).numel()
        for rank in (limit - 1, limit)
        if rank <= found.map.matrix(found.weight).shape[2]
    }
    assert sizes[limit - 1] < found.x.numel()
    assert sizes[limit] == found.x.numel()


# Kinds.


@pytest.mark.parametrize(
    ("make", "text", "names"),
    [
        (lambda: nn.Linear(6, 5), "6→5", ("weight", "bias")),
        (lambda: nn.Linear(6, 5, bias=False), "6→5", ("weight", "bias")),
        (lambda: nn.Conv2d(4, 8, (3, 5), groups=2), "4→8 3×5 /2", ("weight", "bias")),
        (lambda: nn.ConvTranspose3d(4, 6, 3), "4→6 3×3×3", ("weight", "bias")),
        (lambda: nn.MultiheadAttention(8, 2), "8→24", ("in_proj_weight", "in_proj_bias")),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), "6→5", ("", "bias")),
    ],
)
def test_kinds_describe_and_name(make: Any, text: str, names: tuple[str, str]) -> None:
    """The weight as inputs→outputs, and which parameters are multiplied and added."""
    layer = make()
    kind = find_kind(layer)
    assert isinstance(kind, LayerKind)
    assert kind.describe(layer) == text
    assert kind.names(layer) == names
    assert kind.map(layer) == kind.map(make())


def test_linear_kind_reads_names_and_turn() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.shift = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

    layer, kind = Own(), rg.LinearKind(turned=True, weight="kernel", bias="shift")
    assert kind.map(layer) is TURNED
    assert kind.names(layer) == ("kernel", "shift")
    assert kind.describe(layer) == "6→5"
    x = batch((7, 6))
    found = kind.forward(layer, lambda x, w, b, map: map.forward(x, w, b), anything=x)
    torch.testing.assert_close(found, x @ layer.kernel + layer.shift)


class Registered(nn.Module):
    """A layer for kinds that are functions."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.weight, self.bias = nn.Parameter(torch.randn(*shape)), nn.Parameter(torch.randn(5))


LINE = Geometry((2,), (1,), (1,), False, (0,), 1)
UPWARDS = Geometry((2,), (1,), (1,), True, (0,), 1)


@pytest.mark.parametrize(
    ("shape", "operands", "map", "names", "x", "expected"),
    [
        (
            (5, 6),
            lambda layer, x: rg.Operands(x, layer.weight, layer.bias),
            LINEAR,
            ("weight", "bias"),
            (7, 6),
            lambda layer, x: F.linear(x, layer.weight, layer.bias),
        ),
        (
            (6, 5),
            lambda layer, x: rg.Operands(x, layer.weight.T, layer.bias),
            TURNED,
            ("weight", "bias"),
            (7, 6),
            lambda layer, x: x @ layer.weight + layer.bias,
        ),
        (
            (5, 5),
            lambda layer, x: rg.Operands(x, layer.weight.T, None),
            TURNED,
            ("weight", "bias"),
            (7, 5),
            lambda layer, x: x @ layer.weight,
        ),
        (
            (5, 6),
            lambda layer, x: rg.Operands(x, 2 * layer.weight, layer.bias),
            LINEAR,
            ("", "bias"),
            (7, 6),
            lambda layer, x: F.linear(x, 2 * layer.weight, layer.bias),
        ),
        (
            (5, 6, 3),
            lambda layer, x: rg.Operands(x, layer.weight, layer.bias, LINE),
            ConvolutionMap(LINE),
            ("weight", "bias"),
            (2, 6, 9),
            lambda layer, x: F.conv1d(x, layer.weight, layer.bias, 2, 1),
        ),
        (
            (6, 5, 3),
            lambda layer, x: rg.Operands(x, layer.weight, layer.bias, UPWARDS),
            TransposedMap(UPWARDS),
            ("weight", "bias"),
            (2, 6, 9),
            lambda layer, x: F.conv_transpose1d(x, layer.weight, layer.bias, 2, 1),
        ),
    ],
    ids=["plain", "turned", "square_turned", "computed", "convolution", "transposed"],
)
def test_kinds_that_are_functions(
    shape: tuple[int, ...],
    operands: Any,
    map: Map,
    names: tuple[str, str],
    x: tuple[int, ...],
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a function returns is read once, for an input of one row: which parameter is multiplied, and how."""
    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))
    rg.register_layer(Registered, operands)
    layer = Registered(*shape)
    kind = find_kind(layer)
    assert isinstance(kind, LayerKind)
    assert kind.origin is kind_of(Registered)
    assert kind.map(layer) == map
    assert kind.names(layer) == names
    seen: list[tuple[Tensor, Map]] = []

    def product(x: Tensor, weight: Tensor, bias: Tensor | None, found: Map) -> Tensor:
        seen.append((weight, found))
        return found.forward(x, weight, bias)

    inputs = batch(x)
    torch.testing.assert_close(kind.forward(layer, product, inputs), expected(layer, inputs))
    ((weight, found),) = seen
    assert found == map
    assert (weight is layer.weight) == bool(names[0])


def test_a_function_is_asked_for_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of one type may multiply by different things: what was read of one is not believed of the other."""
    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))
    rg.register_layer(
        Registered,
        lambda layer, x: rg.Operands(x, layer.weight * 2 if layer.doubled else layer.weight, None),
    )
    doubled, plain = Registered(5, 6), Registered(5, 6)
    doubled.doubled, plain.doubled = True, False
    for order in ((doubled, plain), (plain, doubled)):
        kinds = [find_kind(layer) for layer in order]
        names = [kind.names(layer)[0] for kind, layer in zip(kinds, order, strict=True)]
        assert names == ["" if layer.doubled else "weight" for layer in order]
        x = batch((7, 6))
        for kind, layer in zip(kinds, order, strict=True):
            found = kind.forward(layer, lambda x, w, b, map: map.forward(x, w, b), x)
            torch.testing.assert_close(found, (2 if layer.doubled else 1) * x @ layer.weight.T)


def test_a_part_of_a_parameter_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a weight are no parameter, even where they lie in memory as its transpose would."""
    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))
    for shape in ((10, 6), (10, 1)):
        rg.register_layer(Registered, lambda layer, x: rg.Operands(x, layer.weight[:5], layer.bias))
        layer = Registered(*shape)
        kind = find_kind(layer)
        assert isinstance(kind, LayerKind)
        assert kind.names(layer)[0] == ""
        x = batch((7, shape[1]))
        found = kind.forward(layer, lambda x, w, b, map: map.forward(x, w, b), x)
        torch.testing.assert_close(found, F.linear(x, layer.weight[:5], layer.bias))

"""The kernels as registered ops: what torch checks of an op, what they compute, how they compile, what they refuse."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from retrograde.errors import DoubleBackwardError, OptionError
from retrograde.kernels import choose, ops, reference
from retrograde.kernels.choose import ConvolutionProblem, CostModel, Problem
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import Products
from retrograde.kernels.geometry import Geometry
from retrograde.kernels.work import Work, convolution_flops, linear_flops
from retrograde.maths.philox import mix_key

OPS = torch.ops.retrograde
STEP = 0.1
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
KEYS = (0, 1, 2**63 - 1, 2**63, 2**64 - 1, mix_key(3, 1, 4))
ORDERS = (torch.contiguous_format, torch.channels_last)

# (values' leading dimensions, o, i)
LINEAR = [((5,), 7, 3), ((2, 3, 5), 13, 11), ((1,), 1, 1), ((0,), 3, 2), ((4,), 0, 2), ((), 3, 2)]

# (input shape, weight shape, geometry), in primes and unequal from one dimension to the next
CONVOLUTIONS = {
    "1d": ((3, 5, 11), (7, 5, 3), Geometry((2,), (1,), (2,), False, (0,), 1)),
    "2d": ((2, 6, 7, 11), (4, 3, 3, 2), Geometry((2, 3), (1, 0), (1, 2), False, (0, 0), 2)),
    "2d plain": ((2, 3, 5, 7), (5, 3, 3, 3), Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)),
    "depthwise": ((1, 3, 5, 5), (3, 1, 1, 1), Geometry((1, 1), (0, 0), (1, 1), False, (0, 0), 3)),
    "3d": ((1, 2, 3, 5, 4), (3, 2, 2, 1, 3), Geometry((1, 2, 1), (0, 1, 1), (1, 1, 1), False, (0, 0, 0), 1)),
    "transposed": ((2, 4, 5, 3), (4, 3, 3, 2), Geometry((2, 3), (1, 0), (1, 2), True, (1, 2), 2)),
    "no images": ((0, 3, 5, 7), (5, 3, 3, 3), Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Favours(CostModel):
    """A machine on which one kernel takes no time."""

    def __init__(self, kernel: str) -> None:
        super().__init__({})
        self._kernel = kernel

    def seconds(self, kernel: str, problem: Problem | ConvolutionProblem) -> float:
        return float(kernel != self._kernel)


@pytest.fixture
def favour(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Make one kernel the fastest; returns a list that the names of the kernels in use are appended to."""

    def choose_always(kernel: str) -> list[str]:
        model, used = Favours(kernel), []
        monkeypatch.setattr(choose, "model", lambda: model)
        for name in (
            "linear_input_grad",
            "linear_weight_grad",
            "convolution_input_grad",
            "convolution_weight_grad",
        ):
            monkeypatch.setattr(Products, name, noting(getattr(Products, name), used))
        return used

    return choose_always


def noting(method: Callable[..., Work], used: list[str]) -> Callable[..., Work]:
    def noted(*args: Any) -> Work:
        work = method(*args)
        used.append(work.kernel)
        return work

    return noted


def gradient(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> tuple[Tensor, float | None]:
    """Values and step of a δ̃: int8 or floating-point levels, or exact; by `kind`, a part of them or all are zeros."""
    kept = torch.rand(shape) < {"all zero": 0.0, "no zeros": 1.1}.get(kind, 0.3)
    if kind == "exact":
        return torch.randn(shape, dtype=dtype) * kept, None
    magnitudes = torch.randint(1, 128, shape) * kept
    levels = magnitudes * (1 - 2 * torch.randint(0, 2, shape))
    return levels.to(dtype if kind == "floating levels" else torch.int8), STEP


def output_shape(x: tuple[int, ...], weight: tuple[int, ...], g: Geometry) -> tuple[int, ...]:
    return tuple(convolution(torch.empty(x), torch.empty(weight), g).shape)


def convolution(x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    return torch.convolution(
        x, weight, None, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups
    )


def last(tensor: Tensor, order: torch.memory_format) -> Tensor:
    return tensor.contiguous(memory_format=order) if tensor.dim() == 4 else tensor


def arguments(g: Geometry) -> tuple[Any, ...]:
    return tuple(asdict(g).values())


# What torch checks of an op: its schema, fake tensors and their strides, and compilation with dynamic shapes.


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("bits", [2, 8, None])
@pytest.mark.parametrize("shape", [(7, 5), (1,), (0, 3), (), (2, 3, 5, 7)], ids=str)
def test_opcheck_nsd(shape: tuple[int, ...], bits: int | None, dtype: torch.dtype) -> None:
    delta = torch.randn(shape, dtype=dtype)
    torch.library.opcheck(OPS.nsd.default, (delta, 0.5, -17, bits))


@pytest.mark.parametrize("order", [*ORDERS, "transposed", "sliced", "expanded"], ids=str)
@pytest.mark.parametrize("bits", [8, None])
def test_opcheck_nsd_in_memory_order(order: torch.memory_format | str, bits: int | None) -> None:
    delta = {
        "transposed": lambda: torch.randn(7, 5, 3, 2).permute(3, 2, 1, 0),
        "sliced": lambda: torch.randn(2, 6, 5, 14)[:, ::2, :, ::2],
        "expanded": lambda: torch.randn(2, 1, 5, 1).expand(2, 3, 5, 7),
    }.get(order, lambda: last(torch.randn(2, 3, 5, 7), order))()
    torch.library.opcheck(OPS.nsd.default, (delta, 0.5, 3, bits))
    assert ops.nsd(delta, 0.5, 3, bits).is_contiguous(
        memory_format=order if order in ORDERS else torch.contiguous_format
    )


KINDS = ("levels", "floating levels", "exact", "all zero", "no zeros")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*itertools.product(KINDS, DTYPES[:1]), *itertools.product(("levels", "exact"), DTYPES[1:])],
    ids=str,
)
@pytest.mark.parametrize(("rows", "o", "i"), LINEAR, ids=str)
def test_opcheck_linear(rows: tuple[int, ...], o: int, i: int, kind: str, dtype: torch.dtype) -> None:
    values, step = gradient((*rows, o), kind, dtype)
    torch.library.opcheck(OPS.delta_matmul.default, (values, step, torch.randn(o, i, dtype=dtype)))
    x = torch.randn(*rows, i, dtype=dtype)
    torch.library.opcheck(OPS.delta_outer.default, (values, step, x, "int8"))


def test_opcheck_linear_of_views() -> None:
    values = torch.randint(-9, 10, (5, 2, 7), dtype=torch.int8).permute(1, 2, 0)
    weight, x = torch.randn(3, 5).T, torch.randn(2, 1, 3).expand(2, 7, 3)
    torch.library.opcheck(OPS.delta_matmul.default, (values, STEP, weight))
    torch.library.opcheck(OPS.delta_outer.default, (values, STEP, x))
    assert ops.delta_matmul(values, STEP, weight).is_contiguous()
    assert ops.delta_outer(values, STEP, x).is_contiguous()


CONVOLUTION_CASES = [
    *itertools.product(CONVOLUTIONS, ["levels"], ORDERS, [torch.float32]),
    *itertools.product(["2d", "transposed"], ["exact", "all zero", "no zeros"], ORDERS, [torch.float32]),
    *itertools.product(["1d", "2d"], ["levels", "exact"], ORDERS[:1], [torch.bfloat16, torch.float64]),
]


@pytest.mark.parametrize(("case", "kind", "order", "dtype"), CONVOLUTION_CASES, ids=str)
@pytest.mark.parametrize("other_order", ORDERS, ids=str)
def test_opcheck_convolution(
    case: str, kind: str, order: torch.memory_format, other_order: torch.memory_format, dtype: torch.dtype
) -> None:
    """δ̃ in one memory order, the other operand in the same or another."""
    x_shape, weight_shape, g = CONVOLUTIONS[case]
    values, step = gradient(output_shape(x_shape, weight_shape, g), kind, dtype)
    values = last(values, order)
    weight = last(torch.randn(weight_shape, dtype=dtype), other_order)
    x = last(torch.randn(x_shape, dtype=dtype), other_order)
    rest = arguments(g)
    torch.library.opcheck(OPS.convolution_input_grad.default, (values, step, weight, x_shape, *rest))
    torch.library.opcheck(OPS.convolution_weight_grad.default, (values, step, x, weight_shape, *rest))


@pytest.mark.parametrize("kernel", ["skip", "bfloat16", "skip-bfloat16", "int8"])
def test_opcheck_of_fast_linear_kernels(kernel: str, favour: Callable[[str], list[str]]) -> None:
    used = favour(kernel)
    values, step = gradient((256, 256), "levels", torch.float32)
    weight, x = torch.randn(256, 264), torch.randn(256, 264)
    torch.library.opcheck(OPS.delta_matmul.default, (values, step, weight, "int8"))
    torch.library.opcheck(OPS.delta_outer.default, (values, step, x, "int8"))
    assert set(used) == {kernel}


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("kind", ["levels", "exact"])
def test_opcheck_of_fast_convolution_kernels(
    kind: str, order: torch.memory_format, favour: Callable[[str], list[str]]
) -> None:
    used = favour("skip")
    g = Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    values, step = gradient((4, 32, 17, 19), kind, torch.float32)
    values, x = last(values, order), last(torch.randn(4, 32, 17, 19), order)
    weight = torch.randn(32, 32, 3, 3)
    rest = arguments(g)
    torch.library.opcheck(OPS.convolution_input_grad.default, (values, step, weight, tuple(x.shape), *rest))
    torch.library.opcheck(OPS.convolution_weight_grad.default, (values, step, x, tuple(weight.shape), *rest))
    assert set(used) == {"skip"}


# What they compute.


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8, None])
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_nsd_is_the_reference(
    order: torch.memory_format, key: int, bits: int | None, dtype: torch.dtype
) -> None:
    """Bit for bit, with keys on both sides of the sign."""
    delta = last(torch.randn(2, 3, 29, 31, dtype=dtype), order)
    step = 8.0 if bits == 2 else 0.7
    found = ops.nsd(delta, step, key, bits)
    expected = reference.nsd(delta, step, key, bits)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert found.any()


def test_keys_are_told_apart() -> None:
    delta = torch.randn(1000)
    found = [ops.nsd(delta, 1.0, key) for key in KEYS]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "o", "i"), LINEAR, ids=str)
def test_linear_is_the_reference(
    rows: tuple[int, ...], o: int, i: int, kind: str, dtype: torch.dtype
) -> None:
    values, step = gradient((*rows, o), kind, dtype)
    weight, x = torch.randn(o, i, dtype=dtype), torch.randn(*rows, i, dtype=dtype)
    delta = Delta(values, step)
    dx, dw = ops.delta_matmul(values, step, weight), ops.delta_outer(values, step, x)
    assert dx.dtype == dw.dtype == dtype
    torch.testing.assert_close(
        dx, reference.linear_input_grad(delta, weight, (*rows, i)), rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(dw, reference.linear_weight_grad(delta, x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", ["skip", "skip-bfloat16", "int8"])
def test_fast_linear_kernels(kernel: str, favour: Callable[[str], list[str]]) -> None:
    """They are taken where the precision allows, and not elsewhere."""
    used = favour(kernel)
    values, step = gradient((2, 128, 256), "levels", torch.float32)
    weight, x = torch.randn(256, 264), torch.randn(2, 128, 264)
    delta = Delta(values, step)
    expected = (
        reference.linear_input_grad(delta, weight, x.shape),
        reference.linear_weight_grad(delta, x),
    )
    tolerance = 1e-5 if kernel == "skip" else 0.02
    for found, wanted in zip(
        (ops.delta_matmul(values, step, weight, "int8"), ops.delta_outer(values, step, x, "int8")),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
    assert used == [kernel, kernel]
    ops.delta_matmul(values, step, weight)
    ops.delta_outer(values.float(), None, x, "int8")
    assert used[2:] == ([kernel] * 2 if kernel == "skip" else [reference.NAME] * 2)


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_convolutions_are_autograd(case: str, order: torch.memory_format) -> None:
    """Every argument reaches its place: against torch's own derivative, in float64."""
    x_shape, weight_shape, g = CONVOLUTIONS[case]
    x = torch.randn(x_shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(weight_shape, dtype=torch.float64, requires_grad=True)
    y = convolution(x, weight, g)
    levels, _ = gradient(tuple(y.shape), "levels", torch.float64)
    levels = last(levels, order)
    expected = torch.autograd.grad(y, (x, weight), levels.double() * STEP)
    rest = asdict(g)
    with torch.no_grad():
        dx = ops.convolution_input_grad(levels, STEP, weight, x_shape, **rest)
        dw = ops.convolution_weight_grad(levels, STEP, x, weight_shape, **rest)
    torch.testing.assert_close((dx, dw), expected, check_stride=False)
    if levels.dim() == 4 and levels.numel():
        assert dx.is_contiguous(memory_format=order)
    assert dw.is_contiguous()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["2d", "transposed"])
def test_convolutions_are_the_reference(case: str, kind: str, dtype: torch.dtype) -> None:
    x_shape, weight_shape, g = CONVOLUTIONS[case]
    values, step = gradient(output_shape(x_shape, weight_shape, g), kind, dtype)
    weight, x = torch.randn(weight_shape, dtype=dtype), torch.randn(x_shape, dtype=dtype)
    delta = Delta(values, step)
    dx = ops.convolution_input_grad(values, step, weight, x_shape, **asdict(g))
    dw = ops.convolution_weight_grad(values, step, x, weight_shape, **asdict(g))
    assert dx.dtype == dw.dtype == dtype
    assert torch.equal(dx, reference.convolution_input_grad(delta, weight, x_shape, g))
    assert torch.equal(dw, reference.convolution_weight_grad(delta, x, weight, g))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_fast_convolution_kernels(order: torch.memory_format, favour: Callable[[str], list[str]]) -> None:
    used = favour("skip")
    g = Geometry((2, 1), (1, 2), (1, 1), False, (0, 0), 2)
    x, weight = last(torch.randn(4, 32, 31, 33), order), torch.randn(64, 16, 3, 3)
    values, step = gradient(output_shape(tuple(x.shape), tuple(weight.shape), g), "levels", torch.float32)
    values = last(values, order)
    assert values.numel() * weight[0].numel() > 10_000_000
    delta = Delta(values, step)
    pairs = (
        (
            ops.convolution_input_grad(values, step, weight, x.shape, **asdict(g)),
            reference.convolution_input_grad(delta, weight, x.shape, g),
        ),
        (
            ops.convolution_weight_grad(values, step, x, weight.shape, **asdict(g)),
            reference.convolution_weight_grad(delta, x, weight, g),
        ),
    )
    assert used == ["skip", "skip"]
    for found, expected in pairs:
        largest = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * largest, check_stride=False)


def test_one_number_serves_every_dimension() -> None:
    x, weight = torch.randn(2, 3, 9, 7), torch.randn(5, 3, 3, 3)
    delta = torch.randn(2, 5, 4, 3)
    each = {"stride": (2, 2), "padding": [1, 1], "dilation": (2, 2)}
    one = {"stride": 2, "padding": 1, "dilation": 2}
    assert torch.equal(
        ops.convolution_input_grad(delta, None, weight, x.shape, **one),
        ops.convolution_input_grad(delta, None, weight, x.shape, **each),
    )
    assert torch.equal(
        ops.convolution_weight_grad(delta, None, x, weight.shape, **one),
        ops.convolution_weight_grad(delta, None, x, weight.shape, **each),
    )


# How they compile.


def backward(delta: Tensor, key: int, weight: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """A linear layer's dithered backward pass."""
    levels = ops.nsd(delta * 2, 0.5, key)
    return levels, ops.delta_matmul(levels, 0.5, weight), ops.delta_outer(levels, 0.5, x) + 1


def convolution_backward(delta: Tensor, key: int, weight: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """The same of a convolution."""
    levels = ops.nsd(delta * 2, 0.5, key)
    geometry = {"stride": 2, "padding": 1, "groups": 2}
    dx = ops.convolution_input_grad(levels, 0.5, weight, x.shape, **geometry)
    return (
        levels,
        dx.relu(),
        ops.convolution_weight_grad(levels, 0.5, x, weight.shape, **geometry) + 1,
    )


def compiled(function: Callable[..., Any], backend: Any = "aot_eager") -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend)


def test_compiled_linear() -> None:
    """Other sizes, keys and leading dimensions, by code compiled before."""
    fast = compiled(backward)
    for n, o, i in ((5, 7, 3), (11, 2, 13), (1, 1, 1)):
        for key in KEYS:
            operands = torch.randn(n, o), key, torch.randn(o, i), torch.randn(n, i)
            for ours, expected in zip(fast(*operands), backward(*operands), strict=True):
                assert torch.equal(ours, expected)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_compiled_convolution(order: torch.memory_format) -> None:
    fast = compiled(convolution_backward)
    for images in (2, 3):
        x, delta = torch.randn(images, 4, 7, 9), torch.randn(images, 6, 4, 5)
        operands = last(delta, order), KEYS[-1], torch.randn(6, 2, 3, 3), last(x, order)
        for ours, expected in zip(fast(*operands), convolution_backward(*operands), strict=True):
            assert torch.equal(ours, expected)
            assert ours.stride() == expected.stride()


def test_inductor(favour: Callable[[str], list[str]]) -> None:
    """Generated code reads results with the strides that were promised: channels-last ones of a fast kernel."""
    used = favour("skip")
    x, delta = torch.randn(4, 32, 32, 32), torch.randn(4, 128, 16, 16)
    operands = (
        last(delta, torch.channels_last),
        KEYS[-1],
        torch.randn(128, 16, 3, 3),
        last(x, torch.channels_last),
    )
    found = compiled(convolution_backward, "inductor")(*operands)
    for ours, expected in zip(found, convolution_backward(*operands), strict=True):
        torch.testing.assert_close(ours, expected)
    assert used == ["skip"] * 4


def test_a_new_key_needs_no_new_code() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    fast, delta = compiled(ops.nsd, counter), torch.randn(100)
    keys = [mix_key(n) for n in range(20)]
    for key in keys:
        assert torch.equal(fast(delta, 1.0, key), reference.nsd(delta, 1.0, key))
    # One for the first key, one for any on each side of the sign.
    assert {key >= 2**63 for key in keys} == {False, True}
    assert counter.frame_count <= 3


def test_a_step_may_be_computed_in_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._dynamo.config, "capture_scalar_outputs", True)

    def dithered(delta: Tensor, weight: Tensor) -> Tensor:
        step = (2 * delta.std()).item()
        return ops.delta_matmul(ops.nsd(delta, step, 7), step, weight)

    fast, weight = compiled(dithered), torch.randn(7, 3)
    for scale in (1.0, 0.3, 20.0):
        delta = scale * torch.randn(5, 7)
        assert torch.equal(fast(delta, weight), dithered(delta, weight))


class Dithered(torch.autograd.Function):
    """A linear product with a backward pass of ours."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        levels = ops.nsd(gradients[0], 0.5, KEYS[-1])
        return ops.delta_matmul(levels, 0.5, weight), ops.delta_outer(levels, 0.5, x)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_in_a_backward_pass(backend: str | None) -> None:
    """As part of a user's own autograd function, eager and compiled."""

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return Dithered.apply(x, weight).square().sum()

    x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    (loss if backend is None else compiled(loss, backend))(x, weight).backward()
    with torch.no_grad():
        delta = Delta(reference.nsd(2 * F.linear(x, weight), 0.5, KEYS[-1]), 0.5)
        expected = (
            reference.linear_input_grad(delta, weight, x.shape),
            reference.linear_weight_grad(delta, x),
        )
    torch.testing.assert_close((x.grad, weight.grad), expected)


# What is counted.


def counted(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("rows", [(4,), (2, 3), (0,), ()], ids=str)
def test_flops_of_linear_products(rows: tuple[int, ...]) -> None:
    """Two for each multiply-add of a triple loop, however many zeros there are."""
    values, step = gradient((*rows, 5), "levels", torch.float32)
    weight, x = torch.randn(5, 3), torch.randn(*rows, 3)
    n = torch.Size(rows).numel()
    triples = sum(2 for _ in itertools.product(range(n), range(5), range(3)))
    assert counted(lambda: ops.delta_matmul(values, step, weight)) == triples
    assert counted(lambda: ops.delta_outer(values, step, x)) == triples
    assert triples == linear_flops(n, 5, 3)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_flops_of_convolutions(case: str) -> None:
    """Two for each pair of an entry of δ (of x, when transposed) and a weight that it meets, on padding or not."""
    x_shape, weight_shape, g = CONVOLUTIONS[case]
    shape = output_shape(x_shape, weight_shape, g)
    values, step = gradient(shape, "levels", torch.float32)
    x, weight = torch.randn(x_shape), torch.randn(weight_shape)
    walked = x_shape if g.transposed else shape
    work = 0
    for place in itertools.product(*map(range, walked)):
        # The channels of the other side that are in the same group as this one.
        group = place[1] // (walked[1] // g.groups)
        others = (shape if g.transposed else x_shape)[1]
        for channel, *_ in itertools.product(range(others), *map(range, weight_shape[2:])):
            work += 2 * (channel // (others // g.groups) == group)
    rest = asdict(g)
    assert counted(lambda: ops.convolution_input_grad(values, step, weight, x_shape, **rest)) == work
    assert counted(lambda: ops.convolution_weight_grad(values, step, x, weight_shape, **rest)) == work
    assert counted(lambda: convolution(x, weight, g)) == work
    assert convolution_flops(x_shape, weight_shape, shape, g) == work


def test_rounding_is_not_counted() -> None:
    assert counted(lambda: ops.nsd(torch.randn(7), 1.0, 1)) == 0


# What is refused.


DELTA, LEVELS, WEIGHT = torch.ones(5, 3), torch.ones(5, 3, dtype=torch.int8), torch.ones(3, 2)
IMAGES, KERNEL = torch.ones(2, 4, 5, 5), torch.ones(4, 3, 3, 3)


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "call",
    [
        lambda step: ops.nsd(DELTA, step, 1),
        lambda step: ops.delta_matmul(LEVELS, step, WEIGHT),
        lambda step: ops.delta_outer(LEVELS, step, DELTA),
        lambda step: ops.convolution_input_grad(IMAGES, step, KERNEL, (2, 3, 7, 7)),
        lambda step: ops.convolution_weight_grad(IMAGES, step, torch.ones(2, 3, 7, 7), KERNEL.shape),
    ],
    ids=("nsd", "matmul", "outer", "input", "weight"),
)
def test_refused_steps(call: Callable[[float], Tensor], step: float) -> None:
    with pytest.raises(OptionError, match=f"step={step} .*positive and finite"):
        call(step)


@pytest.mark.parametrize("step", [1e-60, 1e60])
def test_steps_that_only_float64_holds(step: float) -> None:
    with pytest.raises(OptionError, match=r"in torch\.float32, where it must be positive and finite"):
        ops.nsd(DELTA, step, 1)
    assert ops.nsd(torch.tensor([2 * step], dtype=torch.float64), step, 1).item() == 2


@pytest.mark.parametrize("bits", [-1, 0, 1, 9])
def test_refused_widths(bits: int) -> None:
    with pytest.raises(OptionError, match=f"bits={bits},"):
        ops.nsd(DELTA, 1.0, 1, bits)


@pytest.mark.parametrize("key", [-1, 2**64])
def test_refused_keys(key: int) -> None:
    with pytest.raises(OptionError, match=f"key={key} "):
        ops.nsd(DELTA, 1.0, key)


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_refused_gradients(dtype: torch.dtype, bad: float, bits: int | None) -> None:
    """No level stands for them, so nothing may be returned."""
    with pytest.raises(OptionError, match=f"magnitude of the gradient is {abs(bad)}"):
        ops.nsd(torch.tensor([1.0, bad, 0.0], dtype=dtype), 1.0, 1, bits)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.nsd(LEVELS, 1.0, 1), "int8"),
        (lambda: ops.delta_matmul(LEVELS, None, WEIGHT), "without a step"),
        (lambda: ops.delta_matmul(LEVELS.int(), 1.0, WEIGHT), "int32"),
        (lambda: ops.delta_matmul(DELTA, None, WEIGHT.int()), "int32"),
        (lambda: ops.delta_matmul(DELTA, None, WEIGHT, "int4"), "float32, bfloat16, int8"),
        (lambda: ops.delta_matmul(DELTA, None, WEIGHT.T), r"\(5, 3\).*\(2, 3\)"),
        (lambda: ops.delta_matmul(torch.tensor(1.0), None, WEIGHT), "do not multiply"),
        (lambda: ops.delta_matmul(DELTA, None, WEIGHT[0]), "do not multiply"),
        (lambda: ops.delta_outer(DELTA, None, WEIGHT), "other rows"),
        (lambda: ops.delta_outer(DELTA, None, torch.ones(1, 5, 2)), "other rows"),
        (lambda: ops.delta_outer(torch.tensor(1.0), None, torch.tensor(1.0)), "other rows"),
        (lambda: input_grad((2, 3, 7, 8)), r"would be \(2, 4, 5, 6\)"),
        (lambda: input_grad((3, 3, 7, 7)), r"would be \(3, 4, 5, 5\)"),
        (lambda: input_grad((2, 2, 7, 7)), "3 channels to 4"),
        (lambda: input_grad((2, 9, 7, 7), groups=3), "9 channels to 4"),
        (lambda: input_grad((3, 7, 7)), "N = 1"),
        (lambda: input_grad((2, 3, 7, 7), stride=(1,)), "one number"),
        (lambda: input_grad((2, 3, 7, 7), stride=0), "no convolution"),
        (lambda: input_grad((2, 3, 7, 7), dilation=0), "no convolution"),
        (lambda: input_grad((2, 3, 7, 7), groups=0), "no convolution"),
        (lambda: input_grad((2, 3, 7, 7), padding=-1), "no convolution"),
        (lambda: input_grad((2, 3, 7, 7), output_padding=1), "no convolution"),
        (lambda: ops.convolution_input_grad(DELTA, None, WEIGHT, (5, 2)), "N = 1"),
        (lambda: weight_grad(IMAGES, torch.ones(2, 3, 7, 8)), r"would be \(2, 4, 5, 6\)"),
        (lambda: weight_grad(IMAGES, torch.ones(2, 4, 7, 7)), "3 channels to 4"),
        (lambda: weight_grad(IMAGES.char(), torch.ones(2, 3, 7, 7)), "without a step"),
    ],
)
def test_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()


def input_grad(shape: tuple[int, ...], **geometry: Any) -> Tensor:
    return ops.convolution_input_grad(IMAGES, None, KERNEL, shape, **geometry)


def weight_grad(values: Tensor, x: Tensor) -> Tensor:
    return ops.convolution_weight_grad(values, None, x, KERNEL.shape)


def test_refused_in_compiled_code() -> None:
    """A step when the code runs, a shape when it is compiled; both with our message."""
    with pytest.raises(OptionError, match="positive and finite"):
        compiled(ops.nsd)(DELTA, -1.0, 1)
    with pytest.raises(Exception, match="do not multiply"):
        compiled(ops.delta_matmul)(DELTA, None, WEIGHT.T)


# Nothing passes a gradient on, and nothing drops one silently.


@pytest.mark.parametrize(
    "call",
    [
        lambda d, w: ops.nsd(d, 1.0, 1, None),
        lambda d, w: ops.delta_matmul(d, None, w),
        lambda d, w: ops.delta_matmul(d.detach(), None, w),
        lambda d, w: ops.delta_outer(d, None, w),
        lambda d, w: ops.convolution_input_grad(d[None, None], None, w[None, None], (1, 1, 5, 5)),
        lambda d, w: ops.convolution_weight_grad(d[None, None], None, w[None, None], (1, 1, 1, 1)),
    ],
)
def test_no_derivative(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    delta, weight = torch.randn(3, 3, requires_grad=True), nn.Parameter(torch.randn(3, 3))
    found = call(delta, weight)
    assert found.requires_grad
    with pytest.raises(DoubleBackwardError, match=r"retrograde::\w+ was asked for"):
        found.sum().backward()
    with torch.no_grad():
        assert not call(delta, weight).requires_grad


def test_levels_are_integers() -> None:
    assert not ops.nsd(torch.randn(3, requires_grad=True), 1.0, 1).requires_grad


def test_parameters_meet_fast_kernels(favour: Callable[[str], list[str]]) -> None:
    """numpy takes no tensor whose gradient is recorded."""
    used = favour("skip")
    values, step = gradient((256, 256), "levels", torch.float32)
    weight = nn.Parameter(torch.randn(256, 256))
    delta = torch.randn(256, 256, requires_grad=True)
    ops.delta_matmul(values, step, weight)
    ops.delta_outer(delta, None, weight)
    assert ops.nsd(delta, 1.0, 1).any()
    assert used == ["skip", "skip"]


@pytest.mark.parametrize("first", ["kernels.ops", "engine.boundary"])
def test_either_module_comes_first(first: str) -> None:
    other = {"kernels.ops": "engine.boundary", "engine.boundary": "kernels.ops"}[first]
    code = (
        f"import retrograde.{first}, retrograde.{other}, torch\n"
        "torch.ops.retrograde.backward.default\n"
        "from retrograde.kernels import ops\n"
        "print(tuple(ops.delta_matmul(torch.ones(2, 3), None, torch.ones(3, 4)).shape))"
    )
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (found.stdout.strip(), found.stderr) == ("(2, 4)", "")

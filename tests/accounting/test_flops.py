"""FLOP formulas against loops that count, and against torch's own counter."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import retrograde as rg
from cases import LAYERS, Case, batch, cnn, mlp, seeded
from retrograde.accounting.counters import Counters
from retrograde.accounting.flops import convolution_flops, linear_flops
from retrograde.kernels.geometry import Geometry


def loops(
    n: int,
    inputs: int,
    outputs: int,
    size: tuple[int, ...],
    out: tuple[int, ...],
    kernel: tuple[int, ...],
    g: Geometry,
) -> int:
    """Multiply-adds by enumeration: every (sample, output channel, position, input channel of its group, tap)."""
    positions = size if g.transposed else out
    count = 0
    for _, o, i in itertools.product(range(n), range(outputs), range(inputs)):
        if o * g.groups // outputs == i * g.groups // inputs:
            count += sum(1 for _ in itertools.product(*map(range, positions), *map(range, kernel)))
    return count


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 1, 2)])
def test_linear(shape: tuple[int, int, int]) -> None:
    assert linear_flops(*shape) == 2 * sum(1 for _ in itertools.product(*map(range, shape)))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dim", [1, 2])
def test_convolution(dim: int, transposed: bool, groups: int) -> None:
    """Plain, transposed and grouped; strides and dilation enter through the shapes."""
    size, kernel = (5, 4)[:dim], (3, 2)[:dim]
    cls: Any = {
        (1, False): nn.Conv1d,
        (2, False): nn.Conv2d,
        (1, True): nn.ConvTranspose1d,
        (2, True): nn.ConvTranspose2d,
    }[dim, transposed]
    layer = cls(4, 8, kernel, stride=2, padding=1, dilation=1, groups=groups)
    z = layer(torch.zeros(2, 4, *size))
    g = Geometry(layer.stride, layer.padding, layer.dilation, transposed, (0,) * dim, groups)
    expected = 2 * loops(2, 4, 8, size, tuple(z.shape[2:]), kernel, g)
    assert convolution_flops((2, 4, *size), layer.weight.shape, z.shape, g) == expected


def count(model: nn.Module, x: torch.Tensor, **call: Any) -> int:
    x = x.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(x, **call).sum().backward()
    return counter.get_total_flops()


def torch_counts_wrong(case: Case) -> bool:
    """torch's formula of a grouped convolution's weight gradient counts the groups' cross terms, too."""
    return any(word in case.name for word in ("groups", "depthwise"))


@pytest.mark.parametrize(
    "case", [c for c in LAYERS if not torch_counts_wrong(c) and 0 not in c.shape], ids=str
)
def test_torch_counter(case: Case) -> None:
    """torch's counter sees the same dense work in a plain and in an attached layer, and so do our sums."""
    plain, attached = seeded(case.make), seeded(case.make)
    session = rg.attach(attached, rg.Dither())
    x = batch(case.shape)
    expected = count(plain, x, **case.call)
    assert count(attached, x, **case.call) == expected
    assert session.flops().dense == expected


def test_torch_counter_on_models() -> None:
    for make, shape in ((mlp, (5, 8)),):
        assert count(seeded(make), batch(shape)) > 0
        plain, attached = seeded(make), seeded(make)
        rg.attach(attached, rg.Dither())
        assert count(plain, batch(shape)) == count(attached, batch(shape))


def test_needed_follows_zeros() -> None:
    """needed = dense × (1 − zeros) in both backward products, whole in forward; executed stays dense."""
    layer = nn.Linear(6, 5)
    session = rg.attach(layer, rg.Dither(scale=3))
    x = batch((40, 6)).requires_grad_()
    (layer(x) * batch((40, 5), 2)).sum().backward()
    f, zeros = session.flops(), session.metrics()["zeros"]
    dense = 2 * 40 * 6 * 5
    assert 0.5 < zeros < 0.95
    assert f.forward.dense == f.forward.needed == f.forward.executed == dense
    for product in (f.input_grad, f.weight_grad):
        assert product.dense == product.executed == product.discounted == dense
        assert product.needed == pytest.approx(dense * (1 - zeros))
    assert f.overhead == 28 * 40 * 5
    assert f.dense == 3 * dense
    assert f.executed == 3 * dense + f.overhead
    assert f.needed == pytest.approx(dense * (1 + 2 * (1 - zeros)) + f.overhead)


def test_needed_by_hand() -> None:
    """Own zeros count too: with half of δ zero and nothing dithered, half of the products are needed."""
    layer = nn.Linear(6, 4)
    session = rg.attach(layer, rg.Dither(scale=0))
    layer(batch((10, 6))).backward(torch.tensor([1.0, 0.0, 2.0, 0.0]).expand(10, 4))
    f = session.flops()
    assert f.weight_grad.needed == 0.5 * f.weight_grad.dense == 10 * 6 * 4
    assert f.input_grad.dense == 0
    assert session.metrics()["zeros"] == session.metrics()["own_zeros"] == 0.5


def test_discounts() -> None:
    """Half precision counts half."""
    for dtype, discount in (
        (torch.float64, 1.0),
        (torch.float32, 1.0),
        (torch.bfloat16, 0.5),
        (torch.float16, 0.5),
    ):
        layer = nn.Linear(6, 5).to(dtype)
        session = rg.attach(layer, rg.Dither(scale=0))
        layer(batch((4, 6)).to(dtype)).sum().backward()
        f = session.flops()
        assert f.weight_grad.discounted == discount * f.weight_grad.executed > 0


def test_counters() -> None:
    """Sums, differences and copies touch every field and share nothing."""
    a = Counters(**{name: float(i + 1) for i, name in enumerate(Counters().to_dict())})  # type: ignore[arg-type]
    assert (a + a - a).to_dict() == a.to_dict()
    assert (a + a).to_dict() == {name: 2 * value for name, value in a.to_dict().items()}
    b = a.copy()
    b.calls += 1
    assert a.calls == 1
    table = a.flops().to_dict()
    assert table["weight_grad"]["discounted"] == a.weight_grad_discounted
    assert table["dense"] == a.forward_dense + a.input_grad_dense + a.weight_grad_dense


def test_cnn_counts() -> None:
    """A grouped CNN by hand, where torch's own formula differs."""
    model = seeded(cnn)
    session = rg.attach(model, rg.Dither())
    model(batch((2, 3, 8, 8))).sum().backward()
    first, second, head = 2 * 2 * 64 * 8 * 27, 2 * 2 * 16 * 8 * 36, 2 * 2 * 128 * 4
    f = session.flops()
    assert f.weight_grad.dense == f.forward.dense == first + second + head
    assert f.input_grad.dense == second + head

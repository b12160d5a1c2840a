"""FLOP formulas against loops that count, and against torch's own counter."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import retrograde as rg
from cases import LAYERS, Case, batch, cnn, mlp, program, seeded
from retrograde.accounting.counters import Counters
from retrograde.engine.maps import base as maps
from retrograde.engine.tally import _EVERY
from retrograde.kernels.geometry import Geometry
from retrograde.kernels.work import convolution_flops, linear_flops


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


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(6, 5), lambda: nn.Conv1d(6, 5, 3)], ids=["linear", "conv"]
)
@pytest.mark.parametrize(("of_input", "of_weight"), [(True, False), (False, True)])
def test_torch_counter_of_parts(make: Any, of_input: bool, of_weight: bool) -> None:
    """A gradient that nobody asks for is computed by neither, and counted by nobody."""
    counts = []
    for attached in (False, True):
        layer = seeded(make)
        layer.weight.requires_grad_(of_weight)
        session = rg.attach(layer, rg.Dither(scale=0)) if attached else None
        x = batch((7, 6, 9 if isinstance(layer, nn.Conv1d) else 6)).requires_grad_(of_input)
        with FlopCounterMode(display=False) as counter:
            layer(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert session is not None
    assert counts[0] == counts[1] == session.flops().dense == 2 * session.flops().forward.dense
    assert (session.flops().input_grad.dense > 0) == of_input


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
    assert f.overhead == 22 * 40 * 5
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


def ones_and_zeros(zeros: int) -> torch.Tensor:
    """δ of ten rows and ten columns, `zeros` of its entries zero."""
    return (torch.arange(100) >= zeros).float().view(10, 10)


class Idle(rg.Method):
    """Does nothing in the backward pass."""

    name = "idle"

    def make_rule(self, site: rg.Site) -> rg.Rule:
        return rg.Rule(site.name)


@pytest.mark.parametrize("method", [rg.Dither(scale=0), Idle()], ids=["neutral", "idle"])
def test_zeros_that_nothing_else_counts(method: rg.Method) -> None:
    """Counted in the first eight calls of the first eight steps and of one in so many, and assumed between."""
    layer = nn.Linear(6, 10)
    session = rg.attach(layer, method)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    last, shares = 0, list[int]()
    for step in range(2 * _EVERY + 2):
        share = 10 + step
        # A tenth call is as the eighth was: the later ones arrive without a zero.
        for call in range(10):
            layer(batch((10, 6)).requires_grad_()).backward(ones_and_zeros(share if call < 8 else 0))
        if step < 8 or step % _EVERY == 0:
            last = share
        shares.append(last)
        found, total = session.metrics(reset=True), session.flops()
        assert found["zeros"] == found["own_zeros"] == pytest.approx(last / 100), step
        assert total.weight_grad.dense == total.weight_grad.executed == (step + 1) * 10 * 2 * 10 * 60
        optimizer.step()
    assert len(set(shares)) == 10
    for product in (session.flops().input_grad, session.flops().weight_grad):
        needed = sum(1 - share / 100 for share in shares) * 10 * 2 * 10 * 60
        assert product.needed == pytest.approx(needed)


def test_zeros_of_a_method_are_always_counted() -> None:
    """What dithering makes of δ is known in every step; what δ arrived with, too, where that is counted on the way."""
    layer = nn.Linear(6, 10)
    session = rg.attach(layer, rg.Dither(scale=1e-6, bits=8))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    for step in range(20):
        layer(batch((10, 6))).backward(ones_and_zeros(10 + step))
        optimizer.step()
        found = session.metrics(reset=True)
        # The step is so small that nothing is rounded to zero.
        assert found["zeros"] == found["own_zeros"] == (10 + step) / 100


@pytest.mark.parametrize("idle", ["paused", "evaluated"])
@pytest.mark.filterwarnings("ignore::retrograde.errors.RetrogradeWarning")
def test_the_first_calls_are_counted_whenever_they_come(idle: str) -> None:
    """A layer that sat out its first steps has no share to assume: its first calls count."""
    layer = nn.Linear(6, 10)
    session = rg.attach(layer, rg.Dither(scale=0), strict=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    for _ in range(9):
        if idle == "paused":
            with session.paused():
                layer(batch((10, 6))).backward(ones_and_zeros(40))
                optimizer.step()
        else:
            layer.eval()(batch((10, 6))).backward(ones_and_zeros(40))
            optimizer.step()
    layer.train()(batch((10, 6))).backward(ones_and_zeros(40))
    assert session.metrics()["zeros"] == session.metrics()["own_zeros"] == 0.4
    assert session.flops().weight_grad.needed == pytest.approx(0.6 * session.flops().weight_grad.dense)


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


def test_turned_weight() -> None:
    """A weight that lies as (i, o) multiplies as much as one that lies as (o, i)."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "_KINDS", dict(maps._KINDS))
        rg.register_layer(Turned, rg.LinearKind(turned=True))
        layer = Turned()
        session = rg.attach(layer, rg.Dither(scale=0))
    x = batch((2, 7, 6))
    assert count(layer, x) == session.flops().dense == 3 * 2 * 14 * 30
    session.detach()
    assert count(layer, x) == 3 * 2 * 14 * 30


def test_attention_counts() -> None:
    """Both projections of an attention layer, packed or in parts; the attention itself is not of its weight."""
    for inputs, products in ((1, 1), (2, 2), (3, 3)):
        layer = nn.MultiheadAttention(8, 2, batch_first=True)
        session = rg.attach(layer, rg.Dither(scale=0))
        x = [batch((2, 5, 8), seed).requires_grad_() for seed in range(inputs)]
        query, key, value = x[0], x[min(1, inputs - 1)], x[-1]
        layer(query, key, value, need_weights=False)[0].sum().backward()
        f = session.flops()
        packed, out = 2 * 10 * 8 * 24, 2 * 10 * 8 * 8
        for product in (f.forward, f.input_grad, f.weight_grad):
            assert product.dense == product.executed == packed + out
        assert program(layer).total.calls == products
        assert program(layer.out_proj).total.calls == 1


def test_cnn_counts() -> None:
    """A grouped CNN by hand, where torch's own formula differs."""
    model = seeded(cnn)
    session = rg.attach(model, rg.Dither())
    model(batch((2, 3, 8, 8))).sum().backward()
    first, second, head = 2 * 2 * 64 * 8 * 27, 2 * 2 * 16 * 8 * 36, 2 * 2 * 128 * 4
    f = session.flops()
    assert f.weight_grad.dense == f.forward.dense == first + second + head
    assert f.input_grad.dense == second + head

"""The registered op and the autograd boundary."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import retrograde as rg
from cases import LAYERS, Case, assert_same, batch, gradients, mlp, program, seeded
from retrograde.engine.maps import base
from retrograde.engine.maps.base import kind_of

# test_autograd_registration and test_schema apply to ops as such. test_faketensor checks shapes, strides and aliases of
# the fake implementation. test_aot_dispatch_dynamic compares two runs bitwise: it needs the neutral scale, since each
# call of an op draws new noise by design.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def operands(layer: nn.Module, x: Tensor, needs: list[bool], rows: Tensor | None = None) -> tuple[Any, ...]:
    """What the op of an attached layer is called with, for δ of ones."""
    map = kind_of(type(layer)._retrograde_base).map(layer)
    delta = torch.ones_like(layer(x)).detach()
    saved = [x] if needs[1] else []
    token, weight = program(layer).token, layer.weight.detach()
    return delta, saved, rows, weight, token, tuple(x.shape), needs, map.name, map.numbers


class Turned(nn.Module):
    """A linear layer whose weight lies as (i, o)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))
    rg.register_layer(Turned, rg.LinearKind(turned=True))
    return Turned()


NEEDS = ([True, True, True], [True, True, False], [False, True, False], [True, False, False])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)], ids=str)
def test_opcheck_linear(shape: tuple[int, ...], check: str, needs: list[bool]) -> None:
    """torch.library's own checks: schema, aliases, fake tensors and AOT dispatch with dynamic shapes."""
    layer = nn.Linear(4, 3)
    _session = rg.attach(layer, rg.Dither(scale=0))
    arguments = operands(layer, batch(shape), needs)
    torch.library.opcheck(torch.ops.retrograde.backward.default, arguments, test_utils=check)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_opcheck_turned(turned: nn.Module, check: str, needs: list[bool]) -> None:
    """The same with the weight the other way round."""
    _session = rg.attach(turned, rg.Dither(scale=0))
    arguments = operands(turned, batch((5, 4)), needs)
    torch.library.opcheck(torch.ops.retrograde.backward.default, arguments, test_utils=check)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("needs", [[True, True, True], [False, True, False]], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d], ids=["plain", "transposed"])
def test_opcheck_convolution(
    make: type[nn.Module], check: str, needs: list[bool], layout: torch.memory_format
) -> None:
    """The same for convolutions, in both memory formats."""
    layer = make(4, 6, 3, stride=(2, 1), padding=(1, 0), groups=2).to(memory_format=layout)
    _session = rg.attach(layer, rg.Dither(scale=0))
    arguments = operands(layer, batch((2, 4, 7, 8)).to(memory_format=layout), needs)
    torch.library.opcheck(torch.ops.retrograde.backward.default, arguments, test_utils=check)


@pytest.mark.parametrize("check", CHECKS)
def test_opcheck_with_rows(check: str) -> None:
    """The same where rows of the input were kept for statistics."""
    layer = nn.Linear(4, 3)
    _session = rg.attach(layer, rg.Decorrelate(mode="precondition", rank=2, every=1))
    arguments = operands(layer, batch((5, 4)), NEEDS[0], rows=batch((1, 5, 4)))
    torch.library.opcheck(torch.ops.retrograde.backward.default, arguments, test_utils=check)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_op_and_straight_call_agree(case: Case) -> None:
    """Whoever watches ops gets what everybody else gets, to the last bit, noise included."""
    found = []
    for watched in (False, True):
        layer = seeded(case.make)
        _session = rg.attach(layer, rg.Dither(scale=1.5), seed=4)
        x = batch(case.shape)
        with FlopCounterMode(display=False) if watched else contextlib.nullcontext():
            found.append(gradients(layer, x, **case.call))
    assert_same(found[1], found[0], 0.0)


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in LAYERS
        if c.name in ("linear_1d", "linear_3d", "conv1d_same_even", "conv2d_groups", "transposed2d_stride")
    ],
    ids=str,
)
def test_gradcheck(case: Case) -> None:
    """Finite differences agree with the boundary in float64 (scale 0), undefined gradients included."""
    check_by_differences(case.make().double(), batch(case.shape, dtype=torch.float64))


@pytest.mark.parametrize("rows", [(7,), (3, 2), ()], ids=str)
def test_gradcheck_turned(turned: nn.Module, rows: tuple[int, ...]) -> None:
    """The same with the weight the other way round."""
    check_by_differences(turned.double(), batch((*rows, 4), dtype=torch.float64))


def check_by_differences(layer: nn.Module, x: Tensor) -> None:
    rg.attach(layer, rg.Dither(scale=0))
    names = [n for n, _ in layer.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x.requires_grad_()
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize(
    "case", [c for c in LAYERS if c.name in ("linear_3d", "conv2d_stride", "transposed1d_groups")], ids=str
)
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_linear_in_frozen_noise(case: Case, scale: float) -> None:
    """With the noise frozen, dx and dW are plain autograd's for δ̃, and db is plain autograd's for δ.

    The floor is piecewise constant in δ, so finite differences say nothing of it; what must hold is that both products
    are the exact linear maps of one and the same δ̃, which a rule behind Dither records.
    """
    seen: list[Tensor] = []

    class Recorder(rg.Rule):
        def delta(self, call: rg.Call, delta: rg.Delta) -> rg.Delta:
            seen.append(delta.values.double() * (delta.step or 1.0))
            return delta

    class Recording(rg.Method):
        name = "recording"

        def make_rule(self, site: rg.Site) -> rg.Rule:
            return Recorder(site.name)

    plain, attached = seeded(case.make).double(), seeded(case.make).double()
    rg.attach(attached, [rg.Dither(scale=scale), Recording()], seed=1)
    x = batch(case.shape, dtype=torch.float64).requires_grad_()
    delta = batch(tuple(plain(x).shape), 5, torch.float64)
    dx, dw, db = torch.autograd.grad(attached(x), (x, attached.weight, attached.bias), delta)
    assert not torch.equal(seen[0], delta)
    exact = torch.autograd.grad(plain(x), (x, plain.weight), seen[0])
    torch.testing.assert_close(dx, exact[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dw, exact[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        db, torch.autograd.grad(plain(x), plain.bias, delta)[0], rtol=1e-10, atol=1e-10
    )


def test_double_backward_is_refused() -> None:
    """create_graph=True raises with the layer's name and the way out; inside paused() it works as in plain torch."""
    model = seeded(mlp).double()
    session = rg.attach(model, rg.Dither())
    x = batch((4, 8), dtype=torch.float64).requires_grad_()
    with pytest.raises(rg.errors.DoubleBackwardError, match=r"layer '4'.*session.paused"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)

    def penalty(net: nn.Module) -> Tensor:
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), net[0].weight)
        return h

    with session.paused():
        found = penalty(model)
    torch.testing.assert_close(found, penalty(seeded(mlp).double()), rtol=1e-12, atol=0)


def test_retained_graph_draws_again() -> None:
    """Each backward pass is a draw of its own, also through one graph."""
    layer = seeded(lambda: nn.Linear(6, 5))
    rg.attach(layer, rg.Dither(scale=2))
    z = torch.sin(layer(batch((8, 6))))
    first, second = (torch.autograd.grad(z.sum(), layer.weight, retain_graph=True)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_unused_output() -> None:
    """An output that the loss does not use costs no call."""
    used, unused = nn.Linear(4, 3), nn.Linear(4, 3)
    rg.attach(nn.ModuleList([used, unused]), rg.Dither())
    a, _ = used(torch.ones(2, 4)), unused(torch.ones(2, 4))
    a.sum().backward()
    assert program(used).total.calls == 1
    assert program(unused).total.calls == 0
    assert unused.weight.grad is None


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(6, 5), lambda: nn.Conv1d(6, 5, 3, padding=1)], ids=["linear", "conv"]
)
def test_autocast(make: Callable[[], nn.Module]) -> None:
    """Under autocast: same dtypes and values as plain autocast, float64 left alone."""
    plain, attached = seeded(make), seeded(make)
    rg.attach(attached, rg.Dither(scale=0))
    x = batch((4, 6, 6))

    def forward(net: nn.Module) -> Any:
        def run(y: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                z = net(y)
            assert z.dtype == (torch.float64 if y.dtype == torch.float64 else torch.bfloat16)
            return z.float()

        return run

    assert_same(gradients(attached, x, forward(attached)), gradients(plain, x, forward(plain)), 0.02)
    wide, exact = attached.double(), plain.double()
    assert_same(gradients(wide, x.double(), forward(wide)), gradients(exact, x.double(), forward(exact)), 0.0)


def test_transforms_are_refused_by_name() -> None:
    """With the layer's name and the way out, before a kernel meets what it cannot read."""
    model = seeded(mlp)
    rg.attach(model, rg.Dither())
    x, parameters = batch((3, 8)), dict(model.named_parameters())

    def loss(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, p, (x,)).sum()

    y = model(x).sum(0)
    for transformed in (
        lambda: torch.func.grad(loss)(parameters),
        lambda: torch.func.jacrev(model)(x),
        lambda: torch.func.vmap(model)(x),
        lambda: torch.autograd.functional.jacobian(model, x, vectorize=True),
        lambda: torch.autograd.functional.jacobian(model, x, vectorize=True, strategy="forward-mode"),
        lambda: torch.autograd.grad(
            model(x).sum(0), list(parameters.values()), torch.eye(4), is_grads_batched=True
        ),
        lambda: torch.func.vmap(lambda d: torch.autograd.grad(y, parameters["0.weight"], d))(torch.eye(4)),
    ):
        with pytest.raises(rg.errors.TransformError, match=r"layer '\d' .*session\.paused"):
            transformed()


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (8,)])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_may_be_changed_in_place(shape: tuple[int, ...], bias: bool) -> None:
    """As a plain layer's may be; torch makes some of them as views."""
    plain = seeded(lambda: nn.Sequential(nn.Linear(8, 4, bias=bias), nn.ReLU(inplace=True)))
    model = copy.deepcopy(plain)
    rg.attach(model, rg.Dither(scale=0.0))
    assert_same(gradients(model, batch(shape)), gradients(plain, batch(shape)), 1e-6)


def test_per_sample_gradients_inside_paused() -> None:
    """torch.func transforms work where plain autograd runs."""
    model = seeded(mlp)
    session = rg.attach(model, rg.Dither())
    parameters = dict(model.named_parameters())

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (x,)).sum()

    with session.paused():
        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, batch((3, 8)))
    assert found["0.weight"].shape == (3, 16, 8)

"""The registered ops and the autograd boundary."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retrograde as rg
from cases import LAYERS, Case, assert_same, batch, gradients, mlp, program, seeded

GEOMETRY = {
    "stride": (2, 1),
    "padding": (1, 0),
    "dilation": (1, 1),
    "transposed": False,
    "output_padding": (0, 0),
    "groups": 2,
}

# test_autograd_registration and test_schema apply to ops as such. test_faketensor checks shapes, strides and aliases of
# the fake implementation. test_aot_dispatch_dynamic compares two runs bitwise: it needs the neutral scale, since each
# call of an op draws new noise by design.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def alive(layer: nn.Module) -> tuple[rg.Session, Tensor]:
    session = rg.attach(layer, rg.Dither(scale=0))
    return session, program(layer).token


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "needs", [[True, True, True], [True, True, False], [False, True, False], [True, False, False]], ids=str
)
def test_opcheck_linear(check: str, needs: list[bool]) -> None:
    """torch.library's own checks: schema, aliases, fake tensors and AOT dispatch with dynamic shapes."""
    layer = nn.Linear(4, 3)
    _session, token = alive(layer)
    saved = [batch((5, 4))] if needs[1] else []
    arguments = (batch((5, 3)), saved, None, layer.weight.detach(), token, (5, 4), needs, True)
    torch.library.opcheck(torch.ops.retrograde.linear_backward.default, arguments, test_utils=check)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("needs", [[True, True, True], [False, True, False]], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_opcheck_convolution(check: str, needs: list[bool], layout: torch.memory_format) -> None:
    """The same for convolutions, in both memory formats."""
    layer = nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 0), groups=2).to(memory_format=layout)
    _session, token = alive(layer)
    x = batch((2, 4, 7, 8)).to(memory_format=layout)
    delta = torch.ones_like(layer(x)).detach()
    arguments = (
        delta,
        [x],
        None,
        layer.weight.detach(),
        token,
        tuple(x.shape),
        needs,
        True,
        *GEOMETRY.values(),
    )
    torch.library.opcheck(torch.ops.retrograde.convolution_backward.default, arguments, test_utils=check)


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
    layer = case.make().double()
    rg.attach(layer, rg.Dither(scale=0))
    names = [n for n, _ in layer.named_parameters()]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x = batch(case.shape, dtype=torch.float64).requires_grad_()
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

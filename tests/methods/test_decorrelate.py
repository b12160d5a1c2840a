"""Decorrelate at whole layers: less correlation, the same function, exact folding, autograd where it is neutral."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retrograde as rg
from cases import (
    LAYERS,
    MODELS,
    Case,
    assert_same,
    batch,
    gradients,
    mlp,
    seeded,
)
from retrograde.methods.decorrelate import Decorrelate

MODES: dict[str, Callable[[], Decorrelate]] = {
    "lowrank": partial(Decorrelate, rank=3, every=1, rows=64),
    "full": partial(Decorrelate, mode="full", every=1, rows=64),
}
ALL = {**MODES, "precondition": partial(Decorrelate, mode="precondition", rank=3, every=1, rows=64)}
modes = pytest.mark.parametrize("make", MODES.values(), ids=MODES)
all_modes = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


def ill_conditioned(d: int, n: int, ratio: float = 1e6, seed: int = 0) -> Tensor:
    """Inputs far from zero whose covariance has a power-law spectrum, as natural inputs have, from 1 to 1/ratio."""
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(d, d, generator=generator).double())
    spectrum = torch.arange(1, d + 1).double() ** -(math.log(ratio) / math.log(d))
    noise = torch.randn(n, d, generator=generator).double()
    return (noise * spectrum.sqrt() @ turn.T + 3 * torch.randn(d, generator=generator).double()).float()


def run(layer: nn.Module, x: Tensor, steps: int = 1, lr: float = 0.05, **call: Any) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.sin(layer(x, **call)).square().sum().backward()
        optimizer.step()


def shifted(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    """Inputs with a mean."""
    return batch(shape, seed) + 2.0


# Less correlation.


@pytest.mark.parametrize(("mode", "steps"), [("lowrank", 10), ("full", 2000)])
def test_correlation_falls(mode: str, steps: int) -> None:
    """λ_max/λ_min = 1e6 and far from zero, at defaults: tenfold less correlation on fresh rows, no divergence.

    Rank 32 is adequate for 256 features of this spectrum: what is outside the 32 is below the damping.
    """
    d = 256 if mode == "lowrank" else 64
    x, fresh = ill_conditioned(d, 6000).split(3000)
    layer = nn.Linear(d, 4)
    session = rg.attach(layer, Decorrelate(mode=mode))  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(layer.parameters(), 1e-3)
    target = torch.randn(3000, 4)
    losses = []
    for step in range(steps):
        index = (torch.arange(256) + 256 * step) % 3000
        loss = (layer(x[index]) - target[index]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses) < 2 * losses[0] + 2
    figures = next(iter(session.metrics()["layers"].values()))
    assert figures["correlation"] < figures["correlation_input"] / 10
    # What the layer multiplies fresh rows by, column by column of the identity.
    eye = torch.eye(d)
    with torch.no_grad():
        if mode == "lowrank":
            basis, gain = layer.decorrelation_basis[0], layer.decorrelation_gain[0]
            R = eye + basis * (gain - 1) @ basis.T
        else:
            R = layer.decorrelation_matrix[0]
    before, after = (_mean_square_correlation(rows) for rows in (fresh, fresh @ R.T))
    assert after < before / 10


def _mean_square_correlation(x: Tensor) -> float:
    r = torch.corrcoef(x.T.double())
    d = len(r)
    return float((r.square().sum() - d) / (d * (d - 1)))


def test_normalized_variant_moves() -> None:
    """The other variant goes the same way and stays stable with κ = 1, where its variances weigh double."""
    x = ill_conditioned(16, 500, ratio=100)
    for kappa in (0.5, 1.0):
        layer = nn.Linear(16, 4)
        session = rg.attach(layer, Decorrelate(mode="full", variant="normalized", kappa=kappa, every=1))
        run(layer, x, 300, lr=0.0)
        z = (x - x.mean(0)) @ layer.decorrelation_matrix[0].T
        torch.testing.assert_close(z.square().mean(0), torch.ones(16), rtol=0, atol=0.1)
        figures = next(iter(session.metrics()["layers"].values()))
        if kappa == 0.5:
            assert figures["correlation"] < 0.7 * figures["correlation_input"]


def test_silent_feature_stays_bounded() -> None:
    """A feature that is always zero: its row of R does not grow for ever."""
    x = batch((64, 8))
    x[:, 3] = 0
    layer = nn.Linear(8, 4)
    _session = rg.attach(layer, Decorrelate(mode="full", every=1))
    run(layer, x, 300, lr=0.0)
    found = layer.decorrelation_matrix[0][3].norm()
    run(layer, x, 100, lr=0.0)
    assert float(layer.decorrelation_matrix[0][3].norm()) < 1.01 * float(found) < 100


# The same function.


@modes
@pytest.mark.parametrize("name", MODELS)
def test_update_preserves_the_function(name: str, make: Callable[[], Decorrelate]) -> None:
    """A new R and μ, and the loss agrees to 1e-5; the weights did change."""
    build, shape = MODELS[name]
    model = seeded(build)
    session = rg.attach(model, make())
    x = shifted(shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(4):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        loss = torch.sin(model(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        again = torch.sin(model(x)).square().mean()
        torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
        assert all(
            not torch.equal(before[n], p) for n, p in model.named_parameters() if n.endswith("0.weight")
        )
    assert session.step == 4


def test_update_preserves_wide_spectra() -> None:
    """Condition 1e6, little damping, so that gains reach a hundredth: still 1e-5."""
    x = ill_conditioned(64, 500)
    layer = nn.Linear(64, 8)
    _session = rg.attach(layer, Decorrelate(damping=1e-4, every=1))
    for _ in range(3):
        before = layer(x).square().mean()
        run(layer, x, lr=0.0)
        torch.testing.assert_close(layer(x).square().mean(), before, rtol=1e-5, atol=0)
    assert float(layer.decorrelation_gain.min()) < 0.02


@modes
def test_evaluation_equals_training(make: Callable[[], Decorrelate]) -> None:
    """model.eval(), no_grad and paused compute what training does."""
    model = seeded(mlp)
    session = rg.attach(model, make())
    x = shifted((16, 8))
    run(model, x, 3, lr=0.01)
    trained = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), trained)
        torch.testing.assert_close(model.eval()(x), trained)
    with session.paused():
        torch.testing.assert_close(model.train()(x), trained)


# Folding.


def _supported(case: Case) -> bool:
    return 0 not in case.shape


@modes
@pytest.mark.parametrize("case", [c for c in LAYERS if _supported(c)], ids=str)
def test_fold(case: Case, make: Callable[[], Decorrelate]) -> None:
    """Every layer kind: the plain class, the same keys, and the same function everywhere, padded borders included."""
    layer = seeded(case.make)
    session = rg.attach(layer, make())
    x = shifted(case.shape)
    run(layer, x, 3, lr=0.01, **case.call)
    folded = session.fold()
    assert type(folded) is type(case.make())
    assert list(folded.state_dict()) == list(case.make().state_dict())
    expected = layer(x, **case.call)
    assert_same({"z": folded(x, **case.call)}, {"z": expected.detach()}, 1e-5)
    assert any(n.startswith("decorrelation_") for n in layer.state_dict())
    session.detach()
    assert type(layer) is type(case.make())
    assert list(layer.state_dict()) == list(case.make().state_dict())
    assert_same({"z": layer(x, **case.call)}, {"z": expected}, 1e-5)


def test_groups_have_their_own() -> None:
    """Two groups fed by inputs of different directions learn different transforms."""
    layer = nn.Conv1d(4, 4, 1, groups=2)
    _session = rg.attach(layer, Decorrelate(rank=1, every=1))
    a, b = batch((2, 64, 1, 9), 5)
    x = torch.cat([a, a + 0.1 * b, b, -b + 0.1 * a], 1)
    run(layer, x)
    first, second = layer.decorrelation_basis[..., 0]
    assert float(first.prod()) > 0.4
    assert float(second.prod()) < -0.4


@pytest.mark.parametrize(
    "make",
    [
        partial(nn.Conv2d, 2, 3, 3),
        partial(nn.ConvTranspose2d, 2, 3, 3),
        partial(nn.ConvTranspose2d, 2, 3, 4, stride=2),
        partial(nn.ConvTranspose2d, 4, 2, 3, stride=3, groups=2),
    ],
    ids=["plain", "transposed", "stride", "groups"],
)
def test_whole_patches_are_centred(make: partial[nn.Module]) -> None:
    """Away from borders the layer is W R (x − μ) + b: a constant input μ gives b, averaged over strides."""
    layer = make()
    _session = rg.attach(layer, Decorrelate(rank=4, every=1, rows=4096))
    channels = layer.in_channels
    run(layer, batch((32, channels, 8, 8)) + 5 * torch.arange(1, channels + 1).view(-1, 1, 1), lr=0.0)
    pixels = layer.decorrelation_mean.view(channels, -1).mean(1).view(1, channels, 1, 1)
    with torch.no_grad():
        interior = layer(pixels.expand(1, channels, 16, 16))[..., 6:12, 6:12]
        torch.testing.assert_close(interior.mean((0, 2, 3)), layer.bias, rtol=0, atol=0.1)
        silent = layer(torch.zeros(1, channels, 16, 16))[..., 6:12, 6:12]
        assert float((silent.mean((0, 2, 3)) - layer.bias).abs().max()) > 1


def test_without_bias() -> None:
    """No bias before, none after, and no mean: the mean's direction is one that R brings down."""
    layer = nn.Linear(8, 4, bias=False)
    session = rg.attach(layer, Decorrelate(rank=1, every=1))
    x = batch((256, 8)) + 10
    before = layer(x)
    run(layer, x, lr=0.0)
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)
    assert "decorrelation_mean" not in layer.state_dict()
    assert abs(float(layer.decorrelation_basis[0, :, 0].sum())) == pytest.approx(8**0.5, rel=1e-2)
    assert session.fold().bias is None


def test_frozen_bias_is_left() -> None:
    """A bias that is not trained cannot take up the mean: it stays what it was."""
    layer = nn.Linear(8, 4)
    layer.bias.requires_grad_(False)
    bias = layer.bias.clone()
    _session = rg.attach(layer, Decorrelate(every=1))
    run(layer, shifted((64, 8)), 2)
    assert torch.equal(layer.bias, bias)


def test_one_stride_for_all() -> None:
    """A stride set as one number after building, as segmentation models do."""
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2)
    layer.stride = 2  # type: ignore[assignment]
    session = rg.attach(layer, Decorrelate(every=1))
    x = shifted((4, 2, 5, 5))
    run(layer, x, 2, lr=0.01)
    torch.testing.assert_close(session.fold()(x), layer(x), rtol=1e-5, atol=1e-5)


# Neutral settings, and gradients.


@all_modes
@pytest.mark.parametrize("name", MODELS)
def test_autograd_before_the_first_update(name: str, make: Callable[[], Decorrelate]) -> None:
    build, shape = MODELS[name]
    model = seeded(build)
    _session = rg.attach(model, make())
    assert_same(gradients(model, batch(shape)), gradients(seeded(build), batch(shape)))


def test_autograd_with_endless_damping() -> None:
    """R stays I, and layers without bias have no mean: autograd still, after updates."""
    model, plain = (seeded(partial(mlp, bias=False)) for _ in range(2))
    _session = rg.attach(model, Decorrelate(damping=1e30, every=1))
    run(model, shifted((16, 8)), 3, lr=0.0)
    assert float(model[0].decorrelation_basis.abs().sum()) > 0
    assert_same(gradients(model, batch((16, 8))), gradients(plain, batch((16, 8))))


@modes
@pytest.mark.parametrize("rows", [pytest.param(3, id="on the rows"), pytest.param(16, id="on the weight")])
def test_gradients_are_those_of_the_transformed_layer(make: Callable[[], Decorrelate], rows: int) -> None:
    """Against autograd through z = R (x − μ), written out; R acts on the side with fewer vectors."""
    layer = seeded(partial(nn.Linear, 6, 5))
    _session = rg.attach(layer, make())
    run(layer, shifted((32, 6)), 3, lr=0.01)
    if hasattr(layer, "decorrelation_matrix"):
        R = layer.decorrelation_matrix[0]
    else:
        U, g = layer.decorrelation_basis[0], layer.decorrelation_gain[0]
        R = torch.eye(6) + U @ torch.diag(g - 1) @ U.T
    mean = layer.decorrelation_mean[0]
    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())

        def forward(self, x: Tensor) -> Tensor:
            return ((x - mean) @ R.T) @ self.weight.T + self.bias

    x = shifted((rows, 6), 9)
    assert_same(gradients(layer, x), gradients(Written(), x), 1e-5)


def test_precondition_is_the_reparameterised_step() -> None:
    """Plain SGD, p = 1, no bias: A moves as in low-rank mode; p = 0.5 is another step. The forward pass is plain."""
    x = batch((64, 8)) @ torch.diag(torch.tensor([5.0, 3, 2, 1, 1, 1, 1, 1])) + 1
    found = []
    for options in ({}, {"mode": "precondition"}, {"mode": "precondition", "power": 0.5}):
        layer = seeded(partial(nn.Linear, 8, 4, bias=False))
        session = rg.attach(layer, Decorrelate(rank=3, every=100, **options))  # type: ignore[arg-type]
        run(layer, x, 1, lr=0.0)
        run(layer, x, 3, lr=1e-3)
        found.append(session.fold().weight)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert float((found[2] - found[0]).abs().max()) > 1e-3
    assert list(layer.state_dict()) == ["weight"]


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_precondition_inverts_the_second_moment(power: float) -> None:
    """With all directions and little damping: dW E[xxᵀ]^(−p), up to the scale that leaves the least direction alone."""
    x = ill_conditioned(6, 400, ratio=30)
    layer, plain = (seeded(partial(nn.Linear, 6, 4)) for _ in range(2))
    _session = rg.attach(layer, Decorrelate(mode="precondition", rank=6, damping=1e-6, power=power, every=1))
    run(layer, x, lr=0.0)
    for net in (layer, plain):
        net.zero_grad()
        torch.sin(net(x)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.0).step()
    values, vectors = torch.linalg.eigh(x.T.double() @ x.double() / len(x))
    expected = plain.weight.grad.double() @ vectors * (values[0] / values) ** power @ vectors.T
    assert_same({"w": layer.weight.grad.double()}, {"w": expected}, 1e-2)
    assert torch.equal(layer.bias.grad, plain.bias.grad)

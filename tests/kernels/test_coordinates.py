"""Coordinates around a step: compiled and torch's own, against R written out in float64."""

import pytest
import torch
from torch import Tensor

from retrograde.kernels import coordinates
from retrograde.kernels.coordinates import Coordinates

SHAPES = [(1, 1, 1), (1, 3, 40), (2, 5, 12), (1, 17, 1030), (3, 8, 2049), (2, 9, 1024)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(g: int, d: int, k: int, mean: bool, skew: float = 0.0) -> tuple[Coordinates, Tensor, Tensor]:
    """With R (g, d, d) and μ (g, d) in float64."""
    basis = torch.linalg.qr(random(g, d, k).double())[0].float() + skew * random(g, d, k, seed=9)
    gain = torch.linspace(0.1, 1, k).expand(g, k)
    away = 3 * random(g, d, seed=1) if mean else None
    eye = torch.eye(d).double()
    R = 1.7 * (eye + (basis.double() * (gain.double() - 1).unsqueeze(-2)) @ basis.double().mT)
    return Coordinates.of(basis, gain, 1.7, away), R, torch.zeros(g, d) if away is None else away


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(coordinates, "_SMALL", 0)
    if request.param == "torch":
        monkeypatch.setattr(coordinates, "_FEW", -1)
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("skew", [0.0, 1e-3], ids=["orthonormal", "not_quite"])
def test_both_ways(shape: tuple[int, ...], k: int, mean: bool, skew: float, way: str) -> None:
    """Equations (6) to (8), also when rounding has tilted U."""
    g, o, d = shape
    k = min(k, d)
    found, R, away = made(g, d, k, mean, skew)
    gradient, db = random(g, o, d, seed=2), random(g, o, seed=3)
    exact = (gradient.double() - db.double().unsqueeze(-1) * away.double().unsqueeze(-2)) @ R.mT
    found.turn(gradient, db if mean else None)
    assert float((gradient - exact).abs().max()) <= 2e-6 * (1 + float(exact.abs().max())) * (1 + d**0.5 / 8)

    for kept in (1.0, 0.9):
        before, left = random(g, o, d, seed=4), random(g, o, d, seed=5)
        step = left.double() - kept * before.double()
        exact, was = kept * before.double() + step @ R, before.double()
        moved = found.advance(left, before, kept, mean)
        assert float((left - exact).abs().max()) <= 2e-6 * (1 + float(exact.abs().max())) * (1 + d**0.5 / 8)
        if mean:
            assert moved is not None
            wanted = ((exact - was) @ away.double().unsqueeze(-1)).squeeze(-1)
            assert float((moved - wanted).abs().max()) <= 1e-5 * (1 + d**0.5)
        else:
            assert moved is None


def test_ways_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled are few directions of large float32 weights that lie in one piece, and nothing else."""
    few, many = made(1, 512, 8, True)[0], made(1, 512, 9, True)[0]
    weight = random(1, 128, 512)
    assert few._compiled(weight)
    assert not many._compiled(weight)
    assert not few._compiled(weight[:, :3])
    assert not few._compiled(weight[:, ::2])
    assert not few._compiled(weight.double())
    assert not few._compiled(weight, weight.mT.contiguous().mT)
    monkeypatch.setattr("retrograde.kernels.compiled.usable", lambda: False)
    assert not few._compiled(weight)


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads(threads: int) -> None:
    """The same bits."""
    found = made(1, 700, 5, True)[0]
    both: list[list[Tensor]] = []
    before = torch.get_num_threads()
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            gradient, weight, then = (
                random(1, 301, 700),
                random(1, 301, 700, seed=1),
                random(1, 301, 700, seed=2),
            )
            found.turn(gradient, random(1, 301, seed=3))
            moved = found.advance(weight, then, 0.99, True)
            assert moved is not None
            both.append([gradient, weight, moved])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))


def test_what_is_not_finite_stays_in_its_row(way: str) -> None:
    found = made(1, 600, 4, True)[0]
    gradient = random(1, 70, 600)
    gradient[0, 13, 200] = torch.nan
    gradient[0, 20, 5] = torch.inf
    found.turn(gradient, random(1, 70, seed=3))
    broken = ~gradient.isfinite().all(-1)[0]
    assert broken.nonzero().flatten().tolist() == [13, 20]


def test_gain_one_is_exact(way: str) -> None:
    """R = I leaves every bit of the gradient as it is."""
    gradient = random(2, 5, 12)
    found = Coordinates.of(torch.linalg.qr(random(2, 12, 4))[0], torch.ones(2, 4), 1.0, None)
    turned = gradient.clone()
    found.turn(turned)
    assert torch.equal(turned, gradient)


def test_scales_directions(way: str) -> None:
    """A row along a column of U is scaled by γ and its gain; one across all of them by γ."""
    basis, gain = torch.linalg.qr(random(2, 12, 12))[0], torch.tensor([[0.01, 0.1, 0.5], [0.02, 0.3, 0.9]])
    rows = basis.mT.clone().contiguous()
    Coordinates.of(basis[..., :3], gain, 2.0, None).turn(rows)
    factors = 2 * torch.cat([gain, torch.ones(2, 9)], -1)
    torch.testing.assert_close(rows, basis.mT * factors.unsqueeze(-1), rtol=1e-5, atol=1e-6)

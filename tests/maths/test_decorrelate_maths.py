"""The equations of decorrelation: transforms, whitening, stability, and the measure."""

import math

import pytest
import torch
from torch import Tensor

from retrograde.maths import decorrelate


def rotation(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(2, d, d, generator=torch.Generator().manual_seed(seed)).double())[0]


def rows(spectrum: Tensor, n: int = 4000, seed: int = 0) -> Tensor:
    """Centred rows (2, n, d) with these eigenvalues in two random bases."""
    d = len(spectrum)
    noise = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed + 1)).double()
    return noise * spectrum.sqrt() @ rotation(d, seed).mT


def spectrum(d: int, ratio: float) -> Tensor:
    """A power law, as natural inputs have it, from 1 down to 1/ratio."""
    exponent = torch.log(torch.tensor(ratio)) / torch.log(torch.tensor(float(d)))
    return torch.arange(1, d + 1).double() ** -exponent


def test_gains_bring_down_to_the_least() -> None:
    """Without damping the transformed leading eigenvalues are all λ_k."""
    eigenvalues = torch.tensor([[100.0, 10.0, 4.0], [9.0, 3.0, 1.0]])
    gain = decorrelate.gains(eigenvalues, torch.zeros(2))
    torch.testing.assert_close(gain.square() * eigenvalues, eigenvalues[:, -1:].expand(2, 3))


def test_gains_limits() -> None:
    """Much damping changes nothing; no variance neither; one gain is never below a thousandth."""
    eigenvalues = torch.tensor([[1e3, 1.0]])
    assert torch.equal(decorrelate.gains(eigenvalues, torch.tensor([1e30])), torch.ones(1, 2))
    assert torch.equal(decorrelate.gains(torch.zeros(1, 2), torch.zeros(1)), torch.ones(1, 2))
    assert float(decorrelate.gains(torch.tensor([[1e12, 1.0]]), torch.zeros(1))[0, 0]) == pytest.approx(1e-3)
    more = decorrelate.gains(eigenvalues, torch.tensor([5.0]))
    assert float(more[0, 0]) == pytest.approx((6 / 1005) ** 0.5)


@pytest.mark.parametrize("k", [3, 12])
def test_second_moment(k: int) -> None:
    """Eigenpairs of Cov + μμᵀ, for a covariance that is isotropic outside U."""
    basis, mean = rotation(12)[..., :k], torch.randn(2, 12).double()
    eigenvalues = torch.linspace(5, 2, k).double().expand(2, k)
    rest = torch.tensor([0.3, 0.1]).double() if k < 12 else torch.zeros(2).double()
    eye = torch.eye(12).double()
    covariance = basis * (eigenvalues - rest[:, None])[:, None] @ basis.mT + rest[:, None, None] * eye
    moment = covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2)
    found, values = decorrelate.second_moment(mean, basis, eigenvalues, rest)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(moment)[:, -k:].flip(-1))
    torch.testing.assert_close(moment @ found, found * values.unsqueeze(-2), rtol=1e-6, atol=1e-6)


def test_rest_variance() -> None:
    """The mean of the other eigenvalues; nothing when there are none."""
    values = torch.tensor([[8.0, 4.0, 2.0, 1.0, 1.0]])
    assert float(decorrelate.rest_variance(values[:, :2], values.mean(-1), 5)) == pytest.approx(4 / 3)
    assert float(decorrelate.rest_variance(values, values.mean(-1), 5)) == 0


def test_largest_eigenvalue() -> None:
    """Within a tenth of the exact one."""
    z = rows(spectrum(30, 1e4))
    exact = torch.linalg.eigvalsh(z.mT @ z / z.shape[1])[:, -1]
    torch.testing.assert_close(decorrelate.largest_eigenvalue(z), exact, rtol=0.1, atol=0)
    assert torch.equal(decorrelate.largest_eigenvalue(torch.zeros(1, 5, 3)), torch.zeros(1))


def test_direction() -> None:
    """Both variants against the equations, element by element."""
    z = rows(spectrum(6, 10), n=50)
    s = torch.einsum("gni,gnj->gij", z, z) / 50
    for kappa in (0.0, 0.3, 1.0):
        published = decorrelate.direction(z, kappa, "published", 0.01)
        normalized = decorrelate.direction(z, kappa, "normalized", 0.01)
        for i in range(6):
            for j in range(6):
                v = s[:, i, i] + 0.01 - 1
                torch.testing.assert_close(
                    published[:, i, j], kappa * v if i == j else (1 - kappa) * s[:, i, j]
                )
                expected = 2 * kappa * v if i == j else (1 - kappa) / 5 * s[:, i, j]
                torch.testing.assert_close(normalized[:, i, j], expected)


def test_published_rule_whitens() -> None:
    """κ = 0.5 with ε = lr/λ_max: inputs of condition 1e6 end white, and R stays finite on the way."""
    x, R = rows(spectrum(16, 1e6)), torch.eye(16).double().expand(2, -1, -1)
    for _ in range(200):
        z = x @ R.mT
        step = 0.5 / decorrelate.largest_eigenvalue(z).clamp_min(1)
        R = R - step[:, None, None] * decorrelate.direction(z, 0.5, "published") @ R
    z = x @ R.mT
    torch.testing.assert_close(
        z.mT @ z / x.shape[1], torch.eye(16).double().expand(2, -1, -1), rtol=0, atol=1e-3
    )


def test_correlation() -> None:
    """Known correlation; independent features show their noise alone; dead and constant features do not count."""
    a, b = torch.randn(2, 1, 20000, 1).double()
    z = torch.cat([a, 0.6 * a + 0.8 * b], -1)
    assert float(decorrelate.correlation(5 * z + 3)) == pytest.approx(0.36, abs=0.02)
    assert float(decorrelate.correlation(torch.cat([a, b], -1))) < 5e-4
    dead = torch.cat([z, torch.zeros_like(a), torch.full_like(a, 7.0)], -1)
    torch.testing.assert_close(decorrelate.correlation(dead), decorrelate.correlation(z))
    assert float(decorrelate.correlation(torch.zeros(1, 10, 3))) == 0


def test_scale() -> None:
    """γ² = tr Σ / tr(R₀ΣR₀), over all groups, 3 at most, 1 where there is no variance."""
    eigenvalues = torch.tensor([[8.0, 2.0], [4.0, 2.0]])
    gain = torch.tensor([[0.5, 1.0], [0.5, 1.0]])
    # Traces of 20 and 16 of four features each: R₀ takes away three quarters of 8 and of 4.
    found = decorrelate.scale(eigenvalues, gain, torch.tensor([5.0, 4.0]), 4)
    assert found == pytest.approx(math.sqrt(36 / 27))
    assert decorrelate.scale(eigenvalues[:1], torch.full((1, 2), 1e-3), torch.tensor([2.5]), 4) == 3.0
    assert decorrelate.scale(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1), 4) == 1.0
    assert decorrelate.scale(eigenvalues, torch.ones(2, 2), torch.tensor([5.0, 4.0]), 4) == 1.0

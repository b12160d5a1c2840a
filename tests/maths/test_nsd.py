"""Non-subtractive dither: unbiased, of the stated variance, never saturating, with the stated share of zeros."""

import math

import pytest
import torch
from scipy import integrate

from retrograde.kernels import reference
from retrograde.maths import dither
from retrograde.maths.philox import mix_key, uniform

TABLE = {  # percent of zeros for Δ = sσ
    "gauss": {1: 36.9, 2: 61.0, 4: 80.1, 8: 90.0},
    "laplace": {1: 46.5, 2: 66.7, 4: 82.4, 8: 91.2},
    "lognormal_1.5": {1: 77.1, 2: 86.5, 4: 92.6, 8: 96.1},
    "lognormal_2": {1: 91.0, 2: 94.8, 4: 97.1, 8: 98.4},
}


def sample(name: str, n: int) -> tuple[torch.Tensor, float]:
    """Draws by inversion on an even grid of quantiles (no sampling error in the bulk), and the population's σ.

    The lognormals' variance sits in a tail that a sample hardly reaches (τ = 2: the sample's σ is that of the
    population to a few percent only at 10⁸ draws), so their σ is the closed form exp(τ²).
    """
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    if name == "gauss":
        return torch.special.ndtri(p), 1.0
    if name == "laplace":
        return -torch.sign(p - 0.5) * torch.log1p(-2 * torch.abs(p - 0.5)), math.sqrt(2)
    tau = float(name.split("_")[1])
    sign = 1.0 - 2.0 * (torch.arange(n) % 2)
    return sign * torch.exp(tau * torch.special.ndtri(p)), math.exp(tau**2)


def gauss(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def expected_zeros(name: str, scale: float) -> float:
    """∫ max(0, 1 − |x|/Δ) over the density, numerically."""
    if name.startswith("lognormal"):
        tau = float(name.split("_")[1])
        step = scale * math.exp(tau**2)
        # Over log|x|, where the density is a plain Gauss curve.
        return integrate.quad(lambda t: (1 - math.exp(tau * t) / step) * gauss(t), -12, math.log(step) / tau)[
            0
        ]
    density, sigma = (gauss, 1.0) if name == "gauss" else (lambda x: math.exp(-x) / 2, math.sqrt(2))
    step = scale * sigma
    return 2 * integrate.quad(lambda x: (1 - x / step) * density(x), 0, step, points=[min(1.0, step / 2)])[0]


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("name", TABLE)
def test_table_of_zeros(name: str, scale: int) -> None:
    """The table is what the equations give, and what the kernel measures, to half a point."""
    assert expected_zeros(name, scale) * 100 == pytest.approx(TABLE[name][scale], abs=0.06)
    delta, sigma = sample(name, 400_000)
    levels = reference.nsd(delta, scale * sigma, mix_key(3, scale), bits=None)
    measured = float((levels == 0).double().mean())
    assert measured * 100 == pytest.approx(TABLE[name][scale], abs=0.5)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["gauss", "laplace"])
def test_zeros_with_measured_statistics(name: str, scale: int) -> None:
    """The same from the measured σ and int8 levels, which these light tails never widen."""
    delta = sample(name, 400_000)[0].float()
    std, peak = dither.statistics(delta)
    step = dither.step_size(std, peak, scale, 8)
    assert step == scale * std
    levels = reference.nsd(delta, step, 5, 8)
    assert levels.dtype == torch.int8
    assert float((levels == 0).double().mean()) * 100 == pytest.approx(TABLE[name][scale], abs=0.5)


@pytest.mark.parametrize("scale", [0.01, 0.3, 1, 2, 4, 8, 50])
def test_closed_forms(scale: float) -> None:
    """The closed forms are the integrals."""
    assert dither.expected_zeros_gauss(scale) == pytest.approx(expected_zeros("gauss", scale), abs=1e-9)
    assert dither.expected_zeros_laplace(scale) == pytest.approx(expected_zeros("laplace", scale), abs=1e-9)


@pytest.mark.parametrize("bits", [8, 3, None])
def test_unbiased_with_stated_variance(bits: int | None) -> None:
    """4,000 draws of every entry: mean within 4.5σ, variance by equation (4), zeros by equation (5)."""
    draws, step = 4000, 0.37
    delta = torch.cat([torch.linspace(-1.1, 1.1, 61), torch.tensor([0.0, step, -2 * step, 1e-4, -1e-4])])
    q = torch.stack([reference.nsd(delta, step, mix_key(11, d), bits).double() for d in range(draws)])
    f = (delta.double() / step).remainder(1)
    # A multiple of Δ in real numbers may sit a rounding error beside it in float32.
    variance = step**2 * f * (1 - f)
    error = (q.mean(0) * step - delta.double()).abs()
    assert bool((error <= 4.5 * (variance / draws).sqrt() + 1e-6).all())
    # Mean over all entries: fine enough to see a bias of a hundredth of a step.
    assert float((q.mean(0) * step - delta.double()).mean().abs()) < 4 * float(
        variance.sum().sqrt()
    ) / draws**0.5 / len(delta)
    inside = (f > 0.05) & (f < 0.95)
    assert bool(((q.var(0) * step**2 / variance)[inside] - 1).abs().max() < 0.25)
    zeros = (1 - delta.double().abs() / step).clamp(min=0)
    assert bool(((q == 0).double().mean(0) - zeros).abs().max() < 4.5 * 0.5 / draws**0.5)


def test_exact_at_multiples() -> None:
    """A multiple of Δ is never moved; everything else lands on one of its two neighbours."""
    levels = torch.arange(-127, 128).float()
    for key in range(20):
        assert torch.equal(reference.nsd(levels * 0.25, 0.25, key).float(), levels)
    delta = torch.randn(10_000)
    q = reference.nsd(delta, 0.5, 1, None)
    assert bool(((q == (delta / 0.5).floor()) | (q == (delta / 0.5).floor() + 1)).all())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_widening_never_saturates(bits: int, dtype: torch.dtype) -> None:
    """A heavy tail widens Δ: the largest entry lands on the largest level, unclamped, so nothing is biased."""
    limit = dither.largest_level(bits)
    assert limit == 2 ** (bits - 1) - 1
    for peak in (3.0, 17.3, -1e3):
        delta = torch.cat([0.01 * torch.randn(5000), torch.tensor([peak])]).to(dtype)
        std, top = dither.statistics(delta)
        step = dither.step_size(std, top, 0.5, bits)
        assert step == pytest.approx(abs(float(delta[-1])) / limit)
        u = uniform(0, delta.shape)
        ratio = delta.double() / step
        unclamped = ratio.floor() + (u < ratio - ratio.floor())
        q = dither.levels(delta, step, u, bits)
        assert int(q.abs().max()) == limit
        assert float((q.double() - unclamped).abs().max()) <= 1
        assert int((q.double() != unclamped).sum()) <= 2


def test_statistics() -> None:
    """Biased deviation and peak, in float32 or better; non-finite entries show in either."""
    delta = torch.randn(999)
    std, peak = dither.statistics(delta)
    assert std == pytest.approx(float(delta.double().std(correction=0)), rel=1e-6)
    assert peak == float(delta.abs().max())
    assert dither.statistics(torch.tensor([-3.0, 1.0])) == (2.0, 3.0)
    assert dither.statistics(torch.zeros(4)) == (0.0, 0.0)
    assert dither.statistics(torch.ones(1, dtype=torch.float16)) == (0.0, 1.0)
    for bad in (math.nan, math.inf, -math.inf):
        std, peak = dither.statistics(torch.tensor([1.0, bad, 2.0]))
        assert not (math.isfinite(std) and math.isfinite(peak))
    # A half-precision sum of squares would overflow; float32 does not.
    std, _ = dither.statistics((300 * torch.randn(4000)).half())
    assert 280 < std < 320


def test_step_size() -> None:
    assert dither.step_size(2.0, 10.0, 3.0, None) == 6.0
    assert dither.step_size(2.0, 10.0, 3.0, 8) == 6.0
    assert dither.step_size(0.01, 10.0, 1.0, 8) == 10.0 / 127
    assert dither.step_size(1.0, 10.0, 1.0, 2) == 10.0

"""Routing by error: the measure, the probe, the thresholds and the unbiased rounding."""

import math

import pytest
import torch

from retrograde.maths import deepfocus
from retrograde.maths.philox import mix_key, uniform


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mean_square(dtype: torch.dtype) -> None:
    """e² of any shape and dtype; half precision neither overflows nor underflows; non-finite entries show."""
    for scale in (1.0, 300.0, 1e-3):
        delta = (scale * torch.randn(50, 3, 7)).to(dtype)
        found = deepfocus.mean_square(delta)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert float(found) == pytest.approx(float(delta.double().square().mean()), rel=1e-5)
    assert not math.isfinite(deepfocus.mean_square(torch.tensor([1.0, math.inf])))
    assert math.isnan(deepfocus.mean_square(torch.tensor([1.0, math.nan])))


def test_probe_probability() -> None:
    assert deepfocus.probe_probability(0.4, 0.8, 0.05) == 0.5
    assert deepfocus.probe_probability(0.0, 0.8, 0.05) == 0.05
    assert deepfocus.probe_probability(0.7999, 0.8, 0.05, 0.3) == 0.3


@pytest.mark.parametrize(("low", "high"), [(0.05, 1.0), (0.05, 0.05), (0.2, 0.6), (1.0, 1.0)])
def test_skip_share(low: float, high: float) -> None:
    """The closed form is what the probe gives for uniform r."""
    r = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    alpha = 0.7
    p = [deepfocus.probe_probability(float(x), alpha, low, high) for x in r if x < alpha]
    assert deepfocus.skip_share(alpha, low, high) == pytest.approx(sum(1 - x for x in p) / 20_000, abs=1e-6)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("spread", [0.05, 1.0])
def test_thresholds_track_quantiles(quantile: float, spread: float) -> None:
    """From a start far off, the share below the threshold settles at q, for narrow and for wide errors."""
    r = torch.exp(spread * torch.randn(6000, generator=torch.Generator().manual_seed(0))).tolist()
    threshold, below = 5.0, 0
    for i, value in enumerate(r):
        below += (value < threshold) * (i >= 1000)
        threshold = deepfocus.track(threshold, quantile, value < threshold, 0.03)
    assert below / 5000 == pytest.approx(quantile, abs=0.02)


def test_bfloat16_is_unbiased() -> None:
    """Each result is one of the two bfloat16 neighbours, and the mean is x."""
    x = torch.cat([torch.randn(200), 1e-20 * torch.randn(20), 1e20 * torch.randn(20)])
    draws = [deepfocus.round_to_bfloat16(x, mix_key(2, d)) for d in range(4000)]
    assert all(torch.equal(y.bfloat16().float(), y) for y in draws[:50])
    stack = torch.stack(draws).double()
    spacing = stack.amax(0) - stack.amin(0)
    f = torch.where(spacing > 0, (x.double() - stack.amin(0)) / spacing, 0.0)
    assert bool(((f >= 0) & (f <= 1)).all())
    assert float((spacing > 0).double().mean()) > 0.95
    error = (stack.mean(0) - x.double()).abs()
    assert bool((error <= 4.5 * spacing * (f * (1 - f) / 4000).sqrt() + 1e-6 * x.abs()).all())


def test_bfloat16_keeps_what_is_there() -> None:
    """Values on the grid, non-finite ones and half precision are not changed; dtypes stay."""
    x = torch.tensor([0.0, 1.0, -2.5, math.inf, -math.inf])
    assert torch.equal(deepfocus.round_to_bfloat16(x, 3), x)
    assert bool(deepfocus.round_to_bfloat16(torch.tensor([math.nan]), 3).isnan().all())
    half = torch.randn(5).bfloat16()
    assert deepfocus.round_to_bfloat16(half, 3) is half
    assert deepfocus.round_to_bfloat16(torch.randn(5).double(), 3).dtype == torch.float64


def test_inverse_probability_is_unbiased() -> None:
    """Equation (6) with the noise in use."""
    p = 0.3
    runs = sum(float(uniform(mix_key(9, d), (1,))) < p for d in range(4000)) / 4000
    assert runs / p == pytest.approx(1, abs=4 * ((1 - p) / (p * 4000)) ** 0.5)

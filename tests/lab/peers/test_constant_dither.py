"""Dither with a constant step: Δ = step/B, unbiased, the share of zeros of the page's formula, no saturation."""

import math

import pytest
import torch
from torch import Tensor, nn

import retrograde as rg
from cases import batch
from retrograde.errors import OptionError
from retrograde.lab.peers import make
from retrograde.lab.peers.constant_dither import ConstantDither
from retrograde.maths.dither import expected_zeros_gauss


def quantised(delta: Tensor, step: float, seed: int = 0) -> tuple[Tensor, dict[str, float]]:
    """δ̃, read from dW of a layer whose input is one-hot rows, and the layer's figures."""
    layer = nn.Linear(len(delta), delta.shape[1], bias=False)
    session = rg.attach(layer, ConstantDither(step), seed=seed)
    layer(torch.eye(len(delta))).backward(delta)
    assert layer.weight.grad is not None
    return layer.weight.grad.T, session.metrics()["layers"]["(root)"]


@pytest.mark.parametrize("step", [0.5, 2.0])
def test_step_is_of_one_example(step: float) -> None:
    """Levels are whole multiples of step/B, within one of δ."""
    delta = batch((8, 40), 3) / 8
    found, figures = quantised(delta, step)
    ratio = found / (step / 8)
    torch.testing.assert_close(ratio, ratio.round(), atol=1e-5, rtol=0)
    assert float((found - delta).abs().max()) < step / 8
    assert figures["step"] == pytest.approx(step / 8)
    assert figures["largest_level"] == int(ratio.abs().max().round())


def test_unbiased() -> None:
    """The mean of 400 draws is δ within 4 standard errors, of which Δ²f(1−f) is the variance."""
    delta, step, draws = batch((4, 6), 3) / 4, 1.0, 400
    mean = torch.stack([quantised(delta, step, seed)[0].double() for seed in range(draws)]).mean(0)
    f = torch.remainder(delta.double() / (step / 4), 1)
    error = step / 4 * (f * (1 - f) / draws).sqrt()
    assert bool(((mean - delta).abs() <= 4 * error + 1e-9).all())
    assert float((mean - delta).abs().max()) > 0


@pytest.mark.parametrize("scale", [1.0, 2.0, 4.0])
def test_zeros_of_gauss(scale: float) -> None:
    """Gaussian per-sample gradients of deviation σ and a step of s·σ: the page's share of zeros."""
    sigma = 0.3
    _, figures = quantised(sigma * batch((100, 400), 3) / 100, scale * sigma)
    expected = expected_zeros_gauss(scale)
    assert figures["zeros"] == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 40_000))


def test_constant_while_gradients_shrink() -> None:
    """A tenth of the gradient under the same step: more zeros, where s·std would keep their share."""
    delta = batch((50, 100), 3) / 50
    (_, large), (_, small) = quantised(delta, 1.0), quantised(delta / 10, 1.0)
    assert small["step"] == large["step"]
    assert small["zeros"] > large["zeros"] + 0.4


def test_widened_not_saturated() -> None:
    """Where levels would pass 127 the step grows to max|δ|/127."""
    delta = batch((4, 50), 3)
    found, figures = quantised(delta, 1e-3)
    peak = float(delta.abs().max())
    assert figures["step"] == pytest.approx(peak / 127)
    assert float((found - delta).abs().max()) < peak / 127 * 1.001


def test_not_finite() -> None:
    """Passed on exactly and counted."""
    delta = batch((4, 5), 3)
    delta[1, 2] = math.inf
    layer = nn.Linear(3, 5)
    session = rg.attach(layer, ConstantDither())
    layer(batch((4, 3))).backward(delta)
    assert not bool(layer.weight.grad.isfinite().all())
    torch.testing.assert_close(layer.weight.grad[0], (delta.T @ batch((4, 3)))[0])
    assert session.metrics()["layers"]["(root)"]["fallbacks"] == 1


def test_options() -> None:
    """By name, and refused."""
    assert make("constant-dither", {"step": 2}) == ConstantDither(2.0)
    for bad in (0, -1, math.nan):
        with pytest.raises(OptionError, match=f"step={bad}"):
            make("constant-dither", {"step": bad})

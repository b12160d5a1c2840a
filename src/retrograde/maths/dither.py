"""Non-subtractive dither (NSD): unbiased stochastic rounding of gradients to multiples of a step.

    Δ = s · std(δ)                      (1)   widened to max|δ| / (2^(bits−1) − 1), so that no level saturates
    q = floor(δ/Δ + u),  u ~ U[0, 1)    (2)   computed as floor(δ/Δ) + 1[u < f]: the same law, without rounding bias
    E[Δq] = δ                           (3)
    Var[Δq] = Δ² f(1 − f) ≤ Δ²/4        (4)   f = frac(δ/Δ)
    P(q = 0) = max(0, 1 − |δ|/Δ)        (5)

Reference: Wiedemann, Mehari, Kepp, Samek, *Dithered backprop*, arXiv 2004.04729.
"""

import math

import torch
from torch import Tensor


def largest_level(bits: int) -> int:
    """Largest magnitude of a signed integer level of `bits` bits; the most negative code is left unused."""
    return 2 ** (bits - 1) - 1


def statistics(delta: Tensor) -> tuple[float, float]:
    """Standard deviation (over all entries, biased) and largest magnitude, in float32 or better.

    Args:
        delta: gradient of any shape with at least one entry.

    Returns:
        ``(std, peak)``. Either is NaN or Inf when the gradient holds a non-finite entry.
    """
    wide = delta if delta.dtype == torch.float64 else delta.float()
    low, high = torch.aminmax(wide)
    std = torch.std(wide, correction=0)
    return float(std), float(torch.maximum(-low, high))


def step_size(std: float, peak: float, scale: float, bits: int | None) -> float:
    """The quantisation step Δ of equation (1).

    Args:
        std: standard deviation of δ.
        peak: largest magnitude of δ.
        scale: s, the step in standard deviations.
        bits: width of the signed levels; None leaves them unbounded.
    """
    step = scale * std
    return step if bits is None else max(step, peak / largest_level(bits))


def levels(delta: Tensor, step: float, uniform: Tensor, bits: int | None = 8) -> Tensor:
    """Integer levels q of equation (2).

    Args:
        delta: gradient, any shape.
        step: Δ > 0.
        uniform: U[0, 1) numbers of the same shape.
        bits: width of the levels: at most 8 gives int8; None gives unbounded levels in floating point.

    Returns:
        q with the shape of `delta`; ``q * step`` is the quantised gradient.
    """
    wide = delta if delta.dtype == torch.float64 else delta.float()
    ratio = wide / step
    q = ratio.floor()
    q += uniform < ratio.sub_(q)
    if bits is None:
        return q
    # With Δ ≥ peak/limit only the rounding of the division itself can pass the limit, by one.
    limit = largest_level(bits)
    return q.clamp_(-limit, limit).to(torch.int8)


def expected_zeros_gauss(scale: float) -> float:
    """Expected share of zeros for Gaussian δ and Δ = scale · σ, without widening."""
    return math.erf(scale / math.sqrt(2)) - math.sqrt(2 / math.pi) / scale * (1 - math.exp(-(scale**2) / 2))


def expected_zeros_laplace(scale: float) -> float:
    """Expected share of zeros for Laplacian δ and Δ = scale · σ, without widening."""
    return 1 - (1 - math.exp(-scale * math.sqrt(2))) / (scale * math.sqrt(2))

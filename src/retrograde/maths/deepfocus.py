"""Routing by error: how large a block's gradient is, which tier that earns, and how the thresholds follow quantiles.

e = ‖δ‖_F / √numel                            (1)   root mean square of the gradient at the block's output
m ← μ m + (1 − μ) e,   r = e / m              (2)   relative error
r < α → SKIP,  α ≤ r < β → LOW,  β ≤ r → FULL (3)
p = clip(r/α, p_min, p_max)                   (4)   probability that a block to be skipped runs anyway: the probe
t ← t · exp(h (q − 1[r < t]))                 (5)   settles where P(r < t) = q
E[1[u < p] δ/p] = δ                           (6)   u ~ U[0, 1), given δ
"""

import math

import torch
from torch import Tensor

from retrograde.maths.philox import uniform


def mean_square(delta: Tensor) -> Tensor:
    """e² of equation (1): a 0-dimensional tensor, float32 or float64.

    Args:
        delta: gradient of any shape with at least one entry.
    """
    wide = delta if delta.dtype == torch.float64 else delta.float()
    # Of the mean rather than the sum: halves the exponent that a large gradient needs.
    return (torch.linalg.vector_norm(wide) / math.sqrt(wide.numel())).square()


def probe_probability(ratio: float, alpha: float, smallest: float, largest: float = 1.0) -> float:
    """p of equation (4), for r = `ratio` < α."""
    return min(max(ratio / alpha, smallest), largest)


def skip_share(alpha: float, smallest: float, largest: float = 1.0) -> float:
    """P(r < α and u ≥ p) for r ~ U[0, 1): the share of calls that random routing really skips.

    ∫₀^α (1 − clip(r/α, p_min, p_max)) dr.
    """
    rising = (largest**2 - smallest**2) / 2
    return alpha * (1 - smallest**2 - rising - largest * (1 - largest))


def track(threshold: float, quantile: float, share: float, gain: float) -> float:
    """t of equation (5).

    Args:
        threshold: t > 0.
        quantile: q, the share of r that should lie below.
        share: the share of this step's r that did.
        gain: h.
    """
    return threshold * math.exp(gain * (quantile - share))


def round_to_bfloat16(x: Tensor, key: int) -> Tensor:
    """Stochastic rounding of float32 to the two nearest bfloat16 values, kept in x's dtype: E[result] = x.

    Args:
        x: any shape; float64 goes through float32 first, half precision is returned as it is.
        key: 64-bit Philox key.
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        return x
    wide = x.float()
    # Adding 16 random bits below the kept mantissa and cutting them off rounds up with the right probability.
    noise = (uniform(key, x.shape, x.device) * 65536).to(torch.int32)
    rounded = ((wide.view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(wide.isfinite(), rounded, wide).to(x.dtype)

"""Decorrelating transforms R of a layer's input, their exact inverses, and a measure of what correlation is left.

    z = R (x − μ)                                                (1)
    R = γ (I + U diag(g − 1) Uᵀ)                                 (2)   low rank: U (d, k) orthonormal
    g = sqrt((λ_k + c) / (λ + c))                                (3)   λ leading eigenvalues, λ_k the least of them
    S = ZᵀZ/n,  C = S − diag(S),  V = diag(mean z² − 1)          (4)
    R ← (I − εG) R,  G = (1−κ) C + κ V                           (5)   full, "published"
                     G = (1−κ)/(d−1) C + 2κ V                    (6)   full, "normalized"

Everything has a leading dimension for groups: W (g, o, d), U (g, d, k), rows (g, n, d).

Reference: Dalm, Offergeld, Ahmad, van Gerven, *Efficient Deep Learning with Decorrelated Backpropagation*, 2405.02385.
"""

import math

import torch
from torch import Tensor

from retrograde.maths.spectral import eigh

_POWER_ITERATIONS = 10
_SMALLEST_GAIN = 1e-3
"""No direction is shrunk more than a thousandfold: its weight would hardly move."""
_LARGEST_SCALE = 3.0
"""γ is bounded: what is left when nearly all variance was in few directions is noise."""


def gains(eigenvalues: Tensor, damping: Tensor) -> Tensor:
    """Equation (3): leading directions brought down to the least of them, at most a thousandfold.

    Args:
        eigenvalues: (g, k), leading first.
        damping: c, (g,).

    Returns:
        (g, k), each in (0, 1]; 1 where the input has no variance at all.
    """
    c = damping.unsqueeze(-1)
    ratio = (eigenvalues[:, -1:] + c) / (eigenvalues + c)
    return ratio.nan_to_num(1.0).clamp(0.0, 1.0).sqrt().clamp_min(_SMALLEST_GAIN)


def scale(eigenvalues: Tensor, gain: Tensor, variance: Tensor, d: int) -> float:
    """γ, which gives z the energy of x: ``γ² = tr Σ / tr(R₀ΣR₀)`` for R₀ = R/γ, at most 9.

    Without it a step of the same size changes what the layer returns less than it did, as its leading directions are
    what the output mostly consists of, and a learning rate that suits plain training is too small.

    Args:
        eigenvalues: Λ, (g, k).
        gain: g, (g, k).
        variance: tr Σ/d, (g,).
        d: dimension.

    Returns:
        1 to 3; one figure for all groups.
    """
    trace = float(variance.sum()) * d
    left = trace - float((eigenvalues * (1 - gain.square())).sum())
    if not trace > 0:
        return 1.0
    return min(_LARGEST_SCALE, math.sqrt(trace / max(left, trace / _LARGEST_SCALE**2)))


def second_moment(mean: Tensor, basis: Tensor, eigenvalues: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs of E[xxᵀ] = Cov + μμᵀ from those of the covariance.

    Args:
        mean: μ, (g, d).
        basis: U, (g, d, k).
        eigenvalues: (g, k).
        rest: variance along every direction outside U, (g,).

    Returns:
        Basis and eigenvalues of the same shapes, leading first.
    """
    d, k = basis.shape[-2:]
    joint = torch.cat([basis, mean.unsqueeze(-1)], -1) if k < d else basis
    q, _ = torch.linalg.qr(joint)
    inside = (q.mT @ basis) * (eigenvalues - rest.unsqueeze(-1)).unsqueeze(-2) @ (basis.mT @ q)
    along = q.mT @ mean.unsqueeze(-1)
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    values, vectors = eigh(inside + along @ along.mT + rest[:, None, None] * eye)
    return q @ vectors[..., -k:].flip(-1), values[:, -k:].flip(-1).clamp_min(0)


def rest_variance(eigenvalues: Tensor, variance: Tensor, d: int) -> Tensor:
    """Mean eigenvalue outside the leading ones: ``(trace − Σλ) / (d − k)``; 0 when there is none.

    Args:
        eigenvalues: (g, k).
        variance: trace/d, (g,).
        d: dimension.
    """
    left = d - eigenvalues.shape[-1]
    return ((variance * d - eigenvalues.sum(-1)) / left).clamp_min(0) if left else torch.zeros_like(variance)


def direction(z: Tensor, kappa: float, variant: str, floor: Tensor | float = 0.0) -> Tensor:
    """G of equations (5) and (6), (g, d, d).

    Args:
        z: decorrelated rows, (g, n, d).
        kappa: κ: 0 decorrelates alone, 1 brings variances to 1 alone, 0.5 whitens.
        variant: ``"published"`` or ``"normalized"``.
        floor: added to each variance, (g, d) or a number: keeps rows of R for silent features bounded.
    """
    n, d = z.shape[-2:]
    s = z.mT @ z / n
    diagonal = s.diagonal(dim1=-2, dim2=-1)
    c = s - torch.diag_embed(diagonal)
    v = torch.diag_embed(diagonal + floor - 1)
    if variant == "normalized":
        return (1 - kappa) / max(d - 1, 1) * c + 2 * kappa * v
    return (1 - kappa) * c + kappa * v


def largest_eigenvalue(z: Tensor) -> Tensor:
    """λ_max of ZᵀZ/n, (g,), by power iteration on the rows."""
    n, d = z.shape[-2:]
    # A fixed start: the same on every rank, and in every run.
    start = torch.randn(d, 1, generator=torch.Generator().manual_seed(0))
    vector = start.to(z).expand(z.shape[0], d, 1)
    norm = torch.zeros_like(vector[:, :1])
    for _ in range(_POWER_ITERATIONS):
        vector = vector / torch.linalg.vector_norm(vector, dim=1, keepdim=True).clamp_min(1e-30)
        vector = z.mT @ (z @ vector) / n
        norm = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    return norm.flatten()


def correlation(z: Tensor) -> Tensor:
    """Mean squared correlation between different features, (g,); features without variance are left out.

    Args:
        z: rows, (g, n, d). Independent features show 1/n, not 0: so much is sampling noise.
    """
    centred = z - z.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    alive = deviation > 1e-6 * deviation.amax(-1, keepdim=True)
    unit = torch.where(alive, centred / deviation, 0.0)
    r = unit.mT @ unit / z.shape[1]
    count = alive.sum((-2, -1)).to(z.dtype)
    squares = r.square().sum((-2, -1)) - r.diagonal(dim1=-2, dim2=-1).square().sum(-1)
    return squares / (count * (count - 1)).clamp_min(1)

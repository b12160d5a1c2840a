"""Leading subspaces of second-moment matrices, how they are followed, and what a projection on them loses.

For X (n × d), D (n × o), G = DᵀX and U (d × k) with orthonormal columns:

    G U Uᵀ = (Dᵀ (X U)) Uᵀ                                  (1)   so X U may be kept in place of X
    ‖G − G U Uᵀ‖_F ≤ ‖D‖₂ sqrt(Σ_{i>k} λ_i(XᵀX))            (2)   for U the leading eigenvectors of XᵀX

U is followed, C being XᵀX/n of fresh rows, by QR or on the Stiefel manifold by Cayley's transform:

    Q ← orth(C Q)                                           (3)
    M = C Q,  A = M Qᵀ − Q Mᵀ,  Q ← (I − τA/2)⁻¹(I + τA/2) Q  (4)
      = (2Q + τN)(I + B)⁻¹ − Q                                    (5)   a k × k system instead of d × d
    S = QᵀM,  N = M − QS,  B = (τ²/4) NᵀN − (τ/2)(S − Sᵀ)

A is skew, so (4) keeps Q orthonormal. Its flow is Oja's, dQ/dt = (I − QQᵀ) C Q, at rest exactly when span(Q) is
invariant. (5) follows by writing the new Q as QX + τNY: since NᵀQ = 0, AQ = N + Q(S − Sᵀ) and AN = −Q NᵀN, (4) asks for
Y = (I + B)⁻¹ and X = 2Y − I. It takes 8dk² + 2k³ FLOPs, where the form of Wen and Yin, Q + τL(I − (τ/2)RᵀL)⁻¹RᵀQ with
L = [M, Q] and R = [Q, −M], takes 16dk² + 13k³. All functions take a leading dimension of groups.

References: Wen, Yin, *A feasible method for optimization with orthogonality constraints*, Math. Program. 142, 2013 (4);
Oja, *Principal components, minor components, and linear neural networks*, Neural Networks 5, 1992.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Multiply = Callable[[Tensor], Tensor]
"""``Q → C Q``, (…, d, k) → (…, d, k)."""


def second_moment(rows: Tensor) -> Multiply:
    """``Q → C Q`` with C = XᵀX/n for X = `rows` (…, n, d); C itself is not formed."""
    return lambda q: rows.mT @ (rows @ q) / rows.shape[-2]


def orthonormality(q: Tensor) -> float:
    """max |QᵀQ − I| of q (…, d, k)."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return float((q.mT @ q - eye).abs().max())


def polish(q: Tensor) -> Tensor:
    """One Newton–Schulz step ``Q(3I − QᵀQ)/2``: squares a small departure from orthonormality."""
    return q + 0.5 * (q - q @ (q.mT @ q))


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, smallest first, and eigenvectors of a symmetric matrix, computed in float64.

    In float32 LAPACK fails, or finds NaN, where many eigenvalues are nearly equal, as those of a constant input are.
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix), vectors.to(matrix)


def leading_eigenpairs(multiply: Multiply, q: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh–Ritz: the eigenpairs of C within span(q), largest first.

    Args:
        multiply: C.
        q: (…, d, k), orthonormal columns.

    Returns:
        Eigenvalues (…, k) and orthonormal vectors (…, d, k) that span what q spans.
    """
    values, vectors = eigh(q.mT @ multiply(q))
    return values.flip(-1).clamp_min(0), polish(q @ vectors.flip(-1))


def qr_steps(multiply: Multiply, q: Tensor, steps: int) -> Tensor:
    """Subspace iteration, equation (3), `steps` times."""
    for _ in range(steps):
        q, _ = torch.linalg.qr(multiply(q))
    return q


def cayley_step(q: Tensor, m: Tensor, tau: float) -> Tensor:
    """Equation (5): one rotation of q towards the leading subspace.

    Args:
        q: (…, d, k), orthonormal columns.
        m: C Q; any other direction (…, d, k) gives its own skew A.
        tau: length of the step, in units of 1/C.
    """
    s = q.mT @ m
    return turned(q, tau * (m - q @ s), tau * (s - s.mT))


def turned(q: Tensor, outside: Tensor, inside: Tensor) -> Tensor:
    """Equation (5) for the skew field A with ``A Q = N + Q Ω``.

    Args:
        q: Q (…, d, k), orthonormal columns.
        outside: N (…, d, k), orthogonal to Q.
        inside: Ω (…, k, k), skew.
    """
    b = 0.25 * outside.mT @ outside - 0.5 * inside
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    # The inverse of k × k: solving from the right for the d rows takes LAPACK longer.
    return (2 * q + outside) @ torch.linalg.inv(eye + b) - q


def lie_steps(
    multiply: Multiply, q: Tensor, steps: int, tau: float, tolerance: float | None = None
) -> Tensor:
    """Equation (5), `steps` times, with C scaled by its largest Rayleigh quotient, so that τ has no unit.

    In exact arithmetic q stays orthonormal; rounding adds up as a random walk. Past `tolerance` it is polished.

    Args:
        multiply: C.
        q: (…, d, k), orthonormal columns.
        steps: how many.
        tau: τ; 1 turns by what one power iteration would, to first order.
        tolerance: largest ``max |QᵀQ − I|``; None takes 4 units of rounding.
    """
    limit = 4 * torch.finfo(q.dtype).eps if tolerance is None else tolerance
    for _ in range(steps):
        m = multiply(q)
        quotients = (q * m).sum(-2)
        scale = quotients.amax(-1).clamp_min(torch.finfo(q.dtype).tiny)
        q = cayley_step(q, m / scale[..., None, None], tau)
        if orthonormality(q) > limit:
            q = polish(q)
    return q


def project_rows(g: Tensor, u: Tensor) -> Tensor:
    """``G U Uᵀ`` for g (…, o, d) and u (…, d, k)."""
    return (g @ u) @ u.mT


def project_columns(g: Tensor, v: Tensor) -> Tensor:
    """``V Vᵀ G`` for g (…, o, d) and v (…, o, k)."""
    return v @ (v.mT @ g)


def error_bound(delta: Tensor, eigenvalues: Tensor, rank: int) -> Tensor:
    """Right-hand side of (2).

    Args:
        delta: D (n, o).
        eigenvalues: all of XᵀX, largest first.
        rank: k.
    """
    return torch.linalg.matrix_norm(delta, 2) * eigenvalues[rank:].clamp_min(0).sum().sqrt()


def reexpress(moment: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Carry an optimizer's moment from one basis to the next: ``M P_old P_new + M (I − P_old)``.

    The first term is M U_old (U_oldᵀ U_new) U_newᵀ, the coordinates re-expressed; the second is what full steps left
    outside the old subspace, which no change of basis concerns.

    Args:
        moment: (…, o, d).
        old: (…, d, k).
        new: (…, d, k').
    """
    inside = moment @ old
    return moment + (inside @ (old.mT @ new)) @ new.mT - inside @ old.mT


def drift(old: Tensor, new: Tensor) -> Tensor:
    """``k − ‖U_oldᵀ U_new‖²``: 0 for the same subspace, k for orthogonal ones; (…,)."""
    return (new.shape[-1] - (old.mT @ new).square().sum((-2, -1))).clamp_min(0)


def rank_for_energy(eigenvalues: Tensor, trace: Tensor, energy: float) -> int:
    """The smallest k whose leading eigenvalues hold the share `energy` of the trace, in every group.

    Args:
        eigenvalues: (groups, k_max), largest first.
        trace: (groups,).
        energy: θ in (0, 1].

    Returns:
        k in 1 to k_max; k_max when even that falls short, and for θ = 1.
    """
    if energy >= 1:
        # Rounding lets the running sum reach the trace before the last directions are counted.
        return eigenvalues.shape[-1]
    missing = (eigenvalues.cumsum(-1) < energy * trace.unsqueeze(-1)).sum(-1)
    return min(int(missing.max()) + 1, eigenvalues.shape[-1])


def effective_rank(eigenvalues: Tensor, trace: Tensor, dimension: int) -> Tensor:
    """Participation ratio (Σλ)²/Σλ² per group, the unknown tail taken as even (an upper bound, and a close one).

    Args:
        eigenvalues: (groups, k), the leading ones.
        trace: (groups,), Σλ.
        dimension: d.
    """
    tail = (trace - eigenvalues.sum(-1)).clamp_min(0)
    squares = eigenvalues.square().sum(-1) + tail.square() / max(dimension - eigenvalues.shape[-1], 1)
    return trace.square() / squares.clamp_min(torch.finfo(squares.dtype).tiny)


def decayed(weight: Tensor, direction: Tensor, amount: Tensor) -> Tensor:
    """``W − a e eᵀ W``; a ≥ 1 removes the direction, never more.

    Args:
        weight: W (…, o, d).
        direction: unit vectors e (…, o).
        amount: a (…,).
    """
    along = direction.unsqueeze(-2) @ weight
    return weight - amount.clamp_max(1.0)[..., None, None] * direction.unsqueeze(-1) @ along


def root(matrix: Tensor, power: float) -> Tensor:
    """``C^power`` of a symmetric positive definite C (…, d, d), computed in float64.

    Eigenvalues below d units of rounding, relative to the largest, count as that much: they are rounding themselves,
    may be negative, and would outweigh all others under a negative power.
    """
    values, vectors = torch.linalg.eigh(_symmetric(matrix.double()))
    rounding = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    floor = (rounding * values[..., -1:]).clamp_min(torch.finfo(matrix.dtype).tiny)
    values = values.maximum(floor).pow(power)
    return ((vectors * values.unsqueeze(-2)) @ vectors.mT).to(matrix)


def optimal_transport(old: Tensor, half: Tensor) -> Tensor:
    """The symmetric T with ``T C_old T = C_new`` that moves N(0, C_old) least (Bures, Wasserstein).

    T = C_new^½ (C_new^½ C_old C_new^½)^-½ C_new^½; the identity where the two are the same.

    Args:
        old: C_old (…, d, d), symmetric positive definite.
        half: C_new^½, the same.
    """
    # An asymmetry of float32 rounding would make the product between them indefinite.
    wide = _symmetric(half.double())
    return (wide @ root(wide @ _symmetric(old.double()) @ wide, -0.5) @ wide).to(old)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2

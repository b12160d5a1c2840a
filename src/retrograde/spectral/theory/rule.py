r"""Drift of a perturbed and projected training rule, to the third derivative of the loss.

A rule with step size η takes its gradient at a perturbed place, as sharpness-aware minimisation does, projects it, and
decays:

    w ← w − η P ∇f(w + ρu) − β R(w)                                     (1)   u = ∇f/‖∇f‖, or v₁(H)

Taylor's series of the gradient about w, u held fixed, gives

    ∇f(w + ρu) = ∇f + ρ H u + (ρ²/2) D³f[u, u] + O(ρ³)                  (2)
    H u = ∇‖∇f‖             for u = ∇f/‖∇f‖                             (3)
    D³f[v₁, v₁] = ∇λ₁(H)    for u = v₁, where λ₁ is simple              (4)

so that the flow which (1) follows has the drift, after k terms of (2),

    b(w) = −P [∇f + ρ H u + (ρ²/2) D³f[u, u]] − (β/η) R(w)              (5)
    b̃ = b − (η/2) Db[b]                                                 (6)

b follows the rule with an error O(η) at a given time ηk; b̃, the modified equation, with O(η²). "Third order" counts
derivatives of f; the error of (2) after k terms is O(ρᵏ). For ρ = 0, P = I and β = 0, (6) is −∇(f + (η/4)‖∇f‖²).

Derivatives are by `torch.func`: H u is the gradient of ⟨∇f, u⟩, D³f[u, u] that of ⟨H u, u⟩, at about two and four times
a gradient's cost. Reverse mode thrice takes half the time of forward over reverse on networks this small. v₁ forms H.

Symbols: w (d,), f: (d,) → (), H = ∇²f (d, d), P (d, d) a projection, β a decay for each step.

References: Li, Tai, E, ICML 2017 (6); Foret et al., *Sharpness-aware minimization*, ICLR 2021 (1); Compagnoni et al.,
*An SDE for modeling SAM*, ICML 2023 (5, to second order); Wen, Ma, Li, *How does sharpness-aware minimization minimize
sharpness?*, ICLR 2023 (4).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.func import grad, hessian, jvp

from retrograde.errors import OptionError, check_option, check_value, is_finite
from retrograde.maths import spectral

Loss = Callable[[Tensor], Tensor]
"""f: w (d,) → a scalar."""

Direction = Literal["gradient", "top"]
"""u: the gradient's own, or the leading eigenvector of H, turned uphill."""

Order = Literal[1, 2, 3]

_SYMMETRIC = 1e-5
"""Of the largest entry: what rounding may leave between P and its transpose."""


@dataclass(frozen=True)
class Rule:
    """Equation (1).

    Args:
        eta: η, above 0.
        rho: ρ, 0 or more.
        direction: u.
        projection: P (d, d), symmetric; None is the identity.
        beta: β, 0 or more.
        regulariser: R, (d,) → (d,); needed where β is not 0.

    Raises:
        OptionError: a value out of its range, or a P that is not square and symmetric.
    """

    eta: float
    rho: float = 0.0
    direction: Direction = "gradient"
    projection: Tensor | None = None
    beta: float = 0.0
    regulariser: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_option(self, "eta", is_finite(self.eta) and self.eta > 0, "a finite number above 0")
        _check_rho("Rule", self.rho)
        check_option(self, "beta", is_finite(self.beta) and self.beta >= 0, "a finite number, 0 or more")
        _check_direction("Rule", self.direction)
        if self.projection is not None:
            _check_projection(self.projection)
        if (self.beta > 0) != (self.regulariser is not None):
            raise OptionError(
                f"Rule: beta={self.beta!r} and a regulariser go together. Give both or neither."
            )

    def project(self, vector: Tensor) -> Tensor:
        """``P v`` for v (…, d).

        Raises:
            OptionError: P is of another width.
        """
        if self.projection is None:
            return vector
        if self.projection.shape[-1] != vector.shape[-1]:
            raise OptionError(
                f"Rule: projection is {tuple(self.projection.shape)}, and the weights are ({vector.shape[-1]},). Give "
                "a (d, d) one for weights (d,)."
            )
        return vector @ self.projection.to(vector).mT

    def decay(self, w: Tensor) -> Tensor:
        """``β R(w)``."""
        return torch.zeros_like(w) if self.regulariser is None else self.beta * self.regulariser(w)


def perturbation(loss: Loss, w: Tensor, direction: Direction = "gradient") -> Tensor:
    """u (d,): ∇f/‖∇f‖, or the leading eigenvector of H with ⟨v₁, ∇f⟩ ≥ 0; 0 where the gradient vanishes.

    Raises:
        OptionError: `direction` is neither.
    """
    _check_direction("perturbation", direction)
    g = _grad(loss)(w)
    if direction == "gradient":
        return g / torch.linalg.vector_norm(g).clamp_min(torch.finfo(g.dtype).tiny)
    _, vectors = spectral.eigh(hessian(loss)(w))
    v = vectors[..., -1]
    return torch.where(v @ g < 0, -v, v)


def perturbed_gradient(loss: Loss, w: Tensor, rho: float, direction: Direction = "gradient") -> Tensor:
    """The left-hand side of (2), exactly: ∇f(w + ρu), (d,).

    Raises:
        OptionError: ρ is below 0, or `direction` is not one.
    """
    _check_rho("perturbed_gradient", rho)
    _check_direction("perturbed_gradient", direction)
    return _grad(loss)(w if rho == 0 else w + rho * perturbation(loss, w, direction))


def hessian_product(loss: Loss, w: Tensor, u: Tensor) -> Tensor:
    """``H u`` (d,)."""

    def along(at: Tensor) -> Tensor:
        return _grad(loss)(at) @ u

    return _grad(along)(w)


def third_derivative(loss: Loss, w: Tensor, u: Tensor) -> Tensor:
    """``D³f[u, u]`` (d,): the gradient of uᵀHu, u held fixed."""

    def curvature(at: Tensor) -> Tensor:
        return hessian_product(loss, at, u) @ u

    return _grad(curvature)(w)


def top_curvature_gradient(loss: Loss, w: Tensor) -> Tensor:
    """∇λ₁(H) (d,) by equation (4), with no derivative of an eigenvector; λ₁ must be simple."""
    return third_derivative(loss, w, perturbation(loss, w, "top"))


def drift(
    loss: Loss, w: Tensor, rho: float = 0.0, *, order: Order = 3, direction: Direction = "gradient"
) -> Tensor:
    """Equation (5) of a perturbed gradient alone: −[∇f + ρ H u + (ρ²/2) D³f[u, u]].

    Args:
        loss: f.
        w: (d,); `torch.func.vmap` takes it over many.
        rho: ρ.
        order: highest derivative of f that is kept; the error is O(ρ^order).
        direction: u.

    Returns:
        (d,).

    Raises:
        OptionError: `order` is not 1, 2 or 3, ρ is below 0, or `direction` is not one.

    Examples:
        >>> drift(lambda w: (w**4).sum() / 4, torch.tensor([1.0]), rho=0.1)  # −(1 + 0.1)³ but for 0.1³
        tensor([-1.3300])
    """
    if order not in get_args(Order):
        raise OptionError(f"drift: order={order!r} must be 1, 2 or 3, the highest derivative of the loss.")
    _check_rho("drift", rho)
    _check_direction("drift", direction)
    found = _grad(loss)(w)
    if rho == 0 or order == 1:
        return -found
    u = perturbation(loss, w, direction)
    found = found + rho * hessian_product(loss, w, u)
    return -found if order == 2 else -found - 0.5 * rho**2 * third_derivative(loss, w, u)


def rule_drift(loss: Loss, w: Tensor, rule: Rule, *, order: Order = 3, corrected: bool = False) -> Tensor:
    """Equation (5), or (6) where `corrected`, of a whole rule.

    Args:
        loss: f.
        w: (d,).
        rule: η, ρ, P, β and R.
        order: as in `drift`.
        corrected: the modified equation, whose error is O(η²).

    Returns:
        (d,).
    """

    def b(at: Tensor) -> Tensor:
        plain = rule.project(drift(loss, at, rule.rho, order=order, direction=rule.direction))
        return plain - rule.decay(at) / rule.eta

    found = b(w)
    if not corrected:
        return found
    turned: Any = jvp(b, (w,), (found,))
    return found - 0.5 * rule.eta * turned[1]


def _check_rho(what: str, rho: float) -> None:
    check_value(what, "rho", rho, is_finite(rho) and rho >= 0, "a finite number, 0 or more")


def _check_direction(what: str, direction: str) -> None:
    known = get_args(Direction)
    check_value(what, "direction", direction, direction in known, f"one of {', '.join(known)}")


def _check_projection(projection: Tensor) -> None:
    shape = tuple(projection.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise OptionError(f"Rule: projection is {shape}, and must be square: (d, d) for weights (d,).")
    gap = float((projection - projection.mT).abs().max())
    # So that NaN is refused too.
    if not gap <= _SYMMETRIC * float(projection.abs().max()):
        raise OptionError(
            f"Rule: projection differs from its transpose by {gap:.2g}, and the equations hold for a symmetric one. "
            "Give the orthogonal projection U Uᵀ of an orthonormal basis U (d, k)."
        )


def _grad(loss: Loss) -> Callable[[Tensor], Tensor]:
    return cast(Callable[[Tensor], Tensor], grad(loss))

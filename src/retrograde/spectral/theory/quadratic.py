r"""Moments of a rule and of its stochastic differential equation in closed form, where the loss is a quadratic.

For f = ½ wᵀHw, ρ = 0 and a linear R, with K = PH + (β/η)R, the equation dW = −KW dt + √η P Σ^{1/2} dB is an
Ornstein–Uhlenbeck process and the rule a linear recursion. With mean m and covariance C of w:

    m(t) = e^{−Kt} m(0),    C(t) = ∫₀ᵗ e^{−Ks} η P Σ P e^{−Kᵀs} ds             (1)   K + (η/2)K² in place of K for b̃
    m ← (I − ηK) m,         C ← (I − ηK) C (I − ηK)ᵀ + η² P Σ P                (2)

The integral of one step is a block of a matrix exponential. At rest, for one dimension, (1) has C = ηΣ/(2H) and (2)
ηΣ/(2H(1 − ηH/2)).

References: Mandt, Hoffman, Blei, *Stochastic gradient descent as approximate Bayesian inference*, JMLR 2017 (1);
Van Loan, *Computing integrals involving the matrix exponential*, IEEE Trans. Automatic Control 23, 1978.
"""

from typing import cast

import torch
from torch import Tensor
from torch.func import jacrev

from retrograde.errors import OptionError
from retrograde.spectral.theory.rule import Rule
from retrograde.spectral.theory.simulate import Moments, check_counts, times


def ornstein_uhlenbeck(
    hessian: Tensor,
    covariance: Tensor,
    start: Tensor,
    rule: Rule,
    steps: int,
    *,
    corrected: bool = False,
) -> Moments:
    """Equation (1): what the equation predicts for ½ wᵀHw, at the rule's times.

    Args:
        hessian: H (d, d).
        covariance: Σ (d, d).
        start: w (d,), without spread.
        rule: with ρ = 0 and a linear R.
        steps: of the rule.
        corrected: with the modified drift.

    Raises:
        OptionError: ρ is not 0, or `steps` is below 1.
    """
    check_counts("ornstein_uhlenbeck", steps=steps)
    k = _linear(hessian, rule)
    if corrected:
        k = k + 0.5 * rule.eta * k @ k
    p = rule.project(torch.eye(len(start)).to(start))
    noise = rule.eta * p @ covariance @ p.mT
    block = torch.cat((torch.cat((k, noise), 1), torch.cat((torch.zeros_like(k), -k.mT), 1)))
    d = len(start)
    whole = cast(Tensor, torch.linalg.matrix_exp(rule.eta * block))
    # The block below is e^{−Kᵀη}, and the one beside it the integral, still turned by e^{Kη}.
    forward = whole[d:, d:].mT
    return _recursion(forward, forward @ whole[:d, d:], start, rule.eta, steps)


def quadratic_rule(hessian: Tensor, covariance: Tensor, start: Tensor, rule: Rule, steps: int) -> Moments:
    """Equation (2): the exact moments of the rule itself for ½ wᵀHw. Arguments as of `ornstein_uhlenbeck`."""
    check_counts("quadratic_rule", steps=steps)
    eye = torch.eye(len(start)).to(start)
    p = rule.project(eye)
    noise = rule.eta**2 * p @ covariance @ p.mT
    return _recursion(eye - rule.eta * _linear(hessian, rule), noise, start, rule.eta, steps)


def _linear(hessian: Tensor, rule: Rule) -> Tensor:
    """K."""
    if rule.rho:
        raise OptionError(
            f"the moments of a perturbed rule, rho={rule.rho}, have no closed form even for a quadratic, since its u "
            "has unit length. Use simulate_rule and simulate_sde, or rho=0."
        )
    k = rule.project(hessian.mT).mT
    if rule.regulariser is not None:
        k = k + cast(Tensor, jacrev(rule.decay)(torch.zeros_like(hessian[0]))) / rule.eta
    return k


def _recursion(forward: Tensor, noise: Tensor, start: Tensor, eta: float, steps: int) -> Moments:
    mean, covariance = [start], [torch.zeros_like(noise)]
    for _ in range(steps):
        mean.append(forward @ mean[-1])
        covariance.append(forward @ covariance[-1] @ forward.mT + noise)
    return Moments(times(eta, steps, start), torch.stack(mean), torch.stack(covariance))

"""What a PAC-Bayes bound says, and the inverse of the divergence between coins. Equations: `pac_bayesian`."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Condition:
    """One condition of the theorem: whether it holds, and by what that is known."""

    name: str
    holds: bool
    why: str


@dataclass(frozen=True)
class PacBayes:
    """What `pac_bayes` found.

    Attributes:
        bound: on E_Q of the risk, by inverting (1); None where a condition fails.
        pinsker: the same by (2); None where a condition fails.
        risk: what is bounded: ``"L_D"``, or ``"fixed inputs"``, the risk on the training inputs with fresh labels.
        empirical: mean loss of the draws from Q on S.
        empirical_bound: upper end of (5) for E_Q L_S.
        kl: KL(Q‖P) in nats.
        sigma: the chosen σ.
        outside: share of ‖W − W₀‖² outside the bases, which the bounded network lacks; 0 without bases.
        n: examples.
        delta: the bound fails with this probability at most.
        conditions: each with its reason.
    """

    bound: float | None
    pinsker: float | None
    risk: Literal["L_D", "fixed inputs"]
    empirical: float
    empirical_bound: float
    kl: float
    sigma: float
    outside: float
    n: int
    delta: float
    conditions: tuple[Condition, ...]

    @property
    def holds(self) -> bool:
        """Whether all conditions do."""
        return all(condition.holds for condition in self.conditions)

    @property
    def vacuous(self) -> bool:
        """Whether it says no more than that a loss is at most 1, or nothing at all."""
        return self.bound is None or self.bound >= 1

    def __str__(self) -> str:
        what = "E_Q L_D" if self.risk == "L_D" else "E_Q of the risk on these inputs with fresh labels"
        if self.bound is None:
            head = "no bound: a condition fails"
        else:
            head = f"{what} ≤ {self.bound:.4f} with probability {1 - self.delta:g}" + (
                " (vacuous)" if self.vacuous else ""
            )
        rest = (
            f"L_S of the draws {self.empirical:.4f}, E_Q L_S ≤ {self.empirical_bound:.4f}, KL {self.kl:.1f} nats, "
            f"n = {self.n}, σ = {self.sigma:g}, outside the bases {self.outside:.1%}"
        )
        lines = [f"  {'holds' if c.holds else 'FAILS'}  {c.name}: {c.why}" for c in self.conditions]
        return "\n".join([head, rest, *lines])


def kl_inverse(q: float, budget: float) -> float:
    """The largest p with ``kl(q ‖ p) ≤ budget``, by bisection; q in [0, 1], rounded upwards."""
    low, high = q, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if _coins(q, middle) > budget:
            high = middle
        else:
            low = middle
    return high


def _coins(q: float, p: float) -> float:
    """kl(q ‖ p)."""
    found = 0.0
    for a, b in ((q, p), (1 - q, 1 - p)):
        if a > 0:
            found += a * math.log(a / b) if b > 0 else math.inf
    return found

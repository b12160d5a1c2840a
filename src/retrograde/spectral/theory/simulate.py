r"""A discrete rule beside the stochastic differential equation that it is said to follow.

    w ← w − η P (∇f(w + ρu) + ξ) − β R(w),   E ξ = 0,  Cov ξ = Σ(w)           (1)   the rule
    dW = b(W) dt + √η P Σ(W)^{1/2} dB                                         (2)   b of `rule`, (5) or (6) there

Step k of (1) is at time t = ηk of (2). The two agree weakly: means of smooth functions of w at a given time differ by
O(η) with b, and by O(η²) with the modified drift b̃. For a quadratic both have closed forms, see `quadratic`.

Deviations: (2) is integrated by Heun's step for the drift (and Σ at the start of each step, as Itô's integral asks),
where Euler–Maruyama is usual. With one substep Euler–Maruyama *is* the rule, and with m it keeps 1/m of the very error
that is to be seen; Heun's own is O((η/m)²). Both simulations draw the same normal numbers where `seed`, `runs` and
`substeps` agree, so that their difference has little noise. u is that of the whole loss, not of a minibatch, whose own
u would add ρ E‖∇f_B‖ to the loss (Compagnoni et al. 2023). Σ is taken at w, not at w + ρu: a difference O(ρ).

References: Li, Tai, E, ICML 2017; Milstein, Tretyakov, *Stochastic numerics for mathematical physics*, 2004 (Heun's
step under additive noise).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from retrograde.errors import check_value, is_whole
from retrograde.maths import spectral
from retrograde.spectral.theory.rule import (
    Loss,
    Order,
    Rule,
    perturbation,
    perturbed_gradient,
    rule_drift,
)


@dataclass(frozen=True)
class Problem:
    """What is minimised, and how noisy its gradient is.

    Attributes:
        loss: f: (d,) → ().
        covariance: Σ of the gradient's noise: (d, d), or a function of w; None: no noise.
        examples: the losses (N,) at w whose mean is f; with them the rule draws minibatches, else normal noise of Σ.
        batch: rows of a minibatch, drawn with replacement; 1 or more.

    Raises:
        OptionError: `batch` is not.
    """

    loss: Loss
    covariance: Tensor | Callable[[Tensor], Tensor] | None = None
    examples: Callable[[Tensor], Tensor] | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        check_counts("Problem", batch=self.batch)


@dataclass(frozen=True)
class Moments:
    """Mean (T, d) and covariance (T, d, d) at `times` (T,)."""

    times: Tensor
    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Paths:
    """Simulated trajectories: `values` (T, runs, d) at `times` (T,), from the start on."""

    times: Tensor
    values: Tensor

    @property
    def moments(self) -> Moments:
        """Over runs."""
        mean = self.values.mean(1)
        centred = self.values - mean.unsqueeze(1)
        covariance = centred.mT @ centred / max(self.values.shape[1] - 1, 1)
        return Moments(self.times, mean, covariance)

    def expected(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Means over runs (T,) of a function (d,) → ()."""
        return vmap(vmap(function))(self.values).mean(1)


def network_problem(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    batch: int | None = None,
) -> tuple[Problem, Tensor]:
    """A small network's training as a problem over its flat weights.

    Args:
        model: without dropout or batch statistics; left as it is.
        inputs: (N, …).
        targets: (N, …).
        loss: of (outputs, targets), one number a row: (N,).
        batch: rows of a minibatch; None: the whole gradient, without noise.

    Returns:
        The problem, Σ being the covariance of single rows' gradients over `batch`, and the model's present w (d,).

    Raises:
        OptionError: `batch` is below 1.

    Examples:
        >>> problem, w = network_problem(nn.Linear(3, 1), x, y, lambda z, y: (z - y).square().mean(1), batch=8)
        >>> paths = simulate_rule(problem, w, Rule(eta=0.1), steps=50, runs=20)
    """
    if batch is not None:
        check_counts("network_problem", batch=batch)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in parameters.values()]

    def examples(w: Tensor) -> Tensor:
        parts = w.split(sizes)
        weights = {
            name: part.view(p.shape) for (name, p), part in zip(parameters.items(), parts, strict=True)
        }
        return loss(cast(Tensor, functional_call(model, weights, (inputs,))), targets)

    def covariance(w: Tensor) -> Tensor:
        rows = cast(Tensor, jacrev(examples)(w))
        rows = rows - rows.mean(0)
        return rows.mT @ rows / (len(rows) * (batch or 1))

    start = torch.cat([p.flatten() for p in parameters.values()])
    if batch is None:
        return Problem(lambda w: examples(w).mean()), start
    return Problem(lambda w: examples(w).mean(), covariance, examples, batch), start


def simulate_rule(
    problem: Problem,
    start: Tensor,
    rule: Rule,
    steps: int,
    *,
    runs: int = 1,
    seed: int = 0,
    substeps: int = 1,
) -> Paths:
    """Equation (1), `runs` times side by side.

    Args:
        problem: f and its noise: of minibatches where it has `examples`, normal otherwise.
        start: (d,).
        rule: η, ρ, P, β, R.
        steps: how many.
        runs: trajectories.
        seed: of the noise.
        substeps: normal numbers that make one step's; the same as given to `simulate_sde` couples the two.

    Returns:
        Paths at times 0, η, …, η · steps.
    """
    check_counts("simulate_rule", steps=steps, runs=runs, substeps=substeps)
    generator = torch.Generator().manual_seed(seed)
    examples, batch = problem.examples, problem.batch

    def plain(w: Tensor) -> Tensor:
        return perturbed_gradient(problem.loss, w, rule.rho, rule.direction)

    def sampled(w: Tensor, rows: Tensor) -> Tensor:
        assert examples is not None
        sample = examples
        # Only the gradient is noisy: its place, w + ρu, is the whole loss's.
        place = w if rule.rho == 0 else w + rule.rho * perturbation(problem.loss, w, rule.direction)

        def mean(at: Tensor) -> Tensor:
            return sample(at)[rows].mean()

        return cast(Tensor, grad(mean)(place))

    count = 0 if examples is None else len(examples(start))
    w = start.expand(runs, -1).clone()
    values = [w]
    for _ in range(steps):
        if examples is not None:
            rows = torch.randint(count, (runs, batch), generator=generator)
            gradient = vmap(sampled)(w, rows)
        else:
            normal = _normal(start, (substeps, runs), generator).sum(0) / substeps**0.5
            gradient = vmap(plain)(w) - _noise(problem, w, normal)
        w = w - rule.eta * rule.project(gradient) - vmap(rule.decay)(w)
        values.append(w)
    return Paths(times(rule.eta, steps, start), torch.stack(values))


def simulate_sde(
    problem: Problem,
    start: Tensor,
    rule: Rule,
    steps: int,
    *,
    runs: int = 1,
    seed: int = 0,
    substeps: int = 8,
    order: Order = 3,
    corrected: bool = False,
) -> Paths:
    """Equation (2), `runs` times side by side, read at the rule's times.

    Args:
        problem: f and Σ.
        start: (d,).
        rule: the rule that it describes.
        steps: of the rule.
        runs: trajectories.
        seed: of the Brownian motion.
        substeps: steps of the integrator for one of the rule.
        order: of the drift, see `retrograde.spectral.theory.drift`.
        corrected: with the modified drift b̃.

    Returns:
        Paths at times 0, η, …, η · steps.
    """
    check_counts("simulate_sde", steps=steps, runs=runs, substeps=substeps)
    generator = torch.Generator().manual_seed(seed)
    h = rule.eta / substeps

    def one(at: Tensor) -> Tensor:
        return rule_drift(problem.loss, at, rule, order=order, corrected=corrected)

    b = vmap(one)
    w = start.expand(runs, -1).clone()
    values = [w]
    for _ in range(steps):
        normal = _normal(start, (substeps, runs), generator)
        for dB in normal:
            noise = rule.project(_noise(problem, w, dB)) * (rule.eta * h) ** 0.5
            first = b(w)
            w = w + 0.5 * h * (first + b(w + h * first + noise)) + noise
        values.append(w)
    return Paths(times(rule.eta, steps, start), torch.stack(values))


def slope(sizes: Sequence[float], errors: Sequence[float]) -> float:
    """The order of an error: the least-squares slope of log error over log size."""
    x = torch.tensor(sizes, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x @ y) / (x @ x))


def _noise(problem: Problem, w: Tensor, normal: Tensor) -> Tensor:
    """``Σ(w)^{1/2} z`` of each run, (runs, d)."""
    if problem.covariance is None:
        return torch.zeros_like(w)
    sigma: Any = problem.covariance
    matrix = cast(Tensor, vmap(sigma)(w) if callable(sigma) else sigma.to(w))
    values, vectors = spectral.eigh(matrix)
    inner = (vectors.mT @ normal.unsqueeze(-1)).squeeze(-1) * values.clamp_min(0).sqrt()
    return (vectors @ inner.unsqueeze(-1)).squeeze(-1)


def _normal(like: Tensor, count: tuple[int, int], generator: torch.Generator) -> Tensor:
    drawn = torch.randn(*count, len(like), generator=generator, dtype=torch.float64)
    return drawn.to(like)


def times(eta: float, steps: int, like: Tensor) -> Tensor:
    """0, η, …, η · steps."""
    return eta * torch.arange(steps + 1).to(like)


def check_counts(what: str, **counts: int) -> None:
    """Refuse numbers of steps, runs or rows that are not whole, or below 1."""
    for name, count in counts.items():
        check_value(what, name, count, is_whole(count) and count >= 1, "a whole number, 1 or more")

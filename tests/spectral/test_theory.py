"""The continuous picture: its derivatives, its orders in η and ρ, and its moments against simulation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from retrograde.errors import OptionError
from retrograde.maths import spectral
from retrograde.spectral.theory import (
    Problem,
    Rule,
    drift,
    network_problem,
    ornstein_uhlenbeck,
    perturbation,
    perturbed_gradient,
    quadratic_rule,
    rule_drift,
    simulate_rule,
    simulate_sde,
    slope,
    top_curvature_gradient,
)

DOUBLE = torch.float64
H = torch.tensor([[2.0, 0.6, 0.0], [0.6, 1.0, 0.2], [0.0, 0.2, 0.5]], dtype=DOUBLE)
SIGMA = torch.tensor([[1.0, 0.3, 0.0], [0.3, 0.5, 0.1], [0.0, 0.1, 0.2]], dtype=DOUBLE)
START = torch.tensor([1.0, -1.5, 2.0], dtype=DOUBLE)


def bowl(w: Tensor) -> Tensor:
    """Neither quadratic nor symmetric: all derivatives are there."""
    return (
        0.5 * w @ H.to(w) @ w + 0.1 * (w**3).sum() + 0.2 * (w[0] * w[1] - w[2]).sin() + (0.3 * w).cosh().sum()
    )


def quadratic(w: Tensor) -> Tensor:
    return 0.5 * w @ H @ w


def two_layers() -> tuple[Problem, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(12, 2, dtype=DOUBLE)
    y = (x[:, :1] * x[:, 1:]).sin()
    return network_problem(model, x, y, lambda z, y: (z - y).square().mean(1), batch=4)


def plane() -> Tensor:
    q = torch.linalg.qr(torch.randn(3, 2, dtype=DOUBLE))[0]
    return q @ q.T


# Derivatives.


@pytest.mark.parametrize("problem", ["bowl", "network"])
def test_gradient_of_the_norm_and_of_the_top_eigenvalue(problem: str) -> None:
    """Equations (3) and (4) against autograd through the norm and through the eigenvalues."""
    loss, at = (bowl, START) if problem == "bowl" else (two_layers()[0].loss, two_layers()[1])
    w = at.clone().requires_grad_()
    (norm,) = torch.autograd.grad(torch.autograd.grad(loss(w), w, create_graph=True)[0].norm(), w)
    second_term = drift(loss, at, 0.5, order=1) - drift(loss, at, 0.5, order=2)
    torch.testing.assert_close(second_term, 0.5 * norm)
    hessian = torch.func.hessian(loss)(w)
    (expected,) = torch.autograd.grad(torch.linalg.eigvalsh(hessian)[-1], w)
    torch.testing.assert_close(top_curvature_gradient(loss, at), expected, rtol=1e-6, atol=1e-8)
    assert expected.norm() > 1e-3


@pytest.mark.parametrize("direction", ["gradient", "top"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_in_rho(direction: str, order: int) -> None:
    """What the series of (2) leaves out falls off as ρ to the number of its terms."""
    sizes = [0.02, 0.04, 0.08, 0.16]
    errors = [
        float(
            (
                drift(bowl, START, rho, order=order, direction=direction)
                + perturbed_gradient(bowl, START, rho, direction)
            ).norm()
        )
        for rho in sizes
    ]
    assert slope(sizes, errors) == pytest.approx(order, abs=0.15)


def test_top_direction_points_uphill() -> None:
    u = perturbation(bowl, START, "top")
    assert u @ torch.func.grad(bowl)(START) > 0
    assert perturbation(quadratic, torch.zeros(3, dtype=DOUBLE)).norm() == 0


def test_modified_drift_of_plain_descent() -> None:
    """For ρ = 0 equation (6) is −∇(f + (η/4)‖∇f‖²)."""
    w = START.clone().requires_grad_()
    (g,) = torch.autograd.grad(bowl(w), w, create_graph=True)
    (expected,) = torch.autograd.grad(bowl(w) + 0.1 / 4 * g.square().sum(), w)
    torch.testing.assert_close(rule_drift(bowl, START, Rule(0.1), corrected=True), -expected)


# Closed forms.

RULES: dict[str, Callable[[float], Rule]] = {
    "plain": Rule,
    "projected": lambda eta: Rule(eta, projection=plane()),
    "decayed": lambda eta: Rule(
        eta, beta=0.3 * eta, regulariser=lambda w: w * torch.tensor([1.0, 0.0, 2.0]).to(w)
    ),
}


@pytest.mark.parametrize("kind", RULES)
def test_moments_of_the_equation(kind: str) -> None:
    """Simulated mean and covariance are the Ornstein–Uhlenbeck process's, to statistical accuracy."""
    rule, runs, steps = RULES[kind](0.2), 4000, 12
    found = simulate_sde(Problem(quadratic, SIGMA), START, rule, steps, runs=runs, substeps=4).moments
    expected = ornstein_uhlenbeck(H, SIGMA, START, rule, steps)
    _assert_close_moments(found, expected, runs)


@pytest.mark.parametrize("kind", RULES)
def test_moments_of_the_rule(kind: str) -> None:
    rule, runs, steps = RULES[kind](0.4), 4000, 12
    found = simulate_rule(Problem(quadratic, SIGMA), START, rule, steps, runs=runs).moments
    _assert_close_moments(found, quadratic_rule(H, SIGMA, START, rule, steps), runs)


def _assert_close_moments(found: object, expected: object, runs: int) -> None:
    torch.testing.assert_close(found.times, expected.times)
    c = expected.covariance
    variance = c.diagonal(dim1=1, dim2=2)
    assert ((found.mean - expected.mean).abs() <= 4.5 * (variance / runs).sqrt() + 2e-3).all()
    spread = ((c.square() + variance.unsqueeze(1) * variance.unsqueeze(2)) / runs).sqrt()
    assert ((found.covariance - c).abs() <= 4.5 * spread + 1e-4).all()
    assert variance[-1].max() > 0.02


def test_stationary_covariance() -> None:
    """In one dimension ηΣ/(2H) of the equation, and ηΣ/(2H(1 − ηH/2)) of the rule."""
    h, s, start = (
        torch.tensor([[2.0]], dtype=DOUBLE),
        torch.tensor([[3.0]], dtype=DOUBLE),
        torch.ones(1, dtype=DOUBLE),
    )
    for eta in (0.05, 0.3):
        equation = ornstein_uhlenbeck(h, s, start, Rule(eta), 2000).covariance[-1].item()
        discrete = quadratic_rule(h, s, start, Rule(eta), 2000).covariance[-1].item()
        assert equation == pytest.approx(eta * 3 / 4)
        assert discrete == pytest.approx(eta * 3 / 4 / (1 - eta))


# Order in η.


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize(("corrected", "order"), [(False, 1), (True, 2)])
def test_weak_order_on_a_quadratic(kind: str, corrected: bool, order: int) -> None:
    """Moments at time 1.6, without any sampling error.

    The covariance, of which the noise has a factor η, is right to O(η²) with either drift: Σ would have to be modified.
    """
    sizes, means, seconds = [0.02, 0.04, 0.08, 0.16], [], []
    for eta in sizes:
        torch.manual_seed(4)
        rule, steps = RULES[kind](eta), round(1.6 / eta)
        exact = quadratic_rule(H, SIGMA, START, rule, steps)
        other = ornstein_uhlenbeck(H, SIGMA, START, rule, steps, corrected=corrected)
        means.append(float((exact.mean[-1] - other.mean[-1]).norm()))
        seconds.append(float((exact.covariance[-1] - other.covariance[-1]).norm()))
    assert slope(sizes, means) == pytest.approx(order, abs=0.25)
    assert slope(sizes, seconds) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize(("corrected", "order"), [(False, 1), (True, 2)])
def test_order_on_a_perturbed_network(corrected: bool, order: int) -> None:
    """A two-layer network without noise, ρ > 0: its place at time 0.8, by the three-term drift."""
    problem, start = two_layers()
    quiet = Problem(problem.loss)
    sizes = [0.05, 0.1, 0.2]
    errors = []
    for eta in sizes:
        rule, steps = Rule(eta, rho=0.02), round(0.8 / eta)
        exact = simulate_rule(quiet, start, rule, steps).values[-1, 0]
        flow = simulate_sde(quiet, start, rule, steps, substeps=2, corrected=corrected).values[-1, 0]
        errors.append(float((exact - flow).norm()))
    assert slope(sizes, errors) == pytest.approx(order, abs=0.3)


def test_weak_error_with_noise() -> None:
    """Beyond quadratics: E w₃ at time 0.8 with either drift; coupled paths keep the sampling error below both."""
    sizes = [0.05, 0.1, 0.2]
    errors: dict[bool, list[float]] = {False: [], True: []}
    problem = Problem(bowl, SIGMA)
    for eta in sizes:
        given = {"runs": 1000, "substeps": 4}
        exact = simulate_rule(problem, START, Rule(eta), round(0.8 / eta), **given).values[-1, :, 2]
        for corrected, found in errors.items():
            paths = simulate_sde(problem, START, Rule(eta), round(0.8 / eta), corrected=corrected, **given)
            difference = paths.values[-1, :, 2] - exact
            found.append(float(difference.mean().abs()))
            assert found[-1] > 5 * difference.std() / 1000**0.5
    assert slope(sizes, errors[False]) == pytest.approx(1, abs=0.2)
    assert slope(sizes, errors[True]) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_in_rho_along_a_path(order: int) -> None:
    """Steps along the series end, after ten, beside the perturbed rule by ρ to the number of terms."""
    sizes, errors = [0.05, 0.1, 0.2], []
    for rho in sizes:
        exact = simulate_rule(Problem(bowl), START, Rule(0.05, rho=rho), 10).values[-1, 0]
        w = START
        for _ in range(10):
            w = w + 0.05 * drift(bowl, w, rho, order=order)
        errors.append(float((w - exact).norm()))
    assert slope(sizes, errors) == pytest.approx(order, abs=0.2)


# Minibatches, projections, ends.


def test_minibatches_have_the_covariance() -> None:
    """One step of many runs from the same place: mean −η∇f, covariance η²Σ(w)."""
    problem, start = two_layers()
    rule, runs = Rule(0.5), 4000
    moved = simulate_rule(problem, start, rule, 1, runs=runs).moments
    expected = start - 0.5 * torch.func.grad(problem.loss)(start)
    sigma = problem.covariance(start)
    assert ((moved.mean[1] - expected).abs() <= 5 * 0.5 * (sigma.diagonal() / runs).sqrt()).all()
    error = torch.linalg.matrix_norm(moved.covariance[1] - 0.25 * sigma)
    assert error < 0.1 * torch.linalg.matrix_norm(0.25 * sigma)


def test_equation_of_minibatches() -> None:
    """Σ(w) of the network's own gradients: the equation's spread is the rule's."""
    problem, start = two_layers()
    rule = Rule(0.1)
    discrete = simulate_rule(problem, start, rule, 20, runs=400).moments
    equation = simulate_sde(problem, start, rule, 20, runs=400, substeps=1).moments
    spreads = [float(m.covariance[-1].diagonal().sum().sqrt()) for m in (discrete, equation)]
    assert spreads[1] == pytest.approx(spreads[0], rel=0.15)
    assert (discrete.mean[-1] - equation.mean[-1]).norm() < 0.2 * (discrete.mean[-1] - start).norm()


@pytest.mark.parametrize("simulate", [simulate_rule, simulate_sde])
def test_projected_paths_stay_in_their_plane(simulate: Callable) -> None:
    p = plane()
    paths = simulate(Problem(bowl, SIGMA), START, Rule(0.1, rho=0.1, projection=p), 10, runs=5)
    moved = paths.values - START
    torch.testing.assert_close(spectral.project_columns(moved.mT, torch.linalg.qr(p)[0][:, :2]).mT, moved)
    assert moved[-1].norm() > 0.5


def test_same_seed_same_paths() -> None:
    problem, rule = Problem(quadratic, SIGMA), Rule(0.1)
    first, second = (simulate_sde(problem, START, rule, 5, runs=3, seed=7).values for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, simulate_sde(problem, START, rule, 5, runs=3, seed=8).values)


def test_model_is_left_as_it_is() -> None:
    model = nn.Linear(2, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    problem, w = network_problem(
        model, torch.randn(4, 2), torch.randn(4, 1), lambda z, y: (z - y).square().mean(1)
    )
    assert problem.covariance is None
    simulate_rule(problem, w, Rule(0.1), 3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_refusals() -> None:
    for options, words in (
        ({"eta": 0.0}, "eta=0.0 must be a finite number above 0"),
        ({"eta": 0.1, "rho": -1.0}, "rho=-1.0 must be a finite number, 0 or more"),
        ({"eta": 0.1, "beta": 0.1}, "a regulariser go together"),
        ({"eta": 0.1, "direction": "down"}, "one of gradient, top"),
        ({"eta": "x"}, "eta='x' must be a finite number above 0"),
        (
            {"eta": 0.1, "projection": torch.tensor([[1.0, 1.0], [0.0, 0.0]])},
            "differs from its transpose by 1",
        ),
        ({"eta": 0.1, "projection": torch.full((2, 2), float("nan"))}, "differs from its transpose by nan"),
        ({"eta": 0.1, "projection": torch.ones(3, 2)}, r"projection is \(3, 2\), and must be square"),
    ):
        with pytest.raises(OptionError, match=words):
            Rule(**options)
    with pytest.raises(OptionError, match="order=4"):
        drift(bowl, START, 0.1, order=4)
    with pytest.raises(OptionError, match="no closed form"):
        ornstein_uhlenbeck(H, SIGMA, START, Rule(0.1, rho=0.1), 3)
    for simulate in (simulate_rule, simulate_sde):
        with pytest.raises(OptionError, match=f"{simulate.__name__}: steps=0"):
            simulate(Problem(quadratic), START, Rule(0.1), 0)
    for closed in (ornstein_uhlenbeck, quadratic_rule):
        with pytest.raises(OptionError, match=f"{closed.__name__}: steps=-2"):
            closed(H, SIGMA, START, Rule(0.1), -2)
    narrow = Rule(0.1, projection=torch.eye(2))
    with pytest.raises(OptionError, match=r"projection is \(2, 2\), and the weights are \(3,\)"):
        simulate_rule(Problem(quadratic), START, narrow, 1)
    with pytest.raises(OptionError, match="network_problem: batch=0"):
        network_problem(nn.Linear(2, 1), torch.ones(3, 2), torch.ones(3, 1), lambda z, y: z - y, batch=0)
    with pytest.raises(OptionError, match="Problem: batch=0"):
        Problem(quadratic, batch=0)


@pytest.mark.parametrize("order", [1, 3])
def test_directions_and_lengths_that_are_none(order: int) -> None:
    """A misspelt direction is not the leading eigenvector, and no length is negative: whatever else is asked for."""
    for rho in (0.0, 0.1):
        with pytest.raises(OptionError, match="drift: direction='gradent' must be one of gradient, top"):
            drift(bowl, START, rho, order=order, direction="gradent")
        with pytest.raises(OptionError, match="perturbed_gradient: direction='gradent'"):
            perturbed_gradient(bowl, START, rho, "gradent")
    with pytest.raises(OptionError, match="perturbation: direction='gradent'"):
        perturbation(bowl, START, "gradent")
    with pytest.raises(OptionError, match=r"drift: rho=-0\.1 must be a finite number, 0 or more"):
        drift(bowl, START, -0.1, order=order)
    with pytest.raises(OptionError, match=r"perturbed_gradient: rho=-0\.1"):
        perturbed_gradient(bowl, START, -0.1)

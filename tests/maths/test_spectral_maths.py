"""The projection's mathematics: the bound, the two ways to follow a basis, and what is carried along."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retrograde.maths import spectral


def spectrum(n: int, d: int, decay: float, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows (1, n, d) whose second moment falls off by `decay` from one direction to the next."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    scales = decay ** (torch.arange(d, dtype=torch.float64) / 2)
    return (
        ((torch.randn(n, d, generator=generator, dtype=torch.float64) * scales) @ turn).to(dtype).unsqueeze(0)
    )


def exact(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues of E[xxᵀ], largest first, and the leading k vectors."""
    values, vectors = torch.linalg.eigh(rows.mT @ rows / rows.shape[1])
    return values.flip(-1), vectors.flip(-1)[..., :k]


def start(d: int, k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.linalg.qr(torch.randn(1, d, k, generator=generator, dtype=torch.float64))[0].to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    d=st.integers(2, 20),
    o=st.integers(1, 12),
    k=st.integers(1, 20),
    decay=st.floats(0.2, 1.0),
    seed=st.integers(0, 10_000),
)
def test_error_bound(n: int, d: int, o: int, k: int, decay: float, seed: int) -> None:
    """Equation (2) holds for the leading eigenvectors, whatever D."""
    k = min(k, d)
    x = spectrum(n, d, decay, seed)
    delta = torch.randn(n, o, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    values, u = exact(x, k)
    g = delta.T @ x[0]
    error = torch.linalg.matrix_norm(g - spectral.project_rows(g, u[0]))
    assert error <= spectral.error_bound(delta, n * values[0], k) * (1 + 1e-9) + 1e-9


def test_error_bound_is_reached() -> None:
    """D along the first left-out direction: the bound is met with equality, so it is no idle one."""
    x = spectrum(50, 6, 0.5, 0)
    values, u = exact(x, 5)
    _, vectors = torch.linalg.eigh(x[0].T @ x[0])
    delta = x[0] @ vectors[:, :1]
    delta /= delta.norm()
    g = delta.T @ x[0]
    error = torch.linalg.matrix_norm(g - spectral.project_rows(g, u[0]))
    torch.testing.assert_close(error, spectral.error_bound(delta, 50 * values[0], 5))


def test_error_bound_needs_the_leading_subspace() -> None:
    """A random subspace of the same size breaks it: the test above can fail."""
    x = spectrum(50, 12, 0.3, 0)
    values, _ = exact(x, 4)
    delta = torch.randn(50, 3, dtype=torch.float64)
    g = delta.T @ x[0]
    error = torch.linalg.matrix_norm(g - spectral.project_rows(g, start(12, 4)[0]))
    assert error > spectral.error_bound(delta, 50 * values[0], 4)


@pytest.mark.parametrize("method", ["qr", "lie"])
def test_subspace_is_found(method: str) -> None:
    """Both updates end in the leading subspace, from any start, and Rayleigh–Ritz finds its eigenpairs."""
    rows = spectrum(400, 20, 0.6, 3)
    values, u = exact(rows, 4)
    multiply = spectral.second_moment(rows)
    q = start(20, 4)
    assert spectral.drift(u, q) > 1
    q = spectral.qr_steps(multiply, q, 60) if method == "qr" else spectral.lie_steps(multiply, q, 300, 1.0)
    assert spectral.drift(u, q) < 1e-6
    found, vectors = spectral.leading_eigenpairs(multiply, q)
    torch.testing.assert_close(found, values[:, :4], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close((vectors * u).sum(1).abs(), torch.ones(1, 4, dtype=torch.float64))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k", [1, 3, 6, 9])
def test_cayley_step_is_the_full_formula(k: int, symmetric: bool) -> None:
    """Equation (5) is (4), without its d × d matrices: for M = CQ and for any other M, whose QᵀM is not symmetric."""
    rows = spectrum(50, 9, 0.7, 1)
    q = start(9, k)
    m = spectral.second_moment(rows)(q) if symmetric else torch.randn_like(q)
    a = m @ q.mT - q @ m.mT
    eye = torch.eye(9, dtype=torch.float64)
    expected = torch.linalg.solve(eye - 0.35 * a, (eye + 0.35 * a) @ q)
    torch.testing.assert_close(spectral.cayley_step(q, m, 0.7), expected)


def test_cayley_step_rests_on_an_invariant_subspace() -> None:
    rows = spectrum(50, 9, 0.7, 1)
    _, u = exact(rows, 3)
    torch.testing.assert_close(spectral.cayley_step(u, spectral.second_moment(rows)(u), 5.0), u)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_ten_thousand_lie_steps(dtype: torch.dtype, tolerance: float) -> None:
    """Orthonormal throughout, while the data change under the basis."""
    batches = [spectrum(16, 12, 0.8, seed, dtype) for seed in range(10)]
    q, worst = start(12, 4, dtype), 0.0
    for step in range(1000):
        q = spectral.lie_steps(spectral.second_moment(batches[step % 10]), q, 10, 1.0)
        worst = max(worst, spectral.orthonormality(q))
    assert worst <= tolerance


def test_bare_cayley_steps_in_double() -> None:
    """Without polishing, 10,000 steps in float64 drift by rounding alone."""
    multiply = spectral.second_moment(spectrum(16, 12, 0.8, 0))
    q = spectral.lie_steps(multiply, start(12, 4), 10_000, 0.5, tolerance=1.0)
    assert spectral.orthonormality(q) <= 1e-11


def test_polish() -> None:
    q = start(12, 4) * (1 + 1e-4)
    assert spectral.orthonormality(spectral.polish(q)) < 1e-7 < spectral.orthonormality(q)


def test_reexpress() -> None:
    """Inside the old subspace: M P_old P_new. Outside: untouched. Same subspace, other basis: unchanged."""
    old, new = start(8, 3), torch.linalg.qr(torch.randn(1, 8, 3, dtype=torch.float64))[0]
    m = torch.randn(1, 5, 8, dtype=torch.float64)
    inside = spectral.project_rows(m, old)
    found = spectral.reexpress(m, old, new)
    torch.testing.assert_close(found, spectral.project_rows(inside, new) + (m - inside))
    turned = old @ torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    torch.testing.assert_close(spectral.reexpress(m, old, turned), m)


def test_drift_and_ranks() -> None:
    eye = torch.eye(6).unsqueeze(0)
    assert spectral.drift(eye[..., :2], eye[..., :2]) == 0
    assert spectral.drift(eye[..., :2], eye[..., 2:4]) == 2
    values, trace = torch.tensor([[6.0, 3.0, 1.0], [9.0, 0.5, 0.5]]), torch.tensor([10.0, 10.0])
    assert spectral.rank_for_energy(values, trace, 0.6) == 1
    assert spectral.rank_for_energy(values, trace, 0.9) == 2
    assert spectral.rank_for_energy(values, trace, 0.95) == 3
    assert spectral.rank_for_energy(values[:, :1], trace, 0.95) == 1
    # The last ones are lost in the running sum, and are directions all the same.
    values = torch.tensor([[1.0, 1e-9, 1e-9]])
    assert spectral.rank_for_energy(values, values.sum(-1), 1.0) == 3
    ones = torch.ones(1, 4)
    torch.testing.assert_close(spectral.effective_rank(ones, torch.tensor([4.0]), 4), torch.tensor([4.0]))
    torch.testing.assert_close(
        spectral.effective_rank(ones[:, :2], torch.tensor([4.0]), 4), torch.tensor([4.0])
    )
    one = torch.tensor([[4.0, 0.0]])
    torch.testing.assert_close(spectral.effective_rank(one, torch.tensor([4.0]), 2), torch.tensor([1.0]))


def test_decayed() -> None:
    """Only the direction shrinks, by a; and no further than to nothing."""
    w, e = torch.randn(1, 4, 6), torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    found = spectral.decayed(w, e, torch.tensor([0.25]))
    torch.testing.assert_close(found[0, 1], 0.75 * w[0, 1])
    torch.testing.assert_close(found[0, [0, 2, 3]], w[0, [0, 2, 3]])
    assert spectral.decayed(w, e, torch.tensor([7.0]))[0, 1].abs().max() == 0


def test_decay_follows_the_gradient_of_lambda_1() -> None:
    """∇_W λ₁ of Z = XWᵀ is 2 e₁e₁ᵀ W XᵀX; the decay's direction e₁e₁ᵀW lowers λ₁."""
    x, w = torch.randn(40, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    z = x @ w.T
    values, vectors = torch.linalg.eigh(z.T @ z)
    (gradient,) = torch.autograd.grad(values[-1], w)
    e = vectors[:, -1].detach()
    torch.testing.assert_close(gradient, 2 * torch.outer(e, e @ w.detach()) @ x.T @ x)
    after = x @ spectral.decayed(w.detach()[None], e[None], torch.tensor([0.01], dtype=torch.float64))[0].T
    assert torch.linalg.eigvalsh(after.T @ after)[-1] < values[-1]


def test_eigenpairs_of_nearly_equal_eigenvalues() -> None:
    """Finite, and in the matrix's own precision, where one direction outweighs all the others."""
    direction = torch.randn(4, 33, 1)
    matrix = direction @ direction.mT + 1e-9 * torch.eye(33)
    values, vectors = spectral.eigh(matrix)
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close((vectors * values.unsqueeze(-2)) @ vectors.mT, matrix, rtol=1e-4, atol=1e-4)


def test_optimal_transport_is_the_symmetric_map_between_covariances() -> None:
    """T C_old T = C_new with T symmetric and positive; the identity between equals; in one dimension σ_new/σ_old."""
    x, y = (torch.randn(2, 30, 5, dtype=torch.float64) @ torch.randn(5, 5).double() for _ in range(2))
    old, new = x.mT @ x, y.mT @ y
    t = spectral.optimal_transport(old, spectral.root(new, 0.5))
    torch.testing.assert_close(t, t.mT)
    assert torch.linalg.eigvalsh(t).min() > 0
    torch.testing.assert_close(t @ old @ t, new)
    same = spectral.optimal_transport(old, spectral.root(old, 0.5))
    torch.testing.assert_close(same, torch.eye(5).double().expand(2, 5, 5))
    torch.testing.assert_close(
        spectral.optimal_transport(torch.tensor([[4.0]]), torch.tensor([[3.0]])), torch.tensor([[1.5]])
    )


@pytest.mark.parametrize("seed", range(4))
def test_optimal_transport_of_roots_that_are_not_quite_symmetric(seed: int) -> None:
    """As float32 products leave them: their product with C_old would be indefinite. C_new is the square of the root."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    half = (q * torch.logspace(0, -5, 64)) @ q.T + 1e-7 * torch.randn(64, 64, generator=generator)
    old = (q * torch.logspace(0, -6, 64)) @ q.T
    t = spectral.optimal_transport(old, half)
    exact = (half.double() + half.T.double()) / 2
    new = exact @ exact
    assert t.isfinite().all()
    found = t.double() @ ((old.double() + old.T.double()) / 2) @ t.double()
    torch.testing.assert_close(found, new, rtol=1e-3, atol=1e-5)


def test_root_of_what_rounding_made_indefinite() -> None:
    """No eigenvalue counts for less than the rounding of the largest, so that none outweighs the others."""
    c = torch.diag(torch.tensor([4.0, 1.0, -1e-9, 0.0]))
    inverse = spectral.root(c, -0.5)
    floor = 4 * 4 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(inverse.diagonal(), torch.tensor([0.5, 1.0, floor**-0.5, floor**-0.5]))
    assert spectral.root(torch.zeros(2, 2), -0.5).isfinite().all()


def test_root() -> None:
    """C^½ C^½ = C, and C^-½ inverts it; what is not positive counts as nearly 0."""
    x = torch.randn(30, 5, dtype=torch.float64)
    c = x.T @ x
    half = spectral.root(c, 0.5)
    torch.testing.assert_close(half @ half, c)
    torch.testing.assert_close(half @ spectral.root(c, -0.5), torch.eye(5).double())
    assert spectral.root(torch.zeros(2, 2), 0.5).isfinite().all()

"""Shared input statistics: the leading eigenpairs, when they are refreshed, and from which rows."""

import math

import pytest
import torch
from torch import Tensor

from retrograde.engine.statistics import InputStatistics, StatisticsSpec


def rows(n: int, d: int = 40, seed: int = 0) -> Tensor:
    """(2, n, d) with a mean, and eigenvalues that fall by a half in two random bases."""
    generator = torch.Generator().manual_seed(99)
    turn, _ = torch.linalg.qr(torch.randn(2, d, d, generator=generator))
    noise = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed))
    return noise * (100 * 0.5 ** torch.arange(d)).sqrt() @ turn.mT + torch.arange(d) / 10


def step(statistics: InputStatistics, number: int, new: Tensor | None) -> bool:
    """One optimizer step, as a program drives it."""
    if (number == 0 or statistics.due(number)) and new is not None:
        statistics.collect(new)
    found = statistics.refresh()
    statistics.due(number + 1)
    return found


@pytest.mark.parametrize("rank", [5, 20, 40, 60], ids=["iterated", "half", "exact", "more_than_d"])
def test_eigenpairs(rank: int) -> None:
    """Leading eigenpairs, mean and mean variance of the rows, after a cold start and a warm one."""
    statistics = InputStatistics(StatisticsSpec(rows=3000, every=1, rank=rank))
    x = rows(3000)
    for number in range(4):
        assert step(statistics, number, x)
    covariance = torch.stack([torch.cov(group.T, correction=0) for group in x])
    values, k = torch.linalg.eigvalsh(covariance).flip(-1), min(rank, 40)
    torch.testing.assert_close(statistics.mean, x.mean(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistics.variance, values.mean(-1), rtol=1e-4, atol=0)
    assert statistics.basis is not None
    assert statistics.basis.shape == (2, 40, k)
    torch.testing.assert_close(statistics.eigenvalues, values[:, :k], rtol=1e-2, atol=1e-3)
    gram = statistics.basis.mT @ statistics.basis
    torch.testing.assert_close(gram, torch.eye(k).expand(2, k, k), rtol=0, atol=1e-5)
    residual = covariance @ statistics.basis[..., :3] - statistics.basis[..., :3] * values[:, None, :3]
    assert float(residual.norm()) < 0.02 * float(values[:, 0].max())
    assert float(statistics.drift.abs().max()) < 0.05  # type: ignore[union-attr]
    assert statistics.flops > 4 * x.numel()


def test_no_rank() -> None:
    statistics = InputStatistics(StatisticsSpec(rows=10, every=1))
    assert step(statistics, 0, rows(10))
    assert statistics.basis is None
    assert statistics.mean is not None


def test_window_fills_the_budget() -> None:
    """First refresh at once; then the last steps before each refresh bring rows, until the budget is full."""
    statistics = InputStatistics(StatisticsSpec(rows=50, every=8))
    sampled, refreshed, sizes = [], [], []
    for number in range(17):
        if number == 0 or statistics.due(number):
            sampled.append(number)
        if step(statistics, number, rows(16, seed=number)):
            refreshed.append(number)
            sizes.append(statistics.rows.shape[1])  # type: ignore[union-attr]
    assert refreshed == [0, 8, 16]
    assert sampled == [0, *range(5, 9), *range(13, 17)]
    assert sizes == [16, 50, 50]
    assert torch.equal(statistics.rows[:, :16], rows(16, seed=13))  # type: ignore[index]


def test_small_batches_use_every_step() -> None:
    statistics = InputStatistics(StatisticsSpec(rows=1000, every=4))
    assert [number for number in range(9) if step(statistics, number, rows(16))] == [0, 4, 8]
    assert statistics.rows is not None
    assert statistics.rows.shape[1] == 64


def test_until() -> None:
    statistics = InputStatistics(StatisticsSpec(rows=16, every=4, until=9))
    assert [number for number in range(20) if step(statistics, number, rows(16))] == [0, 4, 8]
    assert not any(statistics.due(number) for number in range(9, 40))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_rows_teach_nothing(bad: float) -> None:
    """Rows with NaN or Inf are dropped whole; the next refresh is as if they had not been."""
    statistics = InputStatistics(StatisticsSpec(rows=64, every=1, rank=3))
    step(statistics, 0, rows(64))
    before = statistics.state_dict()
    spoilt = rows(64, seed=1)
    spoilt[0, 3, 2] = bad
    assert not step(statistics, 1, spoilt)
    assert torch.equal(statistics.basis, before["basis"])  # type: ignore[arg-type]
    assert step(statistics, 2, rows(64, seed=2))
    assert bool(torch.isfinite(statistics.basis).all())  # type: ignore[arg-type]


def test_no_rows_teach_nothing() -> None:
    statistics = InputStatistics(StatisticsSpec(rows=8, every=1))
    assert not step(statistics, 0, None)
    assert not step(statistics, 1, rows(8)[:, :0])
    assert step(statistics, 2, rows(8))
    assert statistics.refreshes == 1


def test_a_refresh_without_rows_is_tried_again_until_a_period_has_passed() -> None:
    """A layer of every third step is met soon; one that is never called is asked once a period."""
    statistics = InputStatistics(StatisticsSpec(rows=8, every=5, rank=2))
    refreshed = [
        number for number in range(40) if step(statistics, number, rows(8) if number % 3 == 2 else None)
    ]
    assert refreshed == [2, 8, 14, 20, 26, 32, 38]
    idle = InputStatistics(StatisticsSpec(rows=8, every=5, rank=2))
    asked = []
    for number in range(40):
        asked += [number] if idle.due(number) else []
        idle.refresh()
    assert asked == [*range(5), *range(9, 40, 5)]


def test_merged() -> None:
    """The more demanding wish of each pair; one that goes on to the end wins."""
    first, second = StatisticsSpec(100, 10, 4, 50), StatisticsSpec(50, 20, 8, 70)
    assert first.merged(second) == second.merged(first) == StatisticsSpec(100, 10, 8, 70)
    assert first.merged(StatisticsSpec()).until is None
    assert first.merged(StatisticsSpec(longest=80)).longest == 10, (
        "the first one wants a refresh every tenth step"
    )
    assert StatisticsSpec(every=8, longest=64).merged(StatisticsSpec(every=4, longest=32)).longest == 32


def test_refreshes_that_find_nothing_new_become_rare() -> None:
    """They come half as often each time, down to the longest period; a changed input brings them back."""
    statistics = InputStatistics(StatisticsSpec(rows=500, every=8, rank=5, longest=64))
    refreshed = []
    for number in range(210):
        x = rows(500, seed=number) * (1.0 if number <= 120 else 1.5)
        if step(statistics, number, x):
            refreshed.append(number)
        if number == 100:
            fresh = InputStatistics(statistics.spec)
            fresh.load_state_dict(statistics.state_dict())
            statistics = fresh
    assert refreshed == [0, 8, 24, 56, 120, 184, 192, 200, 208]


@pytest.mark.parametrize("turned", [False, True], ids=["mean", "basis"])
def test_a_moving_input_is_followed(turned: bool) -> None:
    """Of constant spectrum, and of constant mean: either alone is noticed."""
    statistics = InputStatistics(StatisticsSpec(rows=500, every=8, rank=5, longest=64))
    refreshed = []
    for number in range(40):
        x = rows(500, seed=number)
        x = x.roll(number // 8, -1) - x.mean((0, 1)) if turned else x + number
        if step(statistics, number, x):
            refreshed.append(number)
    assert refreshed == [0, 8, 16, 24, 32]


def test_state() -> None:
    """Saved in the middle of a window and taken back: the same refreshes from the same rows."""
    spec = StatisticsSpec(rows=50, every=8, rank=3)
    first, second = InputStatistics(spec), InputStatistics(spec)
    for number in range(15):
        step(first, number, rows(16, seed=number))
    second.load_state_dict(first.state_dict())
    for statistics in (first, second):
        for number in range(15, 26):
            step(statistics, number, rows(16, seed=number))
    assert first.refreshes == second.refreshes == 4
    for name in ("rows", "mean", "basis", "eigenvalues", "variance", "drift"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name

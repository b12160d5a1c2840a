"""The bound: its formula, that it holds where it can be seen to, and that it isn't given where a condition fails."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from retrograde.errors import OptionError
from retrograde.spectral.theory import kl_inverse, pac_bayes

ALL = {"iid", "prior", "sigma"}


def sample(n: int, seed: int, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    y = (x @ torch.tensor([2.0, -1.0, 0.0, 0.0]) > 0).long()
    flipped = torch.rand(n, generator=generator) < noise
    return x, torch.where(flipped, 1 - y, y)


def trained(n: int, seed: int) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    initial = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    model, data = copy.deepcopy(initial), sample(n, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    return model, initial, data


def test_lemma() -> None:
    """Maurer's ξ(n) = Σ C(n, k) (k/n)ᵏ (1 − k/n)ⁿ⁻ᵏ ≤ 2√n: what the logarithm in (1) stands for."""
    for n in (8, 20, 100, 1000):
        terms = [
            math.exp(
                math.lgamma(n + 1)
                - math.lgamma(k + 1)
                - math.lgamma(n - k + 1)
                + (k * math.log(k / n) if k else 0)
                + ((n - k) * math.log(1 - k / n) if k < n else 0)
            )
            for k in range(n + 1)
        ]
        assert math.sqrt(n) < sum(terms) <= 2 * math.sqrt(n)


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("budget", [1e-4, 0.05, 2.0])
def test_inverse(q: float, budget: float) -> None:
    """It is what it inverts, and never above Pinsker's."""
    p = kl_inverse(q, budget)
    assert q <= p <= min(1.0, q + math.sqrt(budget / 2) + 1e-9)
    if p < 1 and q < 1:
        kl = (q * math.log(q / p) if q else 0.0) + (1 - q) * math.log((1 - q) / (1 - p))
        assert kl == pytest.approx(budget, rel=1e-6)
    if q == 0:
        assert p == pytest.approx(1 - math.exp(-budget))


def test_formula() -> None:
    """Every figure of the result by hand, for one σ."""
    model, initial, data = trained(500, 0)
    found = pac_bayes(model, initial, data, 0.3, stated=ALL, draws=40, delta=0.1)
    moved = sum(
        float((a - b).detach().double().square().sum())
        for a, b in zip(model.parameters(), initial.parameters(), strict=True)
    )
    assert found.kl == pytest.approx(moved / (2 * 0.3**2), rel=1e-6)
    assert found.empirical_bound == pytest.approx(kl_inverse(found.empirical, math.log(2 / 0.02) / 40))
    complexity = (found.kl + math.log(2 * math.sqrt(500) / 0.08)) / 500
    assert found.pinsker == pytest.approx(found.empirical_bound + math.sqrt(complexity / 2))
    assert found.bound == pytest.approx(kl_inverse(found.empirical_bound, complexity))
    assert found.bound <= found.pinsker
    assert found.holds
    assert found.risk == "L_D"
    assert (found.n, found.sigma, found.delta, found.outside) == (500, 0.3, 0.1, 0.0)


def test_draws_are_of_q() -> None:
    """The mean loss of draws is E_Q L_S: of a linear rule in one dimension, a normal probability."""
    model, initial = nn.Linear(1, 2), nn.Linear(1, 2)
    with torch.no_grad():
        for layer, at in ((model, 0.5), (initial, 0.0)):
            layer.weight.copy_(torch.tensor([[0.0], [at]]))
            layer.bias.zero_()
    model.bias.requires_grad_(False)
    initial.bias.requires_grad_(False)
    data = torch.ones(8, 1), torch.ones(8, dtype=torch.long)
    found = pac_bayes(model, initial, data, 0.5, stated=ALL, draws=4000)
    # Wrong where w₁ < w₀: N(0.5, 2 · 0.25) below 0.
    expected = 0.5 * math.erfc(0.5 / math.sqrt(0.5) / math.sqrt(2))
    assert found.empirical == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 4000))
    assert found.kl == pytest.approx(0.5)


def test_holds_on_fresh_data() -> None:
    """Above the risk of draws on 20,000 fresh examples in every repetition, and not idle: below 1."""
    for seed in range(6):
        model, initial, data = trained(2000, seed)
        found = pac_bayes(model, initial, data, [0.1, 0.3], stated=ALL)
        fresh = pac_bayes(model, initial, sample(20_000, 100 + seed), found.sigma, stated=ALL, draws=50)
        assert fresh.empirical < found.bound < 0.6
        assert not found.vacuous


def test_grid_pays_for_itself() -> None:
    """The best of a grid is no better than the same σ alone: each has its share of δ."""
    model, initial, data = trained(500, 0)
    grid = pac_bayes(model, initial, data, [0.01, 0.3, 3.0], stated=ALL)
    alone = pac_bayes(model, initial, data, grid.sigma, stated=ALL)
    assert grid.sigma == 0.3
    assert grid.bound > alone.bound
    assert grid.empirical == alone.empirical


def test_clipped_cross_entropy() -> None:
    """In [0, 1], whatever the logits; an untrained network of equal logits has ln 2 over the clip."""
    model = nn.Linear(4, 2)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    found = pac_bayes(model, copy.deepcopy(model), sample(100, 0), 1e-6, stated=ALL, loss="clipped", clip=2.0)
    assert found.empirical == pytest.approx(math.log(2) / 2, abs=1e-4)
    wild = pac_bayes(model, copy.deepcopy(model), sample(100, 0), 1e6, stated=ALL, loss="clipped")
    assert 0.3 < wild.empirical <= 1


# Bases.


def test_basis() -> None:
    """KL counts what lies inside, and the bounded network lacks the rest: with k = d nothing changes."""
    model, initial, data = trained(500, 0)
    plain = pac_bayes(model, initial, data, 0.2, stated=ALL)
    u = torch.linalg.qr(torch.randn(4, 4))[0]
    stated = ALL | {"basis-independent"}
    whole = pac_bayes(model, initial, data, 0.2, stated=stated, basis={"0.weight": u})
    assert whole.kl == pytest.approx(plain.kl, rel=1e-5)
    assert whole.outside == pytest.approx(0, abs=1e-6)
    half = pac_bayes(model, initial, data, 0.2, stated=stated, basis={"0.weight": u[:, :2]})
    moved = (model[0].weight - initial[0].weight).detach()
    lost = float((moved.square().sum() - (moved @ u[:, :2]).square().sum()) / (2 * 0.2**2))
    assert half.kl == pytest.approx(plain.kl - lost, rel=1e-5)
    assert 0 < half.outside < 1
    # Inputs outside the plane no longer reach what was learnt there.
    with torch.no_grad():
        projected = copy.deepcopy(model)
        projected[0].weight.copy_(initial[0].weight + moved @ u[:, :2] @ u[:, :2].T)
        tiny = pac_bayes(model, initial, data, 1e-7, stated=stated, basis={"0.weight": u[:, :2]}, draws=1)
        assert tiny.empirical == pytest.approx(
            float((projected(data[0]).argmax(1) != data[1]).double().mean())
        )


def test_what_a_basis_from_the_inputs_bounds() -> None:
    model, initial, data = trained(200, 0)
    u = {"0.weight": torch.linalg.qr(data[0].T @ data[0])[0][:, :2]}
    found = pac_bayes(model, initial, data, 0.2, stated=ALL | {"basis-inputs"}, basis=u)
    assert found.holds
    assert found.risk == "fixed inputs"
    assert "with fresh labels" in str(found)
    for stated in (ALL, ALL | {"basis-inputs", "basis-independent"}):
        assert pac_bayes(model, initial, data, 0.2, stated=stated, basis=u).bound is None


# Conditions.


@pytest.mark.parametrize("missing", sorted(ALL))
def test_nothing_is_claimed_that_was_not_stated(missing: str) -> None:
    model, initial, data = trained(200, 0)
    found = pac_bayes(model, initial, data, 0.2, stated=ALL - {missing}, draws=10)
    assert found.bound is None
    assert found.pinsker is None
    assert found.vacuous
    assert [c.name for c in found.conditions if not c.holds] == [missing]
    assert "no bound" in str(found)
    assert f"FAILS  {missing}" in str(found)


def test_batch_statistics_are_outside_the_divergence() -> None:
    """Running means learnt from the sample are in no KL: no bound."""
    initial = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model = copy.deepcopy(initial)
    data = sample(64, 0)
    assert pac_bayes(model, initial, data, 0.2, stated=ALL, draws=5).bound is not None
    model(data[0])
    found = pac_bayes(model, initial, data, 0.2, stated=ALL, draws=5)
    assert found.bound is None
    assert "1.running_mean" in str(found)


def test_frozen_parameters_must_not_have_moved() -> None:
    model, initial, data = trained(64, 0)
    model[0].weight.requires_grad_(False)
    found = pac_bayes(model, initial, data, 0.2, stated=ALL, draws=5)
    assert found.bound is None
    assert "0.weight" in str(found)


def test_small_samples() -> None:
    model, initial, data = trained(7, 0)
    assert pac_bayes(model, initial, data, 0.2, stated=ALL, draws=5).bound is None


def test_model_is_left_as_it_is_and_draws_repeat() -> None:
    model, initial, data = trained(64, 0)
    before = copy.deepcopy(model.state_dict())
    model.train()
    first, second = (pac_bayes(model, initial, data, 0.2, stated=ALL, draws=5) for _ in range(2))
    assert first == second
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert first != pac_bayes(model, initial, data, 0.2, stated=ALL, draws=5, seed=1)


def test_bfloat16() -> None:
    model, initial, data = trained(64, 0)
    low = pac_bayes(
        model.bfloat16(), initial.bfloat16(), (data[0].bfloat16(), data[1]), 0.2, stated=ALL, draws=5
    )
    assert low.kl > 0
    assert low.holds


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sigma": []}, "sigma must be above 0"),
        ({"sigma": -1.0}, "sigma must be above 0"),
        ({"sigma": float("nan")}, "sigma must be above 0"),
        ({"delta": 0.0}, "delta must be between"),
        ({"draws": 0}, "draws must be 1"),
        ({"loss": "squared"}, "'zero-one' or 'clipped'"),
        ({"stated": {"everything"}}, "stated must be some of iid"),
        ({"basis": {"0.bias": torch.eye(4)}}, "'0.bias'.*must be"),
        ({"basis": {"0.weight": torch.eye(3)}}, r"'0.weight' is \(3, 3\)"),
        ({"basis": {"0.weight": 2 * torch.eye(4)}}, "not orthonormal"),
        ({"initial": nn.Linear(3, 2)}, "one architecture"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    model, initial, data = trained(16, 0)
    given = {"model": model, "initial": initial, "data": data, "sigma": 0.1, "stated": ALL} | options
    with pytest.raises(OptionError, match=words):
        pac_bayes(**given)


@pytest.mark.parametrize("loss", ["zero-one", "clipped"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: (x, y[:, None]), r"labels are \(16, 1\), and must be \(16,\).*Give labels.flatten\(\)"),
        (lambda x, y: (x, y[:9]), r"labels are \(9,\), and must be \(16,\)"),
        (lambda x, y: (x[:0], y[:0]), "no examples"),
    ],
)
def test_samples_that_are_none(loss: str, change: Any, words: str) -> None:
    model, initial, data = trained(16, 0)
    with pytest.raises(OptionError, match=words):
        pac_bayes(model, initial, change(*data), 0.1, stated=ALL, draws=2, loss=loss)


def test_labels_that_are_no_classes_of_the_model() -> None:
    model, initial, (x, y) = trained(16, 0)
    for labels, words in ((y.float(), "whole class numbers"), (y + 1, "labels run from 1 to 2.*2 classes")):
        with pytest.raises(OptionError, match=words):
            pac_bayes(model, initial, (x, labels), 0.1, stated=ALL, draws=2, loss="clipped")
    single = nn.Linear(4, 1)
    with pytest.raises(OptionError, match=r"gives \(16, 1\) for 16 examples"):
        pac_bayes(single, copy.deepcopy(single), (x, y), 0.1, stated=ALL, draws=2)


def test_one_model_for_both_is_refused() -> None:
    """A forgotten copy would give a bound without any distance in it."""
    model = nn.Linear(4, 2)
    with pytest.raises(OptionError, match="are one object"):
        pac_bayes(model, model, sample(100, 0), 0.1, stated=ALL)

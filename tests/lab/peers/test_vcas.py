"""VCAS: unbiased at any keep ratio, with the variance that its equations predict, adapted in the right direction."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retrograde as rg
from cases import batch, conv, gradients, mlp, program, seeded, train
from retrograde.errors import OptionError
from retrograde.lab.peers import make
from retrograde.lab.peers.vcas import Vcas, keep_probabilities, sparsity

pytestmark = pytest.mark.filterwarnings("ignore:1000 backward passes")


def rule(layer: nn.Module) -> Any:
    return program(layer).rules[0]


def sampling(layer: nn.Module, keep: float, rows: float | None = None) -> None:
    """Set ρ and ν, and leave the measuring step that comes first."""
    found = rule(layer)
    found.measuring = False
    found.load_state_dict({"keep": keep, "keep_rows": 1.0 if rows is None else rows})


def uneven(shape: tuple[int, ...], seed: int) -> Tensor:
    """Examples of very different size."""
    return batch(shape, seed) * torch.logspace(-1.5, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))


@pytest.mark.parametrize("total", [0.5, 3.0, 7.3, 11.0])
def test_keep_probabilities(total: float) -> None:
    """min(1, c·norm) with the c that bisection finds; what is zero is never kept."""
    norms = torch.cat([uneven((12,), 1).abs(), torch.zeros(3)]).double()
    low, high = 0.0, 1e9
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if float((c * norms).clamp_max(1).sum()) < total else (low, c)
    torch.testing.assert_close(keep_probabilities(norms, total), (low * norms).clamp_max(1))
    assert keep_probabilities(norms, 12).tolist() == [1.0] * 12 + [0.0] * 3
    assert not keep_probabilities(torch.zeros(4), 2.0).any()


def test_sparsity() -> None:
    """The least share of examples with s of the sum of norms."""
    norms = torch.tensor([1.0, 4.0, 2.0, 3.0])
    assert [sparsity(norms, s) for s in (0.0, 0.39, 0.5, 0.71, 0.95, 1.0)] == [
        0.25,
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
    ]


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (8, 4), (8, 3)),
    "sequence": (lambda: nn.Linear(4, 3), (8, 5, 4), (8, 5, 3)),
    "convolution": (conv(2, 2, 4, 3, groups=2, padding=1), (8, 2, 4, 4), (8, 4, 4, 4)),
}


@pytest.mark.parametrize("kind", CASES)
def test_measured_variances(kind: str) -> None:
    """V_s is B times the unbiased variance of single examples' gradients; V_act follows from them and p."""
    make_layer, x_shape, shape = CASES[kind]
    layer, x, delta = seeded(make_layer), batch(x_shape), uneven(shape, 2)
    singles = []
    for i in range(8):
        layer.zero_grad()
        layer(x[i : i + 1]).backward(delta[i : i + 1])
        singles.append(layer.weight.grad.double().flatten())
    single = torch.stack(singles)
    _session = rg.attach(layer, Vcas())
    sampling(layer, 0.4)
    rule(layer).measuring = True
    layer.zero_grad()
    layer(x).backward(delta)
    torch.testing.assert_close(layer.weight.grad.double().flatten(), single.sum(0), rtol=1e-4, atol=1e-5)
    p = keep_probabilities(delta.flatten(1).norm(dim=1), 0.4 * 8)
    assert rule(layer).own == pytest.approx(8 * float(single.var(0).sum()), rel=1e-4)
    assert rule(layer).added == pytest.approx(float(((1 / p - 1) * single.square().sum(1)).sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "keep", "rows"),
    [
        ("linear", 0.4, 1.0),
        ("linear", 1.0, 0.5),
        ("linear", 0.6, 0.6),
        ("sequence", 0.5, 0.5),
        ("convolution", 0.5, 1),
    ],
)
def test_unbiased_with_the_predicted_variance(kind: str, keep: float, rows: float) -> None:
    """Mean of the draws within 4.5 standard errors of the exact dW and dx; spread of dW as (4) or (5) say."""
    make_layer, x_shape, shape = CASES[kind]
    layer, delta, draws = seeded(make_layer), uneven(shape, 2), 400
    x = batch(x_shape).requires_grad_()
    layer(x).backward(delta)
    exact = {"weight": layer.weight.grad.clone(), "x": x.grad.clone(), "bias": layer.bias.grad.clone()}
    session = rg.attach(layer, Vcas(), seed=5)
    sampling(layer, keep, rows)
    found: dict[str, list[Tensor]] = {name: [] for name in exact}
    for _ in range(draws):
        layer.zero_grad()
        x.grad = None
        layer(x).backward(delta)
        for name, value in (("weight", layer.weight.grad), ("x", x.grad), ("bias", layer.bias.grad)):
            found[name].append(value.double())
    torch.testing.assert_close(found["bias"][0].float(), exact["bias"])
    for name in ("weight", "x"):
        drawn = torch.stack(found[name])
        error = drawn.std(0) / draws**0.5
        assert bool(((drawn.mean(0) - exact[name]).abs() <= 4.5 * error + 1e-5).all()), name
    weights = torch.stack(found["weight"])
    assert float(weights.std(0).max()) > 0
    norms = delta.flatten(1).norm(dim=1)
    if rows == 1.0 and kind == "linear":
        p = keep_probabilities(norms, keep * 8)
        expected = ((1 / p - 1) * (norms * x.detach().norm(dim=1)) ** 2).sum()
        assert float(weights.var(0).sum()) == pytest.approx(float(expected), rel=0.2)
    if keep == 1.0:
        leverage = norms * x.detach().norm(dim=1)
        q = keep_probabilities(leverage, rows * 8)
        assert float(weights.var(0).sum()) == pytest.approx(float(((1 / q - 1) * leverage**2).sum()), rel=0.2)
    figures = session.metrics()["layers"]["(root)"]
    if keep < 1:
        assert figures["zeros"] == pytest.approx(1 - keep, abs=0.03)


def test_counted_work() -> None:
    """dx needs ρ of the dense product, dW ρν of it, and executes no more rows than it keeps."""
    layer, x, delta, draws = nn.Linear(4, 3), batch((64, 4)).requires_grad_(), batch((64, 3), 2), 60
    session = rg.attach(layer, Vcas())
    sampling(layer, 0.5, 0.5)
    for _ in range(draws):
        layer(x).backward(delta)
    flops = session.summary().flops
    assert flops.input_grad.needed / flops.input_grad.dense == pytest.approx(0.5, abs=0.03)
    assert flops.weight_grad.needed / flops.weight_grad.dense == pytest.approx(0.25, abs=0.03)
    assert flops.weight_grad.executed == pytest.approx(flops.weight_grad.needed)


@pytest.mark.parametrize("every", [4, 5])
def test_counts_are_of_all_steps(every: int) -> None:
    """Exact measuring steps are no more of the figures than of the steps, however they fall in with the sampling."""
    model = seeded(mlp)
    session = rg.attach(model, Vcas(tau=0.0, every=every), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for layer in (model[0], model[2], model[4]):
        rule(layer).norms = None
    train(model, optimizer, (32, 8), 1)
    session.metrics(reset=True)
    shares = []
    for step in range(1, 81):
        for layer in (model[0], model[2], model[4]):
            rule(layer).keep = 0.25
        train(model, optimizer, (32, 8), 1, first=step)
        shares.append(0.0 if step % every == 0 else 0.75)
    assert session.metrics()["layers"]["4"]["zeros"] == pytest.approx(sum(shares) / len(shares), abs=0.03)


def test_nothing_sampled_at_first() -> None:
    """ρ = ν = 1: exact, to the bit."""
    plain, model = seeded(mlp), seeded(mlp)
    _session = rg.attach(model, Vcas())
    expected, found = gradients(plain, batch((16, 8))), gradients(model, batch((16, 8)))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def trained(tau: float, steps: int = 40) -> tuple[dict[str, dict[str, float]], float]:
    model = seeded(mlp)
    session = rg.attach(model, Vcas(tau=tau, every=2, alpha=0.05, beta=0.9), seed=0)
    train(model, torch.optim.SGD(model.parameters(), lr=1e-3), (32, 8), steps)
    metrics = session.metrics()
    return metrics["layers"], metrics["vcas"]["s"]


def test_tau_rules_the_keep_ratios() -> None:
    """More allowed variance keeps less, in both samplings; none keeps all. ρ does not fall towards the output."""
    (none, s_none), (some, s_some), (much, s_much) = trained(0.0), trained(0.2), trained(2.0)
    assert all(layer["keep"] == layer["keep_rows"] == 1 for layer in none.values())
    assert s_none == 1 > s_some > s_much
    for name in none:
        assert none[name]["keep"] > some[name]["keep"] > much[name]["keep"]
        assert none[name]["keep_rows"] > some[name]["keep_rows"] > much[name]["keep_rows"]
    for layers in (some, much):
        keeps = [layer["keep"] for layer in layers.values()]
        assert keeps == sorted(keeps)


def test_resume() -> None:
    """A resumed run goes on bit for bit, between two measurements."""

    def start() -> tuple[nn.Module, rg.Session, torch.optim.Optimizer]:
        model = seeded(mlp)
        session = rg.attach(model, Vcas(tau=1.0, every=3, alpha=0.1, beta=0.7), seed=1)
        return model, session, torch.optim.SGD(model.parameters(), lr=0.1)

    model, session, optimizer = start()
    train(model, optimizer, (32, 8), 20)
    saved = copy.deepcopy((model.state_dict(), session.state_dict()))
    train(model, optimizer, (32, 8), 8, first=20)
    resumed, session, optimizer = start()
    resumed.load_state_dict(saved[0])
    session.load_state_dict(saved[1])
    train(resumed, optimizer, (32, 8), 8, first=20)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_not_finite() -> None:
    """Passed on whole and counted."""
    layer, delta = nn.Linear(3, 5), batch((4, 5), 3)
    session = rg.attach(layer, Vcas())
    sampling(layer, 0.5, 0.5)
    delta[1, 2] = torch.nan
    layer(batch((4, 3))).backward(delta)
    assert bool(layer.weight.grad[2].isnan().all())
    torch.testing.assert_close(layer.weight.grad[0], (delta.T @ batch((4, 3)))[0])
    assert session.metrics()["layers"]["(root)"]["fallbacks"] == 1


@pytest.mark.parametrize("shape", [(0, 4), (4,), (1, 4), (6, 4)], ids=["empty", "single", "one", "zeros"])
def test_nothing_to_sample(shape: tuple[int, ...]) -> None:
    """No batch, or a δ of zeros: as plain autograd has it."""
    plain, layer = seeded(lambda: nn.Linear(4, 3)), seeded(lambda: nn.Linear(4, 3))
    _session = rg.attach(layer, Vcas())
    sampling(layer, 0.5, 0.5)
    delta = torch.zeros(6, 3) if len(shape) > 1 and shape[0] == 6 else batch((*shape[:-1], 3), 2)
    for each in (plain, layer):
        for _ in range(20):
            each(batch(shape)).backward(delta)
    if shape == (1, 4):  # one example: (1) leaves it, (2) cannot
        assert not torch.equal(layer.weight.grad, plain.weight.grad)
    else:
        torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


def test_options() -> None:
    """By name, and refused."""
    assert make("vcas", {"tau": 0.1}) == Vcas(0.1)
    for bad in ({"tau": -1}, {"every": 0}, {"alpha": 0}, {"beta": 1}):
        with pytest.raises(OptionError, match=next(iter(bad))):
            make("vcas", bad)

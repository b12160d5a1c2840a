"""Spectral backpropagation on real layers: what it computes, keeps, moves along and saves."""

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import retrograde as rg
from cases import (
    Turned,
    assert_bitwise,
    assert_same,
    batch,
    conv,
    gradients,
    in_two_ranks,
    program,
    seeded,
    train,
    transposed,
)
from retrograde.accounting.memory import saved_bytes
from retrograde.errors import AttachError, NoEffectError, OptionError, RetrogradeWarning
from retrograde.maths import spectral
from retrograde.methods.spectral import Spectral, sketch

Make = Callable[[], nn.Module]
ALWAYS = partial(Spectral, rank=3, warmup=0, residual="none", every=2, skip_head=False)
"""Projects from the second step on."""
UNBIASED = partial(Spectral, rank=3, residual="unbiased", every=3, skip_head=False)
"""Keeps a sketch in every step: one direction and two channels."""


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1, groups=2),
        nn.Flatten(),
        nn.Linear(128, 4),
    )


MODELS: dict[str, tuple[Make, tuple[int, ...]]] = {"mlp": (net, (16, 8)), "cnn": (convolutions, (6, 3, 8, 8))}


def rule(layer: nn.Module) -> Any:
    return program(layer).rules[-1]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def projected(layer: nn.Module, gradient: Tensor) -> Tensor:
    """``G U Uᵀ`` by the basis that the layer's rule has now."""
    map = program(layer).map
    basis = next(r for r in program(layer).rules if hasattr(r, "projecting"))._inputs.basis
    return map.from_matrix(spectral.project_rows(map.matrix(gradient), basis), gradient.shape)


def projecting(make: Make, shape: tuple[int, ...], method: rg.Method, steps: int = 2) -> nn.Module:
    """An attached model, trained until it projects."""
    model = seeded(make)
    session = rg.attach(model, method, seed=1)
    train(model, sgd(model), shape, steps)
    model.session = session  # type: ignore[assignment]
    return model


LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (partial(nn.Linear, 9, 5), (7, 9)),
    "linear_3d": (partial(nn.Linear, 9, 5, bias=False), (3, 4, 9)),
    "linear_1d": (partial(nn.Linear, 9, 5), (9,)),
    "turned": (partial(Turned, 9, 5), (7, 9)),
    "turned_3d": (partial(Turned, 9, 5), (3, 4, 9)),
    "conv1d": (conv(1, 4, 8, 3, stride=2, padding=1), (3, 4, 11)),
    "conv1d_dilation": (conv(1, 4, 8, 3, dilation=2, padding=2, groups=2), (3, 4, 11)),
    "conv2d": (conv(2, 4, 8, 3, padding=1), (3, 4, 7, 8)),
    "conv2d_mixed": (conv(2, 4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (3, 4, 7, 8)),
    "conv2d_groups": (conv(2, 4, 6, 3, stride=2, padding=2, groups=2), (3, 4, 7, 8)),
    "conv2d_same": (conv(2, 4, 6, 4, padding="same"), (3, 4, 7, 8)),
    "conv2d_circular": (conv(2, 4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 7, 8)),
    "conv2d_unbatched": (conv(2, 4, 6, 3, padding=1), (4, 7, 8)),
    "conv3d": (conv(3, 2, 4, 3, stride=(1, 2, 1), padding=1, dilation=(1, 1, 2)), (2, 2, 5, 6, 7)),
    "transposed1d": (transposed(1, 4, 6, 3, stride=2), (3, 4, 9)),
    "transposed2d_groups": (transposed(2, 8, 6, 3, stride=2, padding=1, groups=2), (3, 8, 5, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_product_is_the_projected_gradient(name: str) -> None:
    """(δᵀ(x̂U))Uᵀ from what was kept is GUUᵀ of autograd's G; dx and db are autograd's own."""
    make, shape = LAYERS[name]
    layer = projecting(make, shape, ALWAYS())
    plain = seeded(make)
    plain.load_state_dict(layer.state_dict())
    assert rule(layer).projecting
    expected = gradients(plain, batch(shape, seed=50))
    whole = expected["weight"]
    expected["weight"] = projected(layer, whole)
    found = gradients(layer, batch(shape, seed=50))
    assert_same(found, expected, 1e-5)
    # Something was left out, or the comparison would be one of G with itself.
    assert (whole - expected["weight"]).norm() > 1e-3 * whole.norm()


COMPUTED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "old_weight_norm": partial(nn.utils.weight_norm, dim=None),
    "pruned": partial(prune.l1_unstructured, name="weight", amount=0.3),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("wrap", COMPUTED)
def test_computed_weights(wrap: str) -> None:
    """The gradient of what is multiplied is projected, and what computes it gets that by the chain rule."""

    def make() -> nn.Module:
        return COMPUTED[wrap](nn.Linear(9, 5))

    layer, plain, x = projecting(make, (7, 9), ALWAYS()), seeded(make), batch((7, 9), seed=50)
    plain.load_state_dict(layer.state_dict())
    assert rule(layer).projecting
    found = gradients(layer, x)
    with parametrize.cached():
        z, weight = plain(x), plain.weight
    ramp = torch.linspace(-1.0, 1.0, z.numel()).reshape(z.shape)
    (whole,) = torch.autograd.grad((torch.sin(z) * ramp).sum(), weight, retain_graph=True)
    own = {name: p for name, p in plain.named_parameters() if name != "bias"}
    for direction, same in ((projected(layer, whole), True), (whole, False)):
        through = torch.autograd.grad(weight, list(own.values()), direction, retain_graph=True)
        close = [torch.allclose(found[name], g, atol=1e-5) for name, g in zip(own, through, strict=True)]
        assert all(close) == same


@pytest.mark.parametrize("name", ["linear", "turned", "conv2d", "conv2d_groups", "transposed2d_groups"])
def test_gradient_error_within_the_bound(name: str) -> None:
    """On the rows that the basis comes from, group by group, the error is within equation (3)."""
    make, shape = LAYERS[name]
    layer = seeded(make)
    _session = rg.attach(layer, ALWAYS(every=1000))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    x = batch(shape)
    layer(x).square().sum().backward()
    whole = layer.weight.grad.clone()
    optimizer.step()
    assert rule(layer).projecting
    optimizer.zero_grad()
    z = layer(x)
    z.retain_grad()
    z.square().sum().backward()
    map, rows = program(layer).map, program(layer).statistics.rows
    error = map.matrix(layer.weight.grad - whole)
    assert torch.linalg.matrix_norm(error).max() > 0
    for group, e in enumerate(error):
        values = torch.linalg.eigvalsh(rows[group].T @ rows[group]).flip(0)
        # D as the bound wants it solves DᵀX = G row by row; its norm is at least that of the δ which autograd saw.
        d = torch.linalg.lstsq(rows[group].T, map.matrix(whole)[group].T).solution
        norm = torch.linalg.matrix_norm(e)
        assert norm <= spectral.error_bound(d, values, 3) * (1 + 1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "method",
    [
        Spectral(2, warmup=100),
        Spectral(2, warmup=1, residual="full-step", full_every=2, every=1),
        Spectral(8, warmup=0, residual="none", every=1, rows=64),
    ],
    ids=["warmup", "full-steps", "rank-d"],
)
def test_neutral(name: str, method: Spectral) -> None:
    """Warm-up, full steps and a whole basis give autograd's gradients."""
    make, shape = MODELS[name]
    if method.rank == 8:
        make, shape = (
            (lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))),
            (
                16,
                8,
            ),
        )
    model = seeded(make)
    _session = rg.attach(model, method)
    train(model, sgd(model), shape, 2)
    assert rule(model[0]).projecting == (method.rank == 8)
    plain = seeded(make)
    plain.load_state_dict(model.state_dict())
    assert_same(gradients(model, batch(shape)), gradients(plain, batch(shape)), 1e-6)


def test_head_is_trained_in_full() -> None:
    """The last linear-like layer keeps its exact gradient, unless it was attached alone."""
    model = projecting(net, (16, 8), ALWAYS(skip_head=True))
    assert [rule(model[i]).projecting for i in (0, 2)] == [True, True]
    assert type(model[4]) is nn.Linear
    plain = seeded(net)
    plain.load_state_dict(model.state_dict())
    found, expected = gradients(model, batch((16, 8))), gradients(plain, batch((16, 8)))
    assert_same({"g": found["4.weight"]}, {"g": expected["4.weight"]})
    assert not torch.allclose(found["2.weight"], expected["2.weight"], rtol=1e-3)
    alone = seeded(net)
    _session = rg.attach(alone, ALWAYS(skip_head=True), only="4")
    train(alone, sgd(alone), (16, 8), 2)
    assert rule(alone[4]).projecting


def test_cadence() -> None:
    """Warm-up, then a full step in every m; statistics at their own."""
    model = seeded(net)
    _session = rg.attach(model, Spectral(3, warmup=5, full_every=3, every=2))
    optimizer, seen = sgd(model), []
    for step in range(14):
        seen.append(rule(model[0]).projecting)
        train(model, optimizer, (16, 8), 1, first=step)
    assert [i for i, projects in enumerate(seen) if not projects] == [0, 1, 2, 3, 4, 7, 10, 13]


def test_saved_bytes_fall_as_rank_over_width() -> None:
    """n·k numbers instead of n·d; the basis, d·k, is state of the layer and no part of a batch."""
    n, d, k = 512, 64, 4

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(d, d), nn.Identity())

    model = projecting(
        make, (n, d), Spectral(k, warmup=0, residual="none", every=100, rows=512, skip_head=False)
    )
    x = batch((n, d))
    plain = seeded(make)
    assert saved_bytes(plain, lambda: plain(x)) == 4 * n * d
    assert saved_bytes(model, lambda: model(x)) == 4 * n * k + 4 * d * k
    gradients(model, x)
    assert model.session.metrics()["layers"]["0"]["saved_bytes_fraction"] == k / d


def test_saved_bytes_of_a_convolution() -> None:
    """N·k·H'·W' numbers instead of N·C·H·W."""
    shape = (16, 16, 10, 10)
    model = projecting(conv(2, 16, 8, 3, padding=1), shape, ALWAYS(rank=4, every=100))
    x = batch(shape)
    assert saved_bytes(model, lambda: model(x)) == 4 * 16 * 4 * 100 + 4 * (16 * 9) * 4


def test_flops() -> None:
    """A projected product costs 2nko in place of 2ndo; narrowing, widening and refreshes are the method's own."""
    n, d, o, k = 64, 32, 24, 4
    model = projecting(partial(nn.Linear, d, o), (n, d), ALWAYS(rank=k, every=100))
    before = model.session.flops()
    # Five iterations from cold and the eigenpairs: C Q six times, at 4ndk, and QR at 6dk². Mean and variance: 4nd.
    refresh = 6 * (4 * n * d * k + 6 * d * k * k) + 4 * n * d
    # The second of the two steps projected: x U, and the product by Uᵀ.
    assert before.overhead == refresh + 2 * n * d * k + 2 * k * d * o
    gradients(model, batch((n, d)))
    after = model.session.flops()
    assert after.weight_grad.dense - before.weight_grad.dense == 2 * n * d * o
    assert after.weight_grad.executed - before.weight_grad.executed == 2 * n * k * o
    assert after.weight_grad.needed - before.weight_grad.needed == 2 * n * k * o
    assert after.overhead - before.overhead == 2 * n * d * k + 2 * k * d * o
    assert after.input_grad.executed - before.input_grad.executed == 2 * n * d * o


COSTS: dict[str, tuple[int, int, int]] = {
    # Of the product with δ, of x U and of the product by Uᵀ, each 2 for a multiply-add, at rank 3.
    "turned": (2 * 7 * 5 * 3, 2 * 7 * 9 * 3, 2 * 9 * 5 * 3),
    # 6 positions; patches of 12; 8 outputs.
    "conv1d": (2 * 3 * 6 * 8 * 3, 2 * 3 * 6 * 12 * 3, 2 * 8 * 12 * 3),
    # 5 × 5 positions; two groups of patches of 18 and of 3 outputs.
    "conv2d_groups": (2 * 3 * 25 * 6 * 3, 2 * 3 * 25 * 2 * 18 * 3, 2 * 6 * 18 * 3),
    # 5 × 6 pixels; two groups of 4 inputs and of 3 outputs at 9 places.
    "transposed2d_groups": (2 * 3 * 30 * 6 * 9 * 3, 2 * 3 * 30 * 8 * 3, 2 * 8 * 3 * 9 * 3),
}


@pytest.mark.parametrize("name", COSTS)
def test_flops_of_other_layers(name: str) -> None:
    """The factor alone is the layer's product; what makes and widens it is the method's own."""
    make, shape = LAYERS[name]
    layer = projecting(make, shape, ALWAYS(every=1000))
    before = layer.session.flops()
    gradients(layer, batch(shape))
    after = layer.session.flops()
    factor, narrowing, widening = COSTS[name]
    assert after.weight_grad.executed - before.weight_grad.executed == factor
    assert after.weight_grad.discounted - before.weight_grad.discounted == factor
    assert after.overhead - before.overhead == narrowing + widening
    dense = after.weight_grad.dense - before.weight_grad.dense
    assert dense == after.forward.dense - before.forward.dense > factor


@pytest.mark.parametrize("make_optimizer", [sgd, adam])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_compiled(
    name: str, unbiased: bool, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    """Eager and compiled end in the same weights, through warm-up, projected and full steps; few graphs."""
    make, shape = MODELS[name]
    options: dict[str, Any] = {"rank": 3, "full_every": 3}
    if unbiased:
        options = {"residual": "unbiased", "rank": 2, "random": 1}
    torch._dynamo.reset()
    ends = []
    for fast in (False, True):
        model = seeded(make)
        _session = rg.attach(model, Spectral(warmup=2, every=2, **options), seed=1)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        run: Any = torch.compile(model, fullgraph=True, backend=counter) if fast else model
        train(run, make_optimizer(model), shape, 12)
        assert rule(model[0])._inputs.rank == options["rank"] - options.get("random", 0)
        ends.append(model.state_dict())
    # Rows sampled or not, projected or not: by step, never more.
    assert 2 <= counter.frame_count <= 4
    torch._dynamo.reset()
    assert_same(ends[1], ends[0], 1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", [ALWAYS(), UNBIASED(rank=2)], ids=["projected", "unbiased"])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing(name: str, method: Spectral, reentrant: bool) -> None:
    """Bit for bit, though forward runs twice."""
    make, shape = MODELS[name]
    one, two = (projecting(make, shape, method) for _ in range(2))
    x = batch(shape)

    def run(y: Tensor) -> Tensor:
        return checkpoint(two, y, use_reentrant=reentrant)

    assert rule(one[0]).projecting
    assert_bitwise(gradients(two, x, run), gradients(one, x))


@pytest.mark.parametrize(
    "method", [ALWAYS(), ALWAYS(side="both", decay=1e-2), UNBIASED()], ids=["input", "both", "unbiased"]
)
def test_accumulation(method: Spectral) -> None:
    """Two half batches give the gradient of the whole one, and train alike."""
    model = projecting(net, (16, 8), method)
    x = batch((16, 8))
    model.zero_grad()
    torch.sin(model(x)).sum().backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for part in x.chunk(2):
        torch.sin(model(part)).sum().backward()
    assert_same({n: p.grad for n, p in model.named_parameters()}, whole, 1e-5)


def test_autocast() -> None:
    """bfloat16 activations are projected in bfloat16; gradients are float32 and near the exact projection."""
    model = projecting(net, (64, 8), ALWAYS())

    def run(y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(y).float()

    exact, found = gradients(model, batch((64, 8))), gradients(model, batch((64, 8)), run)
    assert_same(found, exact, 0.05)
    assert not torch.equal(found["2.weight"], exact["2.weight"])


@pytest.mark.parametrize("make_optimizer", [sgd, adam])
@pytest.mark.parametrize(
    "method",
    [
        Spectral(None, warmup=3, full_every=3, every=2, residual="scaled", decay=1e-2),
        ALWAYS(update="lie", random=1, side="both"),
        ALWAYS(basis="random"),
        UNBIASED(every=2),
    ],
    ids=["scaled", "lie", "random", "unbiased"],
)
def test_resumed_is_uninterrupted(
    method: Spectral, make_optimizer: Callable[[nn.Module], Any], tmp_path: Path
) -> None:
    """Interrupted between any two steps, through a file: the same bits."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4))

    def fresh() -> tuple[nn.Module, rg.Session, Any]:
        model = seeded(make)
        session = rg.attach(model, method, seed=4)
        return model, session, make_optimizer(model)

    model, session, optimizer = fresh()
    train(model, optimizer, (16, 16), 9)
    assert rule(model[0])._inputs.basis is not None
    for cut in (1, 4, 6):
        one, first, opt = fresh()
        train(one, opt, (16, 16), cut)
        torch.save([one.state_dict(), opt.state_dict(), first.state_dict()], tmp_path / "state.pt")
        two, second, opt = fresh()
        parts = torch.load(tmp_path / "state.pt", weights_only=True)
        for part, state in zip((two, opt, second), parts, strict=True):
            part.load_state_dict(state)
        train(two, opt, (16, 16), 9 - cut, first=cut)
        assert_bitwise(two.state_dict(), model.state_dict())
        assert second.metrics() == session.metrics()


@pytest.mark.parametrize("make_optimizer", [sgd, adam])
def test_moments_at_a_refresh(make_optimizer: Callable[[nn.Module], Any]) -> None:
    """Momentum moves along with the basis; Adam's moments, which only mean something together, both stay."""
    for name in ("momentum_buffer",) if make_optimizer is sgd else ("exp_avg", "exp_avg_sq"):
        model = seeded(net)
        _session = rg.attach(model, ALWAYS(every=2), seed=1)
        optimizer = make_optimizer(model)
        train(model, optimizer, (16, 8), 2)
        layer, before = model[2], rule(model[2])._inputs.basis
        twin = copy.deepcopy(model)
        twin_optimizer = make_optimizer(twin)
        twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        x = batch((16, 8), seed=102)
        optimizer.zero_grad()
        torch.sin(model(x)).square().mean().backward()
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.grad = mine.grad.clone()
        optimizer.step()
        twin_optimizer.step()
        after = rule(layer)._inputs.basis
        assert after is not before
        state, plain = optimizer.state[layer.weight], twin_optimizer.state[twin[2].weight]
        moved = spectral.reexpress(plain[name][None], before, after)[0]
        assert not torch.allclose(moved, plain[name], rtol=1e-3)
        expected = moved if name == "momentum_buffer" else plain[name]
        torch.testing.assert_close(state[name], expected)


def test_adam_on_inputs_that_are_nearly_always_zero() -> None:
    """A refresh moves no moment into entries whose second moments are tiny: no weight leaps."""
    layer = nn.Linear(64, 16)
    _session = rg.attach(layer, Spectral(warmup=1000, every=20), seed=1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    for step in range(60):
        torch.manual_seed(step)
        x = torch.randn(32, 64)
        # In one step of twenty, those of the refreshes, they vary with the others, and little.
        x[:, 32:] = 1e-3 * x[:, :32] if step % 20 == 0 and step else 0.0
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        (layer(x) - torch.sin(x[:, :16])).square().mean().backward()
        optimizer.step()
        leap = (layer.weight.detach() - before).abs().max()
        # Adam's own bound, (1 − β₁)/√(1 − β₂), which takes a gradient that was zero before.
        assert leap < 3.3e-3


def test_momentum_stays_in_the_subspace() -> None:
    """Without full steps, and but for the first step, all of momentum and its updates lies in span(U)."""
    model = seeded(net)
    _session = rg.attach(model, ALWAYS(every=3), seed=1)
    optimizer = sgd(model)
    train(model, optimizer, (16, 8), 1)
    optimizer.state[model[2].weight]["momentum_buffer"].zero_()
    train(model, optimizer, (16, 8), 8, first=1)
    m, u = optimizer.state[model[2].weight]["momentum_buffer"], rule(model[2])._inputs.basis[0]
    torch.testing.assert_close(spectral.project_rows(m, u), m)


@pytest.mark.parametrize("update", ["qr", "lie"])
def test_basis_is_of_the_inputs_second_moment(update: str) -> None:
    """On inputs with four directions of note both updates find them, the mean among them."""
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(24, 24))[0]
    scales = torch.cat((torch.tensor([5.0, 4.0, 3.0, 2.0]), torch.full((20,), 0.1)))
    layer = nn.Linear(24, 8)
    session = rg.attach(layer, Spectral(4, update=update, warmup=0, residual="none", every=1, rows=64))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
    for _ in range(60):
        optimizer.zero_grad()
        x = torch.randn(64, 24) * scales
        x[:, 0] = 5.0
        layer(x @ turn.T).square().mean().backward()
        optimizer.step()
    assert spectral.drift(turn[None, :, :4], rule(layer)._inputs.basis) < 0.05
    (figures,) = session.metrics()["layers"].values()
    assert figures["lambda_1"] == pytest.approx(25, rel=0.02)
    # Σλ = 25 + 16 + 9 + 4 + 20 · 0.01, Σλ² = 625 + 256 + 81 + 16
    assert figures["effective_rank"] == pytest.approx(54.2**2 / 978, rel=0.15)
    assert figures["rank"] == 4
    assert spectral.orthonormality(rule(layer)._inputs.basis) <= 1e-6


def test_automatic_rank() -> None:
    """The smallest rank that holds the energy, at most a fourth of the inputs; fixed after warm-up."""
    layer = nn.Linear(32, 8)
    _session = rg.attach(layer, Spectral(warmup=3, every=1, energy=0.9))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    ranks = []
    for step in range(6):
        optimizer.zero_grad()
        scales = torch.cat((torch.tensor([3.0, 2.0]), torch.full((30,), 0.1))) if step < 4 else torch.ones(32)
        layer(torch.randn(64, 32) * scales).square().mean().backward()
        optimizer.step()
        ranks.append(rule(layer)._inputs.rank)
    assert ranks == [8, 8, 2, 2, 2, 2]


def test_captured_energy() -> None:
    """Measured on full steps: ‖GU‖²/‖G‖²."""
    model = seeded(net)
    session = rg.attach(model, Spectral(3, warmup=2, residual="full-step", every=100))
    optimizer = sgd(model)
    train(model, optimizer, (16, 8), 1)
    assert "captured_energy" not in session.metrics()["layers"]["2"]
    basis = rule(model[2])._inputs.basis[0]
    train(model, optimizer, (16, 8), 1, first=1)
    g = model[2].weight.grad
    expected = float((g @ basis).square().sum() / g.square().sum())
    assert session.metrics()["layers"]["2"]["captured_energy"] == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < 1


def test_output_side() -> None:
    """V(VᵀG), V leading E[zzᵀ] with z = Wx."""
    model = seeded(net)
    _session = rg.attach(model, ALWAYS(rank=8, side="output", every=100, rows=64), seed=1)
    x = batch((16, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        z = model[1](model[0](x)) @ model[2].weight.T
    torch.sin(model(x)).sum().backward()
    whole = model[2].weight.grad.clone()
    weight = model[2].weight.detach().clone()
    # A step without movement, or z would be another.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    _, vectors = torch.linalg.eigh(z.T @ z)
    v = vectors[:, -8:]
    assert spectral.drift(v[None], rule(model[2])._outputs.basis) < 1e-4
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.zero_grad()
    torch.sin(model(x)).sum().backward()
    torch.testing.assert_close(model[2].weight.grad, v @ (v.T @ whole), rtol=1e-3, atol=1e-5)
    optimizer.step()
    torch.testing.assert_close(
        model[2].weight.detach(), weight - 0.1 * v @ (v.T @ whole), rtol=1e-3, atol=1e-5
    )


def test_scaled_residual() -> None:
    """On full steps the part outside the subspace counts s-fold."""
    model = seeded(net)
    _session = rg.attach(model, Spectral(3, warmup=0, residual="scaled", full_every=2, every=100), seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, (16, 8), 1)
    weight, basis = model[2].weight.detach().clone(), rule(model[2])._inputs.basis[0]
    values = rule(model[2])._inputs.eigenvalues[0]
    scale = min(2.0, float(values[0] / values[-1]))
    assert scale == 2.0
    x = batch((16, 8), seed=101)
    plain = seeded(net)
    plain.load_state_dict(model.state_dict())
    torch.sin(plain(x)).square().mean().backward()
    g = plain[2].weight.grad
    train(model, optimizer, (16, 8), 1, first=1)
    expected = weight - 0.1 * (g + (scale - 1) * (g - spectral.project_rows(g, basis)))
    torch.testing.assert_close(model[2].weight.detach(), expected)


class Shared(nn.Module):
    """A head whose weight is used once more, by an embedding or by the bare function."""

    def __init__(self, *, embedded: bool) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.head.weight = self.embedding.weight
        if not embedded:
            del self.embedding

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        h = F.embedding(ids, self.head.weight)
        return h, self.head(h.detach())


@pytest.mark.parametrize("embedded", [True, False])
@pytest.mark.parametrize("options", [{}, {"side": "output"}, {"residual": "full-step", "basis": "bulk"}])
def test_a_shared_weight(options: dict[str, Any], embedded: bool) -> None:
    """Only the layer's own gradient is projected and scaled; what others add to ``weight.grad`` stays."""
    model = Shared(embedded=embedded)
    method = Spectral(3, warmup=1, every=2, skip_head=False, **options)
    _session = rg.attach(model, method, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.0 if not embedded else 0.9)
    moments = torch.zeros(20, 16)
    for step in range(8):
        torch.manual_seed(step)
        h, z = model(torch.randint(20, (32,)))
        loss = torch.sin(h).mean()
        (wanted,) = torch.autograd.grad(loss, model.head.weight, retain_graph=True)
        (loss + 0 * z.square().mean()).backward()
        torch.testing.assert_close(model.head.weight.grad, wanted)
        before = model.head.weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        moments = (0.9 * moments if embedded else 0) + wanted
        torch.testing.assert_close(before - model.head.weight.detach(), 0.1 * moments, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("basis", ["top", "random", "bulk"])
def test_ablations_confine_the_weights(basis: str) -> None:
    """Without residual every weight moves in span(U), or for the bulk outside it, and nowhere else."""
    model = projecting(net, (16, 8), ALWAYS(basis=basis, every=1000))
    before = model[2].weight.detach().clone()
    u = rule(model[2])._inputs.basis[0]
    leading = rule(model[2])._inputs._leading[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, (16, 8), 3, first=2)
    moved = model[2].weight.detach() - before
    inside = spectral.project_rows(moved, u)
    assert moved.norm() > 0
    assert (inside if basis == "bulk" else moved - inside).norm() < 1e-4 * moved.norm()
    assert (float(spectral.drift(u[None], leading[None])) > 0.5) == (basis == "random")


def test_some_random_directions() -> None:
    """Top and random together are orthonormal; the random ones change with each refresh."""
    model = projecting(net, (16, 8), ALWAYS(random=1, every=2))
    u = rule(model[2])._inputs.basis
    assert spectral.orthonormality(u) < 1e-6
    torch.testing.assert_close(u[..., :2], rule(model[2])._inputs._leading[..., :2])
    train(model, sgd(model), (16, 8), 2, first=2)
    assert (u[..., 2] * rule(model[2])._inputs.basis[..., 2]).sum().abs() < 0.9


def test_decay() -> None:
    """W ← W − η β λ₁ e₁e₁ᵀW, beside the optimizer's own step."""
    model = seeded(net)
    _session = rg.attach(model, Spectral(3, warmup=100, decay=0.5, every=100), seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, (16, 8), 1)
    outputs = rule(model[2])._outputs
    value, e = outputs.eigenvalues[0, 0], outputs._leading[0, :, 0]
    before = model[2].weight.detach().clone()
    optimizer.zero_grad()
    torch.sin(model(batch((16, 8)))).square().mean().backward()
    stepped = before - 0.1 * model[2].weight.grad
    optimizer.step()
    expected = stepped - 0.1 * 0.5 * value * torch.outer(e, e @ stepped)
    torch.testing.assert_close(model[2].weight.detach(), expected)
    assert (expected - stepped).norm() > 1e-4


def test_together_with_dither() -> None:
    """Levels of δ̃ are projected with their step: the product of both is (δ̃ᵀ(x̂U))Uᵀ."""
    for make, shape in (MODELS["mlp"], MODELS["cnn"]):
        both, alone = seeded(make), seeded(make)
        sessions = [
            rg.attach(both, [ALWAYS(), rg.Dither(scale=2)], seed=1),
            rg.attach(alone, rg.Dither(scale=2), seed=1),
        ]
        train(both, sgd(both), shape, 2)
        alone.load_state_dict(both.state_dict())
        # The same step and call number on both: the same noise.
        for name, p in sessions[1]._programs.items():
            p.step, p.calls = sessions[0]._programs[name].step, 0
            sessions[0]._programs[name].calls = 0
        found, expected = gradients(both, batch(shape)), gradients(alone, batch(shape))
        assert sessions[0].metrics()["zeros"] > sessions[0].metrics()["own_zeros"]
        for name, layer in both.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                expected[f"{name}.weight"] = projected(layer, expected[f"{name}.weight"])
        assert_same(found, expected, 1e-5)


def worker(rank: int, folder: str) -> None:
    model = seeded(convolutions)
    session = rg.attach(model, Spectral(3, warmup=2, full_every=3, every=2, random=1, decay=1e-2), seed=3)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = sgd(model)
    for step in range(7):
        optimizer.zero_grad()
        torch.sin(parallel(batch((6, 3, 8, 8), seed=10 * step + rank))).square().mean().backward()
        optimizer.step()
    result = {
        "parameters": dict(model.state_dict()),
        "bases": {name: rule(model.get_submodule(name))._inputs.basis for name in ("0", "2")},
        "rows": program(model[0]).statistics.rows,
        "metrics": session.metrics()["layers"]["2"]["captured_energy"],
    }
    torch.save(result, f"{folder}/rank{rank}.pt")


def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Different data on each rank: bases, decisions and weights agree to the last bit."""
    in_two_ranks(worker, tmp_path, monkeypatch)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert not torch.equal(one["rows"], two["rows"])
    assert_bitwise(one["bases"], two["bases"])
    assert_bitwise(one["parameters"], two["parameters"])
    # Of each rank's own gradients.
    assert one["metrics"] != two["metrics"]


WIDER: dict[str, tuple[Make, tuple[int, ...]]] = LAYERS | {
    "conv1d_dilation": (conv(1, 8, 8, 3, dilation=2, padding=2, groups=2), (3, 8, 11)),
    "conv2d_groups": (conv(2, 8, 6, 3, stride=2, padding=2, groups=2), (3, 8, 7, 8)),
    "conv3d": (conv(3, 4, 4, 3, stride=(1, 2, 1), padding=1, dilation=(1, 1, 2)), (2, 4, 5, 6, 7)),
}
"""With more than three channels to a group."""


@pytest.mark.parametrize("name", WIDER)
def test_unbiased(name: str) -> None:
    """Over 900 draws the mean of dW is G within 5 σ at every entry, from the first step on; dx and db are exact."""
    make, shape = WIDER[name]
    layer = seeded(make).double()
    plain = copy.deepcopy(layer)
    x = batch(shape).double()
    exact = gradients(plain, x)
    width = rg.attach(layer, UNBIASED(), seed=3) and rule(layer)._sketch.channels
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    assert rule(layer).projecting
    assert_same(
        {k: v for k, v in gradients(layer, x).items() if k != "weight"},
        {k: v for k, v in exact.items() if k != "weight"},
        1e-9,
    )
    for _ in range(4):
        gradients(layer, x)
        optimizer.step()
    total, squares, draws = 0.0, 0.0, 900
    for key in range(draws):
        rule(layer)._sketch.redraw(key, x)
        dw = gradients(layer, x)["weight"]
        total, squares = total + dw, squares + dw.square()
    mean = total / draws
    sigma = (squares / draws - mean.square()).clamp_min(0).div(draws).sqrt()
    assert width > 3  # or nothing would be left out
    assert float(sigma.max()) > 0
    assert bool(((mean - exact["weight"]).abs() <= 5 * sigma + 1e-9).all())


@pytest.mark.parametrize(
    "p",
    [[0.5] * 8, [0.1, 0.9, 1.0, 0.35, 0.65], [1.0, 1.0], [1e-3] * 1000],
    ids=["even", "uneven", "all", "rare"],
)
def test_channels_are_drawn_with_their_probabilities(p: list[float]) -> None:
    """Each as often as it should be, always the same number, none twice."""
    number, draws = round(sum(p)), 4000
    counts = np.zeros(len(p))
    for key in range(draws):
        chosen = sketch.systematic(np.array(p), number, key)
        assert len(set(chosen)) == chosen.size == number
        counts[chosen] += 1
    expected = np.array(p)
    spread = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(counts / draws - expected) <= 5 * spread + 1e-12).all()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1, 1, 1, 1], [0.5, 0.5, 0.5, 0.5]),
        ([10, 1, 1, 2], [1, 0.25, 0.25, 0.5]),
        ([10, 10, 0, 0], [1, 1, 0, 0]),
        ([0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]),
        ([10, 0, 0, 0], [1, 1 / 3, 1 / 3, 1 / 3]),
        ([math.nan, 0, 0, 1], [0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_inclusion(weights: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(sketch.inclusion(np.array(weights, float), 2), expected)


def test_unbiased_keeps_an_eighth_from_the_first_step_on() -> None:
    """n·d/8 numbers in place of n·d, and an eighth of that again in rows; U, d·k, is state of the layer."""
    n, d = 1024, 64

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(d, d), nn.Identity())

    model = seeded(make)
    session = rg.attach(model, Spectral(residual="unbiased", skip_head=False))
    x, optimizer = batch((n, d)), sgd(model)
    state = d * 2 + 6 + 6 * 2
    for _ in range(3):
        kept = saved_bytes(model, lambda: model(x))
        assert kept <= 4 * (n * d // 8 + n * d // 64 + state)
        gradients(model, x)
        optimizer.step()
    assert session.metrics()["layers"]["0"]["saved_bytes_fraction"] == 1 / 8


@pytest.mark.parametrize("residual", ["unbiased", "none", "scaled"])
def test_a_relu_keeps_a_bit_of_what_no_step_keeps_whole(residual: Any) -> None:
    """Its output is the next layer's input: kept by torch's ReLU, it would stay whole for that one's sake alone."""
    n, d = 2048, 64

    def make() -> nn.Module:
        return nn.Sequential(*(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d)))

    model, plain = (seeded(make) for _ in range(2))
    session = rg.attach(model, Spectral(8, residual=residual, warmup=0, every=5, skip_head=False))
    x, optimizer = batch((n, d)), sgd(model)
    shares: list[float] = []
    for _ in range(8):
        shares.append(saved_bytes(model, lambda: model(x)) / saved_bytes(plain, lambda: plain(x)))
        gradients(model, x)
        optimizer.step()
    if residual == "scaled":
        assert max(shares) > 0.9
    else:
        # 1/8 of x and a bit of each of two thirds of it; rows for U before a refresh come and go.
        assert min(shares) < 0.2
        assert max(shares[1:]) < 0.75
    assert type(session.fold()[1]) is nn.ReLU


def test_unbiased_learns_where_a_projection_stalls() -> None:
    """Least squares with a target along the weakest direction: what a fixed subspace never sees."""
    torch.manual_seed(0)
    x = torch.randn(256, 32) * torch.logspace(0, -1, 32)
    y = x[:, 20:] @ torch.randn(12, 4)
    ends: dict[str, float] = {}
    for residual in ("none", "unbiased"):
        model = seeded(partial(nn.Linear, 32, 4))
        rg.attach(model, Spectral(8, residual=residual, warmup=0, every=10, skip_head=False))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 400)
        for _ in range(400):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
        ends[residual] = float(loss)
    assert ends["unbiased"] < 0.2 * ends["none"]


def test_changed_geometry_is_refused() -> None:
    layer = projecting(conv(2, 4, 6, 3, padding=1), (3, 4, 7, 8), ALWAYS())
    layer.dilation = (2, 2)
    with pytest.raises(AttachError, match="another stride, padding or dilation"):
        gradients(layer, batch((3, 4, 7, 8)))


def test_plan_names_the_reasons() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3),
        nn.Flatten(),
        nn.Linear(64, 9),
        nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
    )
    rows = {row.name: row for row in rg.attach(model, Spectral()).plan.rows}
    assert rows["0"].status == "left"
    assert "too few" in rows["0"].why
    assert rows["2"].status == "attached"
    assert "parametrised" in rows["3"].why
    with pytest.raises(NoEffectError, match="rank=9 is more than its 8 inputs"):
        rg.attach(nn.Linear(8, 3), Spectral(9))
    with pytest.raises(NoEffectError, match="random=8 leaves none of its rank 8"):
        rg.attach(nn.Linear(64, 64), Spectral(residual="unbiased", random=8, skip_head=False))
    with pytest.raises(NoEffectError, match="transposed"):
        rg.attach(nn.ConvTranspose2d(8, 8, 3), Spectral(2, side="both"))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "rank=0"),
    ({"energy": 0.0}, "energy"),
    ({"energy": 1.1}, "energy"),
    ({"side": "left"}, "input, output, both"),
    ({"update": "svd"}, "qr, lie"),
    ({"residual": True}, "unbiased, full-step, scaled, none"),
    ({"basis": "last"}, "top, random, bulk"),
    ({"every": 0}, "every=0"),
    ({"full_every": 1}, "full_every=1"),
    ({"warmup": -1}, "warmup=-1"),
    ({"warmup": 1.0}, "warmup=1.0 must be a number of steps, 0 or more, or a share"),
    ({"decay": -1e-3}, "decay"),
    ({"decay": float("nan")}, "decay"),
    ({"tau": 0.0}, "tau"),
    ({"rows": 0}, "rows=0"),
    ({"rank": 4, "random": 4}, "leaves none"),
    ({"random": -1}, "random=-1"),
    ({"residual": "unbiased", "random": 0}, "no random"),
    ({"residual": "unbiased", "side": "output"}, "needs side='input'"),
    ({"random": 2, "basis": "bulk", "residual": "none"}, "needs basis='top'"),
    ({"residual": "scaled", "basis": "bulk"}, "stable only with"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Spectral(**options)


def test_every_combination_trains() -> None:
    """Sides, updates, residuals and bases: finite, and something is learnt."""
    for side, update, residual, basis in itertools.product(
        ("input", "output", "both"), ("qr", "lie"), ("full-step", "scaled", "none"), ("top", "random", "bulk")
    ):
        if residual == "scaled" and basis != "top":
            continue
        method = Spectral(
            3, side=side, update=update, residual=residual, basis=basis, warmup=1, full_every=2, every=2
        )
        model = seeded(net)
        _session = rg.attach(model, method, seed=1)
        before = model.state_dict()["2.weight"].clone()
        train(model, sgd(model), (16, 8), 5)
        assert torch.isfinite(model[2].weight).all()
        assert not torch.equal(before, model[2].weight)


@pytest.mark.filterwarnings("ignore:.*keys are not queries")
@pytest.mark.parametrize("side", ["output", "both"])
def test_attention_with_other_keys_than_queries(side: Any) -> None:
    """It multiplies by parts of its weight, with outputs of their own: V is of all of them, and leaves these alone."""
    layer = nn.MultiheadAttention(6, 2, batch_first=True)
    rg.attach(layer, Spectral(2, side=side, every=1, warmup=0, skip_head=False))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(4):
        queries, keys = batch((3, 4, 6), step), batch((3, 5, 6), 10 + step)
        optimizer.zero_grad()
        layer(queries, keys, keys)[0].square().sum().backward()
        optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in layer.parameters())


# Layers that do not take part in every step, and inputs that are silent.


class Tasks(nn.Module):
    """Two layers in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.head(torch.relu((self.odd if task else self.even)(x)))


@pytest.mark.parametrize("period", [2, 3])
def test_layers_in_turns_project_and_are_full_as_often_as_others(period: int) -> None:
    torch.manual_seed(0)
    model = Tasks()
    session = rg.attach(model, rg.Spectral(rank=8, warmup=4, every=5))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    kinds: dict[str, list[bool]] = {"even": [], "odd": []}
    for step in range(20 * period):
        task = int(step % period == period - 1)
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(128, 64), task), torch.randint(3, (128,))).backward()
        name = ("even", "odd")[task]
        gradient = model.get_submodule(name).get_parameter("weight").grad
        kinds[name].append(int(torch.linalg.matrix_rank(gradient.double(), rtol=1e-5)) <= 8)
        optimizer.step()
    assert all(rule.metrics()["rank"] == 8 for _, rule in session.rules_of("spectral"))
    # Four to warm up, then one of two is full, whatever the others do.
    for found in kinds.values():
        assert found == [False] * 4 + [index % 2 == 0 for index in range(len(found) - 4)]


def test_unbiased_learns_its_directions_in_a_layer_of_every_second_step() -> None:
    torch.manual_seed(0)
    model = Tasks()
    session = rg.attach(model, rg.Spectral(residual="unbiased", every=4))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(20):
        x = torch.randn(128, 64) * torch.logspace(0, -2, 64)
        F.cross_entropy(model(x, step % 2), torch.randint(3, (128,))).backward()
        optimizer.step()
    for name, rule in session.rules_of("spectral"):
        if name != "head":
            held = rule._inputs.basis[0, :8].square().sum() / rule._inputs.basis.shape[-1]
            assert held > 0.6, f"{name} knows where its input is large"


def test_a_silent_group_bounds_no_full_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, groups=2), nn.Flatten(), nn.Linear(288, 3))
    session = rg.attach(model, rg.Spectral(rank=4, warmup=0, every=2))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(6):
        x = torch.randn(8, 32, 5, 5)
        x[:, 16:] = 0
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.randint(3, (8,))).backward()
        live = model[0].weight.grad[:16].flatten(1)
        full = not session.rules_of("spectral")[0][1].projecting
        assert int(torch.linalg.matrix_rank(live, rtol=1e-4)) == (16 if full else 4), step
        optimizer.step()


@pytest.mark.parametrize("silent", [0, 10])
def test_a_silent_batch_fixes_no_rank_and_turns_no_basis(silent: int) -> None:
    """Its second moment has no directions: what was known stays, and nothing is learnt of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    session = rg.attach(model, rg.Spectral(warmup=4, every=10, rows=64))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(24):
        x = torch.zeros(64, 64) if step == silent else torch.randn(64, 64)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.randint(3, (64,))).backward()
        optimizer.step()
        rule = session.rules_of("spectral")[0][1]
        assert rule._scale >= 1
        if step == silent - 1:
            before = rule._inputs.basis.clone()
        if step == silent > 0:
            assert torch.equal(rule._inputs.basis, before)
    assert rule.metrics()["rank"] > 4


def test_side_output_says_that_it_leaves_attention_with_other_keys() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.MultiheadAttention(32, 2, batch_first=True), nn.Linear(32, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(self.a(x, y, y)[0].mean(1))

    for basis in ("top", "bulk"):
        torch.manual_seed(0)
        model = Cross()
        options: dict[str, Any] = {"side": "output", "rank": 4, "warmup": 0, "every": 1, "residual": "none"}
        rg.attach(model, rg.Spectral(basis=basis, **options))  # pyright: ignore[reportArgumentType]
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        batches = [(torch.randn(8, 5, 32), torch.randn(8, 6, 32), torch.randint(3, (8,))) for _ in range(3)]

        def run(model: nn.Module = model, optimizer: Any = optimizer, batches: Any = batches) -> None:
            for x, y, labels in batches:
                optimizer.zero_grad()
                F.cross_entropy(model(x, y), labels).backward()
                optimizer.step()

        with pytest.warns(RetrogradeWarning, match="keys are not queries"):
            run()
        plain = Cross()
        plain.load_state_dict(model.state_dict())
        F.cross_entropy(plain(*batches[-1][:2]), batches[-1][2]).backward()
        torch.testing.assert_close(model.a.in_proj_weight.grad, plain.a.in_proj_weight.grad)


@pytest.mark.parametrize(
    "options", [{"residual": "unbiased"}, {"warmup": 0, "every": 1}], ids=["unbiased", "scaled"]
)
def test_a_transposed_convolution_may_be_asked_for_several_sizes(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(64, 16, 3, stride=2, padding=1), nn.Conv2d(16, 3, 1))
    rg.attach(model, rg.Spectral(**options))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for size in (9, 10, 9, 10):
        optimizer.zero_grad()
        model[1](model[0](torch.randn(4, 64, 5, 5), output_size=[size, size])).square().mean().backward()
        optimizer.step()


def test_unbiased_goes_along_when_a_model_is_moved_before_its_first_step() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    rg.attach(model, rg.Spectral(residual="unbiased"))
    model.to("meta")  # stands for a GPU
    model(torch.randn(4, 64, device="meta")).sum().backward()
    assert model[0].weight.grad is not None


def test_rows_of_a_saved_input_are_kept_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3))
    session = rg.attach(model, rg.Spectral(warmup=1000, every=1, skip_head=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(4):
        F.cross_entropy(model(torch.randn(32, 64)), torch.randint(3, (32,))).backward()
        optimizer.step()
    plain, kept = session.summary().kept or (0, 0)
    assert kept == plain > 0


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 8.5},
        {"rank": True},
        {"rank": "8"},
        {"every": math.inf},
        {"every": 2.5},
        {"full_every": 2.5},
        {"rows": 10.5},
        {"random": 1.5, "rank": 8},
        {"energy": "x"},
        {"tau": "1"},
        {"decay": None},
        {"skip_head": "no"},
        {"residual": "unbiased", "full_every": 4},
        {"residual": "unbiased", "energy": 0.5},
    ],
    ids=str,
)
def test_values_of_the_wrong_kind_and_options_without_effect_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        rg.Spectral(**options)

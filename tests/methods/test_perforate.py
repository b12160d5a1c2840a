"""Perforate: growth preserves the function, no error passes dendrites, phases stop in time and resume bit for bit."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import retrograde as rg
from cases import (
    MODELS,
    Case,
    assert_bitwise,
    assert_same,
    batch,
    conv,
    gradients,
    in_two_ranks,
    mlp,
    program,
    seeded,
)
from retrograde.errors import NoEffectError, OptionError, RetrogradeWarning
from retrograde.methods.perforate import Perforate
from retrograde.methods.perforate.conductor import PerforateConductor
from retrograde.methods.perforate.dendrites import DendriticConv2d, DendriticLinear
from retrograde.methods.perforate.rule import DendriteRule

LEARNING = ("gradient", "perforated")
KINDS = [
    Case("linear", lambda: nn.Linear(6, 5), (7, 6)),
    Case("linear_no_bias", lambda: nn.Linear(6, 5, bias=False), (3, 4, 6)),
    Case("conv1d_groups", conv(1, 4, 6, 3, groups=2, padding=1), (3, 4, 9)),
    Case("conv2d_stride", conv(2, 4, 6, 3, stride=2, padding=1, bias=False), (3, 4, 7, 8)),
    Case("conv2d_same_even", conv(2, 4, 6, 4, padding="same"), (3, 4, 7, 8)),
    Case("conv2d_reflect", conv(2, 4, 6, 3, padding=1, padding_mode="reflect", dilation=2), (3, 4, 9, 8)),
    Case("conv2d_depthwise", conv(2, 4, 4, 3, groups=4, padding=1), (3, 4, 7, 8)),
    Case("conv2d_unbatched", conv(2, 4, 6, 3, padding=1), (4, 7, 8)),
    Case("conv3d", conv(3, 4, 6, 3, padding=1), (2, 4, 5, 6, 5)),
]


def conductor(session: rg.Session) -> PerforateConductor:
    return session._conductors["perforate"]  # type: ignore[return-value]


def rule(layer: nn.Module) -> DendriteRule:
    return next(r for r in program(layer).rules if isinstance(r, DendriteRule))


def grow(session: rg.Session, sets: int = 1, spread: float = 0.3) -> None:
    """`sets` dendrites in use with parameters and w of size `spread`; 0 leaves them as growth makes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetrogradeWarning)  # candidates that saw nothing: meant here
        for _ in range(sets):
            for r in conductor(session)._rules.values():
                r.grow(1)
    if spread:
        for i, (name, p) in enumerate(session.model.named_parameters()):
            if "dendrite" in name:
                p.data.copy_(spread * batch(p.shape, 50 + i, p.dtype))


def run(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, shape: Any) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        torch.sin(model(batch(shape, seed=100 + step).requires_grad_())).square().mean().backward()
        optimizer.step()


def test_options() -> None:
    bad: list[dict[str, Any]] = [
        {"rule": "hebb"},
        {"activation": "gelu"},
        {"max_dendrites": 0},
        {"patience": 0},
        {"tries": 1.5},
        {"period": 0},
        {"candidate_rate": 0.0},
        {"candidate_rate": float("nan")},
        {"momentum": 0.0},
        {"candidates": 2},
        {"where": ("",)},
    ]
    for options in bad:
        with pytest.raises(OptionError, match=next(iter(options))):
            Perforate(**options)


def test_plan() -> None:
    """Layers that dendrites cannot copy are left with the reason."""
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.ConvTranspose1d(4, 4, 3),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.Linear(4, 4),
        nn.Linear(4, 4),
    )
    model[3].weight.requires_grad_(False)
    rows = {r.name: r for r in rg.make_plan(model, [Perforate(rule="perforated", where="[0-3]")]).rows}
    assert rows["0"].status == "attached"
    for name, why in {"1": "inherit", "2": "parametrised", "3": "frozen", "4": "where"}.items():
        assert rows[name].status == "left"
        assert why in rows[name].why


@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("name", MODELS)
def test_neutral(name: str, learning: Any) -> None:
    """Without dendrites: autograd's gradients, and capacity that gets none."""
    make, shape = MODELS[name]
    plain, attached = seeded(make), seeded(make)
    rg.attach(attached, Perforate(rule=learning))
    x = batch(shape)
    assert torch.equal(plain(x), attached(x))
    assert_same(gradients(attached, x), gradients(plain, x), 1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_growth_preserves_the_function(case: Case, learning: Any, autocast: bool) -> None:
    """Bit for bit, in training and evaluation, with none and with other dendrites there before."""
    layer = case.make()
    session = rg.attach(layer, Perforate(rule=learning, max_dendrites=3))
    x = batch(case.shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        grow(session, 1)
        layer.dendrite_output_1.data.zero_()
        for sets in (2, 3):
            layer.train()
            trained, evaluated = layer(x), layer.eval()(x)
            grow(session, 1, spread=0)
            assert rule(layer).active == sets
            assert torch.equal(layer(x), evaluated)
            assert torch.equal(layer.train()(x), trained)
            assert layer(x).dtype == trained.dtype
    assert not bool(layer.dendrite_output_2.any())
    assert bool(layer.dendrite_weight_2.any())


@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_forward_and_fold(case: Case, learning: Any) -> None:
    """Equations (1) to (3) with the plain layer itself as M_d; the folded layer computes the same, and pickles."""
    layer = case.make()
    session = rg.attach(layer, Perforate(rule=learning, max_dendrites=3, activation="sigmoid"))
    grow(session, 2)
    x = batch(case.shape)
    plain = case.make()
    keys = plain.state_dict().keys()
    own = {k: getattr(layer, k) for k in keys}

    def product(d: int) -> Tensor:
        named = {k: getattr(layer, f"dendrite_{k}_{d}") for k in keys}
        return torch.func.functional_call(plain, named, (x,))

    def wide(value: Tensor) -> Tensor:
        return value.view(-1, *[1] * (layer.weight.dim() - 2))

    a0 = torch.sigmoid(product(0))
    a1 = torch.sigmoid(product(1) + wide(layer.dendrite_cascade_1[0]) * a0)
    expected = torch.func.functional_call(plain, own, (x,))
    expected = expected + wide(layer.dendrite_output_0) * a0 + wide(layer.dendrite_output_1) * a1
    torch.testing.assert_close(layer(x), expected)
    folded = session.fold()
    torch.testing.assert_close(folded(x), expected)
    assert not hasattr(folded, "dendrite_count")
    assert not hasattr(folded, "dendrite_weight_2")
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), expected)


def test_fold_without_dendrites() -> None:
    """The plain layer, class, keys, hooks and all."""
    model = seeded(mlp)
    session = rg.attach(model, Perforate())
    folded = session.fold()
    assert type(folded[0]) is nn.Linear
    assert folded.state_dict().keys() == seeded(mlp).state_dict().keys()
    assert not folded[0]._load_state_dict_post_hooks
    grow(session)
    assert type(session.fold()[0]) is DendriticLinear
    assert type(model[0]).__name__ == "RetrogradeLinear"


def test_folded_trains_by_its_rule() -> None:
    for learning in LEARNING:
        layer = nn.Conv2d(3, 4, 3)
        session = rg.attach(layer, Perforate(rule=learning))
        grow(session)
        folded = session.fold()
        assert type(folded) is DendriticConv2d
        assert "dendrites=1" in repr(folded)
        x = batch((2, 3, 6, 6))
        assert_same(gradients(folded, x), gradients(layer, x), 1e-6)


def test_detach() -> None:
    """Same objects, keys and hooks as before; dendrites that are lost are named."""
    model = seeded(mlp)
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    session = rg.attach(model, Perforate())
    assert len(list(model.parameters())) > len(before)
    session.detach()
    assert list(model.state_dict()) == keys
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in before.items()}
    assert not model[0]._load_state_dict_post_hooks
    session = rg.attach(model, Perforate())
    grow(session)
    with pytest.warns(RetrogradeWarning, match="fold"):
        session.detach()
    assert list(model.state_dict()) == keys


def test_perforated_stops_error() -> None:
    """x gets the gradient that it gets without dendrites; w learns, and nothing else of a dendrite does."""
    with_dendrites, without = nn.Linear(6, 5), nn.Linear(6, 5)
    without.load_state_dict(with_dendrites.state_dict())
    session = rg.attach(with_dendrites, Perforate(rule="perforated"))
    grow(session, 2)
    x, delta = batch((7, 6)).requires_grad_(), batch((7, 5), 2)
    with_dendrites(x).backward(delta)
    perforated, x.grad = x.grad, None
    without(x).backward(delta)
    assert torch.equal(perforated, x.grad)
    trained = {n for n, p in with_dendrites.named_parameters() if p.grad is not None}
    assert trained == {"weight", "bias", "dendrite_output_0", "dendrite_output_1"}
    a = torch.tanh(F.linear(x, with_dendrites.dendrite_weight_0, with_dendrites.dendrite_bias_0))
    torch.testing.assert_close(with_dendrites.dendrite_output_0.grad, (a * delta).sum(0))


def test_gradient_rule_is_autograd() -> None:
    """All of the dendrites in use train by the loss, as a network written by hand does."""
    layer = nn.Linear(6, 5).double()
    session = rg.attach(layer, Perforate(max_dendrites=2))
    grow(session, 1)
    x = batch((7, 6), dtype=torch.float64)
    found = gradients(layer, x)
    assert set(found) == {"input", "weight", "bias"} | {
        f"dendrite_{p}_0" for p in ("weight", "bias", "output")
    }

    def by_hand(y: Tensor) -> Tensor:
        a = torch.tanh(F.linear(y, layer.dendrite_weight_0, layer.dendrite_bias_0))
        return F.linear(y, layer.weight, layer.bias) + layer.dendrite_output_0 * a

    assert_same(found, gradients(layer, x, by_hand), 1e-12)


@pytest.mark.parametrize("learning", LEARNING)
def test_unused_capacity_stays(learning: Any) -> None:
    """Momentum and weight decay move nothing that is not in use, or frozen."""
    model = seeded(mlp)
    session = rg.attach(model, Perforate(rule=learning))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    run(model, optimizer, 0, 2, (16, 8))
    grow(session)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run(model, optimizer, 2, 5, (16, 8))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    parts = ("weight", "bias", "output") if learning == "gradient" else ("output",)
    expected = {
        f"{i}.{n}" for i in (0, 2, 4) for n in ("weight", "bias", *(f"dendrite_{p}_0" for p in parts))
    }
    assert moved == expected


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("name", MODELS)
def test_compiled_checkpointed_accumulated(name: str, learning: Any) -> None:
    """fullgraph, activation checkpointing and micro-batches give the eager gradients."""
    make, shape = MODELS[name]
    model = seeded(make)
    session = rg.attach(model, Perforate(rule=learning))
    grow(session, 2)
    x = batch(shape)
    eager = gradients(model, x)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(gradients(model, x, fast), eager, 1e-5)
    saved = gradients(model, x, lambda y: checkpoint(model, y, use_reentrant=False))
    assert_same(saved, eager, 1e-6)
    if name == "mlp":
        halves = gradients(model, x, lambda y: torch.cat([model(part) for part in y.split(5)]))
        assert_same(halves, eager, 1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
def test_recompiles_at_growth_only() -> None:
    """Twelve layers share code; steps, dendrite phases included, add none; growth adds one version."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
    session = rg.attach(model, Perforate(rule="perforated", patience=1))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for layer in model:
        layer.compile(fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run(model, optimizer, 0, 3, (4, 8))
    assert counter.frame_count == 1
    session.report(val=1.0)
    session.report(val=0.0)
    assert conductor(session).phase == "dendrite"
    run(model, optimizer, 3, 6, (4, 8))
    assert counter.frame_count == 1
    conductor(session)._accept()
    run(model, optimizer, 6, 9, (4, 8))
    assert counter.frame_count == 2


@pytest.mark.parametrize("learning", LEARNING)
def test_autocast(learning: Any) -> None:
    """bfloat16: output dtype as of the plain layer, gradients close, candidates in float32."""
    model = seeded(mlp)
    session = rg.attach(model, Perforate(rule=learning, patience=1))
    grow(session)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            assert y.dtype == torch.bfloat16
            return y.float()

    x = batch((16, 8))
    assert_same(gradients(model, x, forward), gradients(model, x), 0.05)


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2, groups=2),
        nn.BatchNorm2d(6, momentum=None),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 3),
    )


SHAPE = (8, 2, 8, 8)
SHORT: dict[str, Any] = {
    "max_dendrites": 2,
    "patience": 2,
    "candidate_patience": 2,
    "candidate_limit": 3,
    "limit": 4,
    "tries": 2,
}


def test_dendrite_phase_freezes_the_network() -> None:
    """Momentum, decay and BatchNorm included: evaluation stays the same to the bit while candidates learn."""
    model = seeded(net)
    session = rg.attach(model, Perforate(rule="perforated", candidates=2, **SHORT))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    run(model, optimizer, 0, 3, SHAPE)
    for score in (1.0, 0.0, 0.0):
        session.report(val=score)
    assert conductor(session).phase == "dendrite"
    x = batch(SHAPE)
    before = model.eval()(x)
    state = copy.deepcopy(model.train().state_dict())
    overhead = program(model[0]).total.overhead
    run(model, optimizer, 3, 9, SHAPE)
    assert program(model[0]).total.overhead > overhead
    assert torch.equal(model.eval()(x), before)
    changed = {k for k, v in model.train().state_dict().items() if not torch.equal(v, state[k])}
    assert all("num_batches_tracked" in k for k in changed)
    session.report(val=0.0)
    figures = session.metrics()["layers"]["0"]
    assert 0.01 < figures["correlation"] <= 1
    assert figures["dendrites"] == 0
    for _ in range(2):
        session.report(val=0.0)
    assert conductor(session).phase == "neuron"
    assert torch.equal(model.eval()(x), before)
    model.train()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if "num_batches" in k)
    assert model[1].momentum == 0.1
    assert model[4].momentum is None
    assert session.metrics()["perforate"]["dendrites"] == 1
    run(model, optimizer, 9, 11, SHAPE)
    assert all(bool(model[i].dendrite_output_0.any()) for i in (0, 3, 7))


def test_detach_in_a_dendrite_phase() -> None:
    """BatchNorm is given back as it was."""
    model = seeded(net)
    session = rg.attach(model, Perforate(rule="perforated", patience=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run(model, optimizer, 0, 1, SHAPE)
    session.report(val=1.0)
    session.report(val=0.0)
    assert model[1].momentum == 0.0
    session.detach()
    assert (model[1].momentum, model[4].momentum) == (0.1, None)


SCRIPTS: dict[str, Callable[[int], float]] = {
    "never better": lambda n: -float(n),
    "always better": float,
    "up and down": lambda n: float(n // 7) - 0.5 * (n % 2),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("learning", LEARNING)
def test_finishes_within_its_bound(learning: Any, script: str) -> None:
    """Whatever the scores do; phases are marked, and the best state is the last."""
    model = seeded(mlp)
    session = rg.attach(model, Perforate(rule=learning, **SHORT))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    figures = session.metrics()["perforate"]
    bound, most = int(figures["bound"]), figures["parameters_bound"]
    expected = 4 + 2 * 2 * (4 + (3 if learning == "perforated" else 0))
    assert bound == expected
    # D·P_M + C·D(D+1)/2 for each layer.
    assert most == sum(2 * (i * o + o) + 3 * o for i, o in ((8, 16), (16, 16), (16, 4)))
    c, states = conductor(session), dict[float, Any]()
    reports = 0
    while c.phase != "finished":
        run(model, optimizer, reports, reports + 1, (16, 8))
        score = SCRIPTS[script](reports)
        states.setdefault(score, copy.deepcopy(model.state_dict()))
        session.report(val=score)
        reports += 1
        assert reports <= bound
    assert c.best is not None
    assert_bitwise(model.state_dict(), states[c.best])
    assert c.marks[-1][2] == "finished"
    metrics = session.metrics()["perforate"]
    assert metrics["phase"] == "finished"
    assert metrics["parameters_added"] <= most
    if script == "always better":
        assert metrics["dendrites"] == 2
        assert metrics["parameters_added"] == most
    if script == "never better":
        assert metrics["dendrites"] == 0
        assert metrics["cycles"] == 2
    run(model, optimizer, reports, reports + 2, (16, 8))
    assert not torch.equal(model[0].weight, states[c.best]["0.weight"])


@pytest.mark.parametrize("learning", LEARNING)
def test_retry_draws_anew(learning: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    session = rg.attach(model, Perforate(rule=learning, patience=1, candidate_limit=1, tries=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    drawn: list[Tensor] = []
    for n in range(6):
        run(model, optimizer, n, n + 1, (16, 8))
        session.report(val=-float(n))
        if rule(model[0]).active:
            drawn.append(model[0].dendrite_weight_0.detach().clone())
    assert conductor(session).growths == 2
    assert not torch.equal(drawn[0], drawn[-1])


def test_thresholds() -> None:
    """A new best must beat the old by 1e-3, then 1e-4, then anything, relatively."""
    for dendrites, margin in ((0, 1e-3), (1, 1e-4), (2, 0.0)):
        session = rg.attach(nn.Linear(4, 4), Perforate())
        grow(session, dendrites, spread=0) if dendrites else None
        c = conductor(session)
        session.report(val=-10.0)
        session.report(val=-10.0 + 10 * margin * 0.9)
        assert c.stale == 1
        session.report(val=-10.0 + max(10 * margin * 1.1, 1e-9))
        assert c.stale == 0


def test_optimizer_state_is_cleared() -> None:
    """Moments of replaced weights go before the next step; those of other models stay."""
    model, other = seeded(mlp), nn.Linear(3, 3)
    session = rg.attach(model, Perforate(patience=1))
    optimizer = torch.optim.Adam([*model.parameters(), *other.parameters()], lr=0.01)
    other.weight.grad = torch.ones_like(other.weight)
    for step in range(3):
        optimizer.zero_grad()
        other(torch.ones(3)).sum().backward()
        torch.sin(model(batch((16, 8), step))).mean().backward()
        optimizer.step()
    session.report(val=1.0)
    session.report(val=0.0)
    assert conductor(session).dendrites == 1
    optimizer.zero_grad()
    other(torch.ones(3)).sum().backward()
    torch.sin(model(batch((16, 8)))).mean().backward()
    optimizer.step()
    assert int(optimizer.state[model[0].weight]["step"]) == 1
    assert int(optimizer.state[other.weight]["step"]) == 4


@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("stop", [2, 5, 8, 11, 14, 20])
def test_resumes_bit_for_bit(stop: int, learning: Any) -> None:
    """From a neuron phase, the middle of a dendrite phase, right after growth and later: as if not interrupted."""
    total, every = 26, 2

    def made() -> tuple[nn.Module, torch.optim.Optimizer, rg.Session]:
        model = seeded(net)
        candidates = 2 if learning == "perforated" else 1
        session = rg.attach(model, Perforate(rule=learning, candidates=candidates, **SHORT), seed=1)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01), session

    def train(model: nn.Module, optimizer: Any, session: rg.Session, first: int, last: int) -> set[str]:
        phases: set[str] = set()
        for step in range(first, last):
            run(model, optimizer, step, step + 1, SHAPE)
            if step % every == 1:
                session.report(val=1.0 if step in (1, 15) else -float(step))
            phases.add(conductor(session).phase)
        return phases

    whole, first = made(), made()
    phases = train(*whole, 0, total)
    train(*first, 0, stop)
    saved = io.BytesIO()
    torch.save([part.state_dict() for part in first], saved)
    saved.seek(0)
    torch.manual_seed(99)  # a new process has another random state
    second = made()
    for part, state in zip(second, torch.load(saved, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*second, stop, total)
    assert_bitwise(second[0].state_dict(), whole[0].state_dict())
    assert second[2].metrics() == whole[2].metrics()
    assert conductor(second[2]).marks == conductor(whole[2]).marks
    assert conductor(whole[2]).growths >= 2
    assert ("dendrite" in phases) == (learning == "perforated")


def test_loading_brings_the_dendrites() -> None:
    """A model's state alone, loaded into a freshly attached model, computes the saved function."""
    one, two = seeded(mlp), seeded(mlp, 1)
    session = rg.attach(one, Perforate())
    rg.attach(two, Perforate())
    grow(session, 2)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(batch((16, 8))), two(batch((16, 8))))


def test_fixed_period_without_reports() -> None:
    """Phases last `period` steps; without one the fallback says so, once."""
    model = seeded(mlp)
    session = rg.attach(model, Perforate(rule="perforated", period=3, max_dendrites=1))
    run(model, torch.optim.SGD(model.parameters(), lr=0.05), 0, 10, (16, 8))
    events = [(step, event) for step, _, event, _ in conductor(session).marks]
    assert events == [(3, "dendrite phase"), (6, "1 dendrites"), (9, "finished")]


def test_fallback_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrograde.methods.perforate.conductor._DEFAULT_PERIOD", 2)
    model = seeded(mlp)
    session = rg.attach(model, Perforate())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.warns(RetrogradeWarning, match="report") as caught:
        run(model, optimizer, 0, 6, (16, 8))
    assert len(caught) == 1
    assert conductor(session).dendrites == 3


def test_decayed_schedule_warns() -> None:
    model = seeded(mlp)
    session = rg.attach(model, Perforate(patience=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    session.report(val=1.0)
    for step in range(4):
        run(model, optimizer, step, step + 1, (16, 8))
        schedule.step()
    with pytest.warns(RetrogradeWarning, match="plateau"):
        session.report(val=0.0)


def test_optimizer_made_before_attaching() -> None:
    """Dendrites that no optimizer owns would never learn: an error at the first step."""
    model = seeded(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rg.attach(model, Perforate())
    with pytest.raises(NoEffectError, match="after attaching"):
        run(model, optimizer, 0, 1, (16, 8))


def test_two_optimizers() -> None:
    """Each counts, and both find the network frozen in a dendrite phase."""
    model = seeded(mlp)
    session = rg.attach(model, Perforate(rule="perforated", patience=1))
    optimizers = [
        torch.optim.Adam([p for n, p in model.named_parameters() if n.startswith("4.") == last], lr=0.01)
        for last in (False, True)
    ]
    for step in range(8):
        torch.sin(model(batch((16, 8), step))).square().mean().backward()
        before = [p.detach().clone() for p in model.parameters()]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        same = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert same == (conductor(session).phase == "dendrite")
        if step < 4:
            session.report(val=-float(step))
    assert conductor(session).phase == "dendrite"


def test_non_finite_error_is_passed_over() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    session = rg.attach(model, Perforate(rule="perforated", patience=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run(model, optimizer, 0, 1, (16, 8))
    session.report(val=1.0)
    session.report(val=0.0)
    model(batch((16, 8))).backward(torch.full((16, 4), torch.inf))
    optimizer.step()
    run(model, optimizer, 2, 4, (16, 8))
    session.report(val=0.0)
    figures = session.metrics()["layers"]["0"]
    assert figures["fallbacks"] == 1
    assert 0 < figures["correlation"] <= 1


def test_another_method_keeps_the_input() -> None:
    """A layer whose input is not there in the backward pass is named, not passed over."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    session = rg.attach(model, Perforate(rule="perforated", patience=1))
    model[1].weight.requires_grad_(False)
    session.report(val=1.0)
    session.report(val=0.0)
    with pytest.raises(OptionError, match=r"layer '1'.*not kept"):
        torch.sin(model(batch((16, 8)))).mean().backward()


def test_with_dither() -> None:
    """Another method on the same layers: dendrites grow, and fold."""
    model = seeded(mlp)
    session = rg.attach(model, [rg.Dither(scale=1), Perforate(rule="perforated", **SHORT)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for n in range(7):
        run(model, optimizer, n, n + 1, (16, 8))
        session.report(val=-float(n))
    assert conductor(session).dendrites == 1
    x = batch((16, 8))
    torch.testing.assert_close(session.fold().eval()(x), model.eval()(x))


def worker(rank: int, folder: str) -> None:
    model = seeded(mlp)
    torch.manual_seed(rank)  # drawn numbers must not depend on the rank's seed
    options = {**SHORT, "max_dendrites": 3}
    session = rg.attach(model, Perforate(rule="perforated", **options))
    model[0].dendrite_weight_2.data.fill_(1.0)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    phases: list[str] = []
    for step in range(14):
        optimizer.zero_grad()
        torch.sin(parallel(batch((16, 8), seed=10 * step + rank))).square().mean().backward()
        optimizer.step()
        # The ranks disagree about the score: alone, one would see a new best where the other sees none.
        mean = 1.0 if step == 6 else -float(step)
        session.report(val=mean + (3.0 * step if rank else -3.0 * step))
        phases.append(conductor(session).phase)
    result = {
        "state": model.state_dict(),
        "phases": phases,
        "used": model[0].dendrite_output_0.detach().clone(),
        "idle": model[0].dendrite_weight_2.detach().clone(),
    }
    torch.save(result, f"{folder}/rank{rank}.pt")


def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unused capacity does not stop DDP; candidates, growth and phases are the same on both ranks."""
    in_two_ranks(worker, tmp_path, monkeypatch)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["phases"] == two["phases"]
    assert "dendrite" in one["phases"]
    assert int(one["state"]["0.dendrite_count"]) >= 1
    assert_bitwise(two["state"], one["state"])
    assert bool(one["used"].any())
    assert torch.equal(one["idle"], torch.ones_like(one["idle"]))

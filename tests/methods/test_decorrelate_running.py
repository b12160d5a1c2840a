"""Decorrelate in every way of running, its period and its counts, and what it refuses."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import retrograde as rg
from cases import (
    MODELS,
    assert_bitwise,
    assert_same,
    batch,
    in_two_ranks,
    mlp,
    program,
    seeded,
    train,
)
from retrograde.engine.maps import base
from retrograde.errors import NoEffectError, OptionError
from retrograde.methods.decorrelate import Decorrelate


def restless(every: int = 1, **options: Any) -> Decorrelate:
    """A new R every so many steps, whether or not it is another one."""
    return Decorrelate(every=every, longest=every, **options)


ALL: dict[str, Callable[..., Decorrelate]] = {
    "lowrank": partial(restless, rank=3, rows=64),
    "full": partial(Decorrelate, mode="full", every=1, rows=64),
    "precondition": partial(restless, mode="precondition", rank=3, rows=64),
}
all_modes = pytest.mark.parametrize("make", ALL.values(), ids=ALL)

ONE_UPDATE = {"until": 1}
"""R is learnt in the first step, and never again."""


def loss_of(z: Tensor) -> Tensor:
    return torch.sin(z).square().sum()


def run(layer: nn.Module, x: Tensor, steps: int = 1, lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(layer(x)).backward()
        optimizer.step()


def shifted(shape: tuple[int, ...], seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs with a mean."""
    return batch(shape, seed, dtype) + 2.0


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def rule_of(layer: nn.Module) -> Any:
    return program(layer).rules[0]


def learnt(layer: nn.Module) -> dict[str, Tensor]:
    """What the rule has found out about the layer's input so far."""
    return {name: v for name, v in rule_of(layer).state_dict().items() if isinstance(v, Tensor)}


def attached(
    make: Callable[..., Decorrelate], count: int = 2, build: Callable[[], nn.Module] = mlp, **options: Any
) -> list[nn.Module]:
    """Equal models, attached alike."""
    models = [seeded(build) for _ in range(count)]
    for model in models:
        rg.attach(model, make(**options), seed=1)
    return models


# Ways of running.


def train_parallel(make: Callable[..., Decorrelate], rank: int) -> dict[str, Tensor]:
    model = seeded(mlp)
    _session = rg.attach(model, make())
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(4):
        optimizer.zero_grad()
        torch.sin(parallel(shifted((16, 8), seed=10 * step + rank))).square().mean().backward()
        if rank and step == 2:
            # Rows that one rank must drop: all drop them, or it would be waited for.
            program(model[0]).statistics.collect(torch.full((1, 1, 8), math.nan))  # type: ignore[index]
        optimizer.step()
    assert program(model[0]).statistics.refreshes == 3  # type: ignore[index]
    found = learnt(model[0])  # type: ignore[index]
    return {**weights(model), **{f"rule.{name}": value for name, value in found.items()}}


def worker(rank: int, folder: str) -> None:
    torch.save({name: train_parallel(make, rank) for name, make in ALL.items()}, f"{folder}/rank{rank}.pt")


def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Different rows on each rank, one R: it and the weights stay identical to the last bit."""
    in_two_ranks(worker, tmp_path, monkeypatch)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in ALL:
        assert_bitwise(one[name], two[name])
        assert any(key.startswith("rule.") for key in one[name])
    assert float(one["lowrank"]["rule.mean"].mean()) == pytest.approx(2, abs=0.3)


@all_modes
@pytest.mark.parametrize("name", MODELS)
def test_compiled(name: str, make: Callable[..., Decorrelate]) -> None:
    """fullgraph, no recompilation as R changes, and the same training."""
    # Slow to import, and the ranks of the test above import this file too.
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    build, shape = MODELS[name]
    eager, fast = seeded(build), seeded(build)
    sessions = [rg.attach(model, make(), seed=5) for model in (eager, fast)]
    counter = CompileCounterWithBackend("aot_eager")
    train(eager, torch.optim.SGD(eager.parameters(), lr=0.05), shape, 4)
    train(
        torch.compile(fast, fullgraph=True, backend=counter),
        torch.optim.SGD(fast.parameters(), lr=0.05),
        shape,
        4,
    )
    torch._dynamo.reset()
    assert sessions[1].step == 4
    assert_same(fast.state_dict(), eager.state_dict(), 1e-4)
    assert counter.frame_count == 1


@all_modes
def test_checkpointing(make: Callable[..., Decorrelate]) -> None:
    found = []
    for saving in (False, True):
        model = seeded(mlp)
        _session = rg.attach(model, make())
        forward = partial(checkpoint, model, use_reentrant=False) if saving else model
        train(forward, torch.optim.Adam(model.parameters()), (16, 8), 4)  # type: ignore[arg-type]
        found.append(weights(model))
    assert_bitwise(found[1], found[0])


@all_modes
def test_accumulation(make: Callable[..., Decorrelate]) -> None:
    """Two micro-batches: the gradient of the whole batch, and one update of R, from the rows of both."""
    found = []
    for parts in (1, 2):
        model = seeded(mlp)
        session = rg.attach(model, make())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            for part in shifted((16, 8)).chunk(parts):
                loss_of(model(part)).backward()
            optimizer.step()
        assert session.step == 3
        found.append(weights(model))
    assert_same(found[1], found[0], 1e-4)


@all_modes
def test_autocast(make: Callable[..., Decorrelate]) -> None:
    """Passes in bfloat16, steps in float32: near exact training, whether the step stands inside of autocast or not."""
    ends = []
    for passes, steps in ((False, False), (True, False), (False, True)):
        (model,) = attached(make, 1)
        start = weights(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for step in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=passes):
                z = model(shifted((16, 8), step))
            assert z.dtype == (torch.bfloat16 if passes else torch.float32)
            loss_of(z.float()).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=steps):
                optimizer.step()
        assert all(value.dtype == torch.float32 for value in learnt(model[0]).values())  # type: ignore[index]
        ends.append({name: value - start[name] for name, value in weights(model).items()})
    assert_same(ends[1], ends[0], 0.1)
    assert_bitwise(ends[2], ends[0])


@all_modes
def test_resumed_equals_uninterrupted(make: Callable[..., Decorrelate], tmp_path: Path) -> None:
    """Interrupted between two updates, where rows are already waiting for the next."""

    def start() -> tuple[nn.Module, rg.Session, torch.optim.Optimizer]:
        model = seeded(mlp)
        session = rg.attach(model, make(every=4, rows=40), seed=1)
        return model, session, torch.optim.Adam(model.parameters(), 1e-2)

    model, session, optimizer = start()
    train(model, optimizer, (16, 8), 7)
    torch.save([model.state_dict(), optimizer.state_dict(), session.state_dict()], tmp_path / "state.pt")
    train(model, optimizer, (16, 8), 7, first=7)
    resumed = start()
    for part, state in zip(
        (resumed[0], resumed[2], resumed[1]),
        torch.load(tmp_path / "state.pt", weights_only=True),
        strict=True,
    ):
        part.load_state_dict(state)
    train(resumed[0], resumed[2], (16, 8), 7, first=7)
    assert_bitwise(dict(resumed[0].state_dict()), dict(model.state_dict()))
    assert_bitwise(learnt(resumed[0][0]), learnt(model[0]))  # type: ignore[index]
    assert resumed[1].flops() == session.flops()


@all_modes
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda o: o.__name__)
def test_bfloat16(optimizer: type[torch.optim.Optimizer], make: Callable[..., Decorrelate]) -> None:
    """Parameters in bfloat16: they stay so, R is float32, and the training gets somewhere."""
    model = seeded(mlp).bfloat16()
    _session = rg.attach(model, make())
    x = shifted((64, 8)).bfloat16()
    target = torch.sin(x[:, :4].float())
    stepping = optimizer(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (model(x).float() - target).square().mean()
        stepping.zero_grad()
        loss.backward()
        stepping.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())
    assert all(value.dtype == torch.float32 for value in learnt(model[0]).values())  # type: ignore[index]


def test_channels_last() -> None:
    """The memory format of weights and gradients makes no difference, and is kept."""
    for make in ALL.values():
        models = [seeded(MODELS["cnn"][0]).double() for _ in range(2)]
        models[1].to(memory_format=torch.channels_last)
        for model in models:
            rg.attach(model, make())
            layout = torch.channels_last if model is models[1] else torch.contiguous_format
            for step in range(3):
                x = shifted((6, 3, 8, 8), step, torch.float64).to(memory_format=layout)
                run(model, x, lr=1e-3)
        assert_same(weights(models[1]), weights(models[0]), 1e-9)
        assert models[1][0].weight.stride() != models[0][0].weight.stride()  # type: ignore[index]


class Turned(nn.Module):
    """A linear layer whose weight lies the other way round, as GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        linear = nn.Linear(8, 5)
        self.weight = nn.Parameter(linear.weight.detach().T.clone())
        self.bias = nn.Parameter(linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@all_modes
def test_turned_weight(make: Callable[..., Decorrelate], monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that lies as (i, o) is trained as one that lies as (o, i)."""
    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))
    rg.register_layer(Turned, rg.LinearKind(turned=True))
    straight, turned = seeded(partial(nn.Linear, 8, 5)).double(), seeded(Turned).double()
    for layer in (straight, turned):
        rg.attach(layer, make())
        for step in range(4):
            run(layer, shifted((32, 8), step, torch.float64), lr=1e-3)
    found = weights(turned)
    assert_same({**found, "weight": found["weight"].T}, weights(straight), 1e-10)


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["plain", "fused"])
@pytest.mark.parametrize("mode", ALL)
def test_grad_scaler(mode: str, options: dict[str, Any]) -> None:
    """Scaled by a power of two: the same bits; a step left out for its overflow leaves all as it was, decay included.

    A plain optimizer's is not made at all; a fused one makes it without effect.
    """
    plain, scaled = attached(ALL[mode], **ONE_UPDATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    pairs = [
        (model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1.0, **options))
        for model in (plain, scaled)
    ]
    for step in range(5):
        for model, optimizer in pairs:
            before = weights(model)
            optimizer.zero_grad()
            loss = loss_of(model(shifted((16, 8), step)))
            if model is plain:
                if step != 3:
                    loss.backward()
                    optimizer.step()
                continue
            scaler.scale(loss * math.inf if step == 3 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if step == 3:
                assert_bitwise(weights(model), before)
    assert learnt(plain[0])  # type: ignore[index]
    assert_bitwise(weights(scaled), weights(plain))


# Ways of stepping.


class Faulty(torch.optim.SGD):
    """An optimizer that can run out of memory."""

    broken = False

    def _init_group(self, *args: Any) -> Any:
        if self.broken:
            raise MemoryError
        return super()._init_group(*args)

    def break_down(self) -> None:
        self.broken = True
        with pytest.raises(MemoryError):
            self.step()
        self.broken = False


@all_modes
def test_step_that_raises(make: Callable[..., Decorrelate]) -> None:
    """The weights stay as they were; when the step is tried again, the same gradients are not changed twice."""
    models = attached(make)
    optimizers = [Faulty(model.parameters(), lr=1e-3, momentum=0.9) for model in models]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model(shifted((16, 8), step))).backward()
            if step == 2 and model is models[1]:
                before = weights(model)
                optimizer.break_down()
                optimizer.break_down()
                assert_bitwise(weights(model), before)
            optimizer.step()
        grads = [{n: p.grad for n, p in model.named_parameters()} for model in models]
        assert_bitwise(grads[1], grads[0])  # type: ignore[arg-type]
        assert_bitwise(weights(models[1]), weights(models[0]))


@all_modes
def test_new_gradients_after_a_step_that_raised(make: Callable[..., Decorrelate]) -> None:
    """Those are changed as ever, in however many parts they were computed, and wherever they lie."""
    for bias in (True, False):
        layers = attached(make, build=partial(nn.Linear, 8, 4, bias=bias), **ONE_UPDATE)
        for layer in layers:
            optimizer = Faulty(layer.parameters(), lr=1e-3)
            run(layer, shifted((16, 8)))
            for step in range(40):
                if layer is layers[1]:
                    optimizer.zero_grad()
                    loss_of(layer(shifted((16, 8), 2))).backward()
                    optimizer.break_down()
                optimizer.zero_grad()
                for part in shifted((16, 8), step).chunk(1 + step % 4):
                    loss_of(layer(part)).backward()
                optimizer.step()
        assert_bitwise(weights(layers[1]), weights(layers[0]))


@all_modes
@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)], ids=["adamw", "momentum"]
)
@pytest.mark.parametrize("named", [False, True], ids=["positional", "named"])
def test_closure(
    named: bool, optimizer: Callable[..., torch.optim.Optimizer], make: Callable[..., Decorrelate]
) -> None:
    """A step that computes the gradient itself is the step after a backward pass."""
    ends = []
    for closed in (False, True):
        (model,) = attached(make, 1)
        stepping = optimizer(model.parameters(), lr=1e-3)
        for step in range(4):

            def closure(model: nn.Module = model, step: int = step, own: Any = stepping) -> Tensor:
                own.zero_grad()
                loss = loss_of(model(shifted((16, 8), step)))
                loss.backward()
                return loss

            if not closed:
                closure()
                stepping.step()
            elif named:
                stepping.step(closure=closure)
            else:
                stepping.step(closure)
        ends.append(weights(model))
    assert_bitwise(ends[1], ends[0])


class Clipping(torch.optim.SGD):
    """Changes gradients where they lie, inside its step, before the step that it inherits."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            torch.nn.utils.clip_grad_value_(group["params"], 1e6)
        return super().step(closure)


@all_modes
def test_inherited_step(make: Callable[..., Decorrelate]) -> None:
    """A step within a step of the same optimizer changes no gradient for a second time."""
    ends = []
    for optimizer in (torch.optim.SGD, Clipping):
        (model,) = attached(make, 1)
        train(model, optimizer(model.parameters(), lr=0.05), (16, 8), 4)
        ends.append(weights(model))
    assert_bitwise(ends[1], ends[0])


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimisation: climb, look around, come back, and step with what was seen there."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    @torch.no_grad()
    def climb(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["before"] = p.clone()
            p.add_(p.grad.sign(), alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def descend(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            p.copy_(self.state[p]["before"])
        self.inner.step()

    def step(self, closure: Any = None) -> None:
        self.climb()
        with torch.enable_grad():
            closure()
        self.descend()


@all_modes
def test_optimizer_that_moves_weights_to_look_around(make: Callable[..., Decorrelate]) -> None:
    """What it moved and moved back is no step: the same weights as when its two halves are called one by one."""
    ends = []
    for closed in (False, True):
        (model,) = attached(make, 1, **ONE_UPDATE)
        optimizer = Sharpness(torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9))
        for step in range(4):

            def closure(model: nn.Module = model, step: int = step) -> None:
                loss_of(model(shifted((16, 8), step))).backward()

            optimizer.zero_grad()
            closure()
            if closed:
                optimizer.step(closure)
            else:
                optimizer.climb()
                closure()
                optimizer.descend()
        ends.append(weights(model))
    assert_bitwise(ends[1], ends[0])


@all_modes
def test_layer_left_out_of_a_step(make: Callable[..., Decorrelate]) -> None:
    """Without a gradient a layer keeps its bits, and goes on afterwards as if that step had not been."""
    ends = []
    for skipping in (False, True):
        layers = nn.ModuleList([seeded(partial(nn.Linear, 8, 4)), seeded(partial(nn.Linear, 8, 4), 1)])
        _session = rg.attach(layers, make())
        optimizer = torch.optim.AdamW(layers.parameters(), lr=1e-2, weight_decay=1.0)
        for step in range(5):
            left_out = step in (2, 3)
            if left_out and not skipping:
                continue
            before = weights(layers[1])
            optimizer.zero_grad()
            used = layers[:1] if left_out else layers
            sum(loss_of(layer(shifted((16, 8), step))) for layer in used).backward()  # type: ignore[union-attr]
            optimizer.step()
            if left_out:
                assert_bitwise(weights(layers[1]), before)
                assert learnt(layers[1])
        ends.append(weights(layers[1]))
    assert_bitwise(ends[1], ends[0])


@all_modes
def test_weights_put_back_after_a_step_that_raised(make: Callable[..., Decorrelate]) -> None:
    """What they are then stays, in a step without gradients too: nothing is left of the step that was not made."""
    (model,) = attached(make, 1)
    optimizer = Faulty(model.parameters(), lr=1e-3)
    saved = copy.deepcopy(model.state_dict())
    train(model, optimizer, (16, 8), 3)
    loss_of(model(shifted((16, 8)))).backward()
    optimizer.break_down()
    model.load_state_dict(saved)
    optimizer.zero_grad()
    optimizer.step()
    assert_bitwise(weights(model), saved)


@all_modes
def test_lbfgs_is_refused(make: Callable[..., Decorrelate]) -> None:
    """In its first step, before it has moved anything; so it is where R is there already."""
    for trained in (0, 2):
        (model,) = attached(make, 1)
        run(model, shifted((16, 8)), trained, lr=1e-3)
        before = weights(model)
        optimizer = torch.optim.LBFGS(model.parameters())

        def closure(model: nn.Module = model, own: torch.optim.Optimizer = optimizer) -> Tensor:
            own.zero_grad()
            loss = loss_of(model(shifted((16, 8))))
            loss.backward()
            return loss

        with pytest.raises(OptionError, match=r"layer '0' is trained by LBFGS"):
            optimizer.step(closure)
        assert_bitwise(weights(model), before)


# Period, share of training, counting.


def basis_changes(layer: nn.Module, steps: int) -> list[bool]:
    """Whether R was another one after each step."""
    changed = []
    for step in range(steps):
        before = rule_of(layer)._basis
        run(layer, shifted((16, 8), step + 1))
        after = rule_of(layer)._basis
        changed.append(before is None or not torch.equal(before, after))
    return changed


def test_every_and_until() -> None:
    """Updates at steps 0, 3, 6, …, and none from `until` on; rows are not sampled after it."""
    layer = nn.Linear(8, 4)
    _session = rg.attach(layer, Decorrelate(rank=2, every=3, longest=3, rows=16, until=0.5), steps=14)
    assert basis_changes(layer, 12) == [step in (0, 3, 6) for step in range(12)]
    assert not program(layer).sampling


def test_keeps_its_own_period() -> None:
    """Another method may want the statistics refreshed more often, and longer: R keeps to its own times."""
    layer = nn.Linear(8, 4)
    _session = rg.attach(layer, Decorrelate(rank=2, every=3, longest=3, rows=16, until=6))
    statistics = program(layer).statistics
    demanding = statistics.spec.merged(type(statistics.spec)(rows=16, every=1, rank=5))
    statistics.__init__(demanding)
    assert basis_changes(layer, 9) == [step in (0, 3) for step in range(9)]
    assert statistics.refreshes == 9
    assert statistics.basis.shape == (1, 8, 5)
    assert rule_of(layer)._basis.shape == (1, 8, 2)


def test_overhead_is_counted() -> None:
    """Of each step that R takes part in, and of R in full mode; nothing for each row, nor for each call."""
    n, o, d, k = 16, 4, 8, 2
    expected = {
        "lowrank": (0, 8 * o * d * k),
        "full": (4 * n * d**2 + 2 * d**3, 4 * o * d**2),
        "precondition": (0, 4 * o * d * k),
    }
    for mode, (update, step) in expected.items():
        layer = nn.Linear(d, o)
        rank = {} if mode == "full" else {"rank": k}
        session = rg.attach(layer, Decorrelate(mode=mode, every=10, rows=n, **rank))  # type: ignore[arg-type]

        def overhead(session: rg.Session = session) -> float:
            return next(iter(session.metrics()["layers"].values()))["overhead"]

        run(layer, shifted((n, d)))
        assert overhead() == update
        statistics = session.flops().overhead - update
        assert statistics >= 4 * n * d
        run(layer, shifted((n, d)))
        run(nn.Sequential(nn.Flatten(0, 1), layer), shifted((3, 5 * n, d)))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        optimizer.zero_grad()
        loss_of(layer(shifted((n, d))) + layer(shifted((n, d), 2))).backward()
        optimizer.step()
        assert overhead() == update + 3 * step
        assert session.flops().overhead == statistics + update + 3 * step


# What is refused.


def test_layers_that_are_left() -> None:
    """Frozen, shared, computed and unknown weights are left, each with its reason."""
    frozen, shared, other = (nn.Linear(4, 4) for _ in range(3))
    frozen.weight.requires_grad_(False)
    other.weight = shared.weight
    layers = {
        "plain": nn.Linear(4, 4),
        "frozen": frozen,
        "shared": shared,
        "other": other,
        "computed": parametrizations.weight_norm(nn.Linear(4, 4)),
        "unknown": nn.Bilinear(2, 2, 2),
    }
    session = rg.attach(nn.ModuleDict(layers), Decorrelate())
    why = {row.name: row.why for row in session.plan.rows if row.status != "attached"}
    for name, word in {
        "frozen": "weight frozen",
        "shared": "shared with another layer",
        "other": "shared with another layer",
        "computed": "computed anew",
        "unknown": "",
    }.items():
        assert word in why[name]
    assert "plain" not in why
    with pytest.raises(NoEffectError, match="frozen"):
        rg.attach(copy.deepcopy(frozen), Decorrelate())


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "half"},
        {"rank": 0},
        {"every": 0},
        {"rows": 1},
        {"mode": "full", "kappa": 1.5},
        {"mode": "full", "lr": 0.0},
        {"mode": "full", "lr": 0.6},
        {"mode": "full", "variant": "other"},
        {"damping": -0.1},
        {"damping": math.nan},
        {"mode": "precondition", "power": 2},
        {"until": 0.0},
        {"until": 0},
        {"until": 1.0},
        {"kappa": 0.1},
        {"variant": "normalized"},
        {"lr": 0.1},
        {"power": 0.5},
        {"mode": "full", "rank": 8},
        {"mode": "full", "damping": 0.2},
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any]) -> None:
    """Out of range, or without effect in the mode: named, with its value."""
    with pytest.raises(OptionError, match=f"{list(options)[-1]}="):
        Decorrelate(**options)


# What it may cost.


@pytest.mark.parametrize(
    ("options", "rows", "rank"),
    [
        # A direction takes 10·512·64 operations a step and 4·4·64·512/32 of statistics (precondition: 4·512·64), of
        # 6·512·64 for each row.
        ({}, 256, 16),
        ({"max_overhead": 0.1}, 256, 8),
        ({"max_overhead": 0.3}, 256, 32),
        ({"mode": "precondition"}, 256, 32),
        ({}, 64, 5),
        # Four at least, whatever they cost.
        ({}, 4, 4),
        ({"rank": 24}, 8, 24),
    ],
    ids=str,
)
def test_the_rank_follows_the_rows(options: dict[str, Any], rows: int, rank: int) -> None:
    layer = nn.Linear(512, 64)
    _session = rg.attach(layer, Decorrelate(rows=64, **options))
    run(layer, shifted((rows, 512)))
    assert rule_of(layer)._basis.shape == (1, 512, rank)
    assert program(layer).statistics.basis.shape == (1, 512, rank)


def test_convolutions_pay_for_all_their_positions() -> None:
    layer = nn.Conv2d(8, 16, 3)
    _session = rg.attach(layer, Decorrelate())
    run(layer, shifted((16, 8, 16, 16)))
    assert rule_of(layer)._basis.shape == (1, 72, 32)


def test_a_resumed_run_tracks_the_same_directions() -> None:
    first, second = (seeded(partial(nn.Linear, 512, 64)) for _ in range(2))
    sessions = [rg.attach(layer, Decorrelate(every=2, rows=64)) for layer in (first, second)]
    run(first, shifted((128, 512)), steps=3)
    second.load_state_dict(first.state_dict())
    sessions[1].load_state_dict(sessions[0].state_dict())
    for layer in (first, second):
        for step in range(4):
            run(layer, shifted((128, 512), seed=step))
    assert_bitwise(weights(first), weights(second))


def test_directions_lie_in_one_piece() -> None:
    """Products with a few columns take five times as long where these are strided; a resumed run has them so too."""
    model, resumed = attached(Decorrelate, rank=3, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        torch.sin(model(shifted((6, 8), seed=step))).square().mean().backward()
        optimizer.step()
    rules = [rule_of(one[0]) for one in (model, resumed)]  # type: ignore[index]
    state = {
        name: v.contiguous() if isinstance(v, Tensor) else v for name, v in rules[0].state_dict().items()
    }
    rules[1].load_state_dict(state)
    for rule in rules:
        found = rule._coordinates
        # With the mean beside them.
        assert found.basis.shape == found.scaled.shape == (1, 8, 4)
        assert found.basis.mT.is_contiguous()
        assert found.scaled.mT.is_contiguous()


def test_settled_inputs_are_looked_at_less_often() -> None:
    """The same rows in every step: R is learnt in steps 0, 2, 6, 14, then every 8 steps; other rows bring it back."""
    layer = nn.Linear(64, 16)
    _session = rg.attach(layer, Decorrelate(rank=4, every=2, longest=8, rows=512))
    x = shifted((512, 64))
    assert [number for number, new in enumerate(refreshes(layer, [x] * 24)) if new] == [0, 2, 6, 14, 22]
    assert [number for number, new in enumerate(refreshes(layer, [x.flip(1) * 3] * 11)) if new] == [6, 8, 10]


def refreshes(layer: nn.Module, inputs: Sequence[Tensor]) -> list[bool]:
    """Whether each step brought new statistics."""
    found = []
    for x in inputs:
        before = program(layer).statistics.refreshes
        run(layer, x)
        found.append(program(layer).statistics.refreshes > before)
    return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8, "max_overhead": 0.2}, "max_overhead=0.2 has no effect beside rank=8"),
        ({"mode": "full", "max_overhead": 0.2}, "no effect in mode='full'"),
        ({"mode": "full", "longest": 64}, "no effect in mode='full'"),
        ({"longest": 8}, "longest=8 must be 32 or more"),
        ({"max_overhead": 0.0}, "max_overhead=0.0 must be"),
        ({"max_overhead": math.inf}, "max_overhead=inf must be"),
    ],
    ids=str,
)
def test_costs_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Decorrelate(**options)

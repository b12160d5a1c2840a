"""Decorrelate in every way of running, its period and its counts, and what it refuses."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import retrograde as rg
from cases import (
    MODELS,
    assert_bitwise,
    assert_same,
    batch,
    gradients,
    in_two_ranks,
    mlp,
    program,
    seeded,
    train,
)
from retrograde.engine.slots import Site
from retrograde.errors import NoEffectError, OptionError
from retrograde.methods.decorrelate import Decorrelate

ALL: dict[str, Callable[[], Decorrelate]] = {
    "lowrank": partial(Decorrelate, rank=3, every=1, rows=64),
    "full": partial(Decorrelate, mode="full", every=1, rows=64),
    "precondition": partial(Decorrelate, mode="precondition", rank=3, every=1, rows=64),
}
all_modes = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


def run(layer: nn.Module, x: Tensor, steps: int = 1, lr: float = 0.05) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.sin(layer(x)).square().sum().backward()
        optimizer.step()


def shifted(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    """Inputs with a mean."""
    return batch(shape, seed) + 2.0


def train_parallel(make: Callable[[], Decorrelate], rank: int) -> dict[str, Tensor]:
    model = seeded(mlp)
    _session = rg.attach(model, make())
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(4):
        optimizer.zero_grad()
        torch.sin(parallel(shifted((16, 8), seed=10 * step + rank))).square().mean().backward()
        if rank and step == 2:
            # Rows that one rank must drop: all drop them, or it would be waited for.
            program(model[0]).statistics.collect(torch.full((1, 1, 8), math.nan))
        optimizer.step()
    assert program(model[0]).statistics.refreshes == 3
    return {name: value.clone() for name, value in model.state_dict().items()}


def worker(rank: int, folder: str) -> None:
    torch.save({name: train_parallel(make, rank) for name, make in ALL.items()}, f"{folder}/rank{rank}.pt")


def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Different rows on each rank, one R: weights and buffers stay identical to the last bit."""
    in_two_ranks(worker, tmp_path, monkeypatch)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in ALL:
        assert_bitwise(one[name], two[name])
    assert float(one["lowrank"]["0.decorrelation_mean"].mean()) == pytest.approx(2, abs=0.3)


@all_modes
@pytest.mark.parametrize("name", MODELS)
def test_compiled(name: str, make: Callable[[], Decorrelate]) -> None:
    """fullgraph, no recompilation as R changes, and the same training."""
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
def test_checkpointing(make: Callable[[], Decorrelate]) -> None:
    found = []
    for saving in (False, True):
        model = seeded(mlp)
        _session = rg.attach(model, make())
        forward = partial(checkpoint, model, use_reentrant=False) if saving else model
        train(forward, torch.optim.Adam(model.parameters()), (16, 8), 4)  # type: ignore[arg-type]
        found.append(copy.deepcopy(dict(model.state_dict())))
    assert_bitwise(found[1], found[0])


@all_modes
def test_accumulation(make: Callable[[], Decorrelate]) -> None:
    """Two micro-batches: the gradient of the whole batch, and one update of R, from the rows of both."""
    found = []
    for parts in (1, 2):
        model = seeded(mlp)
        session = rg.attach(model, make())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            for part in shifted((16, 8)).chunk(parts):
                torch.sin(model(part)).square().sum().backward()
            optimizer.step()
        assert session.step == 3
        found.append(copy.deepcopy({n: v.detach() for n, v in session.fold().state_dict().items()}))
    assert_same(found[1], found[0], 1e-4)


@all_modes
def test_autocast(make: Callable[[], Decorrelate]) -> None:
    """bfloat16 products, float32 transform: near the exact function and gradients."""
    model, exact = seeded(mlp), seeded(mlp)
    _sessions = [rg.attach(m, make()) for m in (model, exact)]
    for net in (model, exact):
        run(net, shifted((16, 8)), 2, lr=0.0)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            z = model(x)
        assert z.dtype == torch.bfloat16
        return z.float()

    found = gradients(model, batch((16, 8)), forward)
    assert all(g.dtype == torch.float32 for g in found.values())
    assert_same(found, gradients(exact, batch((16, 8))), 0.1)


@all_modes
def test_resumed_equals_uninterrupted(make: Callable[[], Decorrelate], tmp_path: Any) -> None:
    """Interrupted between two updates, where rows are already waiting for the next."""

    def start() -> tuple[nn.Module, rg.Session, torch.optim.Optimizer]:
        model = seeded(mlp)
        options = {**make().__dict__, "every": 4, "rows": 40}
        session = rg.attach(model, Decorrelate(**options), seed=1)
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
    assert resumed[1].flops() == session.flops()


@all_modes
def test_double_precision(make: Callable[[], Decorrelate]) -> None:
    model = seeded(mlp).double()
    _session = rg.attach(model, make())
    x = shifted((16, 8)).double()
    before = model(x)
    run(model, x, 2, lr=0.0)
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)


# Period, share of training, counting.


def test_every_and_until() -> None:
    """Updates at steps 0, 3, 6, …, and none from `until` · `total_steps` on; rows are not sampled after it."""
    layer = nn.Linear(8, 4)
    _session = rg.attach(layer, Decorrelate(rank=2, every=3, rows=16, until=0.5, total_steps=14))
    changed = []
    for step in range(12):
        before = layer.decorrelation_basis.clone()
        run(layer, shifted((16, 8), step + 1))
        changed.append(not torch.equal(before, layer.decorrelation_basis))
    assert changed == [step in (0, 3, 6) for step in range(12)]
    assert not program(layer).sampling


def test_keeps_its_own_period() -> None:
    """Another method may want the statistics refreshed more often: R follows its own period all the same."""
    layer = nn.Linear(8, 4)
    _session = rg.attach(layer, Decorrelate(rank=2, every=4, rows=16))
    statistics = program(layer).statistics
    statistics.spec = statistics.spec.merged(type(statistics.spec)(rows=16, every=1, rank=5))
    changed = []
    for step in range(9):
        before = layer.decorrelation_basis.clone()
        run(layer, shifted((16, 8), step + 1))
        changed.append(not torch.equal(before, layer.decorrelation_basis))
    assert statistics.refreshes == 9
    assert statistics.basis.shape == (1, 8, 5)
    assert changed == [step in (0, 4, 8) for step in range(9)]


def test_overhead_is_counted() -> None:
    """8·o·d·k for a call, and as much for an update, noted with the next call."""
    layer = nn.Linear(8, 4)
    session = rg.attach(layer, Decorrelate(rank=2, every=10, rows=16))
    x = shifted((16, 8))
    run(layer, x)
    assert next(iter(session.metrics()["layers"].values()))["overhead"] == 8 * 4 * 8 * 2
    run(layer, x)
    assert next(iter(session.metrics()["layers"].values()))["overhead"] == 3 * 8 * 4 * 8 * 2
    assert session.flops().overhead >= 3 * 8 * 4 * 8 * 2


# What is refused.


def test_tied_weights_are_left() -> None:
    answer = Decorrelate().make_rule(
        SimpleNamespace(name="head", layer=nn.Linear(4, 4), kind="linear", tied=True)
    )  # type: ignore[arg-type]
    assert isinstance(answer, str)
    assert "shared" in answer


def test_layers_that_are_left() -> None:
    """Frozen, parametrised and unknown layers are left, each with its reason."""
    frozen = nn.Linear(4, 4)
    frozen.weight.requires_grad_(False)
    turned = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    for layer, word in ((frozen, "frozen"), (turned, "parametrised"), (nn.Bilinear(2, 2, 2), "layout")):
        answer = Decorrelate().make_rule(Site("layer", layer, "linear"))
        assert isinstance(answer, str)
        assert word in answer
    with pytest.raises(NoEffectError, match="frozen"):
        rg.attach(frozen, Decorrelate())


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
        {"until": 0.5},
        {"total_steps": 100},
        {"until": 0.5, "total_steps": 0},
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
    with pytest.raises(
        OptionError, match=f"{list(options)[-1] if 'total_steps' not in options else 'total_steps'}="
    ):
        Decorrelate(**options)

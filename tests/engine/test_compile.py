"""torch.compile(fullgraph=True): the same noise, the same gradients, no recompilation storm."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import retrograde as rg
from cases import MODELS, assert_same, batch, gradients, mlp, program, seeded, train


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, backend: str = "aot_eager", **options: Any) -> Any:
    return torch.compile(model, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize("scale", [0, 2.0])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_same_gradients(name: str, backend: str, scale: float) -> None:
    """Compiled and eager draw the same noise: gradients agree to rounding, counts exactly."""
    make, shape = MODELS[name]
    if scale and backend == "inductor":
        pytest.skip(
            "inductor's rounding moves δ by an ulp, which may move a level by one: covered by the neutral scale"
        )
    eager, fast = seeded(make), seeded(make)
    first, second = (
        rg.attach(eager, rg.Dither(scale=scale), seed=5),
        rg.attach(fast, rg.Dither(scale=scale), seed=5),
    )
    x = batch(shape)
    assert_same(gradients(fast, x, compiled(fast, backend)), gradients(eager, x), 1e-5)
    assert second.metrics() == first.metrics()
    assert second.flops() == first.flops()


@pytest.mark.parametrize("name", MODELS)
def test_same_training(name: str) -> None:
    """Three steps of Adam, noise and statistics included, end in the same weights."""
    make, shape = MODELS[name]
    eager, fast = seeded(make), seeded(make)
    sessions = [rg.attach(model, rg.Dither(scale=1, target_sparsity=0.7), seed=5) for model in (eager, fast)]
    train(eager, torch.optim.SGD(eager.parameters(), lr=0.1), shape, 3)
    train(compiled(fast), torch.optim.SGD(fast.parameters(), lr=0.1), shape, 3)
    assert sessions[1].step == 3
    assert_same(fast.state_dict(), eager.state_dict(), 1e-5)


def test_channels_last_inductor() -> None:
    """Strides that the op returns are those that it announced to inductor."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).to(
            memory_format=torch.channels_last
        )

    eager, fast = seeded(make), seeded(make)
    _sessions = [rg.attach(model, rg.Dither(scale=0)) for model in (eager, fast)]
    x = batch((2, 4, 8, 8)).to(memory_format=torch.channels_last)
    assert_same(gradients(fast, x, compiled(fast, "inductor")), gradients(eager, x), 1e-5)


def test_autocast() -> None:
    """bfloat16 autocast inside compiled code."""
    eager, fast = seeded(mlp), seeded(mlp)
    _sessions = [rg.attach(model, rg.Dither(scale=0)) for model in (eager, fast)]
    run = compiled(fast)

    def forward(net: Any) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return net(x).float()

        return call

    x = batch((16, 8))
    assert_same(gradients(fast, x, forward(run)), gradients(eager, x, forward(eager)), 0.02)


def test_dynamic_shapes() -> None:
    """Batch sizes change without recompiling each time, and each gets its own gradients."""
    eager, fast = seeded(mlp), seeded(mlp)
    _sessions = [rg.attach(model, rg.Dither(scale=0)) for model in (eager, fast)]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(fast, fullgraph=True, backend=counter, dynamic=True)
    for rows in (5, 6, 11):
        assert_same(gradients(fast, batch((rows, 8)), run), gradients(eager, batch((rows, 8))), 1e-5)
    assert counter.frame_count == 1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def test_many_blocks() -> None:
    """Twelve blocks compiled each by itself share their code: the recompile limit (8) is not reached."""

    def make() -> nn.Module:
        return nn.Sequential(*(Block() for _ in range(12)))

    eager, fast = seeded(make), seeded(make)
    sessions = [rg.attach(model, rg.Dither(scale=2), seed=1) for model in (eager, fast)]
    for block in fast:
        block.compile(fullgraph=True, backend="aot_eager")
    x = batch((4, 8))
    with torch._dynamo.config.patch(error_on_recompile=False, fail_on_recompile_limit_hit=True):
        found = gradients(fast, x)
    assert_same(found, gradients(eager, x), 1e-5)
    assert [program(block.up).total.calls for block in fast] == [1] * 12
    assert sessions[0].metrics() == sessions[1].metrics()


def test_pause_and_eval_when_compiled() -> None:
    """paused() and eval() are seen by compiled code, there and back."""
    model = seeded(mlp)
    session = rg.attach(model, rg.Dither(scale=3))
    plain = gradients(seeded(mlp), batch((16, 8)))
    run = compiled(model)
    gradients(model, batch((16, 8)), run)
    calls = session.metrics()["layers"]["0"]["zeros"], program(model[0]).total.calls
    with session.paused():
        assert_same(gradients(model, batch((16, 8)), run), plain, 1e-5)
    model.eval()
    assert_same(gradients(model, batch((16, 8)), run), plain, 1e-5)
    assert program(model[0]).total.calls == calls[1] == 1
    gradients(model.train(), batch((16, 8)), run)
    assert program(model[0]).total.calls == 2


@pytest.mark.parametrize("scale", [0, 2.0])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("fast", [False, True])
def test_activation_checkpointing(reentrant: bool, scale: float, fast: bool) -> None:
    """The forward pass that runs twice counts once, and draws nothing: the same gradients bit for bit."""
    if fast and reentrant:
        pytest.skip("torch compiles only the non-reentrant kind")
    plain, saving = seeded(mlp), seeded(mlp)
    sessions = [rg.attach(model, rg.Dither(scale=scale), seed=2) for model in (plain, saving)]
    x = batch((16, 8))

    def function(y: Tensor) -> Tensor:
        return checkpoint(saving, y, use_reentrant=reentrant)

    run = torch.compile(function, fullgraph=True, backend="aot_eager") if fast else function
    assert_same(gradients(saving, x, run), gradients(plain, x), 1e-5 if fast else 0.0)
    assert sessions[0].metrics() == sessions[1].metrics()

"""torch.compile(fullgraph=True): the same noise, the same gradients, no recompilation storm."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import retrograde as rg
from cases import MODELS, assert_same, batch, gradients, mlp, program, seeded, train
from retrograde.engine.maps import base


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


class Turned(nn.Module):
    """A linear layer whose weight lies as (i, o)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Masked(Turned):
    """A linear layer whose weight is computed."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (self.weight > 0), self.bias)


class Causal(nn.Module):
    """A convolution that pads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8, 3)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (2, 0)), self.weight, self.bias)


class Grow(nn.Module):
    """Twice as long, whatever the length: the output padding depends on the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(8, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, output_size=[2 * x.shape[-1]])


PLAIN = rg.Geometry((1,), (0,), (1,), False, (0,), 1)
KINDS: dict[str, Callable[[], nn.Module]] = {
    "turned": Turned,
    "masked": Masked,
    "causal": Causal,
    "same": lambda: nn.Conv1d(8, 8, 4, padding="same"),
    "grown": Grow,
}


@pytest.fixture
def _kinds_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))
    rg.register_layer(Turned, rg.LinearKind(turned=True))
    rg.register_layer(Masked, lambda layer, x: rg.Operands(x, layer.weight * (layer.weight > 0), layer.bias))
    rg.register_layer(Causal, lambda layer, x: rg.Operands(F.pad(x, (2, 0)), layer.weight, layer.bias, PLAIN))


@pytest.mark.usefixtures("_kinds_are_known")
@pytest.mark.parametrize("scale", [0, 2.0])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, dynamic: bool, scale: float) -> None:
    """Maps pass through compiled code as name and numbers, symbolic ones included."""
    models = [seeded(lambda: nn.Sequential(nn.Linear(8, 8), KINDS[kind](), nn.Tanh())) for _ in range(2)]
    sessions = [rg.attach(model, rg.Dither(scale=scale), seed=5) for model in models]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(models[1], fullgraph=True, backend=counter, dynamic=dynamic)
    for rows in (5, 6, 11) if dynamic else (5,):
        x = batch((rows, 8, 8))
        assert_same(gradients(models[1], x, run), gradients(models[0], x), 1e-5)
    assert counter.frame_count == 1
    assert sessions[1].flops() == sessions[0].flops()
    assert program(models[1][1].up if kind == "grown" else models[1][1]).total.calls == (3 if dynamic else 1)


def test_lengths_that_change() -> None:
    """The spatial size changes, and the output padding with it."""
    eager, fast = seeded(Grow), seeded(Grow)
    sessions = [rg.attach(model, rg.Dither(scale=0)) for model in (eager, fast)]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(fast, fullgraph=True, backend=counter, dynamic=True)
    for length in (5, 8, 13):
        x = batch((3, 8, length))
        assert_same(gradients(fast, x, run), gradients(eager, x), 1e-5)
    assert counter.frame_count == 1
    assert sessions[1].flops() == sessions[0].flops()


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

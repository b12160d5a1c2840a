"""Forecasts of every method: the bytes are those that training keeps, and the seconds are of all that a step does."""

import itertools
import json
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import retrograde as rg
from retrograde import trials
from retrograde.accounting.memory import saved_bytes
from retrograde.engine.slots import Tier
from retrograde.forecast import LayerForecast

Y = torch.arange(64) % 10
STEADY, PERIOD = 24, 40
"""Steps after which every method below has warmed up, and a multiple of all their periods."""


class Branches(nn.Module):
    """Residual branches, and three layers that are given one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(64, 32) for _ in range(3))
        branch = nn.Sequential(nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 96))
        self.residual = rg.Residual(branch)
        self.out = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.residual(torch.cat([head(x) for head in self.heads], 1)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.GELU(), nn.Linear(96, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (4, 4, 4)), nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 24, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 10)),
    )


MODELS = {"mlp": mlp, "cnn": cnn, "branches": Branches}
METHODS: dict[str, list[Any]] = {
    "exact": [rg.Exact()],
    "dither": [rg.Dither()],
    "int8": [rg.Dither(forward="int8")],
    "spectral": [rg.Spectral(rank=8, warmup=10, every=20, rows=128)],
    "spectral, seldom full": [rg.Spectral(rank=4, warmup=10, every=40, full_every=4, rows=64)],
    "spectral, never full": [rg.Spectral(rank=4, warmup=10, residual="none", every=40, rows=64)],
    "decorrelate": [rg.Decorrelate(rank=8, every=8, rows=128)],
    "deepfocus": [rg.DeepFocus(warmup=5, p_max=0.1)],
    "perforate": [rg.Perforate()],
    "perforated": [rg.Perforate(rule="perforated")],
    "two": [rg.Exact(), rg.Spectral(rank=8, warmup=10, every=20, rows=128)],
}


def losses(model: nn.Module) -> Callable[[], Tensor]:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    return lambda: F.cross_entropy(model(x), Y)


def measured(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """Mean bytes of a step once the methods have warmed up."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    found: list[int] = []
    for step in range(STEADY + PERIOD):
        if step >= STEADY:
            found.append(saved_bytes(model, loss))
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return sum(found) / len(found)


@pytest.mark.filterwarnings("ignore::retrograde.errors.RetrogradeWarning")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("methods", METHODS)
def test_bytes_are_those_that_training_keeps(kind: str, methods: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    loss = losses(model)
    plain = saved_bytes(model, loss)
    session = rg.attach(model, METHODS[methods], example=loss, decline=False, seed=0)
    step = session.plan.step
    assert step is not None
    assert step.plain_bytes == plain
    assert step.attached_bytes == pytest.approx(measured(model, loss), rel=0.05)
    for row in session.plan.rows:
        assert (row.forecast is not None) is (row.status == "attached")
        if row.forecast:
            assert min(row.forecast.plain, row.forecast.attached, row.forecast.backward) > 0


def test_a_layer_keeps_its_input_whoever_else_does() -> None:
    """A sigmoid keeps its output, the next layer's input: the layer keeps less, and the step as much as before."""
    model = nn.Sequential(
        *(nn.Linear(64, 64), nn.Sigmoid(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.Linear(64, 10))
    )
    method = rg.Spectral(rank=4, warmup=0, residual="none", every=1000, rows=64, skip_head=False)
    plan = rg.make_plan(model, method, example=losses(model), only=["2", "4"])
    found = {row.name: row.forecast for row in plan.rows if row.forecast}
    narrow = 4 * (64 * 4 + 64 * 4)
    whole = 4 * 64 * 64
    for name in ("2", "4"):
        # One step of a thousand brings rows.
        expected = 0.999 * narrow + 0.001 * (narrow + whole)
        assert (found[name].plain_bytes, found[name].attached_bytes) == pytest.approx((whole, expected))
    assert plan.step is not None
    assert plan.step.plain_bytes - plan.step.attached_bytes == pytest.approx(0.999 * whole - 2 * narrow)


def test_int8_keeps_eighths_of_bits() -> None:
    """x in 8 bits, in place of float32, W too, and a scale for each row or column of both."""
    model = nn.Linear(256, 64)
    x = torch.randn(512, 256)
    plan = rg.make_plan(model, rg.Dither(forward="int8"), example=x, decline=False)
    found = plan.rows[0].forecast
    assert found is not None
    assert found.plain_bytes == 4 * 512 * 256
    assert 512 * 256 + 256 * 64 < found.attached_bytes < 0.3 * found.plain_bytes


def test_checkpointed_layers_keep_nothing() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(torch.tanh(checkpoint(self.inner, x, use_reentrant=False)))

    model = Checkpointed()
    loss = losses(model)
    method = rg.Spectral(rank=4, warmup=10, every=20, rows=64, skip_head=False)
    plan = rg.make_plan(model, method, example=loss)
    inner, outer = (row.forecast for row in plan.rows)
    assert inner is not None
    assert outer is not None
    assert (inner.plain_bytes, inner.attached_bytes) == (0, 0)
    assert outer.attached_bytes < outer.plain_bytes
    assert plan.step is not None
    rg.attach(model, method, seed=0)
    assert plan.step.attached_bytes == pytest.approx(measured(model, loss), rel=0.05)


def test_bfloat16_is_kept_as_such() -> None:
    """Under autocast the copies that are kept count, not what they were made from."""
    model = mlp()
    plain = losses(model)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain()

    session = rg.attach(model, METHODS["spectral"], example=loss, seed=0)
    assert session.plan.step is not None
    assert session.plan.step.attached_bytes == pytest.approx(measured(model, loss), rel=0.05)


def test_what_happens_around_a_step_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of each step, and the refresh by its share; every kind of step by how often it happens."""
    clock = itertools.count()
    monkeypatch.setattr(trials.time, "perf_counter", lambda: float(next(clock)))
    model = nn.Linear(64, 64)
    every = 10
    plan = rg.make_plan(model, rg.Decorrelate(rank=4, every=every, rows=64), example=torch.randn(64, 64))
    found = plan.rows[0].forecast
    assert found is not None
    # By this clock the plain pass, and what is around a step, take one second, the attached pass three: it reads the
    # clock twice in its backward pass. A refresh is one more, once in so many steps.
    assert (found.plain, found.backward) == (1, 1)
    assert found.attached == pytest.approx(3 + 1 + 1 / every)


def test_tiers_count_by_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is skipped for certain costs no backward pass; the first and the last are never skipped."""
    found: dict[str, dict[Tier, float]] = {}
    run = trials.Trials.run

    def watch(self: trials.Trials, candidate: trials.Candidate, calls: Any) -> LayerForecast:
        found[candidate.name] = candidate.tiers
        return run(self, candidate, calls)

    monkeypatch.setattr(trials.Trials, "run", watch)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)), nn.Linear(64, 10))
    method = rg.DeepFocus(q_skip=0.6, q_full=0.1, p_max=0.25)
    plan = rg.make_plan(model, method, example=losses(model))
    assert found["0"] == found["3"] == pytest.approx({Tier.LOW: 0.9, Tier.FULL: 0.1})
    assert found["1"] == found["2"] == pytest.approx({Tier.SKIP: 0.45, Tier.LOW: 0.45, Tier.FULL: 0.1})
    assert "deepfocus: only those calls" in str(plan)


def test_trials_leave_the_model_alone() -> None:
    """Rules that change what is around a layer (an encoder's packing of padded batches) see only the copy."""
    layer = nn.TransformerEncoderLayer(64, 2, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True)
    x = torch.randn(2, 4, 64)
    packed, keys, state = model.use_nested_tensor, set(model.state_dict()), torch.get_rng_state()
    plan = rg.make_plan(model, rg.Perforate(), example=x)
    assert any(row.forecast for row in plan.rows)
    assert (model.use_nested_tensor, set(model.state_dict())) == (packed, keys)
    assert torch.equal(torch.get_rng_state(), state)
    assert "perforate: the forecast is of the model as it starts" in str(plan)


def test_the_plan_shows_bytes_where_there_are_any() -> None:
    model = mlp()
    method = rg.Spectral(rank=8)
    assert "MiB" not in str(rg.make_plan(model, method))
    plan = rg.make_plan(model, method, example=losses(model))
    text, content = str(plan), json.loads(json.dumps(plan.to_dict()))["forecast"]
    assert "MiB kept" in text
    assert "MiB for the backward pass" in text
    assert {"plain_bytes", "attached_bytes", "plain", "attached", "ratio", "notes"} <= content.keys()
    assert {"plain_bytes", "attached_bytes"} <= content["layers"]["0"].keys()
    found = plan.rows[0].forecast
    assert found is not None
    assert f"{found.plain_bytes / 2**20:.2f} → {found.attached_bytes / 2**20:.2f}" in text


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


ALL = (
    rg.Dither(),
    rg.Exact(),
    rg.Spectral(),
    rg.Decorrelate(rank=32),
    rg.DeepFocus(),
    rg.Perforate(where="*"),
)


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_layers_of_which_the_bias_alone_learns(method: rg.Method) -> None:
    model = net()
    model[0].weight.requires_grad = False
    plan = rg.make_plan(model, method, example=torch.randn(32, 64))
    assert plan.step is not None


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_users_hooks_run_in_passes_of_the_model_alone(method: rg.Method) -> None:
    """What a hook keeps or belongs to need not be copied, and a copy's passes are no passes of the model."""

    class Watcher:
        def __init__(self) -> None:
            self.lock, self.calls = threading.Lock(), 0

        def __call__(self, module: Any, args: Any, output: Any) -> None:
            module.seen = output
            self.calls += 1

    model, watcher = net(), Watcher()
    passes = Watcher()
    model[0].register_forward_hook(watcher)
    model.register_forward_hook(passes)
    for _ in range(2):
        rg.make_plan(model, method, example=torch.randn(32, 64))
    assert watcher.calls == passes.calls > 0


def test_weights_that_a_hook_of_torch_computes_are_tried_with_it() -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[0])
    model(torch.randn(2, 64)).sum().backward()
    (first, _) = rg.make_plan(model, rg.Dither(), example=torch.randn(32, 64), decline=False).rows
    assert first.forecast is not None
    assert first.forecast.plain > 0


def test_a_buffer_that_a_pass_replaces_is_put_back() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            return self.layer(x)

    model = Counts()
    before = model.count
    rg.make_plan(model, rg.Dither(), example=torch.randn(4, 8))
    assert model.count is before
    assert not before


def test_planning_without_gradients_plans_with_them() -> None:
    with torch.no_grad():
        plan = rg.make_plan(net(), rg.Dither(), example=torch.randn(32, 64))
    assert plan.step is not None


def test_an_empty_example_is_refused() -> None:
    with pytest.raises(rg.errors.OptionError, match="the example is empty at layer 0"):
        rg.make_plan(net(), rg.Dither(), example=torch.randn(0, 64))

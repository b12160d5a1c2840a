"""Forecasts from an example: what they look at, what they leave alone, and what is declined."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import retrograde as rg
from retrograde import trials
from retrograde.errors import NoEffectError, OptionError, RetrogradeWarning
from retrograde.forecast import Kept, LayerForecast
from retrograde.trials import Candidate, Trials


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(64, 5),
    )


X, Y = torch.randn(8, 2, 6, 6), torch.arange(8) % 5
FIXED = LayerForecast(2.0, attached=1.0, backward=0.5, zeros=0.5, kernels={"skip": 1.0}, quartiles=(0.8, 1.4))


def times(monkeypatch: pytest.MonkeyPatch, by_layer: dict[str, float]) -> None:
    """Attached layers take so many times the plain ones' time."""

    def run(self: Trials, candidate: Candidate, calls: Any) -> LayerForecast:
        return replace(FIXED, attached=FIXED.plain * by_layer.get(candidate.name, 1.0))

    monkeypatch.setattr(Trials, "run", run)


@pytest.mark.parametrize("kind", ["input", "arguments", "keywords", "loss"])
def test_an_example_leaves_no_trace(kind: str) -> None:
    net = model()
    examples: dict[str, Any] = {
        "input": X,
        "arguments": (X,),
        "keywords": {"input": X},
        "loss": lambda: F.cross_entropy(net(X), Y),
    }
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    plan = rg.make_plan(net, [rg.Dither()], example=examples[kind], decline=False)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert all(not m._forward_hooks for m in net.modules())
    assert {type(m) for m in net} == {type(m) for m in model()}
    rows = {row.name: row.forecast for row in plan.rows}
    assert rows["1"] is None
    for name in ("0", "5"):
        found = rows[name]
        assert found is not None
        assert min(found.plain, found.attached, found.backward) > 0
        low, high = found.quartiles
        assert low <= found.attached <= high
        assert sum(found.kernels.values()) == pytest.approx(1.0)
    assert plan.step is not None
    saved = sum(found.plain - found.attached for found in rows.values() if found)
    assert plan.step.attached == pytest.approx(plan.step.plain - saved)


def test_zeros_are_those_of_the_true_gradient() -> None:
    """With scale 0 nothing is rounded: the zeros left are what ReLU makes, seen before it acts in place."""
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(inplace=True), nn.Linear(40, 3))
    x = torch.randn(64, 6)
    share = float((net[0](x) <= 0).float().mean())
    plan = rg.make_plan(net, [rg.Dither(scale=0)], example=lambda: net(x).square().sum(), decline=False)
    first = plan.rows[0].forecast
    assert first is not None
    assert first.zeros == pytest.approx(share, abs=1e-6)


def test_layers_that_lose_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, {"0": 0.5, "5": 1.2})
    net = model()
    session = rg.attach(net, rg.Dither(), example=X)
    rows = {row.name: row for row in session.plan.rows}
    assert (rows["0"].status, rows["5"].status) == ("attached", "declined")
    assert "×1.20 [0.40–0.70] the time" in rows["5"].why
    assert type(net[5]) is nn.Linear
    assert type(net[0]) is not nn.Conv2d
    assert session.plan.step is not None
    assert session.plan.step.plain - session.plan.step.attached == pytest.approx(1.0)
    assert set(session.metrics()["layers"]) == {"0"}
    text = str(session.plan)
    assert "declined" in text
    assert "2000.00 → 1000.00" in text
    low, high = session.plan.step.quartiles
    assert (session.plan.step.plain - low, session.plan.step.plain - high) == pytest.approx((1.2, 0.6))
    assert f"[{low / session.plan.step.plain:.2f}–" in text, "a busy machine shows in the forecast"
    step = session.plan.step
    kept = (
        f"keeps {step.plain_bytes / 2**20:.2f} → {step.attached_bytes / 2**20:.2f} MiB for the backward pass"
    )
    assert f"A step, plain → attached: {step.plain * 1e3:.1f} → {step.attached * 1e3:.1f} ms" in text
    assert kept in text


def test_close_ones_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, {"0": 0.99, "5": 0.9})
    rows = {row.name: row.status for row in rg.make_plan(model(), [rg.Dither()], example=X).rows}
    assert (rows["0"], rows["5"]) == ("declined", "attached")


def test_declining_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, {"0": 2.0, "5": 2.0})
    plan = rg.make_plan(model(), [rg.Dither()], example=X, decline=False)
    assert [row.status for row in plan.rows if row.forecast] == ["attached", "attached"]


def test_nothing_left_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, {"0": 2.0, "5": 2.0})
    with pytest.raises(NoEffectError, match="decline=False"):
        rg.attach(model(), rg.Dither(), example=X)
    plan = rg.make_plan(model(), rg.Dither(), example=X)
    assert {row.status for row in plan.rows if row.forecast} == {"declined"}
    assert "Nothing is attached: no layer would become faster" in str(plan)


def test_methods_that_are_not_there_for_speed_are_never_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, {"0": 9.0, "5": 9.0})
    for methods in ([rg.Dither(), rg.Decorrelate(rank=2)], [rg.Spectral(rank=2, warmup=0, skip_head=False)]):
        plan = rg.make_plan(model(), methods, example=X)
        assert {row.name for row in plan.rows if row.forecast} == {"0", "5"}
        assert {row.status for row in plan.rows if row.forecast} == {"attached"}


def test_layers_called_often_cost_as_often() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    calls: list[int] = []
    run = Trials.run

    def count(self: Trials, candidate: Candidate, seen: Any) -> LayerForecast:
        calls.append(len(seen))
        return run(self, candidate, seen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trials, "run", count)
        patch.setattr(Trials, "_once", lambda *_: trials._Found(FIXED, Kept((1.0,), 8.0), Kept((0.5,), 4.0)))
        plan = rg.make_plan(Twice(), [rg.Dither()], example=torch.randn(4, 6), decline=False)
    assert calls == [2]
    # Two inputs of 4 × 6 numbers, and twice what one call keeps beside its input.
    assert plan.rows[0].forecast == replace(FIXED.times(2), plain_bytes=2 * 96 + 16, attached_bytes=96 + 8)


def test_layers_alike_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def compare(plain: Any, attached: Any, zeros: float) -> Any:
        compared.append(attached.program.name)
        return trials._Found(FIXED, plain.kept(), attached.kept())

    monkeypatch.setattr(trials, "_compare", compare)
    net = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4)), nn.Linear(6, 3))
    with torch.no_grad():
        for layer in net:
            assert isinstance(layer, nn.Linear)
            layer.weight.fill_(0.1)
    rg.make_plan(net, [rg.Dither(scale=0)], example=torch.randn(4, 6))
    # The first layer's input asks for no gradient; the next three are alike.
    assert compared == ["0", "1", "4"]


def test_autocast_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype | None] = []
    run = Trials.run

    def watch(self: Trials, candidate: Candidate, calls: Any) -> LayerForecast:
        seen.extend(call.precision for call in calls)
        return run(self, candidate, calls)

    monkeypatch.setattr(Trials, "run", watch)
    net = model()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(net(X).float(), Y)

    rg.make_plan(net, [rg.Dither()], example=loss, decline=False)
    assert seen == [torch.bfloat16] * 2


BAD: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "number": (lambda _: 3, "is not a batch"),
    "module": (lambda net: net, "is not a batch"),
    "no loss": (lambda net: lambda: net(X), "one entry"),
    "no gradient": (lambda _: lambda: torch.zeros(()), "one entry"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_examples(kind: str) -> None:
    make, message = BAD[kind]
    net = model()
    with pytest.raises(OptionError, match=message):
        rg.attach(net, rg.Dither(), example=make(net))
    assert type(net[0]) is nn.Conv2d


def test_a_failing_example_is_named_and_leaves_no_trace() -> None:
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RuntimeError) as error:
        rg.attach(net, rg.Dither(), example=torch.randn(8, 3, 6, 6))
    assert "Check `example`" in error.value.__notes__[0]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(not m._forward_hooks for m in net.modules())


def test_an_attached_model_is_refused() -> None:
    net = model()
    session = rg.attach(net, rg.Dither())
    with pytest.raises(OptionError, match="attached already"):
        rg.make_plan(net, [rg.Dither()], example=X)
    session.detach()


def test_backward_seconds_count_steps() -> None:
    net = model()
    session = rg.attach(net, rg.Dither())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        for _ in range(2):
            F.cross_entropy(net(X), Y).backward()
        optimizer.step()
    assert {steps for _, steps in session.backward_seconds().values()} == {3}
    assert all(seconds > 0 for seconds, _ in session.backward_seconds().values())


@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_tried(padded: bool) -> None:
    """It returns its weights beside its output, and may be given masks."""
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), torch.randn(4, 6, 32)
    mask = (torch.arange(6) > torch.tensor([[5], [2], [3], [4]])) if padded else None

    def loss() -> torch.Tensor:
        real = 1.0 if mask is None else (~mask)[..., None]
        return (model(x, src_key_padding_mask=mask) * real).square().mean()

    plan = rg.make_plan(model, rg.Exact(), example=loss, decline=False)
    tried = [row for row in plan.rows if row.forecast is not None]
    assert any("attn" in row.name for row in tried)
    if padded:
        assert all(row.forecast.zeros > 0.2 for row in tried if row.forecast is not None)


def test_where_nothing_pays_a_script_may_go_on() -> None:
    """Strict, it is an error; otherwise the plain model trains, and the user is told."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    with pytest.raises(NoEffectError, match="save less than 5 % of their time"):
        rg.attach(model, rg.Dither(), example=(x,))
    with pytest.warns(RetrogradeWarning, match="nothing is attached"):
        session = rg.attach(model, rg.Dither(), example=(x,), strict=False)
    assert type(model[0]) is nn.Linear
    model(x).sum().backward()
    torch.optim.SGD(model.parameters()).step()
    session.summary()
    session.metrics()
    assert session.fold()(x).shape == (2, 4)

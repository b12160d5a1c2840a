"""Dither at whole layers: unbiased, controlled, bounded, and exact where it steps aside."""

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint

import retrograde as rg
from cases import Turned, assert_bitwise, assert_same, batch, gradients, program, seeded, train
from retrograde.accounting.memory import saved_bytes
from retrograde.errors import OptionError, RetrogradeWarning


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (partial(nn.Linear, 6, 5), (8, 6)),
        (partial(Turned, 6, 5), (8, 6)),
        (partial(nn.Conv1d, 3, 4, 3, stride=2, padding=1), (2, 3, 8)),
        (partial(nn.ConvTranspose2d, 2, 3, 2, groups=1), (2, 2, 3, 3)),
    ],
    ids=["linear", "turned", "conv1d", "transposed2d"],
)
@pytest.mark.filterwarnings("ignore:1000 backward passes")
@pytest.mark.parametrize("dither", [rg.Dither(2.0), rg.Dither(0.5, bits=3)], ids=["int8", "three_bits"])
def test_unbiased_layer(make: partial[nn.Module], shape: tuple[int, ...], dither: rg.Dither) -> None:
    """Mean of 2,000 draws of dx and dW within 4.5 standard errors of the exact ones, entry by entry; db exact."""
    exact = gradients(seeded(make), batch(shape))
    layer = seeded(make)
    _session = rg.attach(layer, dither, seed=4)
    draws = [gradients(layer, batch(shape)) for _ in range(2000)]
    for name, value in exact.items():
        found = torch.stack([d[name] for d in draws]).double()
        if name == "bias":
            torch.testing.assert_close(found[0].float(), value)
            continue
        error = found.std(0) / len(draws) ** 0.5
        assert bool(error.max() > 0)
        assert bool(((found.mean(0) - value).abs() <= 4.5 * error + 1e-6).all()), name


def test_turned_layers_dither_as_others() -> None:
    """The same δ̃, forward pass in 8 bits or not: a turned layer's gradients are a linear layer's, transposed."""
    for forward in ("exact", "int8"):
        ends = []
        for make in (nn.Linear, Turned):
            layer = seeded(partial(nn.Linear, 6, 5))
            if make is Turned:
                plain, layer = layer, Turned(6, 5)
                layer.load_state_dict({"weight": plain.weight.detach().T, "bias": plain.bias.detach()})
            session = rg.attach(layer, rg.Dither(scale=1.0, forward=forward), seed=3)
            found = gradients(layer, batch((64, 6)))
            ends.append((found, session.metrics()["layers"]["(root)"]["zeros"]))
        (one, zeros), (other, zeros_too) = ends
        assert zeros == zeros_too > 0.2
        torch.testing.assert_close(other["weight"].T, one["weight"])
        torch.testing.assert_close(other["input"], one["input"])
        torch.testing.assert_close(other["bias"], one["bias"])


@pytest.mark.parametrize("target", [0.6, 0.9])
def test_target_sparsity(target: float) -> None:
    """The controller finds and holds the share of zeros, layer by layer."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 32)))
    session = rg.attach(model, rg.Dither(scale=1.0, target_sparsity=target), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    train(model, optimizer, (64, 8), 60)
    session.metrics(reset=True)
    train(model, optimizer, (64, 8), 20, first=60)
    for name, figures in session.metrics()["layers"].items():
        assert figures["zeros"] == pytest.approx(target, abs=0.04), name
        assert figures["scale"] != 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite(bad: float) -> None:
    """NaN and Inf pass through exactly, counted each time, warned of once."""
    layer, plain = seeded(partial(nn.Linear, 6, 5)), seeded(partial(nn.Linear, 6, 5))
    session = rg.attach(layer, rg.Dither())
    delta = batch((8, 5), 2)
    delta[3, 2] = bad
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            layer.zero_grad()
            layer(batch((8, 6))).backward(delta)
    assert len([w for w in seen if issubclass(w.category, RetrogradeWarning)]) == 1
    plain(batch((8, 6))).backward(delta)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, equal_nan=True, rtol=0, atol=0)
    assert session.metrics()["layers"]["(root)"]["fallbacks"] == session.summary().fallbacks == 3


@pytest.mark.parametrize(
    "delta", [torch.zeros(8, 5), torch.ones(8, 5), torch.full((8, 5), -3.0)], ids=["0", "1", "-3"]
)
def test_no_variance(delta: torch.Tensor) -> None:
    """All-zero and constant δ are left exact, counted, without a word."""
    layer, plain = seeded(partial(nn.Linear, 6, 5)), seeded(partial(nn.Linear, 6, 5))
    session = rg.attach(layer, rg.Dither())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(batch((8, 6))).backward(delta)
    plain(batch((8, 6))).backward(delta)
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    assert session.summary().fallbacks == 1


@pytest.mark.parametrize("factor", [1e-36, 1e-25, 1e25, 1e36])
def test_extreme_magnitudes(factor: float) -> None:
    """δ whose square leaves float32's range: finite, and near the exact gradient in the mean."""
    layer, plain = seeded(partial(nn.Linear, 6, 5)), seeded(partial(nn.Linear, 6, 5))
    _session = rg.attach(layer, rg.Dither(scale=0.1))
    delta = batch((64, 5), 2) * factor
    layer(batch((64, 6))).backward(delta)
    plain(batch((64, 6))).backward(delta)
    found, exact = layer.weight.grad.double(), plain.weight.grad.double()
    assert float((found - exact).norm() / exact.norm()) < 0.1
    assert not torch.equal(found, exact)


def test_metrics() -> None:
    """Scale, step, largest level and the bits that it needs with its sign."""
    layer = seeded(partial(nn.Linear, 6, 5))
    session = rg.attach(layer, rg.Dither(scale=0.5))
    assert session.metrics()["layers"]["(root)"]["bits"] == 0
    delta = batch((64, 5), 2)
    layer(batch((64, 6))).backward(delta)
    figures = session.metrics()["layers"]["(root)"]
    assert figures["step"] == pytest.approx(0.5 * float(delta.std(correction=0)), rel=1e-5)
    assert 4 <= figures["largest_level"] <= 9
    assert figures["bits"] in (4, 5)
    assert program(layer).total.overhead == 22 * delta.numel()


@pytest.mark.parametrize(
    "options",
    [
        {"scale": -1},
        {"scale": math.nan},
        {"scale": math.inf},
        {"target_sparsity": 0},
        {"target_sparsity": 1},
        {"target_sparsity": 1.5},
        {"target_sparsity": math.nan},
        {"target_sparsity": 0.5, "scale": 0},
        {"bits": 1},
        {"bits": 9},
        {"bits": 7.5},
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, float]) -> None:
    (wrong, *_) = options
    with pytest.raises(OptionError, match=f"Dither: {wrong}"):
        rg.Dither(**options)


# What is kept of x.


KEPT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (partial(nn.Linear, 40, 12), (16, 40)),
    "linear_3d": (partial(nn.Linear, 40, 12), (3, 5, 40)),
    "conv2d": (partial(nn.Conv2d, 6, 8, 3, padding=1, stride=2, groups=2), (4, 6, 9, 8)),
    "transposed": (partial(nn.ConvTranspose2d, 6, 4, 3, stride=2), (3, 6, 5, 4)),
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", KEPT)
def test_kept_in_bits_dw_is_unbiased(name: str, bits: Any) -> None:
    """Over 900 draws the mean of dW is G within 5 σ; dx and db are plain training's."""
    make, shape = KEPT[name]
    plain = seeded(make)
    layer = copy.deepcopy(plain)
    rg.attach(layer, rg.Dither(scale=0, keep=bits), seed=1)
    x = batch(shape)
    exact = gradients(plain, x)
    rule: Any = program(layer).rules[0]
    total, squares, draws = 0.0, 0.0, 900
    for key in range(draws):
        rule._key = torch.tensor([key])
        found = gradients(layer, x)
        dw = found.pop("weight").double()
        total, squares = total + dw, squares + dw.square()
        assert_same(found, {name: value for name, value in exact.items() if name != "weight"}, 1e-6)
    mean = total / draws
    sigma = (squares / draws - mean.square()).clamp_min(0).div(draws).sqrt()
    assert float(sigma.max()) > 0
    tolerance = 5 * sigma + 1e-5 * exact["weight"].abs().max()
    assert bool(((mean - exact["weight"]).abs() <= tolerance).all())


def test_kept_bytes_of_a_network() -> None:
    """Of linear layers behind ReLU: 4 bits and a quarter of an input, and a bit for the ReLU, in place of 32."""
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    plain, x = copy.deepcopy(model), batch((128, 256))
    before = saved_bytes(plain, lambda: plain(x))
    session = rg.attach(model, rg.Dither(keep=4))
    after = saved_bytes(model, lambda: model(x))
    assert before == 4 * 128 * (256 + 512 + 512)
    assert after == 128 * (256 + 512 + 512) * (4 + 0.25) / 8 + 128 * 1024 / 8
    assert before > 6 * after
    session.detach()
    assert saved_bytes(model, lambda: model(x)) == before


def test_each_step_draws_anew_and_resumes(tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, rg.Session, torch.optim.Optimizer]:
        model = seeded(lambda: nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 4)))
        session = rg.attach(model, rg.Dither(keep=2), seed=3)
        return model, session, torch.optim.Adam(model.parameters(), lr=0.01)

    model, session, optimizer = start()
    rule: Any = program(model[0]).rules[0]
    keys = set()
    for _ in range(6):
        keys.add(int(rule._key))
        train(model, optimizer, (8, 16), 1)
    assert len(keys) == 6
    one, first, opt = start()
    for _ in range(3):
        train(one, opt, (8, 16), 1)
    first.save(tmp_path / "session")
    two = seeded(lambda: nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 4)))
    resumed = rg.resume(two, tmp_path / "session")
    two.load_state_dict(one.state_dict())
    opt2 = torch.optim.Adam(two.parameters(), lr=0.01)
    opt2.load_state_dict(opt.state_dict())
    for _ in range(3):
        train(two, opt2, (8, 16), 1)
    assert_bitwise(two.state_dict(), model.state_dict())
    assert resumed.step == session.step == 6


def test_keep_compiled_and_checkpointed() -> None:
    """One graph for all steps; a forward pass that runs twice keeps the same."""
    torch._dynamo.reset()
    make = lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))  # noqa: E731
    ends = []
    for fast in (False, True):
        model = seeded(make)
        _session = rg.attach(model, rg.Dither(scale=0, keep=4), seed=3)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        run: Any = torch.compile(model, fullgraph=True, backend=counter) if fast else model
        train(run, torch.optim.SGD(model.parameters(), lr=0.1), (8, 16), 5)
        ends.append(model.state_dict())
    assert counter.frame_count == 1
    assert_same(ends[1], ends[0], 1e-5)
    torch._dynamo.reset()
    model = seeded(make)
    _session = rg.attach(model, rg.Dither(scale=0, keep=4), seed=3)
    x = batch((8, 16))
    whole = gradients(model, x)
    assert_bitwise(gradients(model, x, lambda y: checkpoint(model, y, use_reentrant=False)), whole)


def test_keep_beside_8_bits_is_refused() -> None:
    with pytest.raises(OptionError, match="keeps the layer's input in 8 bits already"):
        rg.Dither(forward="int8", keep=4)
    with pytest.raises(OptionError, match="keep=3"):
        rg.Dither(keep=3)  # type: ignore[arg-type]

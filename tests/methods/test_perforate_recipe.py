"""Perforate as it is by default: sets of one growth by one product, with a norm, a scaled start, early in the run."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import retrograde as rg
from cases import (
    MODELS,
    Case,
    Turned,
    assert_bitwise,
    assert_same,
    batch,
    cnn,
    conv,
    gradients,
    in_two_ranks,
    mlp,
    program,
    seeded,
)
from dendrite_cases import KINDS, conductor, rule, run, stopped
from retrograde.engine import ranks
from retrograde.errors import OptionError, RetrogradeWarning, StateError
from retrograde.maths.perforate import correlations
from retrograde.methods.perforate import Perforate
from retrograde.methods.perforate.dendrites import Dendritic
from retrograde.methods.perforate.hybrid import HybridRule
from retrograde.methods.perforate.sets import DendriteSets, fan_in

EPSILON = 1e-5


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


def grow(session: rg.Session, spread: float = 0.3) -> None:
    """One more growth at every layer, with parameters and w of size `spread`; 0 leaves them as growth makes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetrogradeWarning)  # hybrid starts that saw nothing: meant here
        for r in conductor(session)._rules.values():
            r.grow(1)
            for i, value in enumerate(r.used[-1].state_dict().values()):
                if spread and value.is_floating_point() and value.dim():
                    value.copy_(spread * batch(value.shape, 50 + i, value.dtype).abs())
                    value.mul_(1 - 2 * (torch.arange(value.numel()).view(value.shape) % 2))
            if r.used[-1].norm is not None and spread:
                r.used[-1].norm.running_var.abs_()


def part(weight: Tensor, plain: nn.Module, sets: int, s: int) -> Tensor:
    """The weight of set s, laid out as the plain layer's."""
    groups = getattr(plain, "groups", 1)
    if isinstance(plain, nn.modules.conv._ConvTransposeNd):
        return weight.unflatten(1, (sets, -1))[:, s]
    if isinstance(plain, Turned):
        return weight.unflatten(1, (sets, -1))[:, s]
    return weight.unflatten(0, (groups, sets, -1))[:, s].flatten(0, 1)


def channels(value: Tensor, plain: nn.Module, sets: int, s: int) -> Tensor:
    """Of set s, (…, C)."""
    return value.unflatten(-1, (getattr(plain, "groups", 1), sets, -1))[..., s, :].flatten(-2)


def wide(values: Tensor, plain: nn.Module) -> Tensor:
    return values.view(-1, *[1] * (plain.weight.dim() - 2))


def by_hand(
    plain: nn.Module,
    state: Mapping[str, Tensor],
    growths: tuple[int, ...],
    x: Tensor,
    *,
    training: bool,
    scale: float = 1.0,
    **call: Any,
) -> Tensor:
    """Equations (1) to (3), set by set, each with the plain layer itself as M_s."""
    own = {k: state[k] for k in plain.state_dict()}
    y = torch.func.functional_call(plain, own, (x,), call)
    earlier: list[Tensor] = []
    for g, sets in enumerate(growths):
        mine = {k.removeprefix(f"dendrites.{g}."): v for k, v in state.items() if f"dendrites.{g}." in k}
        found: list[Tensor] = []
        for s in range(sets):
            values = {k: torch.zeros_like(v) for k, v in own.items()}
            values["weight"] = part(mine["weight"], plain, sets, s)
            if "bias" in mine:
                values["bias"] = channels(mine["bias"], plain, sets, s)
            z = torch.func.functional_call(plain, values, (x,), call)
            axis = z.dim() - 1 - (plain.weight.dim() - 2)
            for e, a in enumerate(earlier if "cascade" in mine else ()):
                z = z + wide(channels(mine["cascade"][e], plain, sets, s), plain) * a
            if "norm.weight" in mine:
                rows = [d for d in range(z.dim()) if d != axis]
                mean, variance = z.mean(rows), z.var(rows, correction=0)
                if not training or z.numel() == plain.weight.shape[0]:
                    mean = channels(mine["norm.running_mean"], plain, sets, s)
                    variance = channels(mine["norm.running_var"], plain, sets, s)
                gamma, beta = (channels(mine[f"norm.{n}"], plain, sets, s) for n in ("weight", "bias"))
                z = (z - wide(mean, plain)) / (wide(variance, plain) + EPSILON).sqrt()
                z = wide(gamma, plain) * z + wide(beta, plain)
            found.append(torch.relu(z))
            y = y + wide(scale * channels(mine["output"], plain, sets, s), plain) * found[-1]
        earlier += found
    return y


GROWTHS: list[dict[str, Any]] = [
    {"max_dendrites": 3},
    {"max_dendrites": 3, "at_once": 2},
    {"max_dendrites": 3, "at_once": 2, "cascade": True},
    {"max_dendrites": 2, "norm": None},
]


def test_defaults() -> None:
    """The recipe of which the page speaks; the papers' rule keeps what is its own."""
    method = Perforate()
    assert (method.rule, method.norm, method.activation, method.initial) == (
        "gradient",
        "batch",
        "relu",
        "scaled",
    )
    assert (method.grow_after, method.cascade, method.growths, method.output_scale) == (
        0.2,
        False,
        (3,),
        None,
    )
    papers = Perforate(rule="perforated", activation="tanh", cascade=True)
    assert not papers.normalises
    assert not papers.scales_start
    assert not papers.samples
    assert (papers.growths, papers.output_scale, papers.first_growth) == ((1, 1, 1), 1.0, None)
    assert papers.for_run(1000).grow_after is None
    assert Perforate(max_dendrites=5, at_once=2).growths == (2, 2, 1)


def test_options() -> None:
    bad: list[dict[str, Any]] = [
        {"norm": "layer"},
        {"initial": "zero"},
        {"scale": 0.0},
        {"scale": float("inf")},
        {"at_once": 0},
        {"at_once": 4},
        {"at_once": 2, "rule": "perforated"},
        {"cascade": True, "at_once": 3},
        {"grow_after": 1.5},
        {"grow_after": -1},
        {"grow_after": 10, "rule": "perforated"},
        {"candidates": 2, "rule": "hybrid"},
        {"fit_steps": 0},
        {"fit_rows": 0},
    ]
    for options in bad:
        with pytest.raises(OptionError, match=next(iter(options))):
            Perforate(**options)


# Where, and at what cost.


def test_placement() -> None:
    """More than four inputs for an output: left, with the numbers; a name brings it back."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Conv2d(4, 4, 3),
        nn.ConvTranspose2d(8, 4, 4, stride=2),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    model.append(nn.Linear(17, 4))
    rows = {row.name: row for row in rg.make_plan(model, Perforate()).rows}
    assert [rows[n].status for n in ("0", "1", "2", "4", "5")] == [
        "attached",
        "left",
        "left",
        "attached",
        "left",
    ]
    assert "36 inputs for 4 outputs" in rows["1"].why
    assert "17 inputs for 4 outputs" in rows["5"].why
    # Each output of a transposed convolution adds up the inputs of 16/4 of the kernel's places.
    assert "32 inputs for 4 outputs" in rows["2"].why
    rows = {row.name: row for row in rg.make_plan(model, Perforate(where=("1", "5"))).rows}
    assert [n for n, row in rows.items() if row.status == "attached"] == ["1", "5"]


@pytest.mark.parametrize("options", GROWTHS, ids=str)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_cost(case: Case, options: dict[str, Any]) -> None:
    """The plan's number of parameters is what attaching adds, and no wider plain layer has as few."""
    layer = case.make()
    own = sum(p.numel() for p in layer.parameters())
    session = rg.attach(layer, Perforate(where="*", **options))
    added = sum(p.numel() for p in layer.parameters()) - own
    (row,) = session.plan.rows
    assert f"{added:,} parameters" in row.why
    assert f"{added:,} parameters for dendrites on 1 layers, beside {own:,}" in session.plan.notes[0]
    assert session.metrics()["perforate"]["parameters_bound"] == added
    outputs = layer.dendrites[0].output.numel() // layer.dendrites[0].sets
    assert own % outputs == 0
    wider = int(row.why.split("a plain layer of ")[1].split(" outputs in place of ")[0])
    assert wider * own // outputs <= own + added < (wider + 1) * own // outputs


def test_notes() -> None:
    """Said of networks without normalisation alone, and of dendrites with a norm."""
    with_norm, without = rg.make_plan(cnn(), Perforate()), rg.make_plan(mlp(), Perforate())
    assert len(with_norm.notes) == 1
    assert "no normalisation" in without.notes[1]
    assert len(rg.make_plan(mlp(), Perforate(norm=None)).notes) == 1
    assert "no normalisation" in str(without)


def test_when_it_grows() -> None:
    """A share of the run, a step, or a plateau where the run's length is not known; another share is refused then."""
    model = mlp()
    assert "after step 20" in rg.make_plan(model, Perforate(), steps=100).rows[0].why
    assert "after step 7" in rg.make_plan(model, Perforate(grow_after=7)).rows[0].why
    why = rg.make_plan(model, Perforate()).rows[0].why
    assert "validated" in why
    assert "attach(…, steps=…)" in why
    assert "steps=" not in rg.make_plan(model, Perforate(grow_after=None)).rows[0].why
    with pytest.raises(OptionError, match=r"grow_after=0\.3.*steps"):
        rg.make_plan(model, Perforate(grow_after=0.3))
    assert "validated" in rg.make_plan(model, Perforate(rule="perforated"), steps=100).rows[0].why


# What a layer computes.


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", GROWTHS, ids=str)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_growth_preserves_the_function(case: Case, options: dict[str, Any], autocast: bool) -> None:
    """Bit for bit, in training and evaluation, with none and with other dendrites there before."""
    layer = case.make()
    session = rg.attach(layer, Perforate(where="*", **options))
    x = batch(case.shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for growth in range(len(session.methods[0].growths)):  # type: ignore[attr-defined]
            trained = layer.train()(x, **case.call)
            evaluated = layer.eval()(x, **case.call)
            grow(session, spread=0)
            assert rule(layer).state.growths == growth + 1
            assert torch.equal(layer(x, **case.call), evaluated)
            assert torch.equal(layer.train()(x, **case.call), trained)
            assert layer(x, **case.call).dtype == trained.dtype
            layer.dendrites[growth].output.data.copy_(batch(layer.dendrites[growth].output.shape))
            assert not torch.equal(layer(x, **case.call), trained)


@pytest.mark.parametrize("options", GROWTHS, ids=str)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_forward_and_fold(case: Case, options: dict[str, Any]) -> None:
    """As a network written set by set, in training and evaluation; the folded layer computes the same bits."""
    layer = case.make()
    session = rg.attach(layer, Perforate(where="*", **options))
    growths = session.methods[0].growths  # type: ignore[attr-defined]
    for _ in growths:
        grow(session)
    x = batch(case.shape)
    folded = session.fold()
    assert isinstance(folded, Dendritic)
    assert not any("scale" in key for key in folded.state_dict())
    # Training moves the statistics of a folded norm, as of any.
    for training in (False, True):
        state, scale = copy.deepcopy(layer.state_dict()), 5.0
        expected = by_hand(case.make(), state, growths, x, training=training, scale=scale, **case.call)
        found = layer.train(training)(x, **case.call)
        torch.testing.assert_close(found, expected)
        assert torch.equal(folded.train(training)(x, **case.call), found)


@pytest.mark.parametrize("options", GROWTHS, ids=str)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_gradients(case: Case, options: dict[str, Any]) -> None:
    """Of the layer's own and of the dendrites' parameters, and of the input: autograd's, through the equations."""
    layer, plain = case.make().double(), case.make().double()
    session = rg.attach(layer, Perforate(where="*", **options))
    growths = session.methods[0].growths  # type: ignore[attr-defined]
    for _ in growths:
        grow(session)
    x = batch(case.shape, dtype=torch.float64)

    def forward(y: Tensor, **call: Any) -> Tensor:
        state = {**dict(layer.named_buffers()), **dict(layer.named_parameters())}
        return by_hand(plain, state, growths, y, training=True, scale=5.0, **call)

    found = gradients(layer, x, **case.call)
    assert_same(found, gradients(layer, x, forward, **case.call), 1e-6)
    parts = {"dendrites.0.weight", "dendrites.0.output"}
    parts |= {"dendrites.0.norm.weight", "dendrites.0.norm.bias"} if "norm" not in options else set()
    parts |= {"dendrites.1.cascade"} if options.get("cascade") else set()
    assert {"weight", "input"} | parts <= found.keys()
    assert all(bool(found[name].any()) for name in parts)


def test_one_product() -> None:
    """Three sets cost one product of three times the outputs, and nothing is put together for it in a step."""
    layer = nn.Linear(16, 8)
    session = rg.attach(layer, Perforate(norm=None))
    grow(session)
    x = batch((32, 16))
    with torch.profiler.profile() as profile:
        layer(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::addmm"] == 2
    assert "aten::cat" not in counts
    gradients(layer, x)
    flops = session.flops()
    # One forward product and two backward ones, of three sets.
    assert flops.overhead == 3 * 3 * flops.forward.dense


@pytest.mark.parametrize("shape", [(6,), (1, 6)])
def test_a_single_row(shape: tuple[int, ...]) -> None:
    """It has no variance: running statistics take its place, and learn nothing from it."""
    layer = nn.Linear(6, 5)
    session = rg.attach(layer, Perforate())
    grow(session)
    norm = layer.dendrites[0].norm
    before = copy.deepcopy(norm.state_dict())
    x = batch(shape)
    assert torch.equal(layer(x), layer.eval()(x))
    gradients(layer.train(), x)
    torch.optim.SGD(layer.parameters(), lr=0.0).step()
    assert_bitwise(norm.state_dict(), before)


def test_batches_of_one() -> None:
    """Nothing is ever known of the variance, and nothing is divided by none."""
    layer = seeded(lambda: nn.Linear(6, 5))
    session = rg.attach(layer, Perforate(grow_after=1))
    run(layer, torch.optim.SGD(layer.parameters(), lr=0.05), 0, 5, (1, 6))
    norm = layer.dendrites[0].norm
    assert torch.equal(norm.running_var, torch.ones_like(norm.running_var))
    assert conductor(session).dendrites == 3
    assert float(layer(batch((1, 6))).detach().abs().max()) < 10


@pytest.mark.parametrize("half", [False, True])
def test_half_precision(half: bool) -> None:
    """Under autocast, and of a model in half precision besides: the layer's output type, finite, and it learns."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Conv1d(4, 4, 3, padding=1))
    if half:
        model.half()
    session = rg.attach(model, Perforate())
    grow(session)
    x = batch((3, 4, 6))
    with torch.autocast("cpu", torch.bfloat16):
        z = model(x)
        assert z.dtype == torch.bfloat16
        assert torch.isfinite(z).all()
    z.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


# Statistics.


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_start_is_scaled_and_primed(case: Case) -> None:
    """After a step: z has about unit variance, and the norm's statistics are those of z."""
    layer = seeded(case.make)
    rg.attach(layer, Perforate(where="*", grow_after=1, max_dendrites=4), seed=3)
    x = 7 * batch(case.shape)
    gradients(layer, x, **case.call)
    torch.optim.SGD(layer.parameters(), lr=0.0).step()
    sets = layer.dendrites[0]
    assert rule(layer).active == 4
    values: dict[str, Tensor] = {}
    plain = case.make()
    zero = {k: torch.zeros_like(v) for k, v in plain.state_dict().items()}
    found: list[tuple[Tensor, Tensor]] = []
    for s in range(4):
        values = {**zero, "weight": part(sets.weight.detach(), plain, 4, s)}
        z = torch.func.functional_call(plain, values, (x,), case.call)
        axis = z.dim() - 1 - (plain.weight.dim() - 2)
        rows = z.movedim(axis, -1).reshape(-1, z.shape[axis])
        found.append((rows.mean(0), rows.var(0, correction=0)))
    mean = torch.stack([channels(sets.norm.running_mean, plain, 4, s) for s in range(4)])
    variance = torch.stack([channels(sets.norm.running_var, plain, 4, s) for s in range(4)])
    true_mean, true_variance = (torch.stack(values) for values in zip(*found, strict=True))
    assert 0.2 < float(variance.mean()) < 2.5
    if "transposed" in case.name:
        # At its edges fewer pixels meet than elsewhere.
        assert 0.25 < float(true_variance.mean() / variance.mean()) < 4
    elif x.numel() <= 3 * 4 * 9 * 8:
        torch.testing.assert_close(mean, true_mean, rtol=0.05, atol=0.1)
        torch.testing.assert_close(variance, true_variance, rtol=0.3, atol=0.05)
    assert torch.equal(sets.norm.weight, torch.ones_like(sets.norm.weight))
    assert 0.5 < float(sets.norm.bias.detach().std()) < 1.6
    assert not bool(sets.output.any())


def test_fan_in() -> None:
    for make, expected in (
        (lambda: nn.Linear(7, 3), 7),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), 18),
        (lambda: nn.ConvTranspose2d(4, 6, 4, stride=2), 16),
        (lambda: Turned(7, 3), 7),
    ):
        layer = make()
        kind = rg.make_plan(layer, Perforate(where="*")).rows[0]
        assert kind.status == "attached"
        session = rg.attach(layer, Perforate(where="*"))
        assert fan_in(rule(layer)._map, layer.weight.shape) == expected
        session.detach()


def test_running_statistics() -> None:
    """A step takes in the mean of its forward passes, by the norm's momentum; to run them twice changes nothing."""
    x, y = batch((16, 6), 1), batch((16, 6), 2)
    states: list[dict[str, Tensor]] = []
    for twice in (False, True):
        layer = seeded(lambda: nn.Linear(6, 5))
        session = rg.attach(layer, Perforate())
        grow(session)
        norm = layer.dendrites[0].norm
        before = copy.deepcopy(norm.state_dict())
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        for part_of in (x, y):
            z = checkpoint(layer, part_of, use_reentrant=False) if twice else layer(part_of)
            z.square().sum().backward()
        assert_bitwise(norm.state_dict(), before)
        optimizer.step()
        states.append(copy.deepcopy(norm.state_dict()))
        weight = layer.dendrites[0].weight
        z = [F.linear(each, weight) for each in (x, y)]
        mean = (z[0].mean(0) + z[1].mean(0)) / 2
        variance = (z[0].var(0) + z[1].var(0)) / 2
        torch.testing.assert_close(norm.running_mean, 0.9 * before["running_mean"] + 0.1 * mean)
        torch.testing.assert_close(norm.running_var, 0.9 * before["running_var"] + 0.1 * variance)
        assert int(norm.num_batches_tracked) == 1
        # A pass without a gradient, in training as by `update_bn`, is taken in at once.
        norm.momentum = None
        with torch.no_grad():
            layer(x)
        assert int(norm.num_batches_tracked) == 2
    assert_bitwise(states[1], states[0])


def test_a_batch_that_overflowed() -> None:
    """It leaves the running statistics of its channels as they are."""
    layer = nn.Linear(6, 5)
    session = rg.attach(layer, Perforate())
    grow(session)
    norm = layer.dendrites[0].norm
    before = copy.deepcopy(norm.state_dict())
    layer(torch.full((4, 6), torch.inf)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.0).step()
    assert torch.equal(norm.running_mean, before["running_mean"])
    assert torch.equal(norm.running_var, before["running_var"])


def test_a_frozen_norm_stays() -> None:
    """Whoever puts norms into evaluation puts these, too."""
    layer = nn.Linear(6, 5)
    session = rg.attach(layer, Perforate())
    grow(session)
    x = batch((16, 6))
    for module in layer.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    before = copy.deepcopy(layer.dendrites[0].norm.state_dict())
    trained = layer(x)
    trained.sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.0).step()
    assert torch.equal(trained, layer.eval()(x))
    assert_bitwise(layer.dendrites[0].norm.state_dict(), before)


# The scale of w.

OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], float]] = {
    "adam": (torch.optim.Adam, 5.0),
    "adamw": (torch.optim.AdamW, 5.0),
    "rmsprop": (torch.optim.RMSprop, 5.0),
    "sgd": (torch.optim.SGD, 5.0**0.5),
    "asgd": (torch.optim.ASGD, 5.0**0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scale_follows_the_optimizer(name: str) -> None:
    make, scale = OPTIMIZERS[name]
    layer = nn.Linear(6, 5)
    rg.attach(layer, Perforate(grow_after=2))
    run(layer, make(layer.parameters(), lr=0.001), 0, 3, (16, 6))
    assert rule(layer).active == 3
    assert float(layer.dendrites[0].scale) == pytest.approx(scale)
    given = nn.Linear(6, 5)
    rg.attach(given, Perforate(grow_after=2, scale=2.5))
    run(given, make(given.parameters(), lr=0.001), 0, 3, (16, 6))
    assert float(given.dendrites[0].scale) == 2.5


class Around(torch.optim.Optimizer):
    """Steps another one, which it keeps as sharpness-aware optimizers do."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.base_optimizer = inner
        super().__init__(inner.param_groups, inner.defaults)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base_optimizer.step()


def test_scale_of_an_optimizer_around_another() -> None:
    layer = nn.Linear(6, 5)
    rg.attach(layer, Perforate(grow_after=1))
    run(layer, Around(torch.optim.SGD(layer.parameters(), lr=0.001)), 0, 2, (16, 6))
    assert float(layer.dendrites[0].scale) == pytest.approx(5.0**0.5)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_scaled_weight_learns_five_times_as_fast(name: str) -> None:
    """The first step after growth moves s·w by five times what it would move a weight in its place."""
    rate = 0.01
    layer = nn.Linear(6, 5)
    session = rg.attach(layer, Perforate(grow_after=1))
    optimizer = OPTIMIZERS[name][0](layer.parameters(), lr=rate)
    run(layer, optimizer, 0, 1, (16, 6))
    assert rule(layer).active == 3
    x = batch((16, 6), 2)
    sets: DendriteSets = layer.dendrites[0]
    a = sets.activations(x, rule(layer)._map, "relu", [], detached=True, aside=True)
    optimizer.zero_grad()
    z = layer(x)
    (delta,) = torch.autograd.grad(torch.sin(z).square().mean(), z, retain_graph=True)
    torch.sin(z).square().mean().backward()
    optimizer.step()
    moved = (sets.scale * sets.output).detach()
    gradient = (a.unflatten(1, (3, 5)) * delta.unsqueeze(1)).sum(0).flatten()
    if name == "adam":
        torch.testing.assert_close(moved, -5 * rate * gradient.sign(), rtol=1e-3, atol=1e-7)
    else:
        torch.testing.assert_close(moved, -5 * rate * gradient, rtol=1e-4, atol=1e-9)
    assert session.metrics()["perforate"]["dendrites"] == 3


def test_scale_is_set_once_the_optimizer_is_known() -> None:
    """Growth before the first step: the factor of that step's gradient is put right as well."""
    found: list[Tensor] = []
    for early in (True, False):
        layer = seeded(lambda: nn.Linear(6, 5))
        session = rg.attach(layer, Perforate(scale=None if early else 5.0**0.5), seed=1)
        grow(session, spread=0)
        run(layer, torch.optim.SGD(layer.parameters(), lr=0.01), 0, 1, (16, 6))
        found.append(layer.dendrites[0].output.detach().clone())
    assert bool(found[0].any())
    torch.testing.assert_close(found[0], found[1])


# Growth within a run.


def test_grows_at_its_share_of_the_run() -> None:
    """All sets, once; moments of other parameters go on, those of the new ones begin; nothing is restored."""
    model = seeded(mlp)
    session = rg.attach(model, Perforate(), steps=20)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    parameters = list(optimizer.param_groups[0]["params"])
    for step in range(20):
        run(model, optimizer, step, step + 1, (16, 8))
        session.validated(-float(step))
        assert conductor(session).dendrites == (3 if step >= 3 else 0)
        assert conductor(session).phase == "neuron"
    assert [mark[:1] + mark[2:] for mark in conductor(session).marks] == [(4, "3 dendrites", 3)]
    assert len(optimizer.param_groups) == 1
    assert all(a is b for a, b in zip(parameters, optimizer.param_groups[0]["params"], strict=True))
    assert int(optimizer.state[model[0].weight]["step"]) == 20
    assert int(optimizer.state[model[0].dendrites[0].weight]["step"]) == 16
    assert bool(model[0].dendrites[0].output.any())
    figures = session.metrics()["perforate"]
    assert figures["best"] == 0.0
    assert figures["grow_after"] == 4
    assert "bound" not in figures
    assert figures["parameters_added"] == figures["parameters_bound"]


def test_several_growths_at_once() -> None:
    """Where sets cascade, each growth is a product of its own, and all of them grow at that step."""
    model = seeded(mlp)
    session = rg.attach(model, Perforate(cascade=True, grow_after=2))
    run(model, torch.optim.Adam(model.parameters(), lr=0.01), 0, 4, (16, 8))
    assert [sets.sets for sets in rule(model[0]).used] == [1, 1, 1]
    assert bool(model[0].dendrites[2].cascade.all())
    assert conductor(session).dendrites == 3


def test_plateau_grows_all_sets_at_once() -> None:
    model = seeded(mlp)
    session = rg.attach(model, Perforate(patience=1, tries=1, limit=5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for score in (1.0, 0.0, 0.5):
        run(model, optimizer, 0, 1, (16, 8))
        session.validated(score)
    assert conductor(session).phase == "finished"
    assert conductor(session).growths == 1
    assert session.metrics()["perforate"]["dendrites"] == 0
    assert session.metrics()["perforate"]["bound"] == 5 + 5


@pytest.mark.parametrize("decay", [False, True])
def test_learning_rate_restarts_for_what_is_new(decay: bool) -> None:
    """At the schedule's largest rate, then in its shape; other parameters keep the schedule."""
    model = nn.Sequential(nn.Linear(6, 5))
    rg.attach(model, Perforate(grow_after=4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    factor = (lambda step: (10 - step) / 10) if decay else (lambda step: 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    steps: list[tuple[float, float]] = []
    for step in range(6):
        before = [p.detach().clone() for p in (model[0].weight, model[0].dendrites[0].output)]
        run(model, optimizer, step, step + 1, (16, 6))
        after = model[0].weight.detach(), model[0].dendrites[0].output.detach()
        steps.append(tuple(float((b - a).abs().max()) for a, b in zip(before, after, strict=True)))  # type: ignore[arg-type]
        schedule.step()
    assert steps[3][1] == 0
    # Adam's first step is the rate: 0.006 by the schedule, restarted at 0.01.
    assert steps[4][1] == pytest.approx(0.01, rel=1e-3)
    assert steps[4][0] < (0.0075 if decay else 0.0125)
    # The second one follows the schedule's shape: 0.005 · 0.01/0.006.
    assert steps[5][1] <= (0.005 / 0.006 if decay else 1.0) * 0.0101


def test_a_rate_that_still_rises_is_not_restarted() -> None:
    """Growth within a warm-up: new parameters have the schedule's rate."""
    model = nn.Sequential(nn.Linear(6, 5))
    rg.attach(model, Perforate(grow_after=2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10)
    for step in range(3):
        run(model, optimizer, step, step + 1, (16, 6))
        schedule.step()
    assert float(model[0].dendrites[0].output.detach().abs().max()) == pytest.approx(0.003, rel=1e-3)


def test_overfitting_is_said_once() -> None:
    session = rg.attach(mlp(), Perforate())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.validated(0.55, train=0.59)
        session.validated(-1.05, train=-1.0)
    with pytest.warns(RetrogradeWarning, match=r"0\.59, is far above.*0\.48: the network overfits"):
        session.validated(0.48, train=0.59)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.validated(0.47, train=0.6)
    late = rg.attach(mlp(), Perforate())
    grow(late)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        late.validated(0.1, train=0.9)


@pytest.mark.parametrize("learning", ["gradient", "hybrid"])
@pytest.mark.parametrize("stop", [2, 4, 6, 9, 14])
def test_resumes_bit_for_bit(stop: int, learning: Any) -> None:
    """Before growth, within a phase, right after and later, with a schedule: as if not interrupted."""
    total = 18

    def made() -> tuple[Any, ...]:
        model = seeded(net)
        method = Perforate(rule=learning, where="*", grow_after=0.25, fit_rows=40, fit_steps=5)
        session = rg.attach(model, method, seed=1, steps=20)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, session, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)

    def train(
        model: nn.Module, optimizer: Any, session: Any, schedule: Any, first: int, last: int
    ) -> set[str]:
        phases: set[str] = set()
        for step in range(first, last):
            run(model, optimizer, step, step + 1, SHAPE)
            schedule.step()
            phases.add(conductor(session).phase)
        return phases

    whole, second, phases = stopped(made, train, stop, total)
    assert_bitwise(second[0].state_dict(), whole[0].state_dict())
    assert second[2].metrics() == whole[2].metrics()
    assert conductor(whole[2]).dendrites == 3
    assert ("dendrite" in phases) == (learning == "hybrid")


# The fitted start.


def test_hybrid_fits_the_error() -> None:
    """Dendrites follow δ far better than as they were drawn; the network stays as it was while pairs are kept."""
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)))
    session = rg.attach(model, Perforate(rule="hybrid", grow_after=1, fit_rows=400), seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step(n: int) -> None:
        x = batch((64, 6), n)
        optimizer.zero_grad()
        ((model(x) - torch.sin(3 * x[:, :2]) * x[:, 2:4]) ** 2).mean().backward()
        optimizer.step()

    step(0)
    assert conductor(session).phase == "dendrite"
    before = {k: v.clone() for k, v in model.state_dict().items() if "num_batches" not in k}
    pairs = rule(model[0])
    assert isinstance(pairs, HybridRule)
    # 400 rows by 51 of each call.
    for n in range(1, 9):
        step(n)
        if n < 8:
            assert conductor(session).phase == "dendrite"
            assert_bitwise({k: v for k, v in model.state_dict().items() if k in before}, before)
    assert conductor(session).phase == "neuron"
    assert model[1].momentum == 0.1
    assert rule(model[0]).active == 3
    assert not bool(model[0].dendrites[0].output.any())
    x = batch((1000, 6), 50)
    z = model[0](x)
    loss = ((model[3](model[2](model[1](z))) - torch.sin(3 * x[:, :2]) * x[:, 2:4]) ** 2).mean()
    (delta,) = torch.autograd.grad(loss, z)
    fitted = model[0].dendrites[0]
    drawn = copy.deepcopy(fitted)
    torch.manual_seed(5)
    drawn.weight.data.normal_(std=6**-0.5)
    drawn.norm.bias.data.normal_()
    found: list[float] = []
    for sets in (fitted, drawn):
        a = sets.activations(x, rule(model[0])._map, "relu", [], detached=True, aside=True)
        found.append(float(correlations(a.detach(), delta.repeat(1, 3)).abs().mean()))
    assert found[0] > 2 * found[1]
    assert found[0] > 0.1
    assert session.metrics()["layers"]["0"]["correlation"] > 0.1
    step(9)
    assert bool(model[0].dendrites[0].output.any())


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_hybrid_on_every_kind(case: Case) -> None:
    """Growth keeps the function, fitted statistics are those of z, and what follows is the gradient rule."""
    layer = seeded(case.make)
    method = Perforate(
        rule="hybrid", where="*", grow_after=1, fit_rows=40, fit_steps=3, cascade=True, at_once=2
    )
    session = rg.attach(layer, method, seed=2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    x = batch(case.shape)

    def step() -> None:
        optimizer.zero_grad()
        torch.sin(layer(x, **case.call)).square().mean().backward()
        optimizer.step()

    step()
    expected = layer(x, **case.call)
    for _ in range(200):
        if conductor(session).phase == "neuron":
            break
        step()
    assert rule(layer).active == 3
    assert torch.equal(layer(x, **case.call), expected)
    step()
    step()
    assert bool(layer.dendrites[0].output.any())
    learning = {n for n, p in layer.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {"dendrites.0.weight", "dendrites.1.weight", "dendrites.1.output"} <= learning


def test_hybrid_needs_the_input() -> None:
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8))
    rows = {row.name: row for row in rg.make_plan(model, Perforate(rule="hybrid", where="*")).rows}
    assert "weight frozen" in rows["0"].why
    session = rg.attach(model, Perforate(rule="hybrid", grow_after=1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    run(model, optimizer, 0, 1, (16, 8))
    assert conductor(session).phase == "dendrite"
    model[1].weight.requires_grad_(False)
    with pytest.raises(OptionError, match=r"layer '1'.*not kept"):
        torch.sin(model(batch((16, 8)).requires_grad_())).mean().backward()


def test_hybrid_without_an_error() -> None:
    """A layer that no error reaches starts as it is drawn, and that is said."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    session = rg.attach(model, Perforate(rule="hybrid"))
    with pytest.warns(RetrogradeWarning, match="saw no error"):
        conductor(session)._rules["0"].grow(1)
    assert bool(model[0].dendrites[0].weight.any())


# Copies, averages and states.

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("make_copy", COPIES)
def test_copies_compute_the_same(make_copy: str) -> None:
    """Keys, values and function in both modes, before growth and after; and a copy's norms learn as BatchNorm does."""
    model = seeded(net)
    session = rg.attach(model, Perforate(where="*"))
    x = batch(SHAPE)
    for growths in (0, 1):
        if growths:
            grow(session)
        copied = COPIES[make_copy](model)
        assert_bitwise(copied.state_dict(), model.state_dict())
        assert torch.equal(copied.eval()(x), model.eval()(x))
        assert torch.equal(copied.train()(x), model.train()(x))
    before = copied[0].dendrites[0].norm.running_mean.clone()
    copied(x)
    assert not torch.equal(copied[0].dendrites[0].norm.running_mean, before)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("learning", ["gradient", "hybrid"])
def test_an_average_follows_growth(learning: Any, buffers: bool) -> None:
    """Made before any dendrite; its every update is the attached model's present state, norms included."""
    model = seeded(net)
    session = rg.attach(model, Perforate(rule=learning, where="*", grow_after=3, fit_rows=20, fit_steps=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    latest = lambda average, value, count: value  # noqa: E731
    average = AveragedModel(model, avg_fn=latest, use_buffers=buffers)
    x = batch(SHAPE)
    for step in range(12):
        run(model, optimizer, step, step + 1, SHAPE)
        average.update_parameters(model)
        assert torch.equal(average.eval()(x), model.eval()(x))
        model.train()
    assert conductor(session).dendrites == 3
    assert bool(average.module[0].dendrites[0].output.any())


def test_an_exponential_average() -> None:
    """Of every parameter; the norms' statistics are then taken anew, by torch's own means."""
    model = seeded(mlp)
    rg.attach(model, Perforate(grow_after=2))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(6):
        run(model, optimizer, step, step + 1, (16, 8))
        average.update_parameters(model)
    first = average.module[0]
    plain = seeded(mlp)[0]
    x = batch((64, 8))
    expected = by_hand(plain, first.state_dict(), (3,), x, training=False, scale=5.0**0.5)
    torch.testing.assert_close(average.eval().module[0](x), expected)
    update_bn([x], average)
    z = F.linear(x, first.dendrites[0].weight)
    torch.testing.assert_close(first.dendrites[0].norm.running_mean, z.mean(0), rtol=1e-4, atol=1e-6)


def test_folded_trains_on() -> None:
    """As the attached model would: the same gradients, and norms that learn."""
    model = seeded(net)
    session = rg.attach(model, Perforate(where="*"))
    grow(session)
    folded = session.fold()
    x = batch(SHAPE)
    before = folded[0].dendrites[0].norm.running_mean.clone()
    found, expected = gradients(folded, x), gradients(model, x)
    scales = {n: 5.0 if n.endswith("output") else 1.0 for n in expected}
    assert_same(found, {n: v / scales[n] for n, v in expected.items()}, 1e-5)
    assert not torch.equal(folded[0].dendrites[0].norm.running_mean, before)
    other = rg.attach(folded, rg.Dither(scale=0))
    torch.testing.assert_close(gradients(folded, x)["input"], found["input"])
    other.detach()
    rows = {row.name: row for row in rg.make_plan(folded, [Perforate(), rg.Dither()], strict=False).rows}
    assert "already" in rows["0"].why


def test_a_plain_state_means_no_dendrites() -> None:
    """It loads strictly, and gives the plain function; growth then starts anew."""
    model = seeded(net)
    session = rg.attach(model, Perforate(where="*"))
    grow(session)
    plain = seeded(net, 1)
    x = batch(SHAPE)
    for loaded in (model, copy.deepcopy(model)):
        answer = loaded.load_state_dict(plain.state_dict(), strict=True)
        assert answer.missing_keys == answer.unexpected_keys == []
        assert torch.equal(loaded.eval()(x), plain.eval()(x))
        norm = loaded[0].dendrites[0].norm
        assert torch.equal(norm.running_var, torch.ones_like(norm.running_var))
    assert conductor(session).dendrites == 0
    grow(session, spread=0)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_brings_the_dendrites(assign: bool) -> None:
    one, two = seeded(net), seeded(net, 1)
    session = rg.attach(one, Perforate(where="*", scale=3.0))
    grow(session)
    rg.attach(two, Perforate(where="*"))
    two.load_state_dict(copy.deepcopy(one.state_dict()), assign=assign)
    assert [rule(two[i]).active for i in (0, 3, 7)] == [3, 3, 3]
    x = batch(SHAPE)
    assert torch.equal(one.eval()(x), two.eval()(x))


def test_states_of_an_earlier_version_are_refused() -> None:
    """Whose sets were separate parameters: by the attached model, by copies, and as a whole pickle."""
    model = seeded(mlp)
    session = rg.attach(model, Perforate())
    earlier = {**seeded(mlp).state_dict(), "0.dendrite_weight_0": torch.ones(16, 8)}
    earlier["0.dendrite_output_0"] = torch.ones(16)
    for loaded in (model, copy.deepcopy(model)):
        for strict in (True, False):
            with pytest.raises(StateError, match=r"'0\.dendrite_output_0' and 1 more"):
                loaded.load_state_dict(earlier, strict=strict)
    grow(session)
    folded = session.fold()
    state = folded[0]._dendrite_state
    state.__dict__.clear()
    state.__dict__.update(count=1, capacity=1, activation="tanh", detached=False)
    with pytest.raises(StateError, match="earlier version"):
        pickle.loads(pickle.dumps(folded))
    whole = session.state_dict()
    del whole["conductors"]["perforate"]["stage"]["rates"]
    with pytest.raises(StateError, match="rates"):
        session.load_state_dict(whole)


def test_saved_session(tmp_path: Path) -> None:
    """The file knows the options, shares in steps."""
    model = seeded(mlp)
    session = rg.attach(model, Perforate(max_dendrites=2), steps=20)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    run(model, optimizer, 0, 6, (16, 8))
    session.save(tmp_path / "session.pt")
    again = seeded(mlp, 1)
    resumed = rg.resume(again, tmp_path / "session.pt")
    again.load_state_dict(model.state_dict())
    assert resumed.methods == (Perforate(max_dendrites=2, grow_after=4),)
    assert conductor(resumed).dendrites == 2
    x = batch((16, 8))
    assert torch.equal(again.eval()(x), model.eval()(x))


# Compilers, checkpoints, ranks.


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", MODELS)
def test_compiled_and_checkpointed(name: str) -> None:
    """fullgraph and activation checkpointing give the eager gradients, and compiled steps the eager statistics."""
    make, shape = MODELS[name]
    model = seeded(make)
    session = rg.attach(model, Perforate(where="*"))
    grow(session)
    x = batch(shape)
    seen = model[0].dendrites[0].norm.seen
    eager, once = gradients(model, x), seen.clone()
    assert bool(once.any())
    seen.zero_()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(gradients(model, x, fast), eager, 1e-5)
    torch.testing.assert_close(seen, once)
    saved = gradients(model, x, lambda y: checkpoint(model, y, use_reentrant=False))
    assert_same(saved, eager, 1e-6)
    model.eval()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    run(model.train(), torch.optim.SGD(model.parameters(), lr=0.01), 0, 2, shape)


def test_export_of_the_folded_model() -> None:
    model, x = seeded(mlp), batch((2, 8))
    session = rg.attach(model, Perforate())
    grow(session)
    folded = session.fold().eval()
    torch.testing.assert_close(torch.export.export(folded, (x,)).module()(x), folded(x))


def worker(rank: int, folder: str) -> None:
    found: dict[str, Any] = {}
    for parallel in (nn.parallel.DistributedDataParallel, fully_shard):
        for learning in ("gradient", "hybrid"):
            model = seeded(
                lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 8))
            )
            torch.manual_seed(rank)  # drawn numbers must not depend on the rank's seed
            method = Perforate(rule=learning, where="*", grow_after=2, fit_rows=32, fit_steps=3)  # type: ignore[arg-type]
            session = rg.attach(model, method)
            made: Any = parallel(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
            for step in range(10):
                optimizer.zero_grad()
                torch.sin(made(batch((8, 2, 4, 4), seed=10 * step + rank))).square().mean().backward()
                optimizer.step()
                schedule.step()
            state = {name: ranks.whole(value).clone() for name, value in model.state_dict().items()}
            found[f"{parallel.__name__} {learning}"] = {**state, "sets": conductor(session).dendrites}
    torch.save(found, f"{folder}/rank{rank}.pt")


def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts, growth and running statistics are the same on both ranks, sharded or not."""
    in_two_ranks(worker, tmp_path, monkeypatch)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(one) == 4
    for how, state in one.items():
        other = two[how]
        assert state.pop("sets") == other.pop("sets") == 3
        assert_bitwise(other, state)
        assert bool(state["0.dendrites.0.output"].any())
        assert int(state["2.dendrites.0.norm.num_batches_tracked"]) >= 1
    for learning in ("gradient", "hybrid"):
        torch.testing.assert_close(one[f"fully_shard {learning}"], one[f"DistributedDataParallel {learning}"])


def test_on_a_frozen_layer_that_is_named() -> None:
    """What a deployed network is: its own weights stay, and dendrites learn."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    session = rg.attach(model, Perforate(where="*", grow_after=0))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x = batch((32, 8))
    losses: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetrogradeWarning)
        for _ in range(60):
            loss = (model(x) - torch.sin(2 * x[:, :2])).square().mean()
            optimizer.zero_grad()
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert conductor(session).dendrites == 3
    assert losses[-1] < 0.7 * losses[0]
    assert_bitwise({k: model.state_dict()[k] for k in before}, before)


def test_with_another_method() -> None:
    """Dithering on the same layers: dendrites grow by rows that the engine samples, and fold."""
    model = seeded(mlp)
    session = rg.attach(model, [rg.Dither(scale=1), rg.Spectral(rank=3, warmup=0), Perforate(grow_after=2)])
    run(model, torch.optim.SGD(model.parameters(), lr=0.05), 0, 5, (16, 8))
    assert conductor(session).dendrites == 3
    x = batch((16, 8))
    torch.testing.assert_close(session.fold().eval()(x), model.eval()(x))
    assert program(model[0]).statistics is not None


def test_empty_batch() -> None:
    """Nothing to normalise, and nothing breaks."""
    layer = conv(2, 4, 4, 3, padding=1)()
    session = rg.attach(layer, Perforate(where="*"))
    grow(session)
    assert layer(batch((0, 4, 6, 6))).shape == (0, 4, 6, 6)

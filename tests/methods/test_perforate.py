"""Perforate: growth preserves the function, no error passes dendrites, phases stop in time and resume bit for bit."""

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import retrograde as rg
from cases import (
    MODELS,
    Case,
    Gradients,
    Turned,
    assert_bitwise,
    assert_same,
    batch,
    conv,
    gradients,
    in_two_ranks,
    mlp,
    program,
    seeded,
    transposed,
)
from dendrite_cases import KINDS, conductor, first_edition, grow, rule, run, stopped
from retrograde.engine.layers import AttachedLayer
from retrograde.errors import NoEffectError, OptionError, RetrogradeWarning, TransformError
from retrograde.methods.perforate import Perforate
from retrograde.methods.perforate.dendrites import Dendritic

LEARNING = ("gradient", "perforated")
COPIED = [
    Case("linear", partial(nn.Linear, 6, 5), (7, 6)),
    Case("conv2d", conv(2, 4, 6, 3, padding=1), (3, 4, 7, 8)),
    Case("transposed2d", transposed(2, 4, 6, 3, stride=2), (3, 4, 5, 6)),
]


def wide(values: Tensor, layer: nn.Module) -> Tensor:
    """(C,) shaped to multiply a layer's output."""
    return values.view(-1, *[1] * (layer.weight.dim() - 2))


def product(plain: nn.Module, values: Mapping[str, Tensor], x: Tensor, **call: Any) -> Tensor:
    """The plain layer's map with other parameters."""
    return torch.func.functional_call(plain, dict(values), (x,), call)


def by_hand(
    plain: nn.Module,
    state: Mapping[str, Tensor],
    sets: int,
    x: Tensor,
    f: Callable[[Tensor], Tensor] = torch.tanh,
    **call: Any,
) -> Tensor:
    """Equations (1) to (3) with the plain layer itself as M_d, from the attached layer's state."""
    keys = plain.state_dict().keys()
    values: list[Tensor] = []
    for d in range(sets):
        z = product(plain, {k: state[f"dendrites.{d}.{k}"] for k in keys}, x, **call)
        for e, a in enumerate(values):
            z = z + wide(state[f"dendrites.{d}.cascade"][e], plain) * a
        values.append(f(z))
    y = product(plain, {k: state[k] for k in keys}, x, **call)
    for d, a in enumerate(values):
        y = y + wide(state[f"dendrites.{d}.output"], plain) * a
    return y


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
        Turned(4, 4),
    )
    model[3].weight.requires_grad_(False)
    rows = {r.name: r for r in rg.make_plan(model, [Perforate(rule="perforated", where="[0-35]")]).rows}
    assert all(rows[name].status == "attached" for name in ("0", "1", "5"))
    for name, why in {"2": "weight that is computed", "3": "frozen", "4": "where"}.items():
        assert rows[name].status == "left"
        assert why in rows[name].why
    rows = {r.name: r for r in rg.make_plan(model, [Perforate(where="3")]).rows}
    assert rows["3"].status == "attached"


def test_plan_names_the_new_keys() -> None:
    """The row of a layer says which keys its part of the state gains: those, and no others, from the start."""
    model = seeded(mlp)
    before = set(model.state_dict())
    session = rg.attach(model, first_edition(where="[02]"))
    rows = {row.name: row for row in session.plan.rows}
    for name in ("0", "2"):
        added = {key.removeprefix(f"{name}.") for key in set(model.state_dict()) - before if key[0] == name}
        (told,) = re.findall(r"dendrites\.\*", rows[name].why)
        assert added
        assert all(fnmatchcase(key, told) for key in added)
    assert "dendrite" not in rows["4"].why
    keys = list(model.state_dict())
    grow(session, 2)
    assert list(model.state_dict()) == keys


def test_needs_the_input() -> None:
    """Candidates read the layer's input; where Spectral keeps another thing in its place, attaching says so."""
    model = seeded(mlp)
    keys = list(model.state_dict())
    methods = [first_edition(rule="perforated"), rg.Spectral(rank=3)]
    for order in (methods, methods[::-1]):
        with pytest.raises(OptionError, match=r"'0': perforate reads.*spectral keeps.*`only` and `skip`"):
            rg.attach(model, order)
        assert type(model[0]) is nn.Linear
        assert list(model.state_dict()) == keys
    session = rg.attach(model, [first_edition(), rg.Spectral(rank=3, warmup=0)])
    grow(session)
    run(model, torch.optim.SGD(model.parameters(), lr=0.05), 0, 3, (16, 8))
    assert bool(torch.isfinite(model[2].dendrites[0].weight).all())


@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("name", MODELS)
def test_neutral(name: str, learning: Any) -> None:
    """Without dendrites: autograd's gradients, and capacity that gets none."""
    make, shape = MODELS[name]
    plain, attached = seeded(make), seeded(make)
    rg.attach(attached, first_edition(rule=learning))
    x = batch(shape)
    assert torch.equal(plain(x), attached(x))
    assert_same(gradients(attached, x), gradients(plain, x), 1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_growth_preserves_the_function(case: Case, learning: Any, autocast: bool) -> None:
    """Bit for bit, in training and evaluation, with none and with other dendrites there before."""
    layer = case.make()
    session = rg.attach(layer, first_edition(rule=learning, max_dendrites=3))
    x = batch(case.shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        grow(session, 1)
        layer.dendrites[1].output.data.zero_()
        for sets in (2, 3):
            layer.train()
            trained, evaluated = layer(x, **case.call), layer.eval()(x, **case.call)
            grow(session, 1, spread=0)
            assert rule(layer).active == sets
            assert torch.equal(layer(x, **case.call), evaluated)
            assert torch.equal(layer.train()(x, **case.call), trained)
            assert layer(x, **case.call).dtype == trained.dtype
    assert not bool(layer.dendrites[2].output.any())
    assert bool(layer.dendrites[2].weight.any())


@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_forward_and_fold(case: Case, learning: Any) -> None:
    """Equations (1) to (3) with the plain layer itself as M_d; the folded layer computes the same, and pickles."""
    layer = case.make()
    session = rg.attach(layer, first_edition(rule=learning, max_dendrites=3, activation="sigmoid"))
    grow(session, 2)
    x = batch(case.shape)
    expected = by_hand(case.make(), layer.state_dict(), 2, x, torch.sigmoid, **case.call)
    torch.testing.assert_close(layer(x, **case.call), expected)
    torch.testing.assert_close(layer.eval()(x, **case.call), expected)
    folded = session.fold()
    torch.testing.assert_close(folded(x, **case.call), expected)
    assert len(folded.dendrites) == 2
    assert rule(layer).active == 2
    for copied in (saved(layer), saved(folded)):
        torch.testing.assert_close(copied(x, **case.call), expected)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_gradients(case: Case) -> None:
    """Of the layer's own and of the dendrites' parameters, and of the input: autograd's, through the equations."""
    layer, plain = case.make().double(), case.make().double()
    session = rg.attach(layer, first_edition(max_dendrites=3))
    grow(session, 2)
    x = batch(case.shape, dtype=torch.float64)

    def forward(y: Tensor, **call: Any) -> Tensor:
        return by_hand(plain, dict(layer.named_parameters()), 2, y, **call)

    found = gradients(layer, x, **case.call)
    assert_same(found, gradients(layer, x, forward, **case.call), 1e-10)
    assert {
        "weight",
        "input",
        "dendrites.1.weight",
        "dendrites.1.cascade",
        "dendrites.1.output",
    } <= found.keys()


@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_overhead(case: Case, learning: Any) -> None:
    """Each set in use costs one more forward product, and under the gradient rule two more backward products."""
    layer = case.make()
    session = rg.attach(layer, first_edition(rule=learning))
    grow(session, 2)
    gradients(layer, batch(case.shape), **case.call)
    flops = session.flops()
    assert flops.forward.dense > 0
    assert flops.overhead == (3 if learning == "gradient" else 1) * 2 * flops.forward.dense


def test_fold_without_dendrites() -> None:
    """The plain layer, class, keys, attributes and all; the attached model stays as it is."""
    model = seeded(mlp)
    session = rg.attach(model, first_edition())
    folded = session.fold()
    assert type(folded[0]) is nn.Linear
    assert folded.state_dict().keys() == seeded(mlp).state_dict().keys()
    assert folded[0].__dict__.keys() == nn.Linear(8, 16).__dict__.keys()
    grow(session)
    folded = session.fold()
    assert isinstance(folded[0], Dendritic)
    assert type(folded[0]).__name__ == "DendriticLinear"
    assert {key for key in folded.state_dict() if key.startswith("0.dendrite")} == {
        f"0.dendrites.0.{part}" for part in ("weight", "bias", "output")
    }
    assert isinstance(model[0], AttachedLayer)
    assert rule(model[0]).active == 1


DEEP: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), (7, 6)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv1d(4, 2, 2, stride=2)), (2, 3, 9)),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2), nn.Conv2d(4, 2, 2, groups=2)),
        (2, 3, 9, 8),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.Conv3d(4, 2, 2)), (2, 2, 4, 5, 6)),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 4, 3, 2), nn.ConvTranspose2d(4, 2, 2, 2, output_padding=1)
        ),
        (2, 3, 4, 5),
    ),
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", DEEP)
def test_dendrites_under_autocast(name: str, half: bool) -> None:
    """Of a layer behind another one, whose output is in autocast's precision: multiplied in it, attached and folded."""
    make, shape = DEEP[name]
    model = seeded(make)
    if half:
        model.half()
    session = rg.attach(model, first_edition())
    grow(session)
    x = batch(shape, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z = model(x)
        assert z.dtype == torch.bfloat16
        assert torch.equal(session.fold()(x), model.eval()(x))
    z.float().square().sum().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name for name, p in model.named_parameters() if p.any()} == learning
    plain = seeded(make)
    assert not torch.allclose(z.float(), plain(x), atol=0.1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_folded_through_other_runtimes() -> None:
    """torch.export and tracing take a folded model with dendrites; TorchScript, which reads source, is refused."""
    model, x = seeded(mlp), batch((2, 8))
    session = rg.attach(model, first_edition())
    grow(session)
    folded = session.fold().eval()
    expected = folded(x)
    assert not torch.equal(expected, seeded(mlp).eval()(x))
    for other in (torch.export.export(folded, (x,)).module(), torch.jit.trace(folded, x)):
        torch.testing.assert_close(other(x), expected)
    with pytest.raises(TransformError, match=r"a Linear with dendrites.*torch\.export"):
        torch.jit.script(folded)


@pytest.mark.parametrize("sets", [0, 1])
def test_fold_in_place(sets: int) -> None:
    """As the folded copy, keys and function, but with the layers and parameters of the model itself."""
    model = seeded(mlp)
    session = rg.attach(model, first_edition())
    layer, weight = model[0], model[0].weight
    for _ in range(sets):
        grow(session)
    copied = session.fold()
    assert session.fold(in_place=True) is model
    assert model[0] is layer
    assert model[0].weight is weight
    assert [type(m) for m in model.modules()] == [type(m) for m in copied.modules()]
    assert model.state_dict().keys() == copied.state_dict().keys()
    x = batch((4, 8))
    assert torch.equal(model(x), copied(x))


def test_fold_in_a_dendrite_phase() -> None:
    """Norms that the phase has pinned count batches again, in the copy and in place."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    session = rg.attach(model, first_edition(rule="perforated"))
    session._conductors["perforate"]._stage.freeze()  # type: ignore[attr-defined]
    assert model[1].momentum == 0.0
    assert session.fold()[1].momentum == 0.1  # type: ignore[index]
    assert model[1].momentum == 0.0
    assert session.fold(in_place=True)[1].momentum == 0.1  # type: ignore[index]


def test_folded_trains_by_its_rule() -> None:
    for learning in LEARNING:
        layer = nn.Conv2d(3, 4, 3)
        session = rg.attach(layer, first_edition(rule=learning))
        grow(session)
        folded = session.fold()
        assert type(folded).__name__ == "DendriticConv2d"
        assert isinstance(folded, Dendritic)
        assert isinstance(folded, nn.Conv2d)
        assert "dendrites=1" in repr(folded)
        x = batch((2, 3, 6, 6))
        assert_same(gradients(folded, x), gradients(layer, x), 1e-6)


def test_detach() -> None:
    """Same objects and keys as before; dendrites that are lost are named."""
    model = seeded(mlp)
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    session = rg.attach(model, first_edition())
    assert len(list(model.parameters())) > len(before)
    session.detach()
    assert list(model.state_dict()) == keys
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in before.items()}
    session = rg.attach(model, first_edition())
    grow(session)
    with pytest.warns(RetrogradeWarning, match="fold"):
        session.detach()
    assert list(model.state_dict()) == keys


@pytest.mark.filterwarnings("ignore:detaching takes")
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_detached_is_plain(case: Case) -> None:
    """Class, attributes and function are the plain layer's again."""
    layer, plain = seeded(case.make), seeded(case.make)
    session = rg.attach(layer, first_edition())
    grow(session, 2)
    session.detach()
    assert type(layer) is type(plain)
    assert layer.__dict__.keys() == plain.__dict__.keys()
    x = batch(case.shape)
    assert torch.equal(layer(x, **case.call), plain(x, **case.call))


# Copies, averages and states.


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": saved,
}


def assert_equivalent(found: nn.Module, expected: nn.Module, x: Tensor) -> None:
    """The same keys and values, function in training and evaluation, and gradients."""
    assert list(found.state_dict()) == list(expected.state_dict())
    assert_bitwise(found.state_dict(), expected.state_dict())
    for mode in (False, True):
        assert torch.equal(found.train(mode)(x), expected.train(mode)(x))
    assert_same(moving(gradients(found, x)), moving(gradients(expected, x)), 1e-5)


def moving(found: Gradients) -> Gradients:
    """Without those of unused capacity: nothing, or zeros in a copy."""
    return {name: value for name, value in found.items() if "dendrite" not in name or value.any()}


@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("make_copy", COPIES)
@pytest.mark.parametrize("case", COPIED, ids=str)
def test_copies_compute_the_same(case: Case, make_copy: str, learning: Any) -> None:
    """Before growth and after, copies of copies included; no copy is attached, and none follows later growth."""
    model = nn.Sequential(case.make(), nn.Tanh())
    session = rg.attach(model, first_edition(rule=learning, max_dendrites=2))
    x = batch(case.shape)
    kept: list[tuple[nn.Module, Tensor]] = []
    for sets in (0, 1, 2):
        one = COPIES[make_copy](model)
        two = COPIES[make_copy](one)
        for copied in (one, two):
            assert not isinstance(copied[0], AttachedLayer)
            assert "_retrograde" not in copied[0].__dict__
            assert isinstance(copied[0], type(case.make()))
            assert_equivalent(copied, model, x)
        torch.testing.assert_close(one(x), torch.tanh(by_hand(case.make(), one[0].state_dict(), sets, x)))
        for earlier, value in kept:
            assert torch.equal(earlier(x), value)
            assert not torch.equal(one(x), value)
        kept.append((one, one(x)))
        if sets < 2:
            grow(session)
    for earlier, _ in kept:
        earlier.load_state_dict(model.state_dict())
        assert_equivalent(earlier, model, x)


def test_a_copy_trains_on() -> None:
    """As a plain model would: an optimizer made for it moves it, and the attached one stays."""
    model = seeded(mlp)
    session = rg.attach(model, first_edition())
    grow(session)
    before = copy.deepcopy(model.state_dict())
    copied = copy.deepcopy(model)
    run(copied, torch.optim.SGD(copied.parameters(), lr=0.05), 0, 2, (16, 8))
    assert_bitwise(model.state_dict(), before)
    moved = {key for key, value in copied.state_dict().items() if not torch.equal(value, before[key])}
    assert {"0.weight", "0.dendrites.0.weight", "0.dendrites.0.output"} <= moved
    assert not any("dendrites.1" in key or "dendrites.2" in key for key in moved)


def latest(average: Tensor, value: Tensor, count: Any) -> Tensor:
    return value


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("case", COPIED, ids=str)
def test_an_average_follows_growth(case: Case, learning: Any, buffers: bool) -> None:
    """`AveragedModel` made before any dendrite, whose every update is the attached model's present state."""
    model = nn.Sequential(case.make())
    session = rg.attach(model, first_edition(rule=learning, max_dendrites=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    average = AveragedModel(model, avg_fn=latest, use_buffers=buffers)
    x = batch(case.shape)
    for step in range(6):
        run(model, optimizer, step, step + 1, case.shape)
        before = average(x)
        if step in (2, 4):
            grow(session)
        average.update_parameters(model)
        assert rule(model[0]).active == (0, 0, 1, 1, 2, 2)[step]
        assert torch.equal(average(x), model.eval()(x))
        assert torch.equal(average(x), model.train()(x))
        assert not torch.equal(average(x), before)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("average", ["running mean", "exponential"])
def test_real_averages(average: str, buffers: bool) -> None:
    """torch's own averages: of every parameter, with the dendrites of the model that they follow."""
    options: dict[str, Any] = {"multi_avg_fn": get_ema_multi_avg_fn(0.7)} if average == "exponential" else {}
    model = nn.Sequential(nn.Linear(6, 5))
    session = rg.attach(model, first_edition(max_dendrites=2))
    averaged = AveragedModel(model, use_buffers=buffers, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = batch((7, 6))
    for step in range(5):
        run(model, optimizer, step, step + 1, (7, 6))
        if step == 1:
            grow(session)
        averaged.update_parameters(model)
    state = averaged.module[0].state_dict()
    assert bool(state["dendrites.0.output"].any())
    torch.testing.assert_close(averaged(x), by_hand(nn.Linear(6, 5), state, 1, x))


@pytest.mark.parametrize("case", COPIED, ids=str)
def test_an_average_by_hand(case: Case) -> None:
    """Over ``state_dict``: floating-point entries averaged, others taken; a copy that loads it has its function."""
    model = case.make()
    session = rg.attach(model, first_edition(max_dendrites=2))
    copied = copy.deepcopy(model)
    shadow = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = batch(case.shape)
    for step, sets in enumerate((0, 1, 1, 2)):
        run(model, optimizer, step, step + 1, case.shape)
        if sets > rule(model).active:
            grow(session)
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                shadow[key].lerp_(value, 0.5)
            else:
                shadow[key].copy_(value)
        copied.load_state_dict(shadow)
        torch.testing.assert_close(copied(x), by_hand(case.make(), shadow, sets, x))
        assert not torch.allclose(copied(x), model(x), rtol=1e-3)
    # The attached model takes the average too, as when a run ends.
    model.load_state_dict(shadow)
    assert torch.equal(model(x), copied(x))


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("case", COPIED, ids=str)
def test_a_plain_state_means_no_dendrites(case: Case, learning: Any, attached: bool) -> None:
    """It loads strictly, into the attached model and into its copy, and gives the plain function."""
    model = nn.Sequential(case.make(), nn.Tanh())
    session = rg.attach(model, first_edition(rule=learning))
    grow(session, 2)
    loaded = model if attached else copy.deepcopy(model)
    plain = nn.Sequential(seeded(case.make, 1), nn.Tanh())
    x = batch(case.shape)
    assert not torch.allclose(loaded(x), plain(x))
    answer = loaded.load_state_dict(plain.state_dict(), strict=True)
    assert answer.missing_keys == answer.unexpected_keys == []
    for mode in (False, True):
        assert torch.equal(loaded.train(mode)(x), plain.train(mode)(x))
    found, expected = gradients(loaded, x), gradients(plain, x)
    assert_same(moving(found), expected, 1e-6)
    if attached:
        assert session.metrics()["perforate"]["dendrites"] == 0
        assert type(session.fold()[0]) is type(plain[0])
        grow(session, spread=0)
        assert rule(model[0]).active == 1
        assert torch.equal(model(x), plain(x))


def test_a_plain_state_for_some_layers() -> None:
    """A layer that no dendrites were asked for has no part in it; whatever else is missing is an error as ever."""
    model = seeded(mlp)
    session = rg.attach(model, first_edition(where=("0", "2")))
    grow(session)
    state = model.state_dict()
    model.load_state_dict(state)
    assert [rule(model[i]).active for i in (0, 2)] == [1, 1]
    # The state of a model in which the first layer alone had dendrites.
    model.load_state_dict({k: v for k, v in state.items() if not k.startswith("2.dendrite")})
    assert [rule(model[i]).active for i in (0, 2)] == [1, 0]
    for absent in ("0.dendrites.1.output", "0.weight", "4.bias"):
        with pytest.raises(RuntimeError, match=rf"Missing key\(s\) in state_dict: \"{absent}\""):
            model.load_state_dict({k: v for k, v in state.items() if k != absent})
    plain = seeded(mlp).state_dict()
    del plain["2.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "2.weight"'):
        model.load_state_dict(plain)


@pytest.mark.parametrize("case", COPIED, ids=str)
def test_an_attached_state_in_a_plain_model(case: Case) -> None:
    """torch's own error, which names the dendrites; a folded model takes no more."""
    model = nn.Sequential(case.make())
    session = rg.attach(model, first_edition(max_dendrites=2))
    plain = nn.Sequential(case.make())
    for sets in (0, 1):
        with pytest.raises(RuntimeError, match=r'Unexpected key\(s\).*"0\.dendrites\.0\.weight"'):
            plain.load_state_dict(model.state_dict())
        if not sets:
            grow(session)
    answer = plain.load_state_dict(model.state_dict(), strict=False)
    assert all("dendrite" in key for key in answer.unexpected_keys)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\).*"0\.dendrites\.1\.weight"'):
        session.fold().load_state_dict(model.state_dict())


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.filterwarnings("ignore:detaching takes")
def test_transformer_encoder() -> None:
    """torch's fused evaluation, padded batches included, does not go past dendrites; attention is declined."""
    model = seeded(encoder)
    session = rg.attach(model, first_edition())
    rows = {row.name: row for row in session.plan.rows}
    assert [rows[f"layers.1.{n}"].status for n in ("linear1", "linear2")] == ["attached", "attached"]
    for name in ("layers.0.self_attn", "layers.0.self_attn.out_proj"):
        assert rows[name].status == "left"
        assert "MultiheadAttention" in rows[name].why
    grow(session)
    x, padded = batch((3, 5, 8)), torch.zeros(3, 5, dtype=torch.bool)
    padded[1, 3:] = True
    model.eval()
    for mask in (None, padded):
        expected = model(x, src_key_padding_mask=mask)
        rest = slice(None) if mask is None else ~mask
        for evaluated in (model, copy.deepcopy(model), saved(model), session.fold()):
            with torch.no_grad():
                found = evaluated(x, src_key_padding_mask=mask)
            torch.testing.assert_close(found[rest], expected[rest])
        # Without dendrites it is another function: the comparison can fail.
        plain = seeded(encoder).eval()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "dendrite" not in k})
        assert not torch.allclose(plain(x, src_key_padding_mask=mask)[rest], expected[rest], rtol=0.01)
    assert not model.use_nested_tensor
    session.detach()
    assert model.use_nested_tensor
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))


def test_perforated_stops_error() -> None:
    """x gets the gradient that it gets without dendrites; w learns, and nothing else of a dendrite does."""
    with_dendrites, without = nn.Linear(6, 5), nn.Linear(6, 5)
    without.load_state_dict(with_dendrites.state_dict())
    session = rg.attach(with_dendrites, first_edition(rule="perforated"))
    grow(session, 2)
    x, delta = batch((7, 6)).requires_grad_(), batch((7, 5), 2)
    with_dendrites(x).backward(delta)
    perforated, x.grad = x.grad, None
    without(x).backward(delta)
    assert torch.equal(perforated, x.grad)
    trained = {n for n, p in with_dendrites.named_parameters() if p.grad is not None}
    assert trained == {"weight", "bias", "dendrites.0.output", "dendrites.1.output"}
    a = torch.tanh(F.linear(x, with_dendrites.dendrites[0].weight, with_dendrites.dendrites[0].bias))
    torch.testing.assert_close(with_dendrites.dendrites[0].output.grad, (a * delta).sum(0))


def test_gradient_rule_is_autograd() -> None:
    """All of the dendrites in use train by the loss, as a network written by hand does."""
    layer = nn.Linear(6, 5).double()
    session = rg.attach(layer, first_edition(max_dendrites=2))
    grow(session, 1)
    x = batch((7, 6), dtype=torch.float64)
    found = gradients(layer, x)
    assert set(found) == {"input", "weight", "bias"} | {
        f"dendrites.0.{p}" for p in ("weight", "bias", "output")
    }

    def by_hand(y: Tensor) -> Tensor:
        a = torch.tanh(F.linear(y, layer.dendrites[0].weight, layer.dendrites[0].bias))
        return F.linear(y, layer.weight, layer.bias) + layer.dendrites[0].output * a

    assert_same(found, gradients(layer, x, by_hand), 1e-12)


@pytest.mark.parametrize("learning", LEARNING)
def test_unused_capacity_stays(learning: Any) -> None:
    """Momentum and weight decay move nothing that is not in use, or frozen."""
    model = seeded(mlp)
    session = rg.attach(model, first_edition(rule=learning))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    run(model, optimizer, 0, 2, (16, 8))
    grow(session)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run(model, optimizer, 2, 5, (16, 8))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    parts = ("weight", "bias", "output") if learning == "gradient" else ("output",)
    expected = {
        f"{i}.{n}" for i in (0, 2, 4) for n in ("weight", "bias", *(f"dendrites.0.{p}" for p in parts))
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
    session = rg.attach(model, first_edition(rule=learning))
    grow(session, 2)
    x = batch(shape)
    eager = gradients(model, x)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(gradients(model, x, fast), eager, 1e-5)
    saved = gradients(model, x, lambda y: checkpoint(model, y, use_reentrant=False))
    assert_same(saved, eager, 1e-6)
    model.eval()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    copied = copy.deepcopy(model)
    torch.testing.assert_close(torch.compile(copied, fullgraph=True, backend="aot_eager")(x), model(x))
    model.train()
    if name == "mlp":
        halves = gradients(model, x, lambda y: torch.cat([model(part) for part in y.split(5)]))
        assert_same(halves, eager, 1e-5)


@pytest.mark.usefixtures("_fresh_compiler")
def test_recompiles_at_growth_only() -> None:
    """Twelve layers share code; steps, dendrite phases included, add none; growth adds one version."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
    session = rg.attach(model, first_edition(rule="perforated", patience=1))
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
    session = rg.attach(model, first_edition(rule=learning, patience=1))
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
    session = rg.attach(model, first_edition(rule="perforated", candidates=2, **SHORT))
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
    assert all(bool(model[i].dendrites[0].output.any()) for i in (0, 3, 7))


@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_every_kind_goes_through_the_phases(case: Case, learning: Any) -> None:
    """Plateau, growth, and training on: new dendrites learn, and the fold computes what the attached layer does."""
    layer = seeded(case.make)
    options = {**SHORT, "patience": 1, "candidate_patience": 1}
    session = rg.attach(layer, first_edition(rule=learning, **options), seed=2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)

    def train(steps: int) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            torch.sin(layer(batch(case.shape, 100 + step), **case.call)).square().mean().backward()
            optimizer.step()

    train(2)
    session.report(val=1.0)
    session.report(val=0.0)
    if learning == "perforated":
        assert conductor(session).phase == "dendrite"
        train(4)
        session.report(val=0.0)
        session.report(val=0.0)
        assert 0.01 < session.metrics()["layers"]["(root)"]["correlation"] <= 1 + 1e-6
    assert (conductor(session).phase, rule(layer).active) == ("neuron", 1)
    assert not bool(layer.dendrites[0].output.any())
    train(3)
    assert bool(layer.dendrites[0].output.all())
    x = batch(case.shape)
    found = layer.eval()(x, **case.call)
    torch.testing.assert_close(found, by_hand(case.make(), layer.state_dict(), 1, x, **case.call))
    torch.testing.assert_close(session.fold()(x, **case.call), found)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_candidates_climb_by_the_gradient(case: Case) -> None:
    """What a backward call adds for them is autograd's derivative of Σ sign(C)/σ_δ (δ − δ̄) a, in every parameter."""
    layer, plain = seeded(case.make).double(), case.make().double()
    session = rg.attach(layer, first_edition(rule="perforated", candidates=2), seed=2)
    grow(session)
    conductor(session)._grow()
    pool = rule(layer)._pool  # type: ignore[attr-defined]
    x = batch(case.shape, dtype=torch.float64)
    delta = batch(layer(x, **case.call).shape, 2, torch.float64)
    layer(x, **case.call).backward(delta)
    torch.optim.SGD(layer.parameters(), lr=0.05).step()
    assert int(pool.moments.steps) == 1
    layer(x, **case.call).backward(delta)
    keys = plain.state_dict().keys()
    first = {k: layer.get_parameter(f"dendrites.0.{k}").detach() for k in keys}
    a0 = torch.tanh(product(plain, first, x, **case.call))
    moments = pool.moments
    for j in range(2):
        leaves = {name: value[j].clone().requires_grad_() for name, value in pool.values.items()}
        z = product(plain, {k: leaves[k] for k in keys}, x, **case.call)
        a = torch.tanh(z + wide(leaves["cascade"][0], plain) * a0)
        centred = (delta - wide(moments.mean_delta, plain)) * wide(moments.direction()[j], plain)
        expected = torch.autograd.grad((centred * a).sum(), list(leaves.values()))
        for name, value in zip(leaves, expected, strict=True):
            assert bool(value.any())
            torch.testing.assert_close(pool._gradient[name][j], value)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_each_neuron_takes_its_best_candidate(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output by output: the new dendrite of a neuron computes what that neuron's candidate did."""
    layer, plain = seeded(case.make), case.make()
    session = rg.attach(layer, first_edition(rule="perforated", candidates=3), seed=2)
    grow(session)
    conductor(session)._grow()
    pool = rule(layer)._pool  # type: ignore[attr-defined]
    channels = layer.dendrites[0].output.numel()
    index = torch.arange(channels) % 3
    scores = torch.nn.functional.one_hot(index, 3).T.float()
    monkeypatch.setattr(type(pool.moments), "score", lambda moments: scores)
    x, keys = batch(case.shape), plain.state_dict().keys()
    _, best = pool.best()
    found = product(plain, {k: best[k] for k in keys}, x, **case.call)
    axis = found.dim() - 1 - (layer.weight.dim() - 2)
    for j in range(3):
        one = product(plain, {k: pool.values[k][j] for k in keys}, x, **case.call)
        mine = index == j
        torch.testing.assert_close(
            found.movedim(axis, 0)[mine], one.movedim(axis, 0)[mine], rtol=1e-4, atol=1e-7
        )
        assert torch.equal(best["cascade"][:, mine], pool.values["cascade"][j][:, mine])
        assert not torch.allclose(found.movedim(axis, 0)[~mine], one.movedim(axis, 0)[~mine], rtol=1e-2)


def test_detach_in_a_dendrite_phase() -> None:
    """BatchNorm is given back as it was."""
    model = seeded(net)
    session = rg.attach(model, first_edition(rule="perforated", patience=1))
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
    session = rg.attach(model, first_edition(rule=learning, **SHORT))
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
    session = rg.attach(model, first_edition(rule=learning, patience=1, candidate_limit=1, tries=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    drawn: list[Tensor] = []
    for n in range(6):
        run(model, optimizer, n, n + 1, (16, 8))
        session.report(val=-float(n))
        if rule(model[0]).active:
            drawn.append(model[0].dendrites[0].weight.detach().clone())
    assert conductor(session).growths == 2
    assert not torch.equal(drawn[0], drawn[-1])


def test_thresholds() -> None:
    """A new best must beat the old by 1e-3, then 1e-4, then anything, relatively."""
    for dendrites, margin in ((0, 1e-3), (1, 1e-4), (2, 0.0)):
        session = rg.attach(nn.Linear(4, 4), first_edition())
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
    session = rg.attach(model, first_edition(patience=1))
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
        session = rg.attach(model, first_edition(rule=learning, candidates=candidates, **SHORT), seed=1)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01), session

    def train(model: nn.Module, optimizer: Any, session: rg.Session, first: int, last: int) -> set[str]:
        phases: set[str] = set()
        for step in range(first, last):
            run(model, optimizer, step, step + 1, SHAPE)
            if step % every == 1:
                session.report(val=1.0 if step in (1, 15) else -float(step))
            phases.add(conductor(session).phase)
        return phases

    whole, second, phases = stopped(made, train, stop, total)
    assert_bitwise(second[0].state_dict(), whole[0].state_dict())
    assert second[2].metrics() == whole[2].metrics()
    assert conductor(second[2]).marks == conductor(whole[2]).marks
    assert conductor(whole[2]).growths >= 2
    assert ("dendrite" in phases) == (learning == "perforated")


def test_loading_brings_the_dendrites() -> None:
    """A model's state alone, loaded into a freshly attached model, computes the saved function."""
    one = seeded(mlp)
    session = rg.attach(one, first_edition())
    grow(session, 2)
    for assign in (False, True):
        two = seeded(mlp, 1)
        fresh = rg.attach(two, first_edition())
        two.load_state_dict(copy.deepcopy(one.state_dict()), assign=assign)
        assert [rule(two[i]).active for i in (0, 2, 4)] == [2, 2, 2]
        assert torch.equal(one(batch((16, 8))), two(batch((16, 8))))
        grow(fresh, spread=0)
        assert two[0]._dendrite_state.growths == 3
        assert torch.equal(one(batch((16, 8))), two(batch((16, 8))))


def test_fixed_period_without_reports() -> None:
    """Phases last `period` steps; without one the fallback says so, once."""
    model = seeded(mlp)
    session = rg.attach(model, first_edition(rule="perforated", period=3, max_dendrites=1))
    run(model, torch.optim.SGD(model.parameters(), lr=0.05), 0, 10, (16, 8))
    events = [(step, event) for step, _, event, _ in conductor(session).marks]
    assert events == [(3, "dendrite phase"), (6, "1 dendrites"), (9, "finished")]


def test_fallback_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before the first phase ends, and never where scores are reported or `period` is set."""
    monkeypatch.setattr("retrograde.methods.perforate.conductor._SILENT", 1)
    monkeypatch.setattr("retrograde.methods.perforate.conductor._DEFAULT_PERIOD", 2)
    model = seeded(mlp)
    session = rg.attach(model, first_edition())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.warns(RetrogradeWarning, match="validated") as caught:
        run(model, optimizer, 0, 6, (16, 8))
    assert len(caught) == 1
    assert "seen 1 steps" in str(caught[0].message)
    assert conductor(session).dendrites == 3


def test_no_warning_where_growth_is_driven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrograde.methods.perforate.conductor._SILENT", 1)
    for method, reports in ((first_edition(), True), (first_edition(period=50), False)):
        model = seeded(mlp)
        session = rg.attach(model, method)
        assert "when they grow" in session.plan.rows[0].why
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if reports:
                session.report(val=0.5)
            run(model, optimizer, 0, 3, (16, 8))


def test_decayed_schedule_warns() -> None:
    model = seeded(mlp)
    session = rg.attach(model, first_edition(patience=1))
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
    rg.attach(model, first_edition())
    with pytest.raises(NoEffectError, match="after attaching"):
        run(model, optimizer, 0, 1, (16, 8))


def test_two_optimizers() -> None:
    """Each counts, and both find the network frozen in a dendrite phase."""
    model = seeded(mlp)
    session = rg.attach(model, first_edition(rule="perforated", patience=1))
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
    session = rg.attach(model, first_edition(rule="perforated", patience=1))
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


def test_frozen_while_attached() -> None:
    """A layer whose input is not there in the backward pass is named, not passed over."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    session = rg.attach(model, first_edition(rule="perforated", patience=1))
    model[1].weight.requires_grad_(False)
    session.report(val=1.0)
    session.report(val=0.0)
    with pytest.raises(OptionError, match=r"layer '1'.*not kept"):
        torch.sin(model(batch((16, 8)))).mean().backward()


def test_with_dither() -> None:
    """Another method on the same layers: dendrites grow, and fold."""
    model = seeded(mlp)
    session = rg.attach(model, [rg.Dither(scale=1), first_edition(rule="perforated", **SHORT)])
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
    session = rg.attach(model, first_edition(rule="perforated", **options))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    phases: list[str] = []
    idle: list[bool] = []
    for step in range(14):
        optimizer.zero_grad()
        torch.sin(parallel(batch((16, 8), seed=10 * step + rank))).square().mean().backward()
        optimizer.step()
        # The ranks disagree about the score: alone, one would see a new best where the other sees none.
        mean = 1.0 if step == 6 else -float(step)
        session.report(val=mean + (3.0 * step if rank else -3.0 * step))
        phases.append(conductor(session).phase)
        idle.append(model[0].dendrites[2].weight.grad is None)
    result = {
        "state": model.state_dict(),
        "phases": phases,
        "used": model[0].dendrites[0].output.detach().clone(),
        "idle": idle,
    }
    torch.save(result, f"{folder}/rank{rank}.pt")


def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unused capacity does not stop DDP; candidates, growth and phases are the same on both ranks."""
    in_two_ranks(worker, tmp_path, monkeypatch)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["phases"] == two["phases"]
    assert "dendrite" in one["phases"]
    assert one["state"]["0.dendrites.0.weight"].any()
    assert_bitwise(two["state"], one["state"])
    assert bool(one["used"].any())
    # Neither decay nor momentum moves what has no gradient.
    assert all(one["idle"])


# Layers whose dendrites others would lose.


class Adapted(nn.Module):
    """A low-rank adapter beside a frozen layer, as they are written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.a, self.b = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def test_factors_and_frozen_layers_are_left() -> None:
    """A merge multiplies factors by their weights; what is frozen shall not train by a detour."""
    model = nn.Sequential(Adapted(), nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 2))
    rows = {row.name: row for row in rg.make_plan(model, [first_edition(where=None)]).rows}
    for name, why in {
        "0.base": "frozen",
        "0.a": "low-rank adapter",
        "0.b": "low-rank adapter",
        "1": "frozen",
    }.items():
        assert rows[name].status == "left"
        assert why in rows[name].why
    assert rows["2"].status == "attached"
    with pytest.raises(NoEffectError, match="a merge multiplies its weight"):
        rg.attach(Adapted(), first_edition(where=None))
    model[0].peft_config = {}
    assert (
        "peft" in {row.name: row for row in rg.make_plan(model, [first_edition(where=None)]).rows}["0.a"].why
    )


def test_dendrites_on_a_frozen_layer_that_is_named() -> None:
    """They train, and before they are in use the layer may go without a backward pass."""
    model = nn.Sequential(
        nn.Linear(8, 8).requires_grad_(False), nn.ReLU(), nn.Linear(8, 2).requires_grad_(False)
    )
    session = rg.attach(model, first_edition(where="*", period=6, max_dendrites=1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetrogradeWarning)
        for step in range(20):
            loss = model(batch((4, 8), step)).square().mean()
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert session.metrics()["perforate"]["dendrites"] > 0

"""attach, the session's figures, and its state: a resumed run is the uninterrupted one, bit for bit."""

import copy
import json
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import retrograde as rg
from cases import MODELS, batch, cnn, gradients, mlp, program, seeded, train
from retrograde.errors import AttachError, DetachError, NoEffectError, OptionError, PatternError, StateError

DITHERS = {"fixed": rg.Dither(scale=1.5), "controlled": rg.Dither(scale=1.0, target_sparsity=0.8)}


def run(
    seed: int = 0, dither: rg.Dither = DITHERS["fixed"]
) -> tuple[nn.Module, torch.optim.Optimizer, rg.Session]:
    model = seeded(mlp, seed)
    session = rg.attach(model, dither, seed=9)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2), session


# Resume.


@pytest.mark.parametrize("between_micro_batches", [False, True])
@pytest.mark.parametrize("dither", DITHERS)
def test_resume(dither: str, between_micro_batches: bool, tmp_path: Path) -> None:
    """Save after three steps (or in the midst of an accumulation), load elsewhere, go on: equal to the last bit."""
    model, optimizer, session = run(dither=DITHERS[dither])
    train(model, optimizer, (8, 8), 3)
    session.report(val=0.5)
    session.metrics(reset=True)
    if between_micro_batches:
        optimizer.zero_grad()
        torch.sin(model(batch((8, 8), 55))).sum().backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
    torch.save(
        {"m": model.state_dict(), "o": optimizer.state_dict(), "s": session.state_dict()}, tmp_path / "c.pt"
    )

    def go_on(m: nn.Module, o: torch.optim.Optimizer) -> None:
        if between_micro_batches:
            torch.sin(m(batch((8, 8), 56))).sum().backward()
            o.step()
        train(m, o, (8, 8), 3, first=10)

    go_on(model, optimizer)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    again, other = seeded(mlp, 1), None
    resumed = rg.attach(again, DITHERS[dither], seed=123)
    other = torch.optim.AdamW(again.parameters(), lr=1e-2)
    again.load_state_dict(state["m"])
    other.load_state_dict(state["o"])
    resumed.load_state_dict(state["s"])
    if between_micro_batches:
        for n, p in again.named_parameters():
            p.grad = gradient[n]
    go_on(again, other)
    for (name, a), b in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    torch.testing.assert_close(other.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    assert resumed.state_dict() == session.state_dict()
    assert resumed.metrics() == session.metrics()
    assert str(resumed.summary()) == str(session.summary())


def test_resume_between_counts(tmp_path: Path) -> None:
    """Where zeros are assumed, a resumed run assumes what the uninterrupted one does, and counts when that does."""
    model, optimizer, session = run(dither=rg.Dither(scale=0))
    train(model, optimizer, (8, 8), 12)
    assert 0.2 < session.metrics()["layers"]["0"]["zeros"] < 0.8
    torch.save([model.state_dict(), optimizer.state_dict(), session.state_dict()], tmp_path / "c.pt")
    train(model, optimizer, (8, 8), 6, first=12)
    again, other, resumed = run(seed=1, dither=rg.Dither(scale=0))
    states = torch.load(tmp_path / "c.pt", weights_only=True)
    for part, state in zip((again, other, resumed), states, strict=True):
        part.load_state_dict(state)
    train(again, other, (8, 8), 6, first=12)
    assert resumed.state_dict() == session.state_dict()
    assert resumed.metrics() == session.metrics()


def test_seed() -> None:
    """Equal seeds give equal noise, other seeds other noise; None takes torch's."""
    found = []
    for seed in (1, 1, 2, None, None):
        model = seeded(mlp)
        torch.manual_seed(77)
        _session = rg.attach(model, rg.Dither(), seed=seed)
        found.append(gradients(model, batch((16, 8)))["0.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(found[3], found[4])


def test_layers_and_steps_draw_differently() -> None:
    """Two equal layers in one step, and one layer in two steps, do not share noise."""
    pair = nn.ModuleDict({"a": nn.Linear(8, 5), "b": nn.Linear(8, 5)})
    pair["b"].load_state_dict(pair["a"].state_dict())
    _session = rg.attach(pair, rg.Dither())
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.0)
    draws = []
    for _ in range(2):
        for layer in pair.values():
            layer.zero_grad()
            torch.sin(layer(batch((16, 8)))).sum().backward()
            draws.append(layer.weight.grad.clone())
        optimizer.step()
    for i, a in enumerate(draws):
        assert not any(torch.equal(a, b) for b in draws[i + 1 :])


def damaged(state: dict[str, Any]) -> dict[str, Any]:
    """Ways in which a state does not fit, each a fresh copy."""
    broken: dict[str, Any] = {
        "none": None,
        "empty": {},
        "a list": [1],
        "format alone": {"format": state["format"]},
    }
    for key in ("seed", "methods", "scores", "window", "layers", "conductors", "block_window"):
        broken[f"without {key}"] = {k: v for k, v in state.items() if k != key}
    broken["other format"] = {**state, "format": 99}

    def layer(change: Any) -> dict[str, Any]:
        twin = copy.deepcopy(state)
        change(twin["layers"])
        return twin

    broken["layer missing"] = layer(lambda layers: layers.pop("2"))
    broken["layer surplus"] = layer(lambda layers: layers.update(extra=layers["2"]))
    broken["no rules"] = layer(lambda layers: layers["4"].update(rules=[]))
    broken["two rules"] = layer(lambda layers: layers["4"].update(rules=layers["4"]["rules"] * 2))
    broken["rule of another method"] = layer(lambda layers: layers["4"].update(rules=[{"rank": 3}]))
    broken["unknown counter"] = layer(lambda layers: layers["4"]["total"].update(spins=3))
    broken["no step"] = layer(lambda layers: layers["4"].pop("step"))
    broken["no shares"] = layer(lambda layers: layers["4"].pop("shares"))
    broken["one share"] = layer(lambda layers: layers["4"].update(shares=[0.5]))
    return broken


@pytest.mark.parametrize("how", damaged(run()[2].state_dict()))
def test_state_that_does_not_fit(how: str) -> None:
    """StateError, and nothing at all is changed."""
    model, optimizer, session = run(dither=DITHERS["controlled"])
    train(model, optimizer, (8, 8), 2)
    foreign = run(dither=DITHERS["controlled"])
    train(foreign[0], foreign[1], (8, 8), 5)
    state = damaged(foreign[2].state_dict())[how]
    before = copy.deepcopy(session.state_dict())
    with pytest.raises(StateError):
        session.load_state_dict(state)
    assert session.state_dict() == before


def test_state_of_other_layers_names_them() -> None:
    model = seeded(mlp)
    session = rg.attach(model, rg.Dither(), only=["0", "2"])
    with pytest.raises(StateError, match=r"none attached here.*\['4'\] in it"):
        session.load_state_dict(run()[2].state_dict())


def test_other_options_warn() -> None:
    """The same layers with another scale load, with a warning that shows both."""
    session = run(dither=rg.Dither(scale=4.0))[2]
    with pytest.warns(UserWarning, match=r"scale=1.5.*continues with.*scale=4.0"):
        session.load_state_dict(run()[2].state_dict())


# Figures.


def test_metrics_and_summary() -> None:
    """Shares, windows and text; JSON all the way."""
    model, optimizer, session = run()
    assert session.metrics()["zeros"] is None
    assert "no backward pass yet" in str(session.summary())
    json.dumps(session.summary().to_dict())
    train(model, optimizer, (64, 8), 4)
    first = session.metrics(reset=True)
    assert set(first["layers"]) == {"0", "2", "4"}
    assert 0.3 < first["zeros"] < 0.95
    assert session.metrics()["zeros"] is None
    train(model, optimizer, (64, 8), 1)
    assert session.metrics()["layers"]["4"]["scale"] == 1.5
    summary = session.summary()
    assert summary.steps == 4 + 1
    assert summary.layers == 3
    assert summary.best is None
    entries = program(model[0]).total.entries
    assert entries == 5 * 64 * 16
    assert "dense-equivalent" in str(summary)
    json.dumps(
        [first, summary.to_dict(), session.flops().to_dict(), session.plan.to_dict(), session.state_dict()]
    )


@pytest.mark.parametrize(
    ("method", "width", "share"),
    [
        (rg.Dither(keep=4), 8 + 16 + 16, 4.25 / 32),
        (rg.Spectral(rank=2, residual="unbiased"), 8 + 16, None),
        (rg.Dither(forward="int8"), 8 + 16 + 16, None),
        (rg.Dither(), 0, None),
    ],
    ids=str,
)
def test_summary_says_what_is_kept_of_inputs(method: rg.Method, width: int, share: float | None) -> None:
    """Where it is not the whole: bytes of a call of each layer, however many calls there were."""
    model = seeded(mlp)
    session = rg.attach(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    assert session.summary().kept is None
    train(model, optimizer, (64, 8), 3)
    kept = session.summary().kept
    if not width:
        assert kept is None
        assert "inputs kept" not in str(session.summary())
        return
    assert kept is not None
    assert kept[0] == 4 * 64 * width
    assert kept[1] == pytest.approx(share * kept[0]) if share else 0 < kept[1] < kept[0]
    assert f"({kept[1] / kept[0]:.1%})" in str(session.summary())
    json.dumps(session.summary().to_dict())


def test_backward_seconds() -> None:
    """Of each layer, with the steps that they were for; pauses cost none."""
    model, optimizer, session = run()
    assert session.backward_seconds() == dict.fromkeys(("0", "2", "4"), (0.0, 0))
    train(model, optimizer, (8, 8), 3)
    with session.paused():
        train(model, optimizer, (8, 8), 2)
    found = session.backward_seconds()
    assert all(seconds > 0 and steps == 3 for seconds, steps in found.values())


class Listening(rg.Method):
    """Notes what its conductor is told."""

    name = "listening"

    def __init__(self) -> None:
        self.told: list[tuple[float, ...]] = []

    def make_rule(self, site: rg.Site) -> rg.Rule:
        return rg.Rule(site.name)

    def conductor(self, model: nn.Module, rules: Any) -> rg.Conductor:
        told = self.told

        class Earlier(rg.Conductor):
            """Written before training scores were passed."""

            def validated(self, score: float) -> None:  # type: ignore[override]
                told.append((score,))

        class Present(rg.Conductor):
            def validated(self, score: float, train: float | None = None) -> None:
                told.append((score, *(() if train is None else (train,))))

        return Present() if isinstance(model, nn.Sequential) else Earlier()


def test_training_score() -> None:
    """It reaches conductors where it is given, and is left out where it is not."""
    method = Listening()
    session = rg.attach(seeded(mlp), method)
    session.validated(0.5)
    session.validated(0.5, train=0.75)
    assert method.told == [(0.5,), (0.5, 0.75)]
    assert session.summary().best == (0, 0.5)
    with pytest.raises(OptionError, match="train=nan is not a finite number"):
        session.validated(0.5, train=math.nan)
    earlier = Listening()
    rg.attach(nn.Linear(3, 3), earlier).validated(0.5)
    assert earlier.told == [(0.5,)]


def test_report() -> None:
    """Scores are kept with their step; the best one is shown; nonsense is refused."""
    model, optimizer, session = run()
    for score in (0.2, torch.tensor(0.9), 1):
        session.report(val=score)
        train(model, optimizer, (8, 8), 1)
    assert session.summary().best == (2, 1.0)
    assert "at step 2" in str(session.summary())
    for bad in (math.nan, math.inf, -math.inf, torch.tensor(math.nan)):
        with pytest.raises(OptionError, match="not a finite number"):
            session.report(val=bad)
    for bad in ("high", None, torch.ones(2)):
        with pytest.raises(OptionError):
            session.report(val=bad)  # type: ignore[arg-type]
    assert len(session.state_dict()["scores"]) == 3


# Copies.


class Nested(nn.Module):
    """A layer at several depths, one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 8)
        self.body = nn.ModuleList([mlp(), nn.Sequential(nn.Linear(4, 8), self.head)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body[1](self.body[0](x)))


@pytest.mark.parametrize("make", [Nested, lambda: nn.Linear(8, 8)], ids=["nested", "root"])
def test_fold(make: Any) -> None:
    """A plain copy with the same function and keys; the model stays attached, and trains on."""
    model = seeded(make)
    session = rg.attach(model, rg.Dither())
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), (8, 8), 2)
    folded = session.fold()
    assert [type(m) for m in folded.modules()] == [type(m) for m in make().modules()]
    assert list(folded.state_dict()) == list(model.state_dict())
    assert not {id(p) for p in folded.parameters()} & {id(p) for p in model.parameters()}
    assert len(list(folded.parameters())) == len(list(model.parameters()))
    x = batch((8, 8))
    assert torch.equal(folded(x), model(x))
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), (8, 8), 1)
    assert session.step == 3
    assert not torch.equal(folded(x), model(x))


@pytest.mark.parametrize("make", [Nested, lambda: nn.Linear(8, 8)], ids=["nested", "root"])
def test_fold_in_place(make: Any) -> None:
    """The model itself, plain again, with the parameters that an optimizer has; the session has ended."""
    model = seeded(make)
    parameters = list(model.parameters())
    session = rg.attach(model, rg.Dither())
    assert session.fold(in_place=True) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in make().modules()]
    assert all(mine is was for mine, was in zip(model.parameters(), parameters, strict=True))
    assert "detached" in repr(session)
    with pytest.raises(DetachError):
        session.fold(in_place=True)
    rg.attach(model, rg.Dither())


# Bad input: every error leaves the model plain.


@pytest.mark.parametrize(
    "methods", [(), [], [rg.Dither], rg.Dither, None, 3, "dither", ["dither"], [rg.Dither(), None]], ids=repr
)
def test_no_method(methods: Any) -> None:
    model = mlp()
    with pytest.raises(OptionError):
        rg.attach(model, methods)
    assert type(model[0]) is nn.Linear


def test_class_instead_of_instance() -> None:
    for methods in (rg.Dither, [rg.Dither]):
        with pytest.raises(OptionError, match="Call it"):
            rg.attach(mlp(), methods)  # type: ignore[arg-type]


def test_duplicates() -> None:
    with pytest.raises(OptionError, match="'dither' 2 times"):
        rg.attach(mlp(), [rg.Dither(), rg.Dither(scale=3)])


def test_attach_twice() -> None:
    """Also on a submodule, and on a model with an attached submodule."""
    model = nn.Sequential(mlp(), mlp())
    session = rg.attach(model, rg.Dither())
    for part, name in ((model, "submodule '0.0'"), (model[0], "submodule '0'"), (model[0][0], "the model")):
        with pytest.raises(AttachError, match=f"{name} is attached already"):
            rg.attach(part, rg.Dither())
    session.detach()
    session = rg.attach(model[0], rg.Dither())
    with pytest.raises(AttachError, match=r"'0.0' is attached already"):
        rg.attach(model, rg.Dither())


def test_wrapped_models() -> None:
    """Compiled in both ways, DataParallel: the order is told."""
    compiled = mlp()
    compiled.compile(backend="eager")
    part = mlp()
    part[2].compile(backend="eager")
    for model, word in (
        (torch.compile(mlp(), backend="eager"), "compiled"),
        (nn.Sequential(torch.compile(mlp(), backend="eager")), "compiled"),
        (compiled, "compiled"),
        (part, "'2' is compiled"),
        (nn.DataParallel(mlp()), "DataParallel"),
    ):
        with pytest.raises(AttachError, match=rf"{word}.*The order is: build"):
            rg.attach(model, rg.Dither())


def test_data_parallel_wrappers(tmp_path: Path) -> None:
    """DDP and fully_shard, in a process group of one."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group(
        "gloo",
        timeout=timedelta(seconds=60),
        init_method=f"file://{tmp_path / 'store'}",
        rank=0,
        world_size=1,
    )
    try:
        with pytest.raises(AttachError, match="wrapped in DistributedDataParallel"):
            rg.attach(nn.parallel.DistributedDataParallel(mlp()), rg.Dither())
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        with pytest.raises(AttachError, match="sharded by FSDP"):
            rg.attach(fully_shard(mlp(), mesh=mesh), rg.Dither())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyConv1d(2, 1))
    with pytest.raises(AttachError, match=r"'0.weight' has no shape yet.*one batch"):
        rg.attach(model, rg.Dither())
    layer = nn.LazyLinear(4)
    layer(torch.ones(2, 3))
    assert len(rg.attach(nn.Sequential(layer), rg.Dither()).plan.attached) == 1


def test_nothing_to_touch() -> None:
    for model in (nn.Sequential(), nn.Sequential(nn.ReLU()), nn.Sequential(nn.BatchNorm1d(3)), nn.LSTM(2, 2)):
        for strict in (True, False):
            with pytest.raises(NoEffectError, match="dither would touch no layer"):
                rg.attach(model, rg.Dither(), strict=strict)


def test_bad_patterns_leave_the_model_plain() -> None:
    model = cnn()
    for options in ({"only": "layer1"}, {"skip": ""}, {"only": []}, {"only": "6", "skip": "6"}):
        with pytest.raises((PatternError, NoEffectError)):
            rg.attach(model, rg.Dither(), **options)
        assert type(model[0]) is nn.Conv2d


def test_only_and_skip_act() -> None:
    """Layers that are not chosen are plain."""
    make, shape = MODELS["cnn"]
    model = seeded(make)
    session = rg.attach(model, rg.Dither(), only=["0", "6"], skip="6")
    model(batch(shape)).sum().backward()
    assert list(session.metrics()["layers"]) == ["0"]
    assert type(model[6]) is nn.Linear


def test_given_optimizer_owns_nothing() -> None:
    """An optimizer that owns no attached parameter can never drive the methods."""
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(rg.errors.RetrogradeError, match="optimizer"):
        rg.attach(mlp(), rg.Dither(), optimizer=other)


def test_an_attach_that_fails_leaves_the_model_as_it_was() -> None:
    """Whatever fails last: it can be attached again, and nothing acts meanwhile."""

    class Fails(rg.Dither):
        name = "fails"

        def conductor(self, model: nn.Module, rules: object) -> object:
            raise ZeroDivisionError

    def classes(model: nn.Module) -> list[type]:
        return [type(module) for module in model.modules()]

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    before = classes(model)
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), 1e-3)
    with pytest.raises(AttachError, match="owns no parameter"):
        rg.attach(model, rg.Spectral(residual="unbiased"), optimizer=stranger)
    assert classes(model) == before
    with pytest.raises(ZeroDivisionError):
        rg.attach(model, Fails())
    assert classes(model) == before
    rg.attach(model, rg.Perforate()).detach()
    assert classes(model) == before

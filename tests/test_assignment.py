"""Methods by pattern over layers, options that change in training, sessions found again, saved and resumed."""

import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import retrograde as rg
from cases import assert_same, batch, seeded, train
from retrograde.errors import (
    AttachError,
    DetachError,
    OptionError,
    PatternError,
    RetrogradeWarning,
    StateError,
)


def blocks() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)], nn.Linear(8, 3))


GIVEN: dict[str, Any] = {
    "[01].*": rg.Dither(1.0),
    "4": None,
    "*": [rg.Dither(4.0), rg.Decorrelate(rank=2, every=2)],
}


def scales(session: rg.Session) -> dict[str, float]:
    return {name: figures["scale"] for name, figures in session.metrics()["layers"].items()}


def test_the_first_pattern_that_matches_decides() -> None:
    session = rg.attach(seeded(blocks), GIVEN)
    assert scales(session) == {"0.0": 1.0, "1.0": 1.0, "2.0": 4.0, "3.0": 4.0}
    rows = {row.name: row for row in session.plan.rows}
    assert rows["0.0"].methods == ("dither",)
    assert rows["3.0"].methods == ("dither", "decorrelate")
    assert (rows["4"].status, rows["4"].why) == ("left", "None in `methods`, by '4'")


def test_a_layer_that_no_pattern_matches_is_plain() -> None:
    rows = {row.name: row for row in rg.make_plan(blocks(), {"0.*": rg.Dither()}).rows}
    assert rows["1.0"].why == "no pattern of `methods` matches"


def test_the_plan_says_what_patterns_match() -> None:
    """And of which layers that differ by a number alone only some."""
    plan = rg.make_plan(blocks(), GIVEN, only=["?.0"], skip="3.*")
    found = {(row.option, row.pattern): (row.matches, row.partly) for row in plan.patterns}
    assert found["methods", "[01].*"] == (2, "2 of 4 *.*")
    assert found["methods", "*"] == (5, "")
    assert found["only", "?.0"] == (4, "")
    assert found["skip", "3.*"] == (1, "1 of 4 *.*")
    assert "methods: '[01].*' matches 2 layers, of like ones only 2 of 4 *.*" in str(plan)
    assert plan.to_dict()["patterns"][0]["pattern"] == "[01].*"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"x.*": rg.Dither()}, PatternError, "'x.*' in `methods` matches no layer"),
        (
            {"*": rg.Dither(), "0.*": rg.Dither(1)},
            PatternError,
            "'0.*' .* earlier patterns have decided already",
        ),
        ({" ": rg.Dither()}, PatternError, "pattern ' '"),
        ({"*": None}, OptionError, "no method for any pattern"),
        ({}, OptionError, "no method for any pattern"),
        ({"0.*": rg.DeepFocus(), "*": rg.DeepFocus(q_skip=0.1)}, OptionError, "two settings of 'deepfocus'"),
        ({"*": [rg.Dither(), rg.Dither(1)]}, OptionError, "'dither' 2 times"),
    ],
)
def test_patterns_without_effect_are_refused(given: Any, error: type[Exception], message: str) -> None:
    model = blocks()
    with pytest.raises(error, match=message):
        rg.attach(model, given)
    assert type(model[0][0]) is nn.Linear


def test_layers_chosen_by_a_function() -> None:
    """It is called with the full name and the layer."""
    model = blocks()
    session = rg.attach(
        model, rg.Dither(), only=lambda name, layer: layer.out_features == 8, skip=lambda n, _: n == "0.0"
    )
    assert [row.name for row in session.plan.attached] == ["1.0", "2.0", "3.0"]
    with pytest.raises(PatternError, match="function given as `only` chose no layer"):
        rg.attach(blocks(), rg.Dither(), only=lambda name, layer: False)


# Options that change in training.


SHARES: list[tuple[rg.Method, rg.Method]] = [
    (rg.Spectral(2, warmup=0.25, every=2), rg.Spectral(2, warmup=10, every=2)),
    (rg.DeepFocus(warmup=0.001), rg.DeepFocus(warmup=1)),
    (rg.Decorrelate(rank=2, until=0.5), rg.Decorrelate(rank=2, until=20)),
]


@pytest.mark.parametrize(("share", "steps"), SHARES, ids=str)
def test_shares_of_a_run_are_steps_of_it(share: rg.Method, steps: rg.Method, tmp_path: Path) -> None:
    """A share is a number of steps once the run's length is known, which a saved session keeps."""
    session = rg.attach(seeded(blocks), {"[01].*": share, "*": rg.Dither()}, steps=40)
    assert set(session.methods) == {steps, rg.Dither()}
    session.save(tmp_path / "session.pt")
    assert set(rg.resume(seeded(blocks), tmp_path / "session.pt").methods) == {steps, rg.Dither()}
    given = {"[01].*": share, "*": rg.Dither()}
    resumed = rg.resume(seeded(blocks), tmp_path / "session.pt", given, steps=40)
    assert set(resumed.methods) == {steps, rg.Dither()}
    plan = rg.make_plan(seeded(blocks), share, steps=40)
    assert plan.attached == rg.make_plan(seeded(blocks), steps).attached
    for refused in (lambda: rg.attach(seeded(blocks), share), lambda: rg.make_plan(seeded(blocks), share)):
        with pytest.raises(OptionError, match=r"is a share of the run, whose length is not known.*steps="):
            refused()
    with pytest.raises(OptionError, match="steps=0 must be 1 or more"):
        rg.attach(seeded(blocks), share, steps=0)


def test_set_changes_a_method_where_it_is() -> None:
    session = rg.attach(seeded(blocks), GIVEN)
    session.set("dither", scale=2.0)
    assert scales(session) == dict.fromkeys(("0.0", "1.0", "2.0", "3.0"), 2.0)
    assert [str(method) for method in session.methods] == [
        "Dither(scale=2.0)",
        "Decorrelate(rank=2, every=2)",
    ]


def test_set_follows_a_function_of_the_step() -> None:
    model = seeded(blocks)
    session = rg.attach(model, rg.Dither(1.0))
    session.set(scale=lambda step: 1.0 + step)
    for step in range(3):
        assert set(scales(session).values()) == {1.0 + step}
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), (4, 8), 1)
    session.set(scale=0.5)
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), (4, 8), 2)
    assert set(scales(session).values()) == {0.5}


def test_set_reaches_every_method() -> None:
    """What `adjustable` lists is taken by the rules of each."""
    values = {
        "q_skip": 0.1,
        "q_full": 0.1,
        "p_min": 0.2,
        "p_max": 0.9,
        "h": 0.1,
        "low": None,
        "unbiased": True,
    }
    values |= {"scale": 3.0, "target_sparsity": 0.5, "products": "float32", "damping": 0.2, "kappa": 0.5}
    values |= {"lr": None, "power": None}
    for method in (rg.Dither(), rg.DeepFocus(warmup=0), rg.Decorrelate(rank=2, every=1)):
        model = seeded(blocks)
        session = rg.attach(model, method)
        session.set(**{option: values[option] for option in method.adjustable})
        train(model, torch.optim.SGD(model.parameters(), lr=0.01), (4, 8), 3)
        assert all(getattr(session.methods[0], option) == values[option] for option in method.adjustable)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dither", {"bits": 4}, "cannot change bits in training. It can change products, scale"),
        ("spectral", {"decay": 0.1}, "'spectral' is not attached"),
        (None, {"scale": 1.0}, "method None is not attached. Attached: decorrelate, dither"),
        ("dither", {"scale": -1.0}, "scale=-1.0 must be"),
    ],
)
def test_set_refuses_what_would_have_no_effect(
    name: str | None, options: dict[str, Any], message: str
) -> None:
    session = rg.attach(seeded(blocks), GIVEN)
    with pytest.raises(OptionError, match=message):
        session.set(name, **options)
    assert scales(session)["2.0"] == 4.0


# Sessions found again.


def test_session_of_a_model_and_of_what_contains_it() -> None:
    model = seeded(blocks)
    session = rg.attach(model, rg.Dither(0.0))
    assert rg.session_of(model) is rg.session_of(nn.Sequential(model)) is session
    assert repr(session) == "Session(Sequential: Dither(scale=0.0); 5 of 5 layers; step 0)"
    x = batch((3, 8))
    assert_same({"": rg.fold(model)(x)}, {"": model(x)}, 0.0)
    assert rg.detach(model) is model
    with pytest.raises(AttachError, match="nothing in it is attached"):
        rg.session_of(model)
    both = nn.ModuleList([blocks(), blocks()])
    for part in both:
        rg.attach(part, rg.Dither())
    with pytest.raises(AttachError, match="2 sessions"):
        rg.session_of(both)


# Saved and resumed.


def start(given: Any) -> tuple[nn.Module, rg.Session, torch.optim.Optimizer]:
    model = seeded(blocks)
    session = rg.attach(model, given, seed=3)
    return model, session, torch.optim.AdamW(model.parameters(), 1e-2)


@pytest.mark.parametrize("given", [GIVEN, rg.Spectral(rank=2, warmup=1, every=2), rg.DeepFocus(warmup=1)])
def test_resume_goes_on_bit_for_bit(given: Any, tmp_path: Path) -> None:
    model, session, optimizer = start(given)
    train(model, optimizer, (6, 8), 4)
    session.save(tmp_path / "session.pt")
    states = model.state_dict(), optimizer.state_dict()
    states = torch.load(_saved(states, tmp_path / "states.pt"), weights_only=True)
    train(model, optimizer, (6, 8), 4)
    again = seeded(blocks)
    resumed = rg.resume(again, tmp_path / "session.pt")
    again.load_state_dict(states[0])
    other = torch.optim.AdamW(again.parameters(), 1e-2)
    other.load_state_dict(states[1])
    assert [row.name for row in resumed.plan.attached] == [row.name for row in session.plan.attached]
    train(again, other, (6, 8), 4)
    assert_same(again.state_dict(), model.state_dict(), 0.0)


def _saved(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path


def test_a_run_resumed_without_its_session_is_told() -> None:
    model, _, optimizer = start(rg.Dither())
    train(model, optimizer, (6, 8), 2)
    again, _, other = start(rg.Dither())
    again.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    with pytest.warns(RetrogradeWarning, match=r"the session's was not: at 5 layers.*rg.resume") as said:
        train(again, other, (6, 8), 3)
    assert len(said) == 1


def test_pretrained_weights_are_no_resumed_run() -> None:
    model, _, optimizer = start(rg.Dither())
    model.load_state_dict(seeded(blocks).state_dict())
    train(model, optimizer, (6, 8), 2)


def test_schedules_are_asked_for_again(tmp_path: Path) -> None:
    _, session, _ = start(rg.Dither())
    session.set(scale=lambda step: 1.0 + step)
    session.save(tmp_path / "session.pt")
    with pytest.warns(RetrogradeWarning, match=r"while dither\.scale followed a function"):
        rg.resume(seeded(blocks), tmp_path / "session.pt")


def test_a_detached_session_takes_nothing(tmp_path: Path) -> None:
    _, session, _ = start(rg.Dither())
    session.detach()
    for call in (lambda: session.set(scale=1.0), lambda: session.save(tmp_path / "session.pt")):
        with pytest.raises(DetachError, match="detached already"):
            call()


def test_arguments_in_the_wrong_order_or_of_the_wrong_kind() -> None:
    with pytest.raises(OptionError, match="The model comes first"):
        rg.attach(rg.Dither(), blocks())  # type: ignore[arg-type]
    _, session, _ = start(rg.Dither())
    with pytest.raises(OptionError, match="dither refuses"):
        session.set(scale="x")
    assert set(scales(session).values()) == {1.0}


class Unlisted(rg.Dither):
    """Registered under no name of its own."""

    name: ClassVar[str] = "unlisted"


def test_resume_refuses_what_does_not_fit(tmp_path: Path) -> None:
    """And leaves the model plain."""
    _, session, _ = start(rg.Dither())
    path = tmp_path / "session.pt"
    session.save(path)
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(StateError, match=r"another model: this one has no layer '0\.0'"):
        rg.resume(model, path)
    wider = seeded(blocks)
    wider[3][0], wider[4] = nn.Linear(8, 9), nn.Linear(9, 3)
    with pytest.raises(StateError, match=r"weight of its layer '3\.0' is \(8, 8\), and here it is \(9, 8\)"):
        rg.resume(wider, path)
    assert type(wider[0][0]) is nn.Linear
    data = bytearray(path.read_bytes())
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    torch.save({"x": 1}, tmp_path / "other.pt")
    for name, why in (
        ("missing.pt", "missing"),
        ("cut.pt", "cannot be read"),
        ("other.pt", "is not a session file"),
    ):
        with pytest.raises(StateError, match=why):
            rg.resume(seeded(blocks), tmp_path / name)
    start(Unlisted())[1].save(path)
    with pytest.raises(StateError, match="'unlisted', which is not installed"):
        rg.resume(seeded(blocks), path)
    model = seeded(blocks)
    assert rg.resume(model, path, Unlisted()).step == 0
    assert type(model[0][0]) is not nn.Linear


def test_a_save_that_fails_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, session, _ = start(rg.Dither())
    path = tmp_path / "session.pt"
    session.save(path)
    before = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        session.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["session.pt"]

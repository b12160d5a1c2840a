"""The training loop with peers, with a number of steps, and with readings within an epoch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from safetensors.torch import load_model
from torch import Tensor, nn

from retrograde.errors import OptionError
from retrograde.lab import data as lab_data
from retrograde.lab import files, measure, models, peers
from retrograde.lab.data import Data, Split
from retrograde.lab.peers import Peer
from retrograde.lab.recipe import Recipe, make_recipe
from retrograde.lab.record import read_run
from retrograde.lab.trainer import Progress, Trainer, train

STEPS = 10
"""Steps of an epoch of `SMALL`."""

_TIMES = ("seconds", "step_seconds", "backward_seconds", "peak_memory_bytes", "timing")


def noisy(data: Data) -> nn.Module:
    """Dropout and running means tell whether a reading touched training."""
    width = data.train.inputs[0].numel()
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(width, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3)),
        nn.Linear(16, data.classes),
    )


SMALL = Recipe(
    model=f"{__name__}:noisy",
    limit=160,
    batch_size=16,
    epochs=2,
    optimizer="sgd",
    learning_rate=0.05,
    seed=3,
    decline=False,
)


def changed(**change: Any) -> Recipe:
    return SMALL.model_copy(update=change)


def untimed(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in _TIMES}


def readings(folder: Path) -> list[tuple[str, int, float]]:
    return [
        (reading.event, reading.step, reading.validation["accuracy"]) for reading in read_run(folder).readings
    ]


def assert_same_run(one: Path, two: Path) -> None:
    first, second = (untimed(files.read_json(folder / files.RESULT)) for folder in (one, two))
    assert first == second
    assert readings(one) == readings(two)
    assert (one / files.MODEL).read_bytes() == (two / files.MODEL).read_bytes()


def stopped_at(step: int) -> dict[str, Any]:
    """Arguments for `train` that interrupt it after this step of the whole run."""
    at = [0]

    def progress(state: Progress) -> None:
        at[0] = state.step

    return {"progress": progress, "stop": lambda: at[0] == step}


def assert_resumes(recipe: Recipe, folder: Path, *stops: int) -> None:
    """Interrupted there, it is the run that was never interrupted."""
    train(recipe, folder / "whole")
    for number, step in enumerate(stops):
        with pytest.raises(KeyboardInterrupt):
            train(recipe, folder / "cut", resume=number > 0, **stopped_at(step))
    train(recipe, folder / "cut", resume=True)
    assert_same_run(folder / "whole", folder / "cut")


# A number of steps.


@pytest.mark.parametrize(("steps", "epochs"), [(3, 1), (STEPS, 1), (STEPS + 4, 2), (3 * STEPS, 3)])
def test_steps_decide_over_epochs(tmp_path: Path, steps: int, epochs: int) -> None:
    result = train(changed(steps=steps), tmp_path / "run")
    assert (result["steps"], result["epochs"]) == (steps, epochs)
    assert readings(tmp_path / "run")[-1][:2] == ("epoch", steps)


def test_the_schedule_is_fitted_to_the_steps(tmp_path: Path) -> None:
    """As many steps by either field are the same run; fewer of them end with the rate at its lowest as well."""
    by_epochs = untimed(train(changed(epochs=2), tmp_path / "epochs"))
    assert untimed(train(changed(epochs=7, steps=2 * STEPS), tmp_path / "steps")) == by_epochs
    train(changed(steps=STEPS + 4), tmp_path / "fewer")
    rates = [step.learning_rate for step in read_run(tmp_path / "fewer").steps if step.step == STEPS + 4]
    assert rates == [pytest.approx(0.05 / 25 / 1e4, rel=1e-3)]


@pytest.mark.parametrize("step", [1, STEPS - 1, STEPS, STEPS + 2])
def test_a_run_of_so_many_steps_resumes(tmp_path: Path, step: int) -> None:
    assert_resumes(changed(steps=STEPS + 4), tmp_path, step)


def test_a_run_of_so_many_steps_resumes_after_its_last_one(tmp_path: Path) -> None:
    assert_resumes(changed(steps=STEPS + 4), tmp_path, STEPS + 4)


def test_no_steps_are_refused() -> None:
    for field in ("steps", "evaluations"):
        with pytest.raises(OptionError, match=f"{field}=0 is refused"):
            make_recipe({field: 0})


# Readings.


@pytest.mark.parametrize(("evaluations", "steps"), [(1, [10]), (2, [5, 10]), (4, [2, 5, 8, 10])])
def test_readings_are_spread_over_the_epoch(tmp_path: Path, evaluations: int, steps: list[int]) -> None:
    train(changed(evaluations=evaluations), tmp_path / "run")
    found = [(event, step) for event, step, _ in readings(tmp_path / "run")]
    first = [("reading", step) for step in steps[:-1]] + [("epoch", STEPS)]
    assert found == first + [(event, step + STEPS) for event, step in first]


def test_readings_leave_no_trace_in_training(tmp_path: Path) -> None:
    """Dropout, running means, the methods' figures: all as if nobody had looked."""
    recipe = changed(methods={"dither": {"target_sparsity": 0.9}})
    one = train(recipe, tmp_path / "one")
    four = train(recipe.model_copy(update={"evaluations": 4}), tmp_path / "four")
    for name in ("test", "validation", "zeros", "flops", "steps"):
        assert four[name] == one[name]
    assert (tmp_path / "four" / files.MODEL).read_bytes() == (tmp_path / "one" / files.MODEL).read_bytes()


def test_readings_are_not_repeated_when_a_run_goes_on(tmp_path: Path) -> None:
    assert_resumes(changed(evaluations=4, keep="best"), tmp_path, 2, 7, STEPS + 5)


# The best weights.


def falling(
    monkeypatch: pytest.MonkeyPatch, accuracies: list[float]
) -> tuple[list[dict[str, Tensor]], list[Any]]:
    """The validation split reads so; the weights at each reading, and those that are tested."""
    seen: list[dict[str, Tensor]] = []
    tested: list[Any] = []

    def evaluate(model: nn.Module, split: Split, *arguments: Any) -> dict[str, float]:
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        if len(seen) == len(accuracies):
            tested.append(weights)
            return {"loss": 1.0, "accuracy": 0.5}
        seen.append(weights)
        return {"loss": 1.0, "accuracy": accuracies[len(seen) - 1]}

    monkeypatch.setattr(measure, "evaluate", evaluate)
    return seen, tested


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("keep", "kept"), [("best", 1), ("last", 3)])
def test_the_weights_that_are_kept_are_tested_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str, kept: int
) -> None:
    """The first of equals, in the middle of an epoch or at its end."""
    recipe = changed(epochs=2, evaluations=2, keep=keep)
    seen, tested = falling(monkeypatch, [0.6, 0.8, 0.7, 0.8])
    result = train(recipe, tmp_path / "run")
    assert [same(tested[0], weights) for weights in seen] == [number == kept for number in range(4)]
    saved = models.build(recipe.model, lab_data.load("digits", limit=160))
    load_model(saved, str(tmp_path / "run" / files.MODEL))
    assert same(saved.state_dict(), seen[kept])
    assert result["best_validation"] == {"epoch": 1, "loss": 1.0, "accuracy": 0.8}
    assert result["validation"]["accuracy"] == 0.8


def test_the_best_weights_survive_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, tested = falling(monkeypatch, [0.9, 0.5])
    with pytest.raises(KeyboardInterrupt):
        train(changed(keep="best"), tmp_path / "run", **stopped_at(STEPS + 3))
    train(changed(keep="best"), tmp_path / "run", resume=True)
    assert same(tested[0], seen[0])
    assert not same(seen[0], seen[1])


# The test split.


def test_a_trial_reads_no_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = lab_data.load("digits", seed=SMALL.seed, limit=SMALL.limit)
    evaluate, read = measure.evaluate, []

    def evaluated(model: nn.Module, split: Split, *arguments: Any) -> dict[str, float]:
        read.append("test" if split is data.test else "validation")
        return evaluate(model, split, *arguments)

    monkeypatch.setattr(measure, "evaluate", evaluated)
    results = {}
    for trial in (True, False):
        trainer = Trainer(SMALL, tmp_path / str(trial), data)
        for _ in trainer.epochs():
            pass
        results[trial] = trainer.finish(trial=trial)
    assert read == ["validation"] * 4 + ["test"]
    assert results[True]["test"] is None
    assert results[True]["model_file"] is None
    assert not (tmp_path / "True" / files.MODEL).exists()
    assert results[False]["test"]["accuracy"] > 0
    assert results[False]["validation"] == results[True]["validation"]


# Peers.


class _Twice(torch.optim.SGD):
    closures: ClassVar[list[float]] = []

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is not None
        before = [p.grad.clone() for p in self._all()]
        self.zero_grad()
        self.closures.append(closure())
        for parameter, gradient in zip(self._all(), before, strict=True):
            parameter.grad = (parameter.grad + gradient) / 2
        super().step()

    def _all(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"]]


@dataclass(frozen=True)
class Twice(Peer):
    """The mean of the gradients of two equal passes: plain training at twice its price."""

    second_pass: ClassVar[bool] = True

    def make_optimizer(
        self, model: nn.Module, learning_rate: float, *arguments: Any
    ) -> torch.optim.Optimizer:
        return _Twice(model.parameters(), lr=learning_rate)


@dataclass(frozen=True)
class Once(Peer):
    """The same optimizer without the second pass."""

    def make_optimizer(
        self, model: nn.Module, learning_rate: float, *arguments: Any
    ) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=learning_rate)


class _EveryOther:
    def __init__(self) -> None:
        self.calls = 0

    def select(self, losses: Callable[[], Tensor], count: int) -> Tensor:
        found = losses()
        assert (found.shape, found.requires_grad) == ((count,), False)
        self.calls += 1
        # Which half it is depends on the history.
        return torch.arange(count)[self.calls % 2 :: 2]

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


@dataclass(frozen=True)
class Half(Peer):
    """Trains on every other row."""

    def selector(self, seed: int) -> _EveryOther:
        return _EveryOther()


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, type[Peer]] = {"twice": Twice, "once": Once, "half": Half}
    find = peers.find
    monkeypatch.setattr(peers, "find", lambda name: known[name] if name in known else find(name))


PLAIN_MODEL = {"model": "mlp-small", "epochs": 1}
"""Without dropout or running means, which see both passes."""


@pytest.mark.usefixtures("fakes")
def test_a_second_pass_is_made_and_counted(tmp_path: Path) -> None:
    _Twice.closures.clear()
    once = train(changed(**PLAIN_MODEL, peers={"once": {}}), tmp_path / "once")
    twice = train(changed(**PLAIN_MODEL, peers={"twice": {}}), tmp_path / "twice")
    assert len(_Twice.closures) == STEPS
    assert all(2 < loss < 3 for loss in _Twice.closures[:1]), "the closure gives the loss: ln 10 at first"
    assert twice["test"] == once["test"], "two equal passes are one"
    for name in ("needed", "executed", "discounted"):
        assert twice["flops"][name] == 2 * once["flops"][name]
    assert twice["flops"]["dense"] == once["flops"]["dense"] == once["flops"]["needed"]


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "constant"])
def test_a_schedule_keeps_the_learning_rates_that_a_peer_chose(schedule: Literal["one-cycle"]) -> None:
    """Its highest rate is the recipe's for groups that have that, and a group's own where it has one."""
    first, second = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.01}], lr=0.05)
    moved = changed(schedule=schedule).make_schedule(optimizer, STEPS)
    highest = [0.0, 0.0]
    for _ in range(STEPS):
        highest = [max(pair) for pair in zip(highest, moved.get_last_lr(), strict=True)]
        optimizer.step()
        moved.step()
    assert highest == pytest.approx([0.05, 0.01], rel=0.05)


@pytest.mark.usefixtures("fakes")
def test_a_selector_chooses_the_rows_and_is_counted(tmp_path: Path) -> None:
    """Half of the rows, and a forward pass over all of them."""
    result = train(changed(**PLAIN_MODEL, peers={"half": {}}), tmp_path / "run")
    plain = train(changed(**PLAIN_MODEL), tmp_path / "plain")
    dense, forward = plain["flops"]["dense"], plain["flops"]["forward"]["dense"]
    assert result["flops"]["needed"] == pytest.approx(dense / 2 + forward)
    assert result["flops"]["dense"] == dense
    assert result["validation"] != plain["validation"]


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("name", ["half", "selective-backprop"])
def test_a_selector_resumes(tmp_path: Path, name: str) -> None:
    assert_resumes(changed(peers={name: {}}), tmp_path, 3, STEPS)


@pytest.mark.usefixtures("fakes")
def test_a_second_pass_resumes(tmp_path: Path) -> None:
    assert_resumes(changed(peers={"twice": {}}), tmp_path, STEPS - 1)


def test_sam_costs_twice(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_optimizer")
    flops = train(changed(epochs=1, peers={"sam": {"rho": 0.1}}), tmp_path / "run")["flops"]
    assert flops["executed"] == 2 * flops["dense"]


# Options of the model.


@pytest.mark.parametrize("change", [{"peers": {"sam": {}}}, {"methods": {"dither": {}}}], ids=str)
def test_the_memory_of_a_step_is_measured_without_a_trace(tmp_path: Path, change: dict[str, Any]) -> None:
    recipe = make_recipe({**SMALL.model_dump(), **change})
    found: dict[str, dict[str, Any]] = {}
    for measures in ((), ("step_peak_bytes",)):
        folder = tmp_path / str(len(measures))
        trainer = Trainer(recipe, folder, recipe.load_data(None))
        for _ in trainer.epochs():
            pass
        found[folder.name] = trainer.finish(measures=measures)
    weights = 4 * sum(p.numel() for p in noisy(recipe.load_data(None)).parameters())
    assert found["1"]["measures"]["step_peak_bytes"] > weights, "gradients alone take as much"
    assert found["1"]["test"] == found["0"]["test"]
    first, second = ((tmp_path / name / files.MODEL).read_bytes() for name in "01")
    assert first == second


def test_options_reach_the_model(tmp_path: Path) -> None:
    recipe = Recipe(model="mlp", model_options={"widths": [12]}, limit=64, epochs=1)
    assert train(recipe, tmp_path / "run")["parameters"] == 64 * 12 + 12 + 12 * 10 + 10

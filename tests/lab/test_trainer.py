"""The training loop: what it measures, and that an interruption leaves no trace."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from retrograde import forecast, trials
from retrograde.errors import CheckpointError, OptionError, PatternError, RetrogradeWarning
from retrograde.lab import data as lab_data
from retrograde.lab import files, measure, models
from retrograde.lab.data import Data
from retrograde.lab.recipe import Recipe
from retrograde.lab.record import read_description
from retrograde.lab.tensorboard import is_available
from retrograde.lab.trainer import Progress, Trainer, train

STEPS = 12
"""Steps of an epoch of `SMALL`."""

_TIMES = (
    "seconds",
    "step_seconds",
    "backward_seconds",
    "peak_memory_bytes",
    "metrics_bytes",
    "timing",
    "clocked",
)


class Noisy(nn.Sequential):
    """Dropout draws random numbers and BatchNorm keeps running means: both must survive an interruption."""

    modes: list[bool]

    def __init__(self, data: Data) -> None:
        width = data.train.inputs[0].numel()
        super().__init__(
            nn.Flatten(),
            *(nn.Linear(width, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3)),
            nn.Linear(32, data.classes),
        )
        self.modes = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modes.append(self.training)
        return super().forward(x)


def gelu(data: Data) -> nn.Module:
    """What a layer reads is kept for its own backward pass alone, as it is not behind a ReLU."""
    first = nn.Linear(data.train.inputs[0].numel(), 128)
    return nn.Sequential(nn.Flatten(), first, nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))


# The tests' own module, under whatever name pytest has imported it.
NOISY = f"{__name__}:Noisy"
DITHER: dict[str, dict[str, Any]] = {"dither": {"target_sparsity": 0.9}}
GELU = f"{__name__}:gelu"
SMALL = Recipe(
    model=NOISY,
    methods=DITHER,
    limit=200,
    batch_size=16,
    epochs=3,
    optimizer="sgd",
    learning_rate=0.05,
    seed=5,
    decline=False,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`SMALL`, never interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(SMALL, folder)
    return folder


def untimed(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in _TIMES}


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / files.METRICS).read_text(encoding="utf-8")
    return [untimed(json.loads(line)) for line in text.splitlines()]


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / files.RESULT).read_text(encoding="utf-8"))


def assert_equal(one: Any, two: Any, where: str = "checkpoint") -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key, value in one.items():
            assert_equal(value, two[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for number, pair in enumerate(zip(one, two, strict=True)):
            assert_equal(*pair, f"{where}.{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    else:
        assert one == two, where


def assert_same_run(one: Path, two: Path) -> None:
    """Weights, optimizer, session, generators, figures and log lines are the same to the bit."""
    assert untimed(result_of(one)) == untimed(result_of(two))
    assert lines(one) == lines(two)
    assert (one / files.MODEL).read_bytes() == (two / files.MODEL).read_bytes()
    assert_equal(*(untimed(files.load_checkpoint(folder)) for folder in (one, two)))


def stopped_at(step: int) -> dict[str, Any]:
    """Arguments for `train` that interrupt it after this step of the whole run."""
    at = [0]

    def progress(state: Progress) -> None:
        at[0] = state.step

    return {"progress": progress, "stop": lambda: at[0] == step}


# Interruption.


@pytest.mark.parametrize(
    "stops",
    [
        pytest.param([STEPS], id="last step of an epoch"),
        pytest.param([STEPS - 1, STEPS + 1], id="around it"),
        pytest.param([3 * STEPS], id="last step of all"),
        pytest.param([1, 2, 10], id="beginning"),
        pytest.param(sorted(random.Random(1).sample(range(1, 36), 4)), id="anywhere"),
        pytest.param(sorted(random.Random(2).sample(range(1, 36), 4)), id="anywhere else"),
    ],
)
def test_interrupted_and_resumed_is_never_interrupted(tmp_path: Path, whole: Path, stops: list[int]) -> None:
    folder = tmp_path / "run"
    for number, step in enumerate(stops):
        torch.manual_seed(100 + number)  # the process's own generator is none of the run's business
        with pytest.raises(KeyboardInterrupt):
            train(SMALL, folder, resume=number > 0, **stopped_at(step))
        assert files.load_checkpoint(folder)["step"] == step
        result = result_of(folder)
        assert (result["status"], result["steps"], result["test"]) == ("interrupted", step, None)
        assert not (folder / files.MODEL).exists()
    train(SMALL, folder, resume=True)
    assert_same_run(whole, folder)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "lenet", "augment": True},
        {"optimizer": "adamw", "schedule": "cosine", "methods": {}},
        {"optimizer": "adam", "schedule": "constant", "weight_decay": 0.01, "label_smoothing": 0.1},
        {"precision": "bfloat16"},
    ],
    ids=["augmented convolutions", "plain adamw", "adam", "bfloat16"],
)
def test_every_sort_of_run_resumes(tmp_path: Path, change: dict[str, Any]) -> None:
    recipe = SMALL.model_copy(update={"epochs": 2, **change})
    train(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", **stopped_at(7))
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_run_that_declined_layers_goes_on_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: trials.Trials, candidate: trials.Candidate, calls: Any) -> forecast.LayerForecast:
        attached = 0.5 if candidate.name == "1" else 2.0
        return forecast.LayerForecast(1.0, attached, 0.1, 0.5, {"skip": 1.0}, (attached, attached))

    monkeypatch.setattr(trials.Trials, "run", run)
    recipe = SMALL.model_copy(update={"epochs": 2, "decline": True})
    train(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", **stopped_at(7))
    monkeypatch.setattr(trials.Trials, "run", None)
    result = train(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    (layer,) = result["timing"]["layers"].values()
    assert list(result["timing"]["layers"]) == ["1"]
    assert layer["forecast"] == result["timing"]["backward_forecast"] == 0.1
    assert layer["seconds"] > 0
    rows = {row.name: row for row in read_description(tmp_path / "run").plan.layers}
    assert rows["5"].status == "declined"


def test_a_run_whose_layers_are_all_declined_is_plain_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, as with `attach`; misspelt patterns are errors all the same."""
    slower = forecast.LayerForecast(1.0, 2.0, 0.1, 0.5, {"skip": 1.0}, (1.9, 2.1))
    monkeypatch.setattr(trials.Trials, "run", lambda *given: slower)
    assert Recipe().decline
    recipe = SMALL.model_copy(update={"decline": True, "epochs": 2})
    with pytest.warns(RetrogradeWarning, match="dither: nothing is attached"):
        train(recipe, tmp_path / "whole")
    with pytest.warns(RetrogradeWarning), pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", **stopped_at(7))
    train(recipe, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    train(recipe.model_copy(update={"methods": {}}), tmp_path / "plain")
    assert lines(tmp_path / "whole") == lines(tmp_path / "plain")
    rows = read_description(tmp_path / "run").plan.layers
    assert {row.status for row in rows} == {"declined", "left"}
    with pytest.raises(PatternError):
        train(recipe.model_copy(update={"skip": ["hiden"]}), tmp_path / "misspelt")


def test_a_crash_between_checkpoints_repeats_the_lost_steps(tmp_path: Path, whole: Path) -> None:
    """Log lines that were written after the last checkpoint are not there twice."""

    def crash(state: Progress) -> None:
        if state.step == 2 * STEPS - 1:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(SMALL, tmp_path / "run", progress=crash)
    assert files.load_checkpoint(tmp_path / "run")["step"] == STEPS
    assert lines(tmp_path / "run")[-1]["step"] == 20
    train(SMALL, tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_checkpoints_within_an_epoch_change_nothing(tmp_path: Path, whole: Path) -> None:
    train(SMALL, tmp_path / "run", checkpoint_seconds=0)
    assert_same_run(whole, tmp_path / "run")


def test_the_same_recipe_gives_the_same_run_and_another_seed_another(tmp_path: Path, whole: Path) -> None:
    torch.manual_seed(99)
    train(SMALL, tmp_path / "same")
    assert_same_run(whole, tmp_path / "same")
    train(SMALL.model_copy(update={"seed": 6}), tmp_path / "other")
    assert lines(tmp_path / "other") != lines(whole)


def test_the_process_keeps_its_generator(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(SMALL.model_copy(update={"epochs": 1}), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_runs_that_take_turns_do_not_touch_each_other(tmp_path: Path, whole: Path) -> None:
    data = lab_data.load("digits", validation=SMALL.validation, seed=SMALL.seed, limit=SMALL.limit)
    plain = SMALL.model_copy(update={"methods": {}})
    pair = [
        Trainer(recipe, tmp_path / name, data) for name, recipe in (("plain", plain), ("dithered", SMALL))
    ]
    for _ in zip(*(trainer.epochs() for trainer in pair), strict=True):
        pass
    for trainer in pair:
        trainer.finish()
    assert_same_run(whole, tmp_path / "dithered")


def test_resume_of_a_finished_run(tmp_path: Path) -> None:
    recipe = SMALL.model_copy(update={"epochs": 1})
    first = train(recipe, tmp_path / "run")
    model = (tmp_path / "run" / files.MODEL).read_bytes()
    assert untimed(train(recipe, tmp_path / "run", resume=True)) == untimed(first)
    assert (tmp_path / "run" / files.MODEL).read_bytes() == model


def test_another_recipe_is_refused_by_name(tmp_path: Path) -> None:
    recipe = SMALL.model_copy(update={"epochs": 1})
    train(recipe, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    changed = recipe.model_copy(update={"learning_rate": 0.5, "skip": ["1"]})
    with pytest.raises(CheckpointError, match=r"skip, learning_rate|learning_rate, skip"):
        train(changed, tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="holds a run already"):
        train(recipe, tmp_path / "run")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_bad_pattern_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(PatternError):
        train(SMALL.model_copy(update={"only": ["nothing.*"]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_refused_augmentation_leaves_no_folder(tmp_path: Path) -> None:
    """Else the corrected command would be told that the folder holds a run."""
    recipe = Recipe(data=str(table(tmp_path / "set")), augment=True, epochs=1)
    with pytest.raises(OptionError, match="augment"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / files.RUN).exists()


# TensorBoard.


@pytest.mark.skipif(not is_available(), reason="TensorBoard is not installed")
@pytest.mark.parametrize("step", [10, STEPS, STEPS + 3])
def test_tensorboard_of_a_resumed_run_shows_every_point_once(tmp_path: Path, whole: Path, step: int) -> None:
    """Resuming hides what will be logged again, and not the points of the checkpoint's own step."""
    with pytest.raises(KeyboardInterrupt):
        train(SMALL, tmp_path / "run", **stopped_at(step))
    train(SMALL, tmp_path / "run", resume=True)
    assert scalars(tmp_path / "run") == scalars(whole)


@pytest.mark.skipif(not is_available(), reason="TensorBoard is not installed")
def test_tensorboard_keeps_the_points_of_an_epoch_that_ended_with_the_checkpoint(
    tmp_path: Path, whole: Path
) -> None:
    def crash(state: Progress) -> None:
        if state.step == STEPS + 1:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(SMALL, tmp_path / "run", progress=crash)
    train(SMALL, tmp_path / "run", resume=True)
    assert scalars(tmp_path / "run") == scalars(whole)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag → (step, value) as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    # Sorted: two event files that were begun in the same second are read in either order.
    return {tag: sorted((e.step, e.value) for e in events.Scalars(tag)) for tag in events.Tags()["scalars"]}


# What is measured.


def make(tmp_path: Path, **change: Any) -> Trainer:
    recipe = SMALL.model_copy(update={"epochs": 1, **change})
    data = lab_data.load(recipe.data, seed=recipe.seed, limit=recipe.limit)
    return Trainer(recipe, tmp_path / "run", data)


def test_evaluation_is_in_eval_mode_and_training_in_training_mode(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    model: Any = trainer.model
    model.modes.clear()
    epochs = trainer.epochs()
    next(epochs)
    # So short a run looks at every step for what its pass keeps.
    training = 2 * STEPS
    assert model.modes == [True] * training + [False], "one batch of validation rows after the steps"
    assert model.training
    trainer.finish()
    assert model.modes[training + 1 :] == [False, True], "the test rows, and what a training pass keeps"


def test_the_last_validation_is_that_of_the_trained_model(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    for _ in trainer.epochs():
        pass
    result = trainer.finish()
    plain = models.build(NOISY, trainer.data)
    plain.load_state_dict(trainer.model.state_dict())
    plain.eval()
    for part in ("validation", "test"):
        split = getattr(trainer.data, part)
        with torch.no_grad():
            logits = plain(split.inputs)
        accuracy = float((logits.argmax(1) == split.targets).double().mean())
        loss = float(nn.functional.cross_entropy(logits, split.targets))
        assert result[part]["accuracy"] == pytest.approx(accuracy, abs=1e-12)
        assert result[part]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("methods", [{}, DITHER], ids=["plain", "dither"])
def test_measuring_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: dict[str, dict[str, Any]]
) -> None:
    recipe = SMALL.model_copy(update={"epochs": 1, "methods": methods})
    measured = train(recipe, tmp_path / "measured")
    dense, steps = measured["flops"]["dense"], measured["steps"]
    forward = measured["flops"]["forward"]["dense"]
    step = measure.StepFlops(forward / steps, (dense - forward) / steps)
    monkeypatch.setattr(measure, "step_flops", lambda *a: step)
    monkeypatch.setattr(measure, "saved_activation_bytes", lambda *a: measured["saved_activation_bytes"])
    train(recipe, tmp_path / "unmeasured")
    assert_same_run(tmp_path / "measured", tmp_path / "unmeasured")


def test_saved_activations_on_average(tmp_path: Path) -> None:
    """Of full and of projected steps, which take turns; plain training keeps the same in every step."""
    recipe = SMALL.model_copy(update={"epochs": 2, "batch_size": 256, "limit": None, "methods": {}})
    plain = train(recipe, tmp_path / "plain")
    assert plain["mean_saved_activation_bytes"] == plain["saved_activation_bytes"]
    options = {"rank": 4, "warmup": 1, "every": 100, "full_every": 2}
    methods = {"spectral": options}
    found = train(recipe.model_copy(update={"methods": methods, "model": GELU}), tmp_path / "spectral")
    assert 0 < found["mean_saved_activation_bytes"] < 0.95 * found["saved_activation_bytes"]
    forecast = found["timing"]["forecast_bytes"]
    assert forecast == pytest.approx(found["mean_saved_activation_bytes"], rel=0.1)


def test_backward_passes_are_a_part_of_a_step(tmp_path: Path) -> None:
    result = train(SMALL.model_copy(update={"epochs": 1}), tmp_path)
    assert 0 < result["backward_seconds"] < result["step_seconds"]


@pytest.mark.parametrize("model", [NOISY, "mlp-small", "vgg-small-bn"])
def test_whole_flops_are_those_of_plain_training(tmp_path: Path, model: str) -> None:
    """Dense-equivalent of an attached run = plain run = torch's own count of a step × steps."""
    recipe = SMALL.model_copy(update={"epochs": 1, "model": model, "limit": 48})
    data = lab_data.load("digits", seed=recipe.seed, limit=48)
    fresh = models.build(model, data, seed=1)
    with FlopCounterMode(display=False) as counter:
        loss = measure.loss_of(fresh(data.train.inputs[:16]), data.train.targets[:16])
        forward = counter.get_total_flops() * 3
        loss.backward()
    counted = counter.get_total_flops() * 3
    plain = train(recipe.model_copy(update={"methods": {}}), tmp_path / "plain")["flops"]
    counts = ("dense", "needed", "executed", "discounted")
    assert plain == {
        **dict.fromkeys(counts, counted),
        **{"overhead": 0.0, "forward": dict.fromkeys(counts, forward)},
        **{"input_grad": None, "weight_grad": None},
    }
    attached = train(recipe, tmp_path / "attached")["flops"]
    assert attached["dense"] == counted
    assert attached["needed"] < counted
    assert attached["needed"] <= attached["executed"] <= counted + attached["overhead"]
    partly = train(recipe.model_copy(update={"only": [_last(fresh)]}), tmp_path / "partly")["flops"]
    assert partly["dense"] == counted
    assert partly["not_attached"] > 0.1 * counted
    assert attached["forward"]["dense"] == partly["forward"]["dense"] == forward
    assert attached["needed"] < partly["needed"] < counted


def _last(model: nn.Module) -> str:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def test_metrics_count_what_the_session_counts(whole: Path) -> None:
    written = lines(whole)
    steps = [line["step"] for line in written if line["event"] == "step"]
    assert steps == [10, 20, 30, 36]
    epochs = [line for line in written if line["event"] == "epoch"]
    assert [line["step"] for line in epochs] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert all(0.5 < line["zeros"] < 1 for line in epochs)
    assert set(epochs[0]["layers"]) == {"1", "5"}
    best = max(epochs, key=lambda line: line["validation"]["accuracy"])
    result = result_of(whole)
    assert result["best_validation"] == {"epoch": best["epoch"], **best["validation"]}
    assert result["validation"] == epochs[-1]["validation"]
    assert result["parameters"] == 64 * 32 + 32 + 64 + 32 * 10 + 10


def test_fewer_rows_than_a_batch_make_one_step(tmp_path: Path) -> None:
    recipe = Recipe(limit=5, batch_size=128, epochs=2)
    assert train(recipe, tmp_path / "run")["steps"] == 2


# Other kinds of data.


def table(folder: Path) -> Path:
    folder.mkdir()
    columns = {
        "size": [float(i % 7) for i in range(120)],
        "kind": [("a", "b")[i % 2] for i in range(120)],
        "label": [i % 2 for i in range(120)],
    }
    parquet.write_table(pa.table(columns), folder / "train.parquet")
    return folder


def test_a_table_trains(tmp_path: Path) -> None:
    recipe = Recipe(
        data=str(table(tmp_path / "set")),
        methods={"dither": {}},
        batch_size=16,
        epochs=10,
        learning_rate=0.01,
        decline=False,
    )
    result = train(recipe, tmp_path / "run")
    assert result["test"]["accuracy"] == 1.0
    assert result["zeros"] is not None


def tiny_gpt(data: Data) -> nn.Module:
    return models.GPT(data.vocabulary or 0, data.input_shape[0], layers=1, width=32, heads=2)


def test_a_language_model_trains_and_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    parquet.write_table(pa.table({"text": ["the cat sat on the mat. " * 400]}), folder / "train.parquet")
    recipe = Recipe(
        data=str(folder),
        model=f"{__name__}:tiny_gpt",
        methods={"dither": {"scale": 1.0}},
        batch_size=8,
        epochs=4,
        learning_rate=0.01,
        decline=False,
    )
    result = train(recipe, tmp_path / "run")
    assert result["test"]["accuracy"] > 0.3, "one guess in eleven characters is 0.09"
    assert result["flops"]["not_attached"] >= 0
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "again", **stopped_at(9))
    train(recipe, tmp_path / "again", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "again")


@pytest.mark.data
def test_a_real_table_trains(tmp_path: Path, data_dir: Path) -> None:
    recipe = Recipe(data="adult", methods={"dither": {}}, limit=2000, epochs=2, decline=False)
    assert train(recipe, tmp_path / "run", data_dir=data_dir)["test"]["accuracy"] > 0.75


# A model from the working directory.


def test_model_of_a_module_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "my_own_models.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    forget: Callable[[], object] = lambda: sys.modules.pop("my_own_models", None)  # noqa: E731
    request.addfinalizer(forget)
    recipe = Recipe(model="my_own_models:net", limit=32, epochs=1, batch_size=16)
    assert train(recipe, tmp_path / "run")["parameters"] == 650

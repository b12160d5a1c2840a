"""The whole grid: what its result holds, that it resumes, and that nothing is run twice."""

import math
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import torch
from small_claims import CHECK, HOLD, RECIPE, STEPS, TUNING, small, stop_after, untimed

from retrograde.errors import OptionError
from retrograde.lab import files
from retrograde.lab.claims import grid as grid_module
from retrograde.lab.claims import metrics
from retrograde.lab.claims.cells import Cell, pace
from retrograde.lab.claims.definition import Claim, Measure
from retrograde.lab.claims.grid import Grid, Places, default_folder
from retrograde.lab.claims.result import Result, read_result, schema, write_result
from retrograde.lab.recipe import Recipe
from retrograde.lab.trainer import Trainer, train

CELLS = 4
"""Of `CLAIM`: two contestants, two seeds."""

CLAIM = small(
    tuning=TUNING,
    recipe={**RECIPE, "evaluations": 2},
    checks=[CHECK, {**CHECK, "metric": "steps_to_target", "minus": None, "over": "plain"}],
    target="plain",
    measures=[*get_args(Measure)],
)


def run(claim: Claim, folder: Path, **places: Any) -> Result:
    return Grid(claim, Places(folder, **places)).run()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """`CLAIM`, never interrupted."""
    return run(CLAIM, tmp_path_factory.mktemp("grid"))


# The result.


def test_the_result_holds_everything(whole: Result) -> None:
    assert (whole.claim, whole.hash, whole.title) == (CLAIM.id, CLAIM.hash, CLAIM.title)
    assert whole.seeds == [0, 1]
    assert list(whole.contestants) == ["plain", "decayed"]
    assert [(one.contestant, one.seed) for one in whole.runs] == [
        *(("plain", 0), ("decayed", 0)),
        *(("plain", 1), ("decayed", 1)),
    ]
    for one in whole.runs:
        assert set(one.metrics) == set(metrics.TRAINING)
        assert one.metrics["steps"] == STEPS
        assert one.metrics["zeros"] is None, "plain backpropagation was not asked for them"
        assert 0 < (one.metrics["accuracy"] or 0) <= 1
        for measure in CLAIM.measures:
            assert math.isfinite(one.metrics[measure] or math.nan), measure
        assert [reading.step for reading in one.curve] == [2, STEPS]
        assert max(reading.accuracy for reading in one.curve) == one.metrics["best_validation"]
        assert {"dense", "needed", "executed", "discounted", "overhead"} <= one.flops.keys()
    for entry in whole.contestants.values():
        assert len(entry.trials) == 2
        best = max(entry.trials, key=lambda trial: trial.accuracy)
        assert entry.changes == best.changes
        assert entry.recipe["learning_rate"] == best.changes["learning_rate"]
    assert whole.contestants["decayed"].recipe["weight_decay"] == 0.3
    assert whole.contestants["decayed"].source == {"accuracy": 0.9}
    assert {"cpu", "torch"} <= whole.machine.keys()
    assert whole.summaries["plain"]["accuracy"].n == 2
    assert [finding.says for finding in whole.findings] == ["no less accurate"] * 2
    assert whole.figures("plain", "seconds_to_target") != [None, None]


def test_a_run_is_that_of_its_recipe_alone(whole: Result, tmp_path: Path) -> None:
    """Contestants of a seed are paired by it, and do not touch each other."""
    changes = whole.contestants["decayed"].changes
    recipe = CLAIM.recipe_of("decayed", {**changes, "seed": 1})
    alone = train(recipe, tmp_path / "run")
    assert alone["test"]["accuracy"] == whole.figures("decayed", "accuracy")[1]
    assert whole.figures("decayed", "accuracy") != whole.figures("plain", "accuracy")
    assert len(set(whole.figures("plain", "accuracy"))) == 2


def test_its_json_fits_its_schema(whole: Result, tmp_path: Path) -> None:
    write_result(whole, tmp_path / "a" / "b.json")
    written = files.read_json(tmp_path / "a" / "b.json")
    validator = jsonschema.Draft202012Validator(schema())
    validator.check_schema(schema())
    assert list(validator.iter_errors(written)) == []
    assert list(validator.iter_errors({**written, "verdict": "perhaps"}))
    assert list(validator.iter_errors({**written, "more": 1}))
    assert read_result(tmp_path / "a" / "b.json") == whole


def test_the_machine_does_the_same_to_all_contestants(tmp_path: Path, steps: list[Recipe]) -> None:
    """They take turns, an epoch each."""
    run(small(recipe={**RECIPE, "epochs": 2}, seeds=1), tmp_path)
    turns = [made.weight_decay for made in steps]
    assert turns == [value for _ in range(2) for value in (0.0, 0.3) for _ in range(STEPS)]


def test_a_finished_grid_keeps_no_checkpoints(tmp_path: Path) -> None:
    run(small(), tmp_path)
    assert len(list(tmp_path.rglob(files.RESULT))) == CELLS
    assert list(tmp_path.rglob(files.CHECKPOINT)) == []
    assert list(tmp_path.rglob("tensorboard")) == []


def test_the_best_learning_rate_is_trained_by(tmp_path: Path, steps: list[Recipe]) -> None:
    grid = Grid(small(tuning=TUNING), Places(tmp_path))
    for search in grid.searches:
        trials = [
            {"changes": {"learning_rate": rate}, "accuracy": a, "error": None}
            for rate, a in ((0.05, 0.1), (0.123, 0.2))
        ]
        search.folder.mkdir(exist_ok=True)
        files.write_json(search.path, {"trials": trials})
    result = grid.run()
    assert {made.learning_rate for made in steps} == {0.123}
    assert result.contestants["plain"].changes == {"learning_rate": 0.123}


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[float, float]] = []
    grid = Grid(small(tuning=TUNING), Places(tmp_path))
    grid.run(show=lambda what, done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (8.0, 8.0), "2 contestants × (2 trials + 2 seeds) × 1 epoch"


def test_every_budget_is_a_run_of_its_own_with_a_whole_schedule(tmp_path: Path, steps: list[Recipe]) -> None:
    claim = small(recipe={**RECIPE, "epochs": 4}, seeds=2, target="plain", budgets=[0.25, 0.5])
    result = run(claim, tmp_path)
    assert len(steps) == 2 * 2 * (4 + 2 + 1) * STEPS
    assert len(result.runs) == 4
    assert sorted((one.contestant, one.seed, one.metrics["steps"]) for one in result.shorter) == [
        (name, seed, epochs * STEPS) for name in ("decayed", "plain") for seed in (0, 1) for epochs in (1, 2)
    ]
    assert all(one.curve[-1].step == one.metrics["steps"] for one in result.shorter)
    assert all(result.ends(one)[-1] == one.curve[-1] and len(result.ends(one)) == 3 for one in result.runs)
    assert run(claim, tmp_path) == result, "nothing is run twice"
    assert len(steps) == 2 * 2 * (4 + 2 + 1) * STEPS


# Running again.


def test_a_finished_grid_is_not_run_again(tmp_path: Path, steps: list[Recipe]) -> None:
    first = run(CLAIM, tmp_path)
    assert len(steps) == 2 * CELLS * STEPS
    assert run(CLAIM, tmp_path) == first, "times are those of then"
    assert len(steps) == 2 * CELLS * STEPS


@pytest.mark.parametrize(
    "stops",
    [[1], [2 * STEPS + 2, 2 * STEPS], [4 * STEPS + 3], [5 * STEPS], [6 * STEPS + 1, 1, 1]],
    ids=["first trial", "second search, then a run", "first seed", "between turns", "again and again"],
)
def test_interrupted_and_resumed_is_never_interrupted(
    tmp_path: Path, whole: Result, steps: list[Recipe], stops: list[int]
) -> None:
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            Grid(CLAIM, Places(tmp_path)).run(stop=stop_after(stop))
    assert len(steps) == sum(stops)
    assert untimed(run(CLAIM, tmp_path)) == untimed(whole)
    assert len(steps) == 2 * CELLS * STEPS, "no step was made twice"


def test_a_crash_of_one_contestant_leaves_the_others_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[Recipe]
) -> None:
    claim = small(recipe={**RECIPE, "epochs": 2}, seeds=1)
    expected = untimed(run(claim, tmp_path / "whole"))
    steps.clear()
    counted = Trainer._run_step

    def crash(self: Trainer, *arguments: Any) -> None:
        if len(steps) == 3 * STEPS + 2:
            raise RuntimeError("power cut")
        counted(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_run_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run(claim, tmp_path / "cut")
    steps.clear()
    assert untimed(run(claim, tmp_path / "cut")) == expected
    assert [made.weight_decay for made in steps] == [0.3] * STEPS, "its second epoch again, nothing else"


def test_words_are_no_reason_to_train_again(tmp_path: Path, steps: list[Recipe]) -> None:
    first = run(small(), tmp_path)
    steps.clear()
    again = run(small(title="Other", checks=[CHECK]), tmp_path)
    assert steps == []
    assert again.runs == first.runs
    assert (again.title, again.verdict) == ("Other", "reproduced")
    assert again.hash != first.hash


def test_another_learning_rate_trains_anew(tmp_path: Path, steps: list[Recipe]) -> None:
    first = run(small(), tmp_path)
    steps.clear()
    again = run(small(recipe={**RECIPE, "learning_rate": 0.1}), tmp_path)
    assert [made.learning_rate for made in steps] == [0.1] * CELLS * STEPS
    assert again.figures("plain", "accuracy") != first.figures("plain", "accuracy")


def test_only_what_changed_trains_anew(tmp_path: Path, steps: list[Recipe]) -> None:
    run(small(), tmp_path)
    steps.clear()
    run(small(contestants={"plain": {}, "decayed": {"recipe": {"weight_decay": 0.1}}}, seeds=3), tmp_path)
    plain = [made.seed for made in steps if made.weight_decay == 0.0]
    assert plain == [2] * STEPS, "the third seed is new"
    assert len(steps) == 4 * STEPS


# Equal time.


def paced(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], steps: int) -> list[list[str]]:
    asked: list[list[str]] = []

    def fake(cells: list[Cell], *arguments: Any) -> tuple[dict[str, float], int]:
        asked.append([cell.name for cell in cells])
        return seconds, steps

    monkeypatch.setattr(grid_module, "pace", fake)
    return asked


def test_equal_seconds_give_steps_in_inverse_proportion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = small(equal="seconds", contestants={"a": {}, "slow": {}, "fast": {}}, seeds=1)
    asked = paced(monkeypatch, {"a": 0.01, "slow": 0.025, "fast": 0.005}, 10)
    result = run(claim, tmp_path)
    steps = {name: result.figures(name, "steps")[0] for name in claim.contestants}
    assert steps == {"a": 10, "slow": 4, "fast": 20}
    assert result.contestants["slow"].changes == {"steps": 4}
    assert run(claim, tmp_path) == result
    assert asked == [["a", "slow", "fast"]], "once"


def test_a_contestant_too_slow_for_a_step_makes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paced(monkeypatch, {"plain": 0.01, "decayed": 1.0}, 10)
    assert run(small(equal="seconds", seeds=1), tmp_path).figures("decayed", "steps") == [1]


def test_equal_seconds_after_a_search_and_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[Recipe]
) -> None:
    claim = small(equal="seconds", tuning=TUNING, seeds=1)
    asked = paced(monkeypatch, {"plain": 0.01, "decayed": 0.02}, 10)
    with pytest.raises(KeyboardInterrupt):
        Grid(claim, Places(tmp_path)).run(stop=stop_after(4 * STEPS + 3))
    result = run(claim, tmp_path)
    assert (len(asked), len(steps)) == (1, 4 * STEPS + 15)
    assert set(result.contestants["decayed"].changes) == {"learning_rate", "steps"}


def test_the_pace_is_timed_in_turns_and_leaves_nothing(tmp_path: Path, steps: list[Recipe]) -> None:
    claim = small(recipe={**RECIPE, "epochs": 20})
    cells = [Cell(name, claim.recipe_of(name), tmp_path / name) for name in claim.contestants]
    seconds, whole = pace(cells, 20, None, lambda: False)
    assert whole == 20 * STEPS
    assert list(seconds) == ["plain", "decayed"]
    assert all(0 < value < 1 for value in seconds.values())
    assert [made.weight_decay for made in steps] == [0.0, 0.0, 0.3, 0.3] * 10
    assert list(tmp_path.iterdir()) == []


def test_short_runs_are_timed_over_as_few_steps(tmp_path: Path, steps: list[Recipe]) -> None:
    claim = small(recipe={**RECIPE, "epochs": 1})
    cells = [Cell(name, claim.recipe_of(name), tmp_path / name) for name in claim.contestants]
    assert pace(cells, 1000, None, lambda: False)[1] == STEPS
    assert len(steps) == 10 * max(1, STEPS // 10) * len(cells)


def test_a_step_is_timed_with_the_threads_that_runs_will_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []

    def fake(*arguments: Any) -> tuple[dict[str, float], int]:
        found.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(grid_module, "pace", fake)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with pytest.raises(KeyboardInterrupt):
            Grid(small(equal="seconds", seeds=1), Places(tmp_path, jobs=2)).run()
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert found == [2]


def test_an_interrupted_timing_is_timed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[Recipe]
) -> None:
    claim = small(equal="seconds", seeds=1)
    with pytest.raises(KeyboardInterrupt):
        Grid(claim, Places(tmp_path)).run(stop=stop_after(7))
    steps.clear()
    result = run(claim, tmp_path)
    assert result.figures("plain", "steps") == [STEPS]
    assert len(steps) == 20 + STEPS + int(result.figures("decayed", "steps")[0] or 0)


# Several processes.


def test_seeds_side_by_side_give_the_same_and_stop_with_what_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**RECIPE, "limit": 1200, "batch_size": 4, "epochs": 2, "model": "small_claims:patient"}
    claim = small(recipe=recipe, seeds=3, contestants={"plain": {}})
    folder = tmp_path / "two"
    folder.mkdir()
    hold = folder / "hold"
    hold.touch()
    monkeypatch.setenv(HOLD, str(hold))

    def one_is_done_and_one_is_not() -> bool:
        runs = [run.parent for run in folder.glob(f"runs/*/{files.METRICS}") if run.stat().st_size]
        done = [(run / files.RESULT).exists() for run in runs]
        if any(done) and not all(done):
            hold.unlink()
            return True
        return False

    with pytest.raises(KeyboardInterrupt):
        Grid(claim, Places(folder, jobs=2)).run(stop=one_is_done_and_one_is_not)
    kept = [files.load_checkpoint(path.parent) for path in folder.rglob(files.CHECKPOINT)]
    assert any(0 < checkpoint["step"] < 600 for checkpoint in kept)
    result = run(claim, folder)
    assert untimed(result) == untimed(run(claim, tmp_path / "one"))


def test_the_seeds_left_over_are_shared_out_by_contestants(tmp_path: Path) -> None:
    grid = Grid(small(seeds=3), Places(tmp_path, jobs=2))
    shown: list[str] = []
    result = grid.run(show=lambda what, done, total: shown.append(what))
    assert {what for line in shown for what in line.split(" · ") if what} <= {
        *("seed 0", "seed 1", "seed 2, plain", "seed 2, decayed")
    }
    assert untimed(result) == untimed(run(small(seeds=3), tmp_path / "one"))


def test_threads_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(small(), tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    result = run(small(), tmp_path, jobs=2)
    assert (result.jobs, result.threads) == (2, 2)


# Places.


def test_the_device_is_laid_over_every_recipe(tmp_path: Path, steps: list[Recipe]) -> None:
    claim = small(seeds=1)
    result = run(claim, tmp_path, device="cpu")
    assert {made.device for made in steps} == {"cpu"}
    assert result.hash == claim.hash, "it is the same claim"
    assert result.contestants["plain"].recipe["device"] == "cpu"


@pytest.mark.parametrize("jobs", [0, -1])
def test_no_jobs_are_refused(tmp_path: Path, jobs: int) -> None:
    with pytest.raises(OptionError, match=f"jobs={jobs} runs nothing"):
        Grid(small(), Places(tmp_path, jobs=jobs))


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="no CUDA device"):
        Grid(small(), Places(tmp_path, device="cuda"))


def test_runs_go_below_the_runs_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETROGRADE_RUNS", raising=False)
    assert default_folder("a/b", quick=False) == Path("runs/repro/a/b/full")
    monkeypatch.setenv("RETROGRADE_RUNS", "/elsewhere")
    assert default_folder("a/b", quick=True) == Path("/elsewhere/repro/a/b/quick")

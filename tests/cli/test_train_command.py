"""``retrograde train``: what it leaves, what it refuses to overwrite, and how it goes on."""

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from outcome import QUICK, Outcome, assert_same_run, lines, strict_json, untimed
from pyarrow import parquet
from safetensors.torch import load_model

from retrograde.cli import train as train_command
from retrograde.engine.layers import AttachedLayer
from retrograde.lab import data as lab_data
from retrograde.lab import measure, models, trainer

Run = Callable[..., Outcome]
DITHER = ("--method", "dither", "--scale", "1", "--no-decline")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_train_leaves_a_whole_run_folder(run: Run) -> None:
    outcome = run("train", *QUICK, *DITHER, "--model", "toy_models:dropout", "--out", "a", "--json")
    assert outcome.code == 0, outcome.err
    folder = Path("a")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "run.json",
        "metrics.jsonl",
        "result.json",
        "checkpoint.pt",
        "model.safetensors",
        "tensorboard",
    }
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    result = strict_json(folder / "result.json")
    assert outcome.json == {**result, "folder": "a"}
    assert (result["status"], result["epochs"], result["steps"]) == ("finished", 1, 4)
    described = strict_json(folder / "run.json")
    assert described["recipe"]["methods"] == {"dither": {"scale": 1.0}}
    assert {"cpu", "torch", "device"} <= described["machine"].keys()
    assert "run folder: a" in outcome.err


def test_the_saved_model_is_plain_and_as_accurate_as_the_result_says(run: Run) -> None:
    run(
        "train",
        "--epochs",
        "4",
        "--learning-rate",
        "0.01",
        *DITHER,
        "--model",
        "toy_models:dropout",
        "--out",
        "a",
    )
    data = lab_data.load("digits", seed=0)
    plain = models.build("toy_models:dropout", data, seed=123)
    load_model(plain, "a/model.safetensors")
    assert not any(isinstance(module, AttachedLayer) for module in plain.modules())
    found = measure.evaluate(plain, data.test, torch.device("cpu"), "float32")
    assert found == strict_json(Path("a/result.json"))["test"]
    assert found["accuracy"] > 0.6


def test_table_is_readable_without_a_terminal(run: Run) -> None:
    outcome = run("train", *QUICK, *DITHER)
    assert outcome.code == 0
    for word in ("Test accuracy", "Zeros in δ", "Non-zero FLOPs", "Training time", "folder", "runs/"):
        assert word in outcome.out
    assert "\x1b" not in outcome.out + outcome.err


def test_the_run_folder_is_printed_as_it_is(run: Run) -> None:
    """Brackets are no markup."""
    outcome = run("train", *QUICK, "--out", "runs/[old]")
    assert outcome.code == 0
    assert "runs/[old]" in outcome.out
    assert "runs/[old]" in outcome.err


def test_default_folders_do_not_collide(run: Run) -> None:
    """Two runs started within one second are two runs."""
    assert [run("train", *QUICK).code for _ in range(2)] == [0, 0]
    assert len(list(Path("runs").iterdir())) == 2


def test_a_used_folder_is_refused_and_left_alone(run: Run) -> None:
    run("train", *QUICK, "--out", "a")
    before = contents(Path("a"))
    outcome = run("train", *QUICK, *DITHER, "--out", "a")
    assert outcome.code == 3
    assert "CheckpointError" in outcome.err
    assert "--resume" in outcome.err
    assert contents(Path("a")) == before


def test_a_file_as_run_folder_is_refused(run: Run) -> None:
    Path("a").write_text("mine")
    assert run("train", *QUICK, "--out", "a").code == 3
    assert Path("a").read_text() == "mine"


def test_a_run_that_was_refused_leaves_its_folder_free(run: Run, tmp_path: Path) -> None:
    """A wrong flag must not cost the user the folder's name."""
    table(tmp_path / "sets" / "toy")
    arguments = ("train", "--data", "toy", "--data-dir", tmp_path / "sets", "--out", "a", "--epochs", "1")
    outcome = run(*arguments, "--augment")
    assert outcome.code == 3
    assert "augment" in outcome.err
    assert run(*arguments).code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_bad_input(run: Run) -> None:
    outcome = run("train", *QUICK, "--device", "cuda")
    assert outcome.code == 3
    assert "cuda" in outcome.err
    assert not Path("runs").exists()


def test_a_diverging_run_still_writes_json(run: Run) -> None:
    outcome = run(
        "train", *QUICK, "--learning-rate", "1e30", "--schedule", "constant", "--out", "a", "--json"
    )
    assert outcome.code == 0
    assert outcome.json["status"] == "finished"
    assert [line["event"] for line in lines(Path("a"))] == ["step", "epoch"]
    assert run("report", "a").code == 0


# --resume


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the next `retrograde train` be interrupted after `step` steps of its own."""

    def interrupted(*arguments: object, **named: object) -> dict[str, object]:
        asked = iter([False] * (step - 1))
        return trainer.train(*arguments, **{**named, "stop": lambda: next(asked, True)})  # type: ignore[arg-type]

    monkeypatch.setattr(train_command, "train", interrupted)


def test_resume_takes_the_runs_own_recipe(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = (
        *("--model", "toy_models:dropout", "--limit", "100", "--batch-size", "16", "--epochs", "2"),
        *("--seed", "3", "--method", "dither", "--target-sparsity", "0.9", "--bits", "none", "--no-decline"),
    )
    assert run("train", *recipe, "--out", "whole").code == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        stopped = run("train", *recipe, "--out", "a", "--json")
    assert (stopped.code, stopped.out) == (130, "")
    assert strict_json(Path("a/result.json"))["status"] == "interrupted"
    refused = run("train", "--resume", "--out", "a")
    assert refused.code == 3
    assert "--model toy_models:dropout" in refused.err, "a run's file names code"
    outcome = run("train", "--resume", "--out", "a", "--model", "toy_models:dropout")
    assert outcome.code == 0, outcome.err
    assert_same_run(Path("whole"), Path("a"))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (["--epochs", "2"], "epochs"),
        (["--seed", "5"], "seed"),
        (["--scale", "2"], "methods"),
        (["--only", "net.*"], "only"),
    ],
)
def test_resume_with_another_recipe_is_refused(run: Run, change: list[str], field: str) -> None:
    run("train", *QUICK, *DITHER, "--out", "a")
    before = contents(Path("a"))
    outcome = run("train", "--resume", "--run-folder", "a", *change)
    assert outcome.code == 3
    assert "CheckpointError" in outcome.err
    assert field in outcome.err
    assert contents(Path("a")) == before


def test_resume_with_the_same_recipe_spelt_out_is_accepted(run: Run) -> None:
    """Giving the original command again, plus --resume, is what most people type."""
    run("train", *QUICK, *DITHER, "--out", "a")
    assert run("train", *QUICK, *DITHER, "--out", "a", "--resume").code == 0


def test_resume_of_a_finished_run_gives_the_same_result(run: Run) -> None:
    first = run("train", *QUICK, *DITHER, "--out", "a", "--json").json
    model = Path("a/model.safetensors").read_bytes()
    metrics = Path("a/metrics.jsonl").read_bytes()
    again = run("train", "--resume", "--out=a", "--json").json
    assert untimed(again) == untimed(first)
    assert again["seconds"] == first["seconds"]
    assert again["timing"] == first["timing"]
    assert Path("a/model.safetensors").read_bytes() == model
    assert Path("a/metrics.jsonl").read_bytes() == metrics


def test_resume_of_nothing(run: Run) -> None:
    outcome = run("train", "--resume", "--out", "nothing")
    assert outcome.code == 3
    assert "nothing" in outcome.err
    assert not Path("nothing").exists()
    assert run("train", "--resume").code == 3
    assert not Path("runs").exists()


@pytest.mark.parametrize("cut", [0, 10, 0.5, -1])
def test_a_cut_checkpoint_is_named_and_nothing_else_is_touched(run: Run, cut: float) -> None:
    run("train", *QUICK, *DITHER, "--out", "a")
    checkpoint = Path("a/checkpoint.pt")
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(len(whole) * cut) if isinstance(cut, float) else cut])
    before = contents(Path("a"))
    outcome = run("train", "--resume", "--out", "a")
    assert outcome.code == 3
    assert "CheckpointError" in outcome.err
    assert "checkpoint.pt" in outcome.err
    assert contents(Path("a")) == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"recipe": 3}', '{"recipe": {"epoch": 1}}'])
def test_a_damaged_run_json_is_named(run: Run, text: str) -> None:
    run("train", *QUICK, "--out", "a")
    Path("a/run.json").write_text(text)
    outcome = run("train", "--resume", "--out", "a")
    assert outcome.code == 3
    assert "a" in outcome.err


@pytest.mark.parametrize("left", [None, 5])
def test_lost_metrics_are_noticed(run: Run, monkeypatch: pytest.MonkeyPatch, left: int | None) -> None:
    """Neither a traceback nor a file padded with NUL bytes."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 12)
        run("train", "--limit", "100", "--batch-size", "16", "--epochs", "3", "--out", "a")
    metrics = Path("a/metrics.jsonl")
    if left is None:
        metrics.unlink()
    else:
        metrics.write_bytes(metrics.read_bytes()[:left])
    outcome = run("train", "--resume", "--out", "a")
    assert outcome.code == 3
    assert "metrics.jsonl" in outcome.err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_a_run_killed_before_its_first_checkpoint_has_a_way_on(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused for want of a checkpoint with --resume, and for being used without it: the user would be stuck."""
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "save", _killed)
        with pytest.raises(SystemError):
            run("train", *QUICK, "--out", "a")
    codes = [run("train", *QUICK, "--out", "a").code, run("train", *QUICK, "--out", "a", "--resume").code]
    assert 0 in codes


def _killed(self: object) -> None:
    raise SystemError("killed")


# Data, patterns, precision, compilation.


def table(folder: Path) -> Path:
    folder.mkdir(parents=True)
    columns = {"a": [float(i % 7) for i in range(64)], "b": [float(i % 2) for i in range(64)]}
    parquet.write_table(pa.table({**columns, "label": [i % 2 for i in range(64)]}), folder / "train.parquet")
    return folder


def test_data_folder_missing_or_cut_off(run: Run, tmp_path: Path) -> None:
    file = table(tmp_path / "sets" / "toy") / "train.parquet"
    arguments = ("train", "--data", "toy", "--data-dir", tmp_path / "sets", "--epochs", "1", "--out", "a")
    assert run(*arguments).code == 0
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    outcome = run(*arguments[:-1], "b")
    assert (outcome.code, outcome.out) == (3, "")
    assert "train.parquet" in outcome.err
    outcome = run("train", "--data", "toy", "--data-dir", tmp_path / "gone", "--out", "b")
    assert outcome.code == 3
    assert "DataError" in outcome.err
    assert not Path("b").exists()


def test_model_that_does_not_fit_the_data(run: Run, tmp_path: Path) -> None:
    table(tmp_path / "sets" / "toy")
    outcome = run("train", "--data", "toy", "--data-dir", tmp_path / "sets", "--model", "lenet")
    assert outcome.code == 3
    assert "mlp-small" in outcome.err


def test_only_and_skip_reach_the_run(run: Run) -> None:
    arguments = ("train", *QUICK, *DITHER, "--model", "toy_models:dropout")
    run(*arguments, "--only", "1", "--out", "a")
    run(*arguments, "--skip", "1", "--out", "b")
    attached = {
        folder: {
            row["name"]
            for row in strict_json(Path(folder, "run.json"))["plan"]["layers"]
            if row["status"] == "attached"
        }
        for folder in "ab"
    }
    assert attached == {"a": {"1"}, "b": {"5"}}


def test_bfloat16(run: Run) -> None:
    outcome = run("train", "--epochs", "2", "--limit", "600", *DITHER, "--precision", "bfloat16", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["flops"]["discounted"] < 0.8 * outcome.json["flops"]["executed"]
    assert outcome.json["test"]["accuracy"] > 0.2


def test_compile_trains(run: Run) -> None:
    outcome = run(
        "train", *QUICK, *DITHER, "--model", "toy_models:dropout", "--compile", "--out", "a", "--json"
    )
    assert outcome.code == 0, outcome.err
    assert outcome.json["zeros"] > 0.2
    plain = models.build("toy_models:dropout", lab_data.load("digits"))
    load_model(plain, "a/model.safetensors")


def test_the_same_command_resumes(run: Run) -> None:
    """Flags that are on in the run already are given again."""
    command = ("train", *QUICK, "--model", "lenet", "--augment", "--no-standardise", "--out", "a")
    assert run(*command).code == 0
    assert run(*command, "--resume").code == 0
    assert "augment differ" in run(*command, "--no-augment", "--resume").err


def test_a_recipe_runs_code_only_where_the_command_line_names_it(run: Run) -> None:
    Path("recipe.toml").write_text('model = "toy_models:dropout"\nlimit = 100\nepochs = 1\n')
    refused = run("train", "--recipe", "recipe.toml", "--out", "a")
    assert refused.code == 3
    assert "names code" in refused.err
    assert run("train", "--recipe", "recipe.toml", "--model", "toy_models:dropout", "--out", "a").code == 0
    assert run("train", "--recipe", "recipe.toml", "--model", "mlp-small", "--out", "b").code == 0


@pytest.mark.filterwarnings("default:TensorBoard's logs are left out")
def test_names_that_are_not_utf8_or_too_long(run: Run) -> None:
    name = os.fsdecode("Äpfel".encode("latin-1"))
    assert run("train", *QUICK, "--out", name).code == 0
    assert strict_json(Path(name, "run.json"))["name"] == name
    assert run("train", *QUICK, "--out", name, "--resume", "--json").json["folder"] == name
    assert run("report", name).code == 0
    for command in (["train", "--out"], ["train", "--resume", "--out"], ["train", "--recipe"], ["report"]):
        assert run(*command, "x" * 300, "--json").code in (2, 3)

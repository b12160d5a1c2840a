"""``methods``, ``plan``, ``report``, ``doctor`` and ``demo``: results on stdout, the rest on stderr, exit codes."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from outcome import QUICK, Outcome

from retrograde.cli import doctor as doctor_command
from retrograde.cli import plan as plan_command
from retrograde.forecast import LayerForecast
from retrograde.lab import checks
from retrograde.plan import Plan, PlanRow

Run = Callable[..., Outcome]


# methods


def test_methods_lists_each_method_with_its_options(run: Run) -> None:
    outcome = run("methods")
    assert outcome.code == 0
    assert outcome.err == ""
    assert "dither" in outcome.out
    assert "target_sparsity=None" in outcome.out.replace("\n", "")
    assert "\x1b" not in outcome.out


def test_methods_json_names_type_and_default_of_each_option(run: Run) -> None:
    (dither,) = [m for m in run("methods", "--json").json["methods"] if m["name"] == "dither"]
    assert {o["name"]: o["default"] for o in dither["options"]} == {
        "scale": 1.0,
        "target_sparsity": None,
        "bits": 8,
        "products": "auto",
        "forward": "exact",
        "keep": None,
    }
    assert "arXiv 2004.04729" in dither["card"]


def test_methods_prints_one_card(run: Run) -> None:
    outcome = run("methods", "dither")
    assert outcome.code == 0
    assert outcome.out.startswith("Dithered backpropagation")
    assert "Reference:" in outcome.out


def test_misspelt_card_names_the_nearest(run: Run) -> None:
    outcome = run("methods", "diter")
    assert (outcome.code, outcome.out) == (3, "")
    assert "Did you mean 'dither'?" in outcome.err


# Usage.


@pytest.mark.parametrize(
    "arguments", [["--version"], ["train", "--epochs", "3", "--version"], ["-V", "plan"]]
)
def test_version_anywhere(run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (0, f"retrograde {version('retrograde')}\n")


def test_the_output_of_train_is_no_page(run: Run) -> None:
    """`-o` is the file that a command writes; a run folder has a flag of its own."""
    assert run("train", *QUICK, "-o", "a").code == 2
    assert run("train", *QUICK, "--run-folder", "a").code == 0
    assert Path("a/result.json").exists()


def test_no_command_shows_help(run: Run) -> None:
    outcome = run()
    assert outcome.code == 0
    assert "train" in outcome.out
    assert "Exit codes" in outcome.out


@pytest.mark.parametrize("command", ["methods", "plan", "train", "report", "doctor", "demo"])
def test_every_command_has_help(run: Run, command: str) -> None:
    outcome = run(command, "--help")
    assert outcome.code == 0
    assert "--json" in outcome.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train", "--nope", "3"],
        ["train", "--epochs"],
        ["train", "--epochs", "many"],
        ["train", "--optimizer", "lion"],
        ["train", "stray"],
        ["demo", "--seeds", "x"],
    ],
)
def test_wrong_usage_is_2_and_leaves_stdout_empty(run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        (["train", "--epochs", "0"], "OptionError", "epochs=0"),
        (["train", "--learning-rate", "nan"], "OptionError", "learning_rate=nan"),
        (["train", "--limit", "0"], "OptionError", "limit=0"),
        (["train", "--model", "mpl-small"], "OptionError", "mlp-small"),
        (["train", "--model", "toy_models:dropuot"], "OptionError", "dropout"),
        (["train", "--model", "no_such_module:net"], "OptionError", "no_such_module"),
        (["train", "--model", "toy_models:number"], "OptionError", "returned a int"),
        (["train", "--data", "nowhere"], "DataError", "nowhere"),
        (["train", "--data", "x", "--data-dir", "missing"], "DataError", "missing"),
        (["train", "--seed", "99999999999999999999999"], "OptionError", "seed"),
        (["plan"], "OptionError", "--method"),
        (["report", "missing"], "RunError", "missing"),
        (["report"], "RunError", "run"),
        (["demo", "--seeds", "0"], "OptionError", "seeds=0"),
    ],
)
def test_bad_input_is_3_and_says_what(run: Run, arguments: list[str], error: str, word: str) -> None:
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (3, "")
    assert error in outcome.err
    assert word in outcome.err
    assert "Traceback" not in outcome.err
    assert not Path("runs").exists()


def test_bad_input_with_json_gives_json(run: Run) -> None:
    outcome = run("train", "--json", "--model", "mpl-small")
    assert outcome.code == 3
    assert outcome.json["error"]["type"] == "OptionError"
    assert "mlp-small" in outcome.json["error"]["message"]


# plan


def test_plan_trains_nothing_and_explains_each_layer(run: Run) -> None:
    outcome = run(
        "plan", "--method", "dither", "--only", "1", "--model", "toy_models:dropout", "--json", "--no-decline"
    )
    assert (outcome.code, outcome.err) == (0, "")
    layers = outcome.json["layers"]
    assert {layer["name"]: layer["status"] for layer in layers} == {"1": "attached", "2": "left", "5": "left"}
    assert all(layer["why"] for layer in layers if layer["status"] == "left")
    assert not Path("runs").exists()


def test_plan_follows_only_and_skip(run: Run) -> None:
    arguments = ("plan", "--method", "dither", "--model", "toy_models:dropout", "--json", "--no-decline")
    status = {r["name"]: r["status"] for r in run(*arguments, "--skip", "1").json["layers"]}
    assert (status["1"], status["5"]) == ("left", "attached")
    status = {r["name"]: r["status"] for r in run(*arguments, "--only", "1").json["layers"]}
    assert (status["1"], status["5"]) == ("attached", "left")


def test_plan_is_readable_without_a_terminal(run: Run) -> None:
    outcome = run("plan", "--method", "dither", "--model", "vgg-small-bn", "--no-decline")
    assert outcome.code == 0
    assert "\x1b" not in outcome.out
    assert "attached" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 120


def test_plan_names_the_layers_that_are_forecast_slower(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(name: str, attached: float) -> PlanRow:
        forecast = LayerForecast(0.002, attached, 0.001, 0.9, {"dense": 1.0}, (attached, attached))
        return PlanRow(name, "Linear", "8→8", 72, ("dither",), "auto", "attached", "", forecast)

    rows = row("body.1", 0.001), row("body.3", 0.003), row("head", 0.004)
    monkeypatch.setattr(plan_command, "make_plan", lambda *arguments, **options: Plan(rows))
    shown = run("plan", "--method", "dither").out
    assert "2 layers are forecast slower attached than plain: body.3, head." in shown
    assert "Leave them plain with --decline, the default, or by name: --skip body.3 head" in shown
    assert run("plan", "--method", "dither", "--json").json["slower"] == ["body.3", "head"]
    monkeypatch.setattr(plan_command, "make_plan", lambda *arguments, **options: Plan(rows[:1]))
    assert "slower" not in run("plan", "--method", "dither").out


@pytest.mark.parametrize(
    ("model", "says"), [("wide", "batch of 128 × 1 × 8 × 8 float32"), ("narrow", "logits of 10 classes")]
)
@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_model_that_does_not_fit_the_data_is_refused(run: Run, command: str, model: str, says: str) -> None:
    outcome = run(command, "--method", "dither", "--model", f"toy_models:{model}")
    assert outcome.code == 3
    assert f"OptionError: model toy_models:{model} cannot be trained on digits" in outcome.err
    assert says in outcome.err
    assert not any(Path("runs").rglob("*.pt"))


def test_plan_has_no_flags_of_training(run: Run) -> None:
    shown = run("plan", "--help").out
    for flag in ("--batch-size", "--epochs", "--decline", "--precision"):
        assert flag in shown, "what a forecast depends on"
    for flag in ("--learning-rate", "--schedule", "--keep", "--compile"):
        assert flag not in shown


@pytest.mark.parametrize("flag", ["--only", "--skip"])
@pytest.mark.parametrize("command", ["plan", "train"])
def test_misspelt_pattern_is_refused(run: Run, command: str, flag: str) -> None:
    outcome = run(command, "--method", "dither", flag, "hiden.*")
    assert outcome.code == 3
    assert "PatternError" in outcome.err
    assert "hiden.*" in outcome.err
    assert not Path("runs").exists()


# report


def test_report_of_a_run(run: Run) -> None:
    run("train", *QUICK, "--method", "dither", "--out", "runs/a")
    outcome = run("report", "runs", "-o", "deep/page.html", "--title", "A <title>", "--json")
    assert outcome.code == 0
    page = Path("deep/page.html")
    assert outcome.json == {"report": str(page), "bytes": page.stat().st_size}
    assert "A &lt;title&gt;" in page.read_text(encoding="utf-8")
    assert run("report", "runs").out == "report: report.html\n"


@pytest.mark.parametrize("name", ["[old].html", "deep/" * 30 + "page.html"], ids=["brackets", "long"])
def test_the_reports_path_is_printed_as_it_is(run: Run, name: str) -> None:
    """Brackets are no markup, and a long path is not broken into lines: a script reads it."""
    run("train", *QUICK, "--out", "runs/a")
    outcome = run("report", "runs", "-o", name)
    assert Path(name).is_file()
    assert outcome.out == f"report: {name}\n"


def test_report_that_cannot_be_written_is_3(run: Run) -> None:
    run("train", *QUICK, "--out", "runs/a")
    assert run("report", "runs", "-o", "runs").code == 3


# doctor


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave compilation out: it takes long, and one test runs it."""
    monkeypatch.setattr(checks, "_compile", lambda: ("ok", "not run"))


@pytest.mark.usefixtures("quick_compile")
def test_doctor_is_0_where_nothing_failed(run: Run) -> None:
    outcome = run("doctor")
    assert outcome.code == 0, outcome.out
    assert "gradients" in outcome.out
    assert "fastest in" in outcome.out
    for step in ("gradients: ", "precisions: ", "kernels: "):
        assert step in outcome.err, "what takes long says where it is"
    assert "failed" not in outcome.out


def test_doctor_forgets_kernels(run: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_command, "run_checks", lambda *arguments: [])
    kept = workplace.parent / "cache" / "kernels" / "machine.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    assert run("doctor").code == 0
    assert kept.exists()
    outcome = run("doctor", "--forget-kernels")
    assert "1 file(s) deleted" in outcome.err
    assert not kept.exists()


@pytest.mark.usefixtures("quick_compile")
def test_doctor_is_1_where_a_check_failed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[str, str]:
        raise RuntimeError("the gradients are [wrong]")

    monkeypatch.setattr(checks, "_gradients", broken)
    outcome = run("doctor", "--json")
    assert outcome.code == 1
    (check,) = [c for c in outcome.json["checks"] if c["name"] == "gradients"]
    assert check.pop("seconds") >= 0
    assert check == {
        "name": "gradients",
        "status": "failed",
        "detail": "RuntimeError: the gradients are [wrong]",
    }
    table = run("doctor")
    assert table.code == 1
    assert "[wrong]" in table.out, "what an error says is no markup"


@pytest.mark.usefixtures("quick_compile")
def test_doctor_finds_a_missing_data_folder(run: Run) -> None:
    outcome = run("doctor", "--data-dir", "nowhere", "--json")
    assert outcome.code == 1
    assert [c["name"] for c in outcome.json["checks"] if c["status"] == "failed"] == ["data sets"]


@pytest.mark.usefixtures("quick_compile")
def test_doctor_reports_a_broken_method_package(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that should find a broken installation must not die of it."""
    from importlib.metadata import EntryPoint

    from retrograde.methods import registry

    broken = EntryPoint("sad", "no_such_package:Sad", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    outcome = run("doctor", "--json")
    assert outcome.code == 1
    assert [c["name"] for c in outcome.json["checks"] if c["status"] == "failed"] == ["methods"]

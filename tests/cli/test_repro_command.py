"""``repro``: claims listed, run, shown and verified; what is interrupted goes on."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcome import Outcome, strict_json

from retrograde.lab.trainer import Trainer

Run = Callable[..., Outcome]

TINY = """
title = "Dither on digits"
claim = "no less accurate"
source = "Somebody 2020, Table 1"
seeds = 2
[recipe]
limit = 64
batch_size = 16
epochs = 1
learning_rate = 0.01
[tuning]
trials = 2
space = { learning_rate = { low = 1e-3, high = 1e-1 } }
[contestants.plain]
[contestants.decayed]
label = "decayed [by a tenth]"
recipe = { optimizer = "adamw", weight_decay = 0.1 }
source = { accuracy = 0.9 }
[[checks]]
says = "decay costs nothing"
of = "decayed"
metric = "accuracy"
minus = "plain"
at_least = -1.0
[quick]
seeds = 1
tuning = { trials = 1 }
"""
STEPS = 4 * 2 * (2 + 2)
"""Of `TINY`: two contestants with two trials and two seeds, four steps each."""

RESULT = Path("results/toy/tiny.json")
_TIMED = ("backward_seconds", "seconds", "step_seconds", "late_step_seconds", "peak_memory_bytes", "command")


def untimed(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: untimed(value) for key, value in content.items() if key not in _TIMED}
    return [untimed(value) for value in content] if isinstance(content, list) else content


@pytest.fixture(autouse=True)
def definition(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RETROGRADE_RUNS", raising=False)
    path = workplace / "repro" / "toy" / "tiny.toml"
    path.parent.mkdir(parents=True)
    path.write_text(TINY)
    words = 'title = "Later"\nclaim = "c"\nsource = "s"\npending = "ImageNet is not here"\n'
    (path.parent / "later.toml").write_text(words)
    return path


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of every training step that is made."""
    made: list[int] = []
    step = Trainer._run_step

    def counted(self: Trainer, *arguments: Any) -> None:
        step(self, *arguments)
        made.append(self.state.step)

    monkeypatch.setattr(Trainer, "_run_step", counted)
    return made


# List.


def test_list_as_json(run: Run) -> None:
    outcome = run("repro", "list", "--json")
    assert outcome.code == 0
    claims = {claim["id"]: claim for claim in outcome.json["claims"]}
    assert set(claims) == {"toy/tiny", "toy/later"}
    for claim in claims.values():
        assert {"id", "source", "status", "verdict"} <= claim.keys()
    assert (claims["toy/tiny"]["status"], claims["toy/tiny"]["verdict"]) == ("not run", "not run")
    assert claims["toy/tiny"]["source"] == "Somebody 2020, Table 1"
    assert claims["toy/tiny"]["source_figures"] == {"decayed": {"accuracy": 0.9}}
    assert (claims["toy/later"]["status"], claims["toy/later"]["pending"]) == (
        "pending",
        "ImageNet is not here",
    )


def test_list_as_a_table(run: Run) -> None:
    outcome = run("repro", "list")
    assert outcome.code == 0
    for word in ("toy/tiny", "no less accurate", "not run", "pending"):
        assert word in outcome.out


# Run, show, verify.


def test_run_show_verify_and_change(run: Run, definition: Path, steps: list[int]) -> None:
    outcome = run("repro", "run", "toy/tiny", "--json")
    assert outcome.code == 0, outcome.err
    result = strict_json(RESULT)
    assert outcome.json == result
    assert (result["verdict"], result["quick"], result["seeds"]) == ("reproduced", False, [0, 1])
    assert result["command"] == "retrograde repro run toy/tiny"
    assert len(steps) == STEPS
    assert len(list(Path("runs/repro/toy/tiny/full/runs").iterdir())) == 4
    (entry,) = (one for one in run("repro", "list", "--json").json["claims"] if one["id"] == "toy/tiny")
    assert (entry["status"], entry["verdict"]) == ("run", "reproduced")

    again = run("repro", "run", "toy/tiny")
    assert again.code == 0
    assert len(steps) == STEPS, "what is finished is not run again"
    assert strict_json(RESULT) == result

    shown = run("repro", "show", "toy/tiny")
    assert shown.code == 0
    for word in ("decayed [by a tenth]", "accuracy", "decay costs nothing", "reproduced", str(RESULT)):
        assert word in shown.out
    assert "changed" not in shown.err
    assert run("repro", "show", "toy/tiny", "--json").json == result

    verified = run("repro", "verify", "toy/tiny", "--json")
    assert verified.code == 0
    assert verified.json["claim"] == "toy/tiny"
    assert (verified.json["identical"], verified.json["agrees"]) == (True, True)
    assert ": identical" in run("repro", "verify", "--seed", "3").out

    definition.write_text(TINY.replace("learning_rate = 0.01", "learning_rate = 0.02"))
    (entry,) = (one for one in run("repro", "list", "--json").json["claims"] if one["id"] == "toy/tiny")
    assert (entry["status"], entry["verdict"]) == ("stale", "not run")
    assert "the definition has changed since" in run("repro", "show", "toy/tiny").err
    refused = run("repro", "verify", "toy/tiny")
    assert refused.code == 3
    assert "the definition has changed" in refused.err


def test_an_altered_figure_does_not_agree(run: Run) -> None:
    assert run("repro", "run", "toy/tiny", "--quick").code == 0
    assert run("repro", "run", "toy/tiny").code == 0
    text = RESULT.read_text()
    accuracies = {run_["metrics"]["accuracy"] for run_ in strict_json(RESULT)["runs"]}
    for accuracy in accuracies:
        text = text.replace(f'"accuracy": {accuracy},', '"accuracy": 7.0,')
    RESULT.write_text(text)
    outcome = run("repro", "verify")
    assert outcome.code == 1
    assert "DOES NOT AGREE" in outcome.out
    assert "700.00 %" in outcome.out


def test_quick_publishes_nothing(run: Run, workplace: Path) -> None:
    outcome = run("repro", "run", "toy/tiny", "--quick")
    assert outcome.code == 0, outcome.err
    assert not (workplace / "results").exists()
    assert "quick, which decides nothing" in outcome.out
    result = strict_json(Path("runs/repro/toy/tiny/quick/result.json"))
    assert (result["quick"], result["seeds"]) == (True, [0])
    assert result["command"] == "retrograde repro run toy/tiny --quick"
    claims = run("repro", "list", "--json").json["claims"]
    assert {claim["status"] for claim in claims} == {"not run", "pending"}


def test_fewer_seeds_publish_nothing_and_more_of_them_do(run: Run, workplace: Path, steps: list[int]) -> None:
    assert run("repro", "run", "toy/tiny", "--seeds", "1", "--runs", "mine").code == 0
    assert not (workplace / "results").exists()
    assert strict_json(Path("mine/result.json"))["seeds"] == [0]
    assert run("repro", "run", "toy/tiny", "--seeds", "3", "--runs", "mine").code == 0
    assert len(steps) == STEPS + 2 * 4
    assert strict_json(RESULT)["seeds"] == [0, 1, 2]
    (entry,) = (one for one in run("repro", "list", "--json").json["claims"] if one["id"] == "toy/tiny")
    assert entry["status"] == "run", "more seeds than it asks for are no other claim"
    assert run("repro", "verify", "toy/tiny").code == 0


def test_folder_and_device(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere" / "claims"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "b.toml").write_text(TINY)
    outcome = run("repro", "run", "a/b", "--folder", folder, "--device", "cpu", "--runs", tmp_path / "runs")
    assert outcome.code == 0, outcome.err
    result = strict_json(tmp_path / "elsewhere" / "results" / "a" / "b.json")
    assert result["contestants"]["plain"]["recipe"]["device"] == "cpu"
    assert result["command"].startswith("retrograde repro run a/b")
    assert "--device cpu" in result["command"]
    listed = run("repro", "list", "--folder", folder, "--json").json["claims"]
    assert [(claim["id"], claim["status"]) for claim in listed] == [("a/b", "run")]


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "toy/tiy"], "no claim 'toy/tiy'. Did you mean 'toy/tiny'"),
        (["show", "toy/tiy"], "Did you mean 'toy/tiny'"),
        (["verify", "toy/tiy"], "Did you mean 'toy/tiny'"),
        (["run", "toy/later"], "toy/later cannot be run yet: ImageNet is not here"),
        (["run", "toy/tiny", "--seeds", "0"], "seeds=0 runs nothing"),
        (["run", "toy/tiny", "--jobs", "0"], "jobs=0 runs nothing"),
        (["run", "toy/tiny", "--folder", "nowhere"], "no folder nowhere"),
        (["show", "toy/tiny"], "toy/tiny has no result: run it with `retrograde repro run toy/tiny`"),
        (["show", "toy/later"], "ImageNet is not here"),
        (["verify"], "no claim has a result"),
    ],
)
def test_refusals(run: Run, arguments: list[str], message: str, steps: list[int]) -> None:
    outcome = run("repro", *arguments)
    assert outcome.code == 3
    assert message in " ".join(outcome.err.split())
    assert (outcome.out, steps) == ("", [])
    assert not Path("runs").exists()


def test_a_claim_without_a_quick_form(run: Run, definition: Path) -> None:
    definition.write_text(TINY.partition("[quick]")[0])
    outcome = run("repro", "run", "toy/tiny", "--quick")
    assert outcome.code == 3
    assert "has no quick form" in outcome.err


# Interruption.


def test_ctrl_c_and_again(run: Run, monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    """In a search, then in a seed: 130 each time, nothing published, and no step is made twice."""
    counted = Trainer._run_step

    def interrupted(self: Trainer, *arguments: Any) -> None:
        counted(self, *arguments)
        if len(steps) in (6, 19):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_run_step", interrupted)
        for made in (6, 19):
            outcome = run("repro", "run", "toy/tiny", "--json")
            assert (outcome.code, outcome.out, len(steps)) == (130, "", made)
            assert "stopping after this step" in outcome.err
            assert not RESULT.exists()
    assert run("repro", "run", "toy/tiny").code == 0
    assert len(steps) == STEPS
    found = strict_json(RESULT)
    assert run("repro", "run", "toy/tiny", "--runs", "anew").code == 0
    assert untimed(strict_json(RESULT)) == untimed(found)

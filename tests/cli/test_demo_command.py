"""``demo``: verdicts, page and JSON; its own folder is replaced, others are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import Outcome

from retrograde.cli import demo
from retrograde.lab.demo.scenarios import Scenario, scenarios

Run = Callable[..., Outcome]


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """One scenario, of one epoch."""

    def small() -> tuple[Scenario, ...]:
        (one,) = (one for one in scenarios() if one.name == "spectral")
        recipe = {**one.claim.recipe, "epochs": 1, "model": "mlp-small", "model_options": {}}
        return (Scenario(one.claim.model_copy(update={"recipe": recipe}), one.metric, one.unit, one.time),)

    monkeypatch.setattr(demo, "scenarios", small)


@pytest.mark.usefixtures("small_demo")
def test_verdicts_and_page_and_an_earlier_one_is_replaced(run: Run) -> None:
    outcome = run("demo", "--seeds", "1")
    assert outcome.code == 0
    assert "plain" in outcome.out
    assert "Spectral" in outcome.out
    assert "report: report.html" in outcome.out
    assert outcome.out.rstrip().splitlines()[-1].endswith("retrograde advise MODEL DATA")
    assert "<html" in Path("report.html").read_text(encoding="utf-8")
    Path("runs/demo/leftover").mkdir()
    again = run("demo", "--seeds", "2", "--json")
    assert again.code == 0
    (result,) = again.json["results"]
    (verdict,) = again.json["verdicts"]
    assert next(iter(result["contestants"])) == "plain"
    assert {figures["accuracy"]["n"] for figures in result["summaries"].values()} == {2}
    assert (verdict["scenario"], verdict["name"]) == ("spectral", "spectral")
    assert verdict["words"] in result["sentence"]
    assert verdict["words"] in Path("report.html").read_text(encoding="utf-8")
    assert json.loads(Path("runs/demo/spectral/result.json").read_text())["seeds"] == [0, 1]
    assert not Path("runs/demo/leftover").exists()


@pytest.mark.usefixtures("small_demo")
def test_no_time_shortens_and_says_so(run: Run) -> None:
    """The first seed is run all the same: a demonstration that shows nothing is none."""
    outcome = run("demo", "--seeds", "3", "--seconds", "0.001", "--json")
    assert outcome.json["results"][0]["seeds"] == [0]
    assert "1 of 3 seeds" in outcome.json["shortened"]
    assert outcome.json["shortened"] in Path("report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("given", [("--seeds", "0"), ("--seconds", "0"), ("--seconds", "nan")])
def test_refusals(run: Run, given: tuple[str, str]) -> None:
    outcome = run("demo", *given, "--json")
    assert outcome.code == 3
    assert given[0].lstrip("-") + "=" in outcome.json["error"]["message"]
    assert not Path("runs").exists()


@pytest.mark.usefixtures("small_demo")
def test_it_refuses_a_folder_that_is_not_its_own(run: Run) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    outcome = run("demo", "--runs", "mine", "--seeds", "1", "--json")
    assert outcome.code == 3
    assert json.loads(outcome.out)["error"]["type"] == "OptionError"
    assert Path("mine/thesis.txt").read_text() == "years of work"
    assert len(list(Path("mine").iterdir())) == 1


@pytest.mark.usefixtures("small_demo")
def test_it_refuses_a_file_as_its_folder(run: Run) -> None:
    Path("mine").write_text("years of work")
    outcome = run("demo", "--runs", "mine", "--seeds", "1")
    assert outcome.code == 3
    assert Path("mine").read_text() == "years of work"

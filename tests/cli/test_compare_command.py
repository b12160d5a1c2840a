"""``compare`` and ``advise`` on a user's own model and folder of images."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from outcome import Outcome
from PIL import Image

import retrograde as rg
from retrograde.cli import main
from retrograde.cli.compare import to_toml
from retrograde.lab import peers
from retrograde.lab.options import make
from retrograde.lab.recipe import Recipe, make_recipe
from retrograde.methods.registry import available

Run = Callable[..., Outcome]

SMALL = ("--epochs", "1", "--batch-size", "16", "--seeds", "1", "--no-decline")


@pytest.fixture
def photos(workplace: Path) -> Path:
    """Two classes of 40 bright or dark pictures."""
    noise = np.random.default_rng(0)
    for name, level in (("dark", 60), ("bright", 180)):
        folder = workplace / "photos" / name
        folder.mkdir(parents=True)
        for number in range(40):
            pixels = np.clip(noise.normal(level, 30, (12, 12, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return workplace / "photos"


@pytest.mark.usefixtures("photos")
def test_compare_searches_trains_and_tells(run: Run) -> None:
    command = (
        "compare",
        "toy_models:dropout",
        "photos",
        "--method",
        "dither",
        "dither+spectral",
        "--peers",
        "meprop",
    )
    outcome = run(*command, "--trials", "1", *SMALL)
    assert outcome.code == 0
    for name in ("plain", "dither", "dither+spectral", "meprop"):
        assert name in outcome.out
    assert outcome.out.rstrip().endswith("report: compare.html")
    assert "The target is the best validation accuracy of plain." in " ".join(outcome.out.split())
    assert "<html" in Path("compare.html").read_text(encoding="utf-8")
    again = run(*command, "--trials", "1", *SMALL, "--json")
    assert list(again.json["contestants"]) == ["plain", "dither", "dither+spectral", "meprop"]
    assert all(len(entry["trials"]) == 1 for entry in again.json["contestants"].values())


def test_all_methods_run_as_each_says_of_a_short_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside combinations that are named, and with options of the command line."""
    monkeypatch.setattr(rg.Decorrelate, "short_run", {"rank": 5})
    command = (
        "compare",
        "mlp-small",
        "digits",
        "--methods",
        "all",
        "decorrelate+dither",
        "--dither.bits",
        "4",
    )
    outcome = run(*command, "--trials", "0", *SMALL, "--limit", "64", "--json")
    found = {name: entry["recipe"]["methods"] for name, entry in outcome.json["contestants"].items()}
    assert list(found) == ["plain", *available(), "decorrelate+dither"]
    for name, method in available().items():
        expected = {**method.short_run, **({"bits": 4} if name == "dither" else {})}
        assert found[name] == {name: expected}
    assert found["decorrelate+dither"] == {"decorrelate": {}, "dither": {"bits": 4}}


def test_every_named_setting_is_one_that_the_method_takes() -> None:
    for name, method in available().items():
        for options in (method.short_run, *(o for found in method.benchmarks.values() for o in found)):
            make(name, dict(options))
        assert set(method.benchmarks) <= {"float32", "bfloat16"}


def test_help_names_every_peer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    shown = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert f"rivals to compare with: {', '.join(sorted(peers.names()))}." in shown


@pytest.mark.usefixtures("photos")
def test_options_of_methods_are_flags(run: Run) -> None:
    outcome = run(
        *("compare", "toy_models:dropout", "photos", "--methods", "dither", "--dither.scale", "3"),
        *("--trials", "0", "--json", *SMALL),
    )
    assert outcome.json["contestants"]["dither"]["recipe"]["methods"] == {"dither": {"scale": 3.0}}


@pytest.mark.usefixtures("photos")
def test_options_of_peers_are_flags(run: Run) -> None:
    outcome = run(
        *("compare", "toy_models:dropout", "photos", "--peers", "selective-backprop", "meprop"),
        *("--selective-backprop.beta", "2", "--k", "3", "--trials", "0", "--json", *SMALL),
    )
    contestants = outcome.json["contestants"]
    assert contestants["selective-backprop"]["recipe"]["peers"] == {"selective-backprop": {"beta": 2.0}}
    assert contestants["meprop"]["recipe"]["peers"] == {"meprop": {"k": 3}}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--peers", "meprop", "--meprop.k", "0"), "peer 'meprop' refuses k=0"),
        (("--methods", "diter"), "dither"),
        (("--peers", "samm"), "sam"),
        ((), "nothing to compare"),
        (("--methods", "dither", "--seeds", "0"), "seeds=0"),
    ],
)
def test_compare_refuses(run: Run, arguments: tuple[str, ...], says: str) -> None:
    outcome = run("compare", "mlp-small", "digits", *arguments, "--json")
    assert outcome.code == 3
    assert says in outcome.json["error"]["message"]


@pytest.mark.usefixtures("photos")
def test_advise_recommends_a_recipe_that_trains(run: Run) -> None:
    command = ("advise", "toy_models:dropout", "photos", "--length", "20", *SMALL)
    outcome = run(*command, "--write", "recipe.toml")
    assert outcome.code == 0
    assert "Recommended: " in outcome.out
    assert "not judged: perforate" in outcome.out
    recipe = make_recipe(tomllib.loads(Path("recipe.toml").read_text(encoding="utf-8")))
    assert recipe.model == "toy_models:dropout"
    assert recipe.epochs == 1
    assert recipe.steps is None
    told = run(*command, "--json").json
    assert "1 seed(s) of 20 steps by 6 variants should take about" in outcome.err
    (line,) = (line for line in outcome.out.splitlines() if line.startswith("train it: "))
    words = line.removeprefix("train it: retrograde ").split()
    assert words == ["train", "--recipe", "recipe.toml", "--model", "toy_models:dropout"]
    assert run(*words, "--no-decline", "--run-folder", "trained").code == 0
    assert told["shortened"] == ""
    assert told["recommended"] == ("+".join(recipe.methods) or "plain")
    assert set(told["contestants"]) == {"decorrelate", "deepfocus", "dither", "exact", "spectral"}
    assert told["recipe"]["methods"] == recipe.methods


@pytest.mark.usefixtures("photos")
def test_advise_stays_near_its_time_and_says_so(run: Run) -> None:
    """The tried steps are kept, so that the same command resumes the same runs."""
    command = ("advise", "toy_models:dropout", "photos", "--method", "dither", *SMALL, "--seeds", "2")
    outcome = run(*command, "--length", "130", "--seconds", "0.01", "--json")
    assert outcome.json["shortened"].startswith("Shortened to stay near 0 s: 100 of 130 steps, 1 of 2 seeds.")
    assert "Shortened to stay near" in outcome.err
    assert "Shortened to stay near" in Path("advise.html").read_text(encoding="utf-8")
    runs = sorted(Path("runs/advise").rglob("result.json"))
    before = [path.stat().st_mtime_ns for path in runs if path.parent.parent.name == "runs"]
    assert len(before) == 2
    run(*command, "--length", "130", "--seconds", "0.01")
    assert before == [path.stat().st_mtime_ns for path in runs if path.parent.parent.name == "runs"]
    assert run(*command, "--seconds", "0").code == 3


def test_advise_refuses_too_few_steps(run: Run) -> None:
    outcome = run("advise", "mlp-small", "digits", "--length", "5", "--json")
    assert outcome.code == 3
    assert "length=5" in outcome.json["error"]["message"]


def test_a_recipe_says_none_for_an_option_that_is_none() -> None:
    """TOML has no null, and what is left out is the default."""
    fields = {"model": "mlp", "methods": {"deepfocus": {"low": None, "q_skip": 0.4}}, "only": None}
    written = tomllib.loads(to_toml(fields))
    assert written == {"model": "mlp", "methods": {"deepfocus": {"low": "none", "q_skip": 0.4}}}
    assert Recipe.model_validate(written).make_methods() == [rg.DeepFocus(low=None, q_skip=0.4)]
    assert fields["methods"] == {"deepfocus": {"low": None, "q_skip": 0.4}}

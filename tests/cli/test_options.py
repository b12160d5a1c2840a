"""Options of methods, recipes in files, and which of them wins."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import ClassVar

import pytest
from outcome import QUICK, Outcome

from retrograde.engine.slots import Method, Rule, Site
from retrograde.lab.record import read_description
from retrograde.methods import registry

Run = Callable[..., Outcome]
PLAN = ("plan", "--json", "--method", "dither")


@dataclass(frozen=True)
class Toy(Method):
    """A second method that has an option `scale` too."""

    name: ClassVar[str] = "toy"
    scale: float = 3.0
    epochs: int = 1

    def make_rule(self, site: Site) -> Rule:
        return Rule(site.name)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the method `toy` beside the others."""
    mine = EntryPoint("toy", "toy_package:Toy", registry.GROUP)
    monkeypatch.setattr(EntryPoint, "load", _loader(EntryPoint.load))
    monkeypatch.setattr(registry, "entry_points", lambda group: [*entry_points(group=group), mine])


def _loader(original: Callable[[EntryPoint], object]) -> Callable[[EntryPoint], object]:
    return lambda entry: Toy if entry.name == "toy" else original(entry)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--scale", "1"], {"scale": 1.0}),
        (["--scale=1"], {"scale": 1.0}),
        (["--dither.scale", "1"], {"scale": 1.0}),
        (["--dither.scale=1"], {"scale": 1.0}),
        # What is the default, too, when it is given.
        (["--scale", "2"], {"scale": 2.0}),
        (["--target-sparsity", "0.9"], {"target_sparsity": 0.9}),
        (["--target_sparsity=0.9"], {"target_sparsity": 0.9}),
        (["--dither.target-sparsity", "0.9", "--bits", "4"], {"target_sparsity": 0.9, "bits": 4}),
        (["--bits", "none"], {"bits": None}),
        (["--bits=None"], {"bits": None}),
    ],
)
def test_options_of_the_method_are_flags(run: Run, flags: list[str], expected: dict[str, object]) -> None:
    outcome = run(*PLAN, *flags)
    assert outcome.code == 0, outcome.err
    assert outcome.json["methods"] == {"dither": expected}


def test_options_may_stand_before_the_method(run: Run) -> None:
    assert run("plan", "--json", "--scale", "1", "--method", "dither").json["methods"] == {
        "dither": {"scale": 1.0}
    }


@pytest.mark.parametrize("method", [["--method=dither"], ["--method", "dither"], ["--methods", "dither"]])
def test_all_forms_of_method(run: Run, method: list[str]) -> None:
    assert run("plan", "--json", *method).json["methods"] == {"dither": {}}


@pytest.mark.parametrize("method", [["dither+decorrelate"], ["dither", "decorrelate"]])
def test_methods_attached_together(run: Run, method: list[str]) -> None:
    outcome = run("plan", "--json", "--method", *method, "--rank", "4")
    assert outcome.json["methods"] == {"dither": {}, "decorrelate": {"rank": 4}}


def test_options_that_take_several_words_or_a_choice(run: Run) -> None:
    blocks = ["blocks.0.branch", "blocks.2.branch"]
    flags = ("--blocks", *blocks, "--low", "none", "--controller", "random", "--unbiased", "--json")
    found = run("plan", "--method", "deepfocus", "--model", "resmlp", *flags).json
    assert found["methods"] == {
        "deepfocus": {"blocks": blocks, "low": None, "controller": "random", "unbiased": True}
    }
    assert [block["name"] for block in found["blocks"] if block["kind"] == "branch"] == blocks


# --help


def words(text: str) -> str:
    """Without the frames and line breaks of a help page."""
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize("flags", [["--method", "dither", "--help"], ["--help", "--method", "dither"]])
@pytest.mark.parametrize("command", ["plan", "train", "compare", "advise"])
def test_help_lists_the_options_of_what_is_chosen(run: Run, command: str, flags: list[str]) -> None:
    outcome = run(command, *flags)
    assert outcome.code == 0
    shown = words(outcome.out)
    assert "--scale FLOAT, --dither.scale FLOAT s, the quantisation step" in shown
    assert "0 leaves δ as it is, as Exact does. (default: 1.0)" in shown
    assert "--dither.bits none|INT" in shown
    assert "--dither.forward {exact,int8}" in shown
    assert "--method NAME[+NAME] ..." in shown, "what was read stays on the page"
    assert "--dither" not in run(command, "--help").out


def test_help_shows_the_options_of_peers(run: Run) -> None:
    shown = words(run("compare", "--peers", "schedule-free", "sam", "--help").out)
    assert "--rho FLOAT, --sam.rho FLOAT ρ, the radius. (default: 0.05)" in shown
    assert "--schedule-free." in shown
    assert "NAME|module:callable A model's name" in shown, "positional arguments stay on the page"


@pytest.mark.usefixtures("toy")
def test_help_has_no_short_form_for_what_two_methods_share(run: Run) -> None:
    shown = words(run("plan", "--method", "dither", "toy", "--help").out)
    assert "--scale FLOAT, " not in shown
    assert "--dither.scale FLOAT" in shown
    assert "--toy.scale FLOAT" in shown
    assert "--epochs INT, --toy.epochs" not in shown, "the recipe has a field of this name"


# Wrong usage, which is 2 as everywhere; a value that the method itself refuses is bad input, 3.


@pytest.mark.parametrize("flag", ["--sacle", "--dither.sacle"])
def test_unknown_option_names_the_nearest(run: Run, flag: str) -> None:
    outcome = run("plan", "--method", "dither", flag, "1")
    assert (outcome.code, outcome.out) == (2, "")
    assert flag in outcome.err
    assert "--dither.scale FLOAT" in outcome.err


@pytest.mark.parametrize(
    "flags", [["--scale"], ["--scale", "--json"], ["--dither.scale", "--bits", "4"], ["--scale="]]
)
def test_missing_value(run: Run, flags: list[str]) -> None:
    outcome = run("plan", "--method", "dither", *flags)
    assert (outcome.code, outcome.out) == (2, "")
    assert "--dither.scale" in outcome.err


@pytest.mark.parametrize(
    ("flags", "code", "word"),
    [
        (["--scale", "big"], 2, "big"),
        (["--scale", "none"], 2, "none"),
        (["--bits", "3.5"], 2, "3.5"),
        (["--forward", "int4"], 2, "int4"),
        (["--scale", "-1"], 3, "-1"),
        (["--scale", "nan"], 3, "nan"),
        (["--bits", "9"], 3, "9"),
        (["--target-sparsity", "1"], 3, "1"),
    ],
)
def test_bad_value_is_named_with_its_option(run: Run, flags: list[str], code: int, word: str) -> None:
    outcome = run("plan", "--method", "dither", *flags)
    assert (outcome.code, outcome.out) == (code, "")
    assert flags[0].strip("-").replace("-", "_") in outcome.err.replace("-", "_")
    assert word in outcome.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("plan", "--method", "sam"), "'sam' is a peer, not a method. Give it to `retrograde compare`"),
        (("compare", "mlp-small", "digits", "--peers", "dither"), "'dither' is a method, not a peer"),
        (("compare", "digits", "mlp-small", "--method", "dither"), "'mlp-small' names a model"),
        (("advise", "photos", "toy_models:dropout"), "'toy_models:dropout' names a model"),
        (("train", "--data", "lenet"), "'lenet' names a model"),
    ],
)
def test_swapped_arguments_are_recognised(run: Run, arguments: tuple[str, ...], says: str) -> None:
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (3, "")
    assert says in outcome.err


def test_unknown_method_names_the_nearest(run: Run) -> None:
    outcome = run("train", "--method", "dithr")
    assert outcome.code == 3
    assert "Did you mean 'dither'?" in outcome.err
    assert not Path("runs").exists()


def test_option_of_a_method_that_was_not_chosen_is_unknown(run: Run) -> None:
    assert run("train", *QUICK, "--scale", "1").code == 2
    assert run("train", *QUICK, "--dither.scale", "1").code == 2


@pytest.mark.usefixtures("toy")
def test_option_of_two_methods_needs_its_prefix(run: Run) -> None:
    outcome = run("plan", "--method", "dither", "toy", "--scale", "1")
    assert outcome.code == 2
    assert "--dither.scale FLOAT" in outcome.err
    assert "--toy.scale FLOAT" in outcome.err
    outcome = run(
        "plan", "--json", "--method", "dither", "toy", "--dither.scale", "1", "--toy.scale=4", "--bits", "4"
    )
    assert outcome.json["methods"] == {"dither": {"scale": 1.0, "bits": 4}, "toy": {"scale": 4.0}}


@pytest.mark.usefixtures("toy")
def test_a_field_of_the_recipe_goes_before_an_option_of_the_same_name(run: Run) -> None:
    outcome = run("plan", "--json", "--method", "toy", "--epochs", "2", "--toy.epochs", "7")
    assert outcome.json["methods"] == {"toy": {"epochs": 7}}


# --recipe


RECIPE = """
model = "lenet"
epochs = 1
limit = 64
batch_size = 16
[methods.dither]
scale = 1.5
bits = 4
"""


def recipe(text: str = RECIPE) -> Path:
    path = Path("mine.toml")
    path.write_text(text)
    return path


def test_recipe_file_is_used(run: Run) -> None:
    outcome = run("plan", "--recipe", recipe(), "--json")
    assert outcome.json["model"] == "lenet"
    assert outcome.json["methods"] == {"dither": {"scale": 1.5, "bits": 4}}


def test_flags_win_over_the_recipe(run: Run) -> None:
    outcome = run("plan", "--recipe", recipe(), "--model", "mlp-small", "--scale", "3", "--json")
    assert outcome.json["model"] == "mlp-small"
    assert outcome.json["methods"] == {"dither": {"scale": 3.0, "bits": 4}}


def test_a_flag_that_restates_the_default_wins_too(run: Run) -> None:
    run(
        "train",
        "--recipe",
        recipe(),
        "--model",
        "mlp-small",
        "--batch-size",
        "128",
        "--no-decline",
        "--out",
        "a",
    )
    found = read_description(Path("a")).recipe
    assert (found["batch_size"], found["model"], found["limit"]) == (128, "mlp-small", 64)


@pytest.mark.usefixtures("toy")
def test_method_flag_replaces_the_recipes_methods(run: Run) -> None:
    outcome = run("plan", "--recipe", recipe(), "--method", "toy", "--json")
    assert outcome.json["methods"] == {"toy": {}}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("learning_rat = 1", "learning_rate"),
        ("epochs = ", "mine.toml"),
        ("epochs = 0", "epochs=0"),
        ('epochs = "many"', "epochs"),
        ("methods.dither.sacle = 1", "scale"),
        ("methods.diter.scale = 1", "dither"),
        ('methods = "dither"', "methods"),
        ("methods.dither = 3", "methods"),
    ],
)
def test_bad_recipe_is_named(run: Run, text: str, word: str) -> None:
    outcome = run("train", "--recipe", recipe(text))
    assert (outcome.code, outcome.out) == (3, "")
    assert word in outcome.err


def test_missing_or_binary_recipe(run: Run) -> None:
    missing = run("train", "--recipe", "no.toml")
    assert missing.code == 3
    assert "no.toml" in missing.err
    Path("bytes.toml").write_bytes(b"\xff\xfe\x00")
    assert run("train", "--recipe=bytes.toml").code == 3
    assert run("train", "--recipe", ".").code == 3


def test_recipe_flag_without_a_file(run: Run) -> None:
    assert run("train", *QUICK, "--recipe").code == 2

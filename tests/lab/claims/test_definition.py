"""Definitions: what is read, what each refusal says, and what makes another definition of one."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from small_claims import CHECK, CONTENT, RECIPE, TUNING, small

from retrograde.errors import OptionError
from retrograde.lab.claims.definition import Claim, Range, content_hash, read_claim

REPRO = Path(__file__).parents[3] / "repro"
DEFINITIONS = sorted(REPRO.rglob("*.toml"))

TEXT = """
title = "Dither"
claim = "0.9 at half the FLOPs"
source = "Somebody 2020"
target = "plain"
measures = ["sharpness"]
[recipe]
epochs = 3
model_options = { hidden = 16, dropout = 0.1 }
[contestants.plain]
[contestants.dither]
label = "dithered"
methods = { dither = { scale = 2.0 } }
source = { accuracy = 0.9 }
[[checks]]
says = "as accurate"
of = "dither"
metric = "accuracy"
minus = "plain"
at_least = -0.01
[tuning]
trials = 4
space = { learning_rate = { low = 1e-4, high = 1e-1 }, batch_size = [16, 32], augment = [true, false] }
[quick]
seeds = 2
recipe = { epochs = 1 }
contestants.dither.methods.dither.scale = 1.0
"""


def written(root: Path, text: str, name: str = "dither/toy") -> Path:
    path = root / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(root: Path, text: str) -> Claim:
    return read_claim(written(root, text), root)


# Reading.


def test_a_claim_declines_no_layer_unless_it_says_so() -> None:
    """The forecast, which asks the clock, has no say in what is published."""
    assert not small().recipe_of("plain").decline
    assert small(recipe={**RECIPE, "decline": True}).recipe_of("plain").decline


def test_a_file_is_its_claim(tmp_path: Path) -> None:
    claim = read(tmp_path, TEXT)
    assert (claim.id, claim.method, claim.baseline) == ("dither/toy", "dither", "plain")
    assert (claim.seeds, claim.equal, claim.target) == (5, "steps", "plain")
    assert claim.tuning is not None
    assert claim.tuning.space["learning_rate"] == Range(low=1e-4, high=1e-1, log=True)
    assert claim.contestants["dither"].source == {"accuracy": 0.9}
    assert [check.at_least for check in claim.checks] == [-0.01]


def test_choices_keep_their_types(tmp_path: Path) -> None:
    """A batch of 16.0 rows would be refused, and True is no 1."""
    tuning = read(tmp_path, TEXT).tuning
    assert tuning is not None
    for claim in (read(tmp_path, TEXT), read(tmp_path, TEXT).shortened()):
        assert claim.tuning is not None
        for key, kind in (("batch_size", int), ("augment", bool)):
            space = claim.tuning.space[key]
            assert isinstance(space, list)
            assert [type(value) for value in space] == [kind, kind]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('metric = "accuracy"', 'metric = "acuracy"', "no metric 'acuracy'.* 'accuracy'"),
        ('title = "Dither"', 'title = "D"\ntable = ["zeroes"]', r"table\.0 is refused: .*'zeroes'.* 'zeros'"),
        ('minus = "plain"', 'minus = "plane"', "no variant 'plane'.* 'plain'"),
        ('of = "dither"', 'of = "diter"', "no variant 'diter'.* 'dither'"),
        ('target = "plain"', 'target = "plian"', "no variant 'plian'.* 'plain'"),
        ("epochs = 3", "epoch = 3", "dither/toy, variant 'plain': .*'epoch'.* 'epochs'"),
        ("{ scale = 2.0 }", "{ scales = 2.0 }", "'scales'.* 'scale'"),
        ("{ dither = {", "{ ditherr = {", "'ditherr'.* 'dither'"),
        ("methods = { dither = { scale = 2.0 } }", "peers = { sma = {} }", "no peer 'sma'.* 'sam'"),
        ("methods = { dither = { scale = 2.0 } }", "peers = { meprop = { kk = 3 } }", "'kk'.* 'k'"),
        ("epochs = 3", "epochs = 0", "variant 'plain': epochs=0 is refused"),
        ("trials = 4", "trials = 0", r"dither/toy\.toml: tuning\.trials is refused"),
        ('label = "dithered"', 'lable = "dithered"', r"dither/toy\.toml: contestants\.dither\.lable"),
        ("at_least = -0.01", "", "one of at_least and at_most"),
        ("at_least = -0.01", "at_least = 1\nat_most = 2", "one of at_least and at_most"),
        ('minus = "plain"', 'minus = "plain"\nover = "plain"', "minus or over, not both"),
        ('measures = ["sharpness"]', 'measures = ["sharp"]', r"measures\.0 is refused"),
        ("title =", "title", r"dither/toy\.toml is not valid TOML"),
    ],
)
def test_refusals_name_the_place_and_the_nearest(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    assert before in TEXT
    with pytest.raises(OptionError, match=message):
        read(tmp_path, TEXT.replace(before, after))


def test_a_check_of_the_time_to_a_target_needs_one(tmp_path: Path) -> None:
    text = TEXT.replace('metric = "accuracy"', 'metric = "seconds_to_target"')
    assert read(tmp_path, text).target == "plain"
    with pytest.raises(OptionError, match="needs `target`"):
        read(tmp_path, text.replace('target = "plain"', ""))


@pytest.mark.parametrize(
    ("budgets", "change", "message"),
    [
        ("[0.5]", None, "whole epochs, and 'plain' trains for 3 epochs"),
        ("[1.0]", None, "between 0 and 1"),
        ("[0.0]", None, "between 0 and 1"),
        ("[0.5]", ("epochs = 3", "epochs = 4\nsteps = 10"), "trains for 10 steps"),
        ("[0.5]", ('target = "plain"', ""), "need a `target`"),
        ("[0.5]", ('target = "plain"', 'target = "plain"\nequal = "seconds"'), "equal steps"),
    ],
)
def test_budgets_that_cannot_be_run_are_refused(
    tmp_path: Path, budgets: str, change: tuple[str, str] | None, message: str
) -> None:
    text = TEXT.replace(*change) if change else TEXT
    with pytest.raises(OptionError, match=message):
        read(tmp_path, f"budgets = {budgets}\n" + text)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"nothing\.toml cannot be read"):
        read_claim(tmp_path / "nothing.toml", tmp_path)


@pytest.mark.parametrize(
    "bounds",
    [
        {"low": 2.0, "high": 1.0},
        {"low": 1.0, "high": 1.0},
        {"low": 0.0, "high": 1.0},
        {"low": -1.0, "high": 1.0, "log": True},
    ],
)
def test_ranges_are_ordered_and_logarithms_exist(bounds: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="must be below"):
        Range(**bounds)


def test_a_linear_range_may_hold_zero() -> None:
    assert Range(low=-1.0, high=0.0, log=False).low == -1.0


# Pending.


def test_a_pending_claim_needs_its_reason_only(tmp_path: Path) -> None:
    text = 'title = "t"\nclaim = "c"\nsource = "s"\n'
    claim = read(tmp_path, text + 'pending = "ImageNet is not here"')
    assert claim.pending == "ImageNet is not here"
    with pytest.raises(OptionError, match="are missing, and `pending` does not say why"):
        read(tmp_path, text)


# The hash.


@pytest.mark.parametrize(
    "change",
    [
        {"title": "Smaller"},
        {"claim": "other"},
        {"source": "other"},
        {"note": "other"},
        {"seeds": 3},
        {"recipe": {**RECIPE, "learning_rate": 0.06}},
        {"tuning": TUNING},
        {"equal": "seconds"},
        {"target": "plain"},
        {"target": ["plain", "decayed"]},
        {"recipe": {**RECIPE, "epochs": 4}, "target": "plain", "budgets": [0.5]},
        {"measures": ["sharpness"]},
        {"checks": [CHECK]},
        {"table": ["accuracy"]},
        {"quick": {"seeds": 1}},
        {"contestants": {**CONTENT["contestants"], "third": {}}},
        {"contestants": {"plain": {"label": "plain SGD"}, "decayed": CONTENT["contestants"]["decayed"]}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_content_makes_another_hash(change: dict[str, Any]) -> None:
    assert small(**change).hash != small().hash


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    """Not of the file's spelling, nor of the process."""
    claim = read(tmp_path, TEXT)
    assert read(tmp_path, "# a comment\n" + TEXT).hash == claim.hash
    assert content_hash({"b": 1, "a": [2.5]}) == content_hash({"a": [2.5], "b": 1}) == "e29416a8e9008a7c"


def test_another_baseline_makes_another_hash() -> None:
    """The first contestant is the baseline: its place is content."""
    turned = dict(reversed(CONTENT["contestants"].items()))
    assert small(contestants=turned).baseline == "decayed"
    assert small(contestants=turned).hash != small().hash


# The quick form.


def test_the_quick_form_lies_over_the_whole(tmp_path: Path) -> None:
    claim = read(tmp_path, TEXT)
    quick = claim.shortened()
    assert (quick.id, quick.seeds, quick.quick) == (claim.id, 2, {})
    recipe = quick.recipe_of("dither")
    assert (recipe.epochs, recipe.methods) == (1, {"dither": {"scale": 1.0}})
    assert recipe.model_options == {"hidden": 16, "dropout": 0.1}, "what it does not name stays"
    assert claim.recipe_of("dither").epochs == 3
    assert quick.hash != claim.hash


def test_no_quick_form_is_said() -> None:
    with pytest.raises(OptionError, match="toy/small has no quick form"):
        small().shortened()


def test_a_refused_quick_form_names_itself() -> None:
    with pytest.raises(OptionError, match=r"toy/small, quick: seeds is refused"):
        small(quick={"seeds": 0}).shortened()


# Recipes.


def test_a_contestants_recipe_lies_over_the_common_one() -> None:
    claim = small(
        recipe={**RECIPE, "model_options": {"hidden": 8, "dropout": 0.5}},
        contestants={
            "plain": {},
            "other": {
                "recipe": {"learning_rate": 0.1, "model_options": {"dropout": 0.0}},
                "methods": {"dither": {"scale": 1.0}},
            },
        },
    )
    other = claim.recipe_of("other")
    assert (other.learning_rate, other.batch_size, other.plain) == (0.1, 32, False)
    assert other.model_options == {"hidden": 8, "dropout": 0.0}
    assert claim.recipe_of("plain").model_options == {"hidden": 8, "dropout": 0.5}


def test_dotted_changes_reach_down() -> None:
    claim = small(
        recipe={**RECIPE, "model_options": {"hidden": 8}},
        contestants={
            "dither": {"methods": {"dither": {"scale": 1.0, "bits": 4}}},
            "sam": {"peers": {"sam": {}}},
        },
    )
    changes = {"methods.dither.scale": 3.0, "model_options.dropout": 0.25, "seed": 7}
    recipe = claim.recipe_of("dither", changes)
    assert recipe.methods == {"dither": {"scale": 3.0, "bits": 4}}
    assert recipe.model_options == {"hidden": 8, "dropout": 0.25}
    assert recipe.seed == 7
    assert claim.recipe_of("sam", {"peers.sam.rho": 0.1}).peers == {"sam": {"rho": 0.1}}
    assert claim.recipe_of("dither").methods["dither"]["scale"] == 1.0, "the definition is as it was"


def test_refused_changes_name_the_claim_and_the_contestant() -> None:
    with pytest.raises(OptionError, match=r"toy/small, variant 'plain': .*'learning_rat'.* 'learning_rate'"):
        small().recipe_of("plain", {"learning_rat": 1})
    with pytest.raises(OptionError, match=r"variant 'decayed': learning_rate=-1 is refused"):
        small().recipe_of("decayed", {"learning_rate": -1})


# The checkout's own.


@pytest.mark.parametrize("path", DEFINITIONS, ids=lambda p: p.relative_to(REPRO).with_suffix("").as_posix())
def test_every_definition_reads_and_its_quick_form_too(path: Path) -> None:
    claim = read_claim(path, REPRO)
    assert claim.id == path.relative_to(REPRO).with_suffix("").as_posix()
    if claim.pending is not None:
        return
    assert claim.checks, "nothing would decide"
    for form in (claim, claim.shortened()):
        common = form.tuning.space if form.tuning else {}
        for name, one in form.contestants.items():
            form.recipe_of(name)
            # A name that no recipe has would be found out hours later, by the search.
            for key, space in {**common, **one.space}.items():
                for value in (space.low, space.high) if isinstance(space, Range) else space:
                    form.recipe_of(name, {key: value})


def test_there_are_definitions() -> None:
    assert DEFINITIONS

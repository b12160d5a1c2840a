"""Recipes: what is accepted, and what each refusal says."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from retrograde.errors import OptionError
from retrograde.lab.recipe import Recipe, make_recipe, read_recipe
from retrograde.methods.dither import Dither


def test_defaults_are_accepted_and_plain() -> None:
    recipe = make_recipe({})
    assert recipe == Recipe()
    assert recipe.label == "plain"
    assert recipe.make_methods() == []


def test_a_recipe_survives_its_own_description() -> None:
    recipe = make_recipe({"methods": {"dither": {"scale": 1.5}}, "only": ["a.*"], "limit": 3})
    assert make_recipe(recipe.model_dump()) == recipe
    assert recipe.label == "dither(scale=1.5)"
    assert recipe.make_methods() == [Dither(scale=1.5)]


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Recipe().epochs = 3


def test_unknown_field_names_the_nearest_and_all() -> None:
    with pytest.raises(
        OptionError, match=r"mine: there is no field 'learnin_rate'.* 'learning_rate'"
    ) as error:
        make_recipe({"learnin_rate": 1}, "mine")
    assert all(name in str(error.value) for name in Recipe.model_fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
        ({"weight_decay": -1}, "weight_decay=-1"),
        ({"weight_decay": float("inf")}, "weight_decay=inf"),
        ({"label_smoothing": 1}, "label_smoothing=1"),
        ({"validation": 1}, "validation=1"),
        ({"optimizer": "lion"}, "optimizer='lion'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"only": "fc.*"}, "only='fc.*'"),
        ({"seed": 2**80}, "seed"),
        ({"methods": {"dither": {"scale": -1}}}, "scale"),
        ({"methods": {"dither": {"sacle": 1}}}, "'scale'"),
        ({"methods": {"diter": {}}}, "'dither'"),
    ],
)
def test_refused_values_are_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError) as error:
        make_recipe(fields)
    assert words in str(error.value)


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('data = "digits"\nskip = ["head"]\n[methods.dither]\nscale = 3\n', encoding="utf-8")
    assert read_recipe(path) == {"data": "digits", "skip": ["head"], "methods": {"dither": {"scale": 3}}}


@pytest.mark.parametrize("content", [b"epochs = \n", b"\xff", b"epochs = 1\nepochs = 2\n"])
def test_bad_toml_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(OptionError, match=r"recipe\.toml"):
        read_recipe(path)


def test_missing_toml_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"gone\.toml cannot be read"):
        read_recipe(tmp_path / "gone.toml")


@pytest.mark.parametrize(
    "text",
    [
        'model = "timeit:timeit"\n[model_options]\nstmt = "1"\n',
        '[recipe]\nmodel = "timeit:timeit"\n',
        '[tuning.space]\nmodel = ["mlp", "timeit:timeit"]\n',
        '[tuning.space]\n"recipe.model" = ["timeit:timeit"]\n',
    ],
)
def test_a_file_alone_runs_no_code(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(
        OptionError, match=r"recipe\.toml: model='timeit:timeit' names code.*--model timeit:timeit"
    ):
        read_recipe(path)
    assert read_recipe(path, code=True)

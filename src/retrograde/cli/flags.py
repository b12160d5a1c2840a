"""Flags that several commands share, with the words that `--help` has for them, and a recipe's fields as flags."""

import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, arg

from retrograde.lab.recipe import Recipe

NOT_FLAGS = {"methods", "peers", "model_options"}
"""Fields with options of their own: a recipe file gives them; methods come by --method and their own flags."""

_METAVARS = {
    "data": "NAME|PATH",
    "model": "NAME|module:callable",
    "only": "PATTERN ...",
    "skip": "PATTERN ...",
}

Switch = FlagCreatePairsOff[bool]
"""Off unless it is given: there is no `--no-…`."""


def said(default: str, metavar: str | None = None, *aliases: str) -> Any:
    """A flag whose default is said in words."""
    return arg(metavar=metavar, aliases=aliases or None, help_behavior_hint=f"(default: {default})")


Names = Annotated[tuple[str, ...], said("none", "NAME ...")]
Methods = Annotated[tuple[str, ...], said("none", "NAME[+NAME] ...", "--methods")]
"""`--methods` is the spelling of earlier versions."""

RecipeFile = Annotated[Path | None, said("none", "PATH")]
DataFolder = Annotated[Path | None, said("the environment variable RETROGRADE_DATA", "PATH")]
Model = Annotated[str, tyro.conf.Positional, arg(metavar=_METAVARS["model"])]
DataSet = Annotated[str, tyro.conf.Positional, arg(metavar=_METAVARS["data"])]


def _make(name: str, without: set[str]) -> type[Any]:
    fields: list[tuple[str, Any, Any]] = []
    for field, info in Recipe.model_fields.items():
        if field not in without:
            kind: Any = info.annotation
            if field in _METAVARS:
                kind = Annotated[kind, arg(metavar=_METAVARS[field])]
            fields.append((field, kind, dataclasses.field(default=info.default)))
    made = dataclasses.make_dataclass(name, fields, frozen=True)
    made.__doc__ = inspect.cleandoc(Recipe.__doc__ or "").replace("`", "")
    return made


RecipeFlags = _make("RecipeFlags", NOT_FLAGS)
TaskFlags = _make("TaskFlags", NOT_FLAGS | {"model", "data", "seed"})
"""Without what a comparison names itself: model and data are its arguments, and its seeds are its own."""

_TRAINING = "evaluations keep optimizer learning_rate weight_decay schedule device compile"
PlanFlags = _make("PlanFlags", NOT_FLAGS | set(_TRAINING.split()))
"""Without what only training asks for."""

if TYPE_CHECKING:
    RecipeFields = TaskFields = PlanFields = Any
else:
    RecipeFields = Annotated[RecipeFlags, arg(name="")]
    TaskFields = Annotated[TaskFlags, arg(name="")]
    PlanFields = Annotated[PlanFlags, arg(name="")]


def from_recipe(recipe: Recipe, flags: type[Any] = RecipeFlags) -> Any:
    """Flags whose defaults are the recipe's values."""
    return flags(**recipe.model_dump(include={field.name for field in dataclasses.fields(flags)}))

"""What is read from a command line before its flags: the recipe that gives their defaults, and the options of
methods and peers.

They are flags only once the method or peer is chosen, so they cannot be declared beforehand.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrograde.cli.flags import NOT_FLAGS
from retrograde.errors import OptionError
from retrograde.lab import peers
from retrograde.lab.recipe import Recipe, make_recipe, read_recipe, refuse_code
from retrograde.lab.record import read_description
from retrograde.methods.registry import available, suggest

ALL_METHODS = "all"
"""In ``compare --methods`` every installed method."""

_SEVERAL = (["compare"], ["advise"])
"""Commands that try methods beside each other; the others attach what they are given."""

_OWN_FIELDS = frozenset(Recipe.model_fields) - NOT_FLAGS


@dataclass(frozen=True)
class Given:
    """A command line, read as far as its recipe and methods.

    Attributes:
        rest: the command line without the options of methods and peers.
        recipe: the recipe of ``--recipe``, or of the run that ``--resume`` goes on with, or the default one.
        options: options of the chosen methods and peers, by name.
        flags: all flags that they have.
        line: the whole command line.
    """

    rest: list[str]
    recipe: Recipe
    options: dict[str, dict[str, Any]]
    flags: list[str]
    line: str

    def build(self, flags: Any, names: Sequence[str]) -> Recipe:
        """The command's recipe: flags and method options laid over `recipe`.

        Args:
            flags: a `RecipeFlags`.
            names: methods of ``--method``, which replace the recipe's.
        """
        methods = self.recipe.methods
        if names:
            methods = {name: methods.get(name, {}) for name in names}
        merged = {name: {**given, **self.options.get(name, {})} for name, given in methods.items()}
        kept = {"peers": self.recipe.peers, "model_options": self.recipe.model_options}
        return make_recipe({**dataclasses.asdict(flags), **kept, "methods": merged}, "flags")


def read_given(arguments: Sequence[str]) -> Given:
    """Find the recipe, and take ``--scale 1`` or ``--dither.scale 1`` out of the command line.

    Raises:
        OptionError: an unreadable recipe, an unknown method or peer, an option of two of them without its prefix, or
            an option without a value.
    """
    recipe = _recipe(arguments)
    given = _values(arguments, "--methods" if arguments[:1] in _SEVERAL else "--method")
    # Methods that are attached together are written with a plus between them.
    if arguments[:1] == ["compare"] and ALL_METHODS in given:
        given = [*available(), *(entry for entry in given if entry != ALL_METHODS)]
    chosen = [name for entry in given for name in entry.split("+")] or list(recipe.methods)
    # Only when a method is named: `doctor` must run where one is broken.
    methods = available() if chosen else {}
    for name in chosen:
        if name not in methods:
            raise OptionError(
                f"there is no method {name!r}.{suggest(name, methods)} See `retrograde methods`."
            )
    rivals = _values(arguments, "--peers") if arguments[:1] == ["compare"] else []
    classes = {name: methods[name] for name in chosen} | {name: peers.find(name) for name in rivals}
    fields = {name: {f.name for f in dataclasses.fields(cls)} for name, cls in classes.items()}  # pyright: ignore[reportArgumentType]
    rest: list[str] = []
    options: dict[str, dict[str, Any]] = {name: {} for name in fields}
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        flag, equals, value = argument.partition("=")
        target = _target(flag, fields)
        if target is None:
            rest.append(argument)
            continue
        if not equals:
            if not waiting or _is_flag(waiting[0]):
                raise OptionError(f"option {argument} of {target[0]!r} has no value. Write {argument} VALUE.")
            value = waiting.pop(0)
        options[target[0]][target[1]] = None if value.lower() == "none" else value
    flags = [f"--{name}.{option}" for name, known in fields.items() for option in sorted(known)]
    return Given(rest, recipe, options, flags, shlex.join(["retrograde", *arguments]))


def _recipe(arguments: Sequence[str]) -> Recipe:
    # Whose model the command line names, a file may say what it likes of it.
    named = arguments[:1] in _SEVERAL or bool(_values(arguments, "--model"))
    if file := _values(arguments, "--recipe"):
        return make_recipe(read_recipe(Path(file[0]), code=named), file[0])
    folder = _values(arguments, "--out") or _values(arguments, "-o")
    if "--resume" in arguments and folder:
        fields = read_description(Path(folder[0])).recipe
        if not named:
            refuse_code(fields, f"the run in {folder[0]}")
        return make_recipe(fields, folder[0])
    return Recipe()


def _values(arguments: Sequence[str], flag: str) -> list[str]:
    """What follows `flag`, up to the next flag; empty when it is not there."""
    for position, argument in enumerate(arguments):
        if argument.startswith(flag + "="):
            return [argument.partition("=")[2]]
        if argument == flag:
            values: list[str] = []
            for value in arguments[position + 1 :]:
                if _is_flag(value):
                    break
                values.append(value)
            return values
    return []


def _is_flag(argument: str) -> bool:
    # A negative number is a value.
    return argument.startswith("-") and not argument[1:2].isdigit()


def _target(flag: str, fields: dict[str, set[str]]) -> tuple[str, str] | None:
    """``(method or peer, option)`` that a flag names, or None when it is the command's own."""
    if not flag.startswith("--"):
        return None
    name, dot, option = flag[2:].replace("-", "_").partition(".")
    if dot:
        owner = next((owner for owner in fields if owner.replace("-", "_") == name), None)
        if owner is None:
            return None
        if option not in fields[owner]:
            raise OptionError(
                f"{owner!r} has no option {option!r}.{suggest(option, fields[owner])} "
                f"Its options: {', '.join(sorted(fields[owner])) or 'none'}."
            )
        return owner, option
    owners = [owner for owner, known in fields.items() if name in known]
    if name in _OWN_FIELDS or not owners:
        return None
    if len(owners) > 1:
        forms = " or ".join(f"--{owner}.{name}" for owner in owners)
        raise OptionError(f"option --{name} belongs to several of those that were chosen. Write {forms}.")
    return owners[0], name

"""The flags that only a command line itself decides: options of the methods and peers that it names, and the recipe
that gives the other flags their defaults.

A first, partial reading by the same parser finds the names; from them come the types of the second one.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

import docstring_parser
import tyro
from tyro.conf import arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from retrograde.errors import OptionError
from retrograde.lab import data as lab_data
from retrograde.lab import models, peers
from retrograde.lab.options import require_known
from retrograde.lab.recipe import Recipe, make_recipe, read_recipe, refuse_code
from retrograde.lab.record import read_description
from retrograde.methods.registry import available

ALL_METHODS = "all"
"""For ``compare``: every installed method."""

SEVERAL = ("compare", "advise", "compress")
"""Commands that train methods beside each other and whose arguments name the model; the others attach what is given."""

DENDRITES = ("perforate",)
"""What ``compress`` attaches."""

WITH_RECIPE = ("plan", "train", *SEVERAL)

# A checker knows such types by their text alone; these are made from what the command line names.
_make_type: Any = TypedDict

_LEAVES = (int, float, str, bool, NoneType)


@dataclass(frozen=True)
class Given:
    """What a command is given beside its own flags.

    Attributes:
        recipe: the recipe of `--recipe`, or of the run that `--resume` continues, or the default one.
        options: options of the chosen methods and peers that stand on the command line, by name.
        line: the whole command line.
    """

    recipe: Recipe
    options: dict[str, dict[str, Any]]
    line: str

    def build(self, flags: Any, names: Sequence[str], data_dir: Path | None) -> Recipe:
        """The command's recipe: flags and method options laid over `recipe`.

        Args:
            flags: a `RecipeFlags`.
            names: methods of `--method`, which replace the recipe's.
            data_dir: folder that holds data sets.
        """
        given = split(names) or list(self.recipe.methods)
        methods = {name: self.with_options(name, self.recipe.methods) for name in given}
        return self.over_recipe({**dataclasses.asdict(flags), "methods": methods}, data_dir)

    def over_recipe(self, fields: dict[str, Any], data_dir: Path | None) -> Recipe:
        """`fields`, and of the recipe what no flag gives.

        Raises:
            OptionError: a value is refused, or `data` is a model's name.
        """
        recipe = make_recipe(
            {**self.recipe.model_dump(include={"peers", "model_options"}), **fields}, "flags"
        )
        name = recipe.data
        a_model = (name in models.names() or ":" in name) and not Path(name).exists()
        if a_model and name not in lab_data.available(data_dir):
            raise OptionError(
                f"{name!r} names a model, and stands where a data set should. Give the model first and the data set "
                "second, or name them with --model and --data where the command has these flags."
            )
        return recipe

    def with_options(self, name: str, recipe: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Options of a method or peer: the command line's over the recipe's."""
        return {**recipe.get(name, {}), **self.options.get(name, {})}


def split(names: Iterable[str]) -> list[str]:
    """Single methods: those that are attached together are written with a plus between them."""
    return [name for entry in names for name in entry.split("+")]


@dataclass(frozen=True)
class _Chosen:
    """The flags that decide about others, as the commands have them."""

    method: Annotated[tuple[str, ...], arg(aliases=("--methods",))] = ()
    peers: tuple[str, ...] = ()
    model: str | None = None
    recipe: Path | None = None
    run_folder: Annotated[Path | None, arg(aliases=("--out",))] = None
    resume: bool = False


def read_chosen(arguments: Sequence[str]) -> tuple[Recipe, dict[str, type[Any]]]:
    """The recipe that gives flags their defaults, and the classes of the chosen methods and peers by name.

    Raises:
        OptionError: an unreadable recipe, or an unknown method or peer.
    """
    # Other commands must run where a method or peer cannot be loaded.
    if not arguments or arguments[0] not in WITH_RECIPE:
        return Recipe(), {}
    try:
        chosen, _ = tyro.cli(
            _Chosen, args=arguments[1:], return_unknown_args=True, add_help=False, console_outputs=False
        )
    except SystemExit:
        # The whole parser refuses it too, and with its own usage.
        return Recipe(), {}
    recipe = _recipe(chosen, named=arguments[0] in SEVERAL or chosen.model is not None)
    given = DENDRITES if arguments[0] == "compress" else chosen.method
    if arguments[0] == "compare" and ALL_METHODS in given:
        given = (*available(), *(entry for entry in given if entry != ALL_METHODS))
    names = split(given) or list(recipe.methods)
    methods = available() if names else {}
    rivals = chosen.peers if arguments[0] == "compare" else ()
    return recipe, {name: _method(name, methods) for name in names} | {n: _peer(n) for n in rivals}


def _recipe(chosen: _Chosen, *, named: bool) -> Recipe:
    """`named`: the command line names the model, whose code is trusted then, whatever a file says of it."""
    if chosen.recipe:
        return make_recipe(read_recipe(chosen.recipe, code=named), str(chosen.recipe))
    if chosen.resume and chosen.run_folder:
        fields = read_description(chosen.run_folder).recipe
        if not named:
            refuse_code(fields, f"the run in {chosen.run_folder}")
        return make_recipe(fields, str(chosen.run_folder))
    return Recipe()


def _method(name: str, known: dict[str, type[Any]]) -> type[Any]:
    if name not in known and name in peers.names():
        raise OptionError(
            f"{name!r} is a peer, not a method. Give it to `retrograde compare` with --peers {name}."
        )
    require_known("there is no method", [name], known)
    return known[name]


def _peer(name: str) -> type[Any]:
    if name not in peers.names() and name in available():
        raise OptionError(f"{name!r} is a method, not a peer. Give it with --method {name}.")
    return peers.find(name)


def option_flags(classes: dict[str, type[Any]], command: type[Any]) -> Any:
    """A type whose fields are the flags of all options: `--dither.scale`, and `--scale` where that means one alone.

    What is parsed from it holds only the options that were given.

    Args:
        classes: of the methods and peers, by name.
        command: the command, whose own flags go before options of the same name.
    """
    own = {field.name for field in dataclasses.fields(command)} | {*Recipe.model_fields} | {"methods", "out"}
    named = [*own, *(field.name for cls in classes.values() for field in dataclasses.fields(cls))]
    types: dict[str, Any] = {}
    for name, cls in classes.items():
        docs = docstring_parser.parse(cls.__doc__ or "")
        says = {param.arg_name: param.description for param in docs.params}
        hints = get_type_hints(cls)
        flags = {
            field.name: Annotated[
                hints[field.name] if _parses(hints[field.name]) else str,
                arg(
                    help=" ".join((says.get(field.name) or "").replace("`", "").split()),
                    help_behavior_hint=_hint(field),
                    aliases=(f"--{field.name.replace('_', '-')}",) if named.count(field.name) == 1 else (),
                ),
            ]
            for field in dataclasses.fields(cls)
        }
        if flags:
            what = (docs.short_description or name).partition(" (module docstring")[0].rstrip(".:")
            types[name] = Annotated[_make_type(name, flags, total=False), arg(name=name, help=f"{what}.")]
    return _make_type("Options", types) if types else None


def _hint(field: "dataclasses.Field[Any]") -> str:
    default = field.default
    if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return (
        "(no default)"
        if default is dataclasses.MISSING
        else f"(default: {'none' if default is None else default})"
    )


def _parses(kind: Any) -> bool:
    """Whether the parser knows the type; a method of another package gets the text of what it does not."""
    if get_origin(kind) in (Union, UnionType, tuple, list):
        return all(part is ... or _parses(part) for part in get_args(kind))
    return kind in _LEAVES or get_origin(kind) is Literal


def registry() -> ConstructorRegistry:
    """How values are read: none in small letters or large ones."""
    made = ConstructorRegistry()

    @made.primitive_rule
    def none(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[None] | None:
        if info.type is not NoneType:
            return None

        def read(words: list[str]) -> None:
            if words[0].lower() != "none":
                raise ValueError(f"{words[0]!r} is not none")

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="none",
            instance_from_str=read,
            is_instance=lambda value: value is None,
            str_from_instance=lambda value: ["none"],
        )

    return made

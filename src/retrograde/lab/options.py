"""Methods and peers from what a user wrote: a name, and options as strings or plain values."""

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any, TypeVar, get_args, get_type_hints

import pydantic

from retrograde.engine.slots import Method
from retrograde.errors import OptionError
from retrograde.methods.registry import available, suggest

C = TypeVar("C")

NONE = "none"
"""How a recipe or a command line writes None."""


def require_known(what: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse a name that is not among those known.

    Args:
        what: the message begins with it: ``"there is no method"``.
        names: that a user wrote.
        known: that there are.

    Raises:
        OptionError: with the nearest names, and all that there are.
    """
    for name in names:
        if name not in known:
            raise OptionError(
                f"{what} {name!r}.{suggest(name, known)} Known are {', '.join(known) or 'none'}."
            )


def make(name: str, options: dict[str, Any] | None = None) -> Method:
    """The method `name` with `options`, checked against its fields.

    Args:
        name: as `available` lists it.
        options: field values; strings are converted to the field's type.

    Raises:
        OptionError: no such method, no such option, or a value that the method refuses.
    """
    methods = available()
    require_known("there is no method", [name], methods)
    return configure(methods[name], "method", name, options or {})


def configure(cls: type[C], noun: str, name: str, options: dict[str, Any]) -> C:
    """An instance of a dataclass from options that a user wrote.

    Args:
        cls: the dataclass.
        noun: what it is, for messages: ``"method"``.
        name: what the user called it.
        options: field values; strings are converted to the field's type.

    Raises:
        OptionError: no such option, or a value that the class refuses.
    """
    known = [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    require_known(f"{noun} {name!r} has no option", options, known)
    types = get_type_hints(cls)
    # A file has no other way to say it.
    nothing = {
        key: None for key, value in options.items() if value == NONE and type(None) in get_args(types[key])
    }
    try:
        return pydantic.TypeAdapter(cls).validate_python({**options, **nothing})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            # The class's own refusal, which says everything.
            raise OptionError(str(first.get("ctx", {}).get("error", first["msg"]))) from error
        raise OptionError(
            f"{noun} {name!r} refuses {'.'.join(map(str, first['loc']))}={first['input']!r}: {first['msg']}."
        ) from error

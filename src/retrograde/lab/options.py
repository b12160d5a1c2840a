"""Methods and peers from what a user wrote: a name, and options as strings or plain values."""

import dataclasses
from typing import Any, TypeVar

import pydantic

from retrograde.engine.slots import Method
from retrograde.errors import OptionError
from retrograde.methods.registry import available, suggest

C = TypeVar("C")


def make(name: str, options: dict[str, Any] | None = None) -> Method:
    """The method `name` with `options`, checked against its fields.

    Args:
        name: as `available` lists it.
        options: field values; strings are converted to the field's type.

    Raises:
        OptionError: no such method, no such option, or a value that the method refuses.
    """
    methods = available()
    if name not in methods:
        raise OptionError(f"there is no method {name!r}.{suggest(name, methods)} See `retrograde methods`.")
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
    for option in options:
        if option not in known:
            raise OptionError(
                f"{noun} {name!r} has no option {option!r}.{suggest(option, known)} Its options: "
                f"{', '.join(known) or 'none'}."
            )
    try:
        return pydantic.TypeAdapter(cls).validate_python(options)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            # The class's own refusal, which says everything.
            raise OptionError(str(first.get("ctx", {}).get("error", first["msg"]))) from error
        raise OptionError(
            f"{noun} {name!r} refuses {'.'.join(map(str, first['loc']))}={first['input']!r}: {first['msg']}."
        ) from error

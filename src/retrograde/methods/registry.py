"""Finding methods by name, ours and third parties' alike, and what else packages bring through entry points."""

import dataclasses
import difflib
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from retrograde.engine.slots import Method
from retrograde.errors import OptionError

GROUP = "retrograde.methods"

C = TypeVar("C")


def available() -> dict[str, type[Method]]:
    """All installed methods by name.

    Raises:
        OptionError: an entry point does not lead to a `Method`, or two packages bring one name.
    """
    return {name: load(entry, "method", Method) for name, entry in installed(GROUP, "method").items()}


def installed(group: str, noun: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name, in alphabetical order, none of them loaded.

    Args:
        group: name of the group.
        noun: what its entries are, for messages: ``"method"``.

    Raises:
        OptionError: two entry points of one name lead to different objects.
    """
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
        other = found.setdefault(entry.name, entry)
        # One package may be listed twice, from its source and as installed.
        if other.value != entry.value:
            raise OptionError(
                f"there are two {noun}s {entry.name!r}: {_origin(other)} and {_origin(entry)}. Uninstall one of the "
                "packages."
            )
    return found


def load(entry: EntryPoint, noun: str, base: type[C]) -> type[C]:
    """The class that an entry point leads to.

    Args:
        entry: as `installed` lists it.
        noun: what it is, for messages.
        base: what it must be a dataclass derived from.

    Raises:
        OptionError: it cannot be imported, or is something else.
    """
    what = f"{noun} {entry.name!r} ({_origin(entry)})"
    try:
        cls = entry.load()
    except (ImportError, AttributeError) as error:
        package = f"the package {entry.dist.name}" if entry.dist else "the package that brings it"
        raise OptionError(f"{what} cannot be loaded: {error}. Reinstall or remove {package}.") from error
    if not (isinstance(cls, type) and issubclass(cls, base) and dataclasses.is_dataclass(cls)):
        raise OptionError(f"{what} is not a dataclass derived from {base.__module__}.{base.__name__}.")
    return cls


def _origin(entry: EntryPoint) -> str:
    return f"entry point {entry.value}" + (f" of the package {entry.dist.name}" if entry.dist else "")


def suggest(name: str, known: Any) -> str:
    """``" Did you mean 'x' or 'y'?"``, or nothing when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""

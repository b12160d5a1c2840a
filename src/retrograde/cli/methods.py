"""``retrograde methods``: what there is to attach."""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from retrograde.cli import output
from retrograde.cli.flags import Switch, said
from retrograde.cli.options import Given
from retrograde.engine.slots import Method
from retrograde.errors import OptionError
from retrograde.methods.registry import available, suggest
from retrograde.report.table import Table, make_table


@dataclass(frozen=True)
class Methods:
    """List the methods with their options, or print one method's card.

    Attributes:
        name: Print the card of this method: what it does, its equations, cost and source.
        json: Print JSON.
    """

    name: Annotated[str | None, tyro.conf.Positional, said("all", "[NAME]")] = None
    json: Switch = False

    def run(self, given: Given) -> int:
        """Print to stdout."""
        methods = available()
        if self.name is not None and self.name not in methods:
            raise OptionError(
                f"there is no method {self.name!r}.{suggest(self.name, methods)} "
                f"Installed: {', '.join(methods)}."
            )
        shown = methods if self.name is None else {self.name: methods[self.name]}
        if self.json:
            output.print_json({"methods": [_describe(name, cls) for name, cls in shown.items()]})
        elif self.name is not None:
            sys.stdout.write(_card(shown[self.name]) + "\n")
        else:
            output.print_table(_table(shown))
        return 0


def _describe(name: str, cls: type[Method]) -> dict[str, Any]:
    return {
        "name": name,
        "summary": _summary(cls),
        "module": cls.__module__,
        "options": [
            {"name": f.name, "type": _type_name(f.type), "default": f.default}
            for f in dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        ],
        "card": _card(cls),
    }


def _table(methods: dict[str, type[Method]]) -> Table:
    described = [_describe(name, cls) for name, cls in methods.items()]
    rows = (
        (
            one["name"],
            one["summary"],
            ", ".join(f"{option['name']}={option['default']}" for option in one["options"]),
        )
        for one in described
    )
    return make_table(("method", "what it does", "options"), rows, texts=3)


def _card(cls: type[Method]) -> str:
    return (sys.modules[cls.__module__].__doc__ or cls.__doc__ or "").strip()


def _summary(cls: type[Method]) -> str:
    return _card(cls).partition("\n")[0]


def _type_name(annotation: Any) -> str:
    return getattr(annotation, "__name__", None) or str(annotation)

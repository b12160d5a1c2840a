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
from retrograde.lab.options import require_known
from retrograde.methods.registry import available
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
        require_known("there is no method", [self.name] if self.name else [], methods)
        shown = methods if self.name is None else {self.name: methods[self.name]}
        described = [_describe(name, cls) for name, cls in shown.items()]
        part = described[0]["card"] if self.name else _table(described)
        output.tell({"methods": described}, part, as_json=self.json)
        return 0


def _describe(name: str, cls: type[Method]) -> dict[str, Any]:
    return {
        "name": name,
        "summary": _card(cls).partition("\n")[0],
        "module": cls.__module__,
        "options": [
            {"name": f.name, "type": getattr(f.type, "__name__", None) or str(f.type), "default": f.default}
            for f in dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        ],
        "card": _card(cls),
    }


def _table(described: list[dict[str, Any]]) -> Table:
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

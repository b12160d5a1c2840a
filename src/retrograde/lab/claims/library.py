"""All that a checkout can run again: claims and scripts in ``repro``, and the results beside it in ``results``."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from retrograde.errors import OptionError
from retrograde.lab.claims.definition import Claim, read_claim
from retrograde.lab.claims.result import Result, read_result
from retrograde.lab.options import require_known


@dataclass(frozen=True)
class Entry:
    """A claim and what is known of it.

    Attributes:
        claim: its definition.
        result: the published one; None before it is run.
        status: ``pending``: it cannot be run yet, and its definition says why; ``stale``: the definition has changed
            since the result.
    """

    claim: Claim
    result: Result | None
    status: Literal["pending", "not run", "run", "stale"]

    @property
    def verdict(self) -> str | None:
        """Of a result that belongs to the definition."""
        return self.result.verdict if self.result and self.status == "run" else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        claim = self.claim
        return {
            "id": claim.id,
            "method": claim.method,
            "title": claim.title,
            "claim": claim.claim,
            "source": claim.source,
            "source_figures": {name: one.source for name, one in claim.contestants.items() if one.source},
            "status": self.status,
            "pending": claim.pending,
            "verdict": self.verdict or "not run",
            "hash": claim.hash,
        }


@dataclass(frozen=True)
class Script:
    """An experiment that is no claim, because it trains nothing by a recipe: its docstring says what it is.

    Attributes:
        name: of its file.
        question: the docstring's first line.
        command: how to run it: the docstring's indented line.
        results: the files that it writes, from the checkout's folder; empty where it prints.
        status: ``run`` where all of them are there; ``printed`` where it writes none.
    """

    name: str
    question: str
    command: str
    results: tuple[str, ...]
    status: Literal["not run", "run", "printed"]


class Library:
    """The claims and scripts of a folder.

    Args:
        folder: of the definitions.

    Raises:
        OptionError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results = folder.parent / "results"
        if not folder.is_dir():
            raise OptionError(
                f"there is no folder {folder} with definitions of claims. Run this in a checkout of retrograde, or "
                "name the folder with --folder."
            )

    def ids(self) -> list[str]:
        """All claims, by method and name."""
        return sorted(
            path.relative_to(self.folder).with_suffix("").as_posix() for path in self.folder.rglob("*.toml")
        )

    def claim(self, name: str) -> Claim:
        """The definition of a claim.

        Raises:
            OptionError: there is none, or it is refused.
        """
        require_known("there is no claim", [name], self.ids())
        return read_claim(self.folder / f"{name}.toml", self.folder)

    def path(self, claim: Claim) -> Path:
        """Where its result is published."""
        return self.results / f"{claim.id}.json"

    def entry(self, name: str) -> Entry:
        """A claim with its result.

        Raises:
            RunError: the result does not fit its schema.
        """
        claim = self.claim(name)
        path = self.path(claim)
        if not path.is_file():
            return Entry(claim, None, "pending" if claim.pending else "not run")
        result = read_result(path)
        return Entry(claim, result, "run" if result.hash == claim.hash else "stale")

    def entries(self) -> list[Entry]:
        """All claims with their results."""
        return [self.entry(name) for name in self.ids()]

    def scripts(self) -> list[Script]:
        """All scripts that say in a line ``Results: …`` of their docstring where their figures go."""
        return [
            found for path in sorted(self.folder.glob("*.py")) if (found := self._script(path)) is not None
        ]

    def _script(self, path: Path) -> Script | None:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        written = re.search(r"^Results: (.+)$", text, re.MULTILINE)
        command = re.search(r"^ {4}(.+)$", text, re.MULTILINE)
        if written is None or command is None:
            return None
        results = () if written[1] == "printed" else tuple(written[1].split(", "))
        there = all((self.folder.parent / result).is_file() for result in results)
        status = ("run" if there else "not run") if results else "printed"
        return Script(path.stem, text.splitlines()[0].replace("`", ""), command[1], results, status)

"""What only some parts of retrograde need: packages that an extra brings. The library itself needs none of them."""

import importlib.util
from collections.abc import Sequence

from retrograde.errors import MissingPackageError

LAB = (
    *("PIL", "datasets", "docstring_parser", "jinja2", "plotly", "pydantic", "rich"),
    *("safetensors", "scipy", "sklearn", "tomli_w", "tyro"),
)
"""Modules of the packages of the extra ``lab``."""


def is_installed(module: str) -> bool:
    """Whether a package can be imported; nothing is."""
    return importlib.util.find_spec(module) is not None


def require(part: str, extra: str, modules: Sequence[str]) -> None:
    """Say how to get what `part` needs, where it is missing.

    Args:
        part: what needs the packages, as the beginning of a sentence.
        extra: name of the extra that brings them.
        modules: names that they are imported by.

    Raises:
        MissingPackageError: some of the modules are not installed.
    """
    lacking = [module for module in modules if not is_installed(module)]
    if lacking:
        raise missing(part, extra, ", ".join(lacking))


def missing(part: str, extra: str, packages: str) -> MissingPackageError:
    """The error that says how to get what `part` needs.

    Args:
        part: what needs the packages, as the beginning of a sentence.
        extra: name of the extra that brings them.
        packages: what is missing.
    """
    return MissingPackageError(
        f"{part} needs {packages}, which retrograde does not bring by itself. Install the extra: "
        f"pip install 'retrograde[{extra}]'."
    )

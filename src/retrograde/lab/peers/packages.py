"""Importing what a peer needs, or saying how to get it."""

import importlib
from typing import Any

from retrograde.errors import MissingPackageError


def load(module: str, package: str) -> Any:
    """The imported `module` of `package`.

    Raises:
        MissingPackageError: `package` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"this peer comes from the package {package}, and {error.name} cannot be imported. "
            "Install it: pip install 'retrograde[peers]'."
        ) from error

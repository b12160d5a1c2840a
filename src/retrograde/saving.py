"""The file of a session: methods, the layers that they act on, and state; plain values and tensors alone."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from retrograde.assignment import distinct
from retrograde.engine.slots import Method
from retrograde.errors import OptionError, StateError
from retrograde.host import write_atomically
from retrograde.methods import registry

_FORMAT = 1


def write(
    path: str | os.PathLike[str],
    layers: Mapping[str, Sequence[Method]],
    shapes: Mapping[str, Sequence[int]],
    state: Mapping[str, Any],
) -> None:
    """Replace the file at `path` as a whole, or leave it as it was.

    Args:
        path: in a folder that exists.
        layers: the methods of each attached layer by its full name.
        shapes: of their weights.
        state: of the session.

    Raises:
        OSError: the file cannot be written.
    """
    methods = distinct(layers.values())
    whole = {
        "retrograde_session": _FORMAT,
        "methods": [{"name": method.name, "options": _options(method)} for method in methods],
        "layers": {name: [methods.index(method) for method in acting] for name, acting in layers.items()},
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "state": dict(state),
    }
    write_atomically(Path(path), lambda file: torch.save(whole, file), shared=True)


def read(
    path: str | os.PathLike[str], *, known: bool
) -> tuple[dict[str, list[Method]], dict[str, tuple[int, ...]], dict[str, Any]]:
    """The methods of each layer, the shapes of the layers' weights, and the session's state.

    Args:
        path: what `write` wrote.
        known: whether the methods are made; else each layer has none.

    Raises:
        StateError: the file cannot be read, is damaged or something else, or names an unknown method.
    """
    where = os.fspath(path)
    try:
        whole: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what damaged bytes raise is anyone's guess
        raise StateError(
            f"{where} cannot be read ({type(error).__name__}: {error}): it is missing, damaged, or not a file that "
            "session.save(path) wrote. Pass a complete one."
        ) from error
    if not isinstance(whole, dict) or cast(Any, whole).get("retrograde_session") != _FORMAT:
        raise StateError(
            f"{where} is not a session file of this version of retrograde. Pass a file that session.save(path) wrote."
        )
    try:
        methods = [_method(entry, where) for entry in whole["methods"]] if known else []
        layers = {
            str(name): [methods[i] for i in acting if known] for name, acting in whole["layers"].items()
        }
        shapes = {str(name): tuple(map(int, shape)) for name, shape in whole["shapes"].items()}
        return layers, shapes, whole["state"]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise StateError(
            f"{where} is damaged: {type(error).__name__}: {error}. Pass a complete file."
        ) from error


def _options(method: Method) -> dict[str, Any]:
    return {
        field.name: getattr(method, field.name)
        for field in dataclasses.fields(cast(Any, method))
        if field.init
    }


def _method(entry: Mapping[str, Any], where: str) -> Method:
    name, options = entry["name"], entry["options"]
    cls = registry.available().get(name)
    if cls is None:
        raise StateError(
            f"{where} names the method {name!r}, which is not installed. Install the package that has it, "
            "or pass `methods` to resume."
        )
    try:
        return cast(Any, cls)(**options)
    except (OptionError, TypeError) as error:
        raise StateError(
            f"{where} names {name!r} with options that it refuses ({error}): they belong to another version. "
            "Pass `methods` to resume."
        ) from error

"""What checks of generated pages share: the script that makes the page, as a module, and its strings."""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def imported(path: Path) -> Iterator[ModuleType]:
    """A script as a module, with its neighbours in reach."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look for their module.
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(path.parent))
        del sys.modules[spec.name]


def texts(path: Path, drawn_by: str) -> list[str]:
    """The strings of what makes the page's text, formats left out: all before the drawing, where `drawn_by` stands."""
    source, drawing = path.read_text(encoding="utf-8").split("\n# The pictures.\n")
    assert drawn_by in drawing
    tree = ast.parse(source)
    formats = {
        id(node)
        for value in ast.walk(tree)
        if isinstance(value, ast.FormattedValue) and value.format_spec is not None
        for node in ast.walk(value.format_spec)
    }
    constants = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in formats]
    return [node.value for node in constants if isinstance(node.value, str)]

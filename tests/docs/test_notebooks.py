"""Notebooks run, their own assertions hold, and what is committed has what they show."""

import json
from pathlib import Path

import pytest
import torch
from generated_page import imported

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every cell, in a plain namespace; the committed outputs are of the same kinds."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    committed = _kinds(notebook)
    try:
        with imported(DOCS / "make_notebook.py") as module:
            module.run(notebook)
    finally:
        torch.set_default_dtype(torch.float32)
    assert _kinds(notebook) == committed
    assert any("image/svg+xml" in kinds for cell in committed for kinds in cell)


def _kinds(notebook: dict) -> list[list[list[str]]]:
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [[sorted(output.get("data", {"text": 0})) for output in cell["outputs"]] for cell in cells]


def test_there_are_some() -> None:
    assert NOTEBOOKS

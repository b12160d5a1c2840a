"""Notebooks run, their own assertions hold, and what is committed has what they show."""

import json
import math
from pathlib import Path
from xml.etree import ElementTree

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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_text_is_cut_by_the_picture(path: Path) -> None:
    """A letter is about 0.6 of its size wide, where it is bold."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    figures = ["".join(data["image/svg+xml"]) for data in outputs if "image/svg+xml" in data]
    with imported(DOCS / "notebooks" / "plots.py") as plots:
        for figure in figures:
            for text in ElementTree.fromstring(figure).iter("{http://www.w3.org/2000/svg}text"):
                if text.get("text-anchor") == "start":
                    letter = float(text.get("font-size")) * (
                        0.6 if text.get("font-weight") == "600" else 0.53
                    )
                    assert float(text.get("x")) + letter * len(text.text) <= plots.WIDTH, text.text


def test_ticks_of_a_logarithmic_axis() -> None:
    with imported(DOCS / "notebooks" / "plots.py") as plots:
        for low, high, shown in (
            (0.02, 0.16, ["0.02", "0.05", "0.1"]),
            (1e-6, 0.3, ["10⁻⁶", "10⁻⁵", "10⁻⁴", "0.001", "0.01", "0.1"]),
            (3e-5, 6e-4, ["5·10⁻⁵", "10⁻⁴", "2·10⁻⁴", "5·10⁻⁴"]),
            (1e-12, 1, ["10⁻¹²", "10⁻¹⁰", "10⁻⁸", "10⁻⁶", "10⁻⁴", "0.01", "1"]),
        ):
            assert [plots._power(t) for t in plots._log_ticks(math.log10(low), math.log10(high))] == shown


def _kinds(notebook: dict) -> list[list[list[str]]]:
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [[sorted(output.get("data", {"text": 0})) for output in cell["outputs"]] for cell in cells]


def test_there_are_some() -> None:
    assert NOTEBOOKS

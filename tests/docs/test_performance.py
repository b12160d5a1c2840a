"""The page on performance is what its script makes from ``results/``: no figure in it can be typed by hand."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from generated_page import imported, texts

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "make_performance.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with imported(SCRIPT) as module:
        yield module


@pytest.fixture(scope="module")
def growth() -> dict[str, Any]:
    """A result with two linear points: ``skip`` is slower than torch's at the first, faster at the second."""
    rows: list[dict[str, Any]] = []
    for share, took in ((0.5, 0.004), (0.75, 0.001)):
        for kernel, seconds in {"fp32": 0.002, "bf16": 0.0005, "skip": took, "auto": took}.items():
            single, half = 0.002 / seconds, 0.0005 / seconds
            rows.append(
                {
                    "sweep": "zeros",
                    "at": share,
                    "op": "linear",
                    "shape": "8x8x8",
                    "sparsity": share,
                    "zeros": share,
                    "kernel": kernel,
                    "chosen": ["skip"] if kernel == "auto" else None,
                    "seconds": seconds,
                    "quartiles": [seconds, seconds],
                    "speedup_fp32": single,
                    "spread_fp32": [single, single],
                    "speedup_bf16": half,
                    "spread_bf16": [half, half],
                    "multiply_adds": {"float32": 500_000},
                    "bytes": 2**20,
                }
            )
    rates = [{"precision": "float32", "how": "in registers", "size": None, "rate": 2e9}]
    return {
        "command": "python repro/kernel_growth.py",
        "rounds": 3,
        "machine": {"cpu": "a processor", "cores": 2, "threads": 2, "torch": "2.13"},
        "commit": "abc",
        "caches": [],
        "roofs": {
            "rates": rates,
            "copies": [
                {"bytes": 2**20, "how": "copy", "rate": 2**31},
                {"bytes": 2**22, "how": "copy", "rate": 2**30},
            ],
        },
        "rows": rows,
    }


def test_page_is_that_of_the_results(script: ModuleType) -> None:
    """No figure is older than, or other than, what `results/` holds."""
    made = script.page(script.load(ROOT / "results"))
    assert (ROOT / "docs" / "performance.md").read_text(encoding="utf-8") == made, (
        "docs/performance.md is stale: run python docs/make_performance.py"
    )


def test_pictures_and_files_exist() -> None:
    for target in re.findall(
        r"\]\(([^)]+)\)", (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    ):
        assert (ROOT / "docs" / target).exists(), target


def test_script_holds_no_figures() -> None:
    """What makes the text holds no digits but those of formats and of the types' names."""
    found = texts(SCRIPT, drawn_by="def draw(")
    assert any("# Performance" in text for text in found)
    for text in found:
        assert not re.search(r"\d", re.sub("bfloat16|float32|int8|bf16|fp32", "", text)), text


def test_missing_results_are_left_out(script: ModuleType) -> None:
    assert "](" not in script.page({}).replace("[`results/`](../results)", "")
    assert "## On a GPU" not in script.page({})


def test_where_kernels_win(script: ModuleType, growth: dict[str, Any]) -> None:
    """Torch's float32 is passed at the second point, its bfloat16 at none."""
    made = script.page({"kernel-growth": growth})
    assert "| `skip` | 75 % | 50 % | – | 50–75 % | 50–75 % |" in made
    assert "`skip` is faster than torch float32 from 75 % zeros on" in " ".join(made.split())
    assert "never, up to 75 % zeros, faster than torch bfloat16" in " ".join(made.split())


def test_roof(script: ModuleType, growth: dict[str, Any]) -> None:
    """A million operations at two thousand million a second take half a millisecond, a MiB at 2 GiB/s a little less."""
    row = next(row for row in growth["rows"] if row["kernel"] == "skip")
    assert script.least(growth, row) == (0.0005, "arithmetic")
    assert script.reached(growth, row) == pytest.approx(0.0005 / 0.004)
    # Where twice as much must move the copy of a MiB is still the next smaller one.
    assert script.least(growth, {**row, "bytes": 2**21}) == (pytest.approx(2**21 / 2**31), "bytes")
    assert script.least(growth, {**row, "bytes": 2**22})[0] == pytest.approx(2**22 / 2**30)

"""Run folders that the trainer left, and copies of them with other figures."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import RUNS, SMALL, Make, edit

from retrograde.lab import files
from retrograde.lab.recipe import Recipe
from retrograde.lab.trainer import train


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of `RUNS`, once for all tests."""
    root = tmp_path_factory.mktemp("trained")
    for name, change in RUNS.items():
        train(Recipe.model_validate({**SMALL, **change}), root / name)
        # Only what a report reads.
        (root / name / files.CHECKPOINT).unlink()
        shutil.rmtree(root / name / "tensorboard", ignore_errors=True)
    return root


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, started once for all tests."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    quiet = ("background-networking", "component-update", "sync")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=[*arguments, *(f"--disable-{name}" for name in quiet)]
        )
        yield browser
        browser.close()


@pytest.fixture
def copy_run(trained: Path, tmp_path: Path) -> Make:
    """Copies a trained run to ``tmp_path / "runs"`` under another name, with other fields."""

    def copy(
        run: str,
        to: str = "",
        *,
        seed: int | None = None,
        accuracy: float | None = None,
        finished: bool = True,
        outcome: dict[str, Any] | None = None,
        **description: Any,
    ) -> Path:
        folder = shutil.copytree(trained / run, tmp_path / "runs" / (to or run))
        if seed is not None:
            recipe = json.loads((folder / files.RUN).read_text())["recipe"]
            description = {"recipe": recipe | {"seed": seed}, **description}
        edit(folder / files.RUN, **{"name": folder.name, **description})
        scores = {} if accuracy is None else {"test": {"accuracy": accuracy}}
        edit(folder / files.RESULT, **scores, **(outcome or {}))
        if not finished:
            (folder / files.RESULT).unlink()
        return folder

    return copy


@pytest.fixture
def runs(copy_run: Make, tmp_path: Path) -> Path:
    """Two seeds of plain backpropagation and of dithering, and a second group whose one run never ended."""
    for name in ("plain-0", "plain-1", "dither-0", "dither-1"):
        copy_run(name)
    copy_run("blocks", "unended", finished=False)
    return tmp_path / "runs"

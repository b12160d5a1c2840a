"""A comparison: a row for every pair of model and contestant, and comparable run folders."""

import json
import subprocess
from pathlib import Path

import pytest

from retrograde.lab import files
from retrograde.lab.comparison import FILE, compare
from retrograde.lab.recipe import Recipe
from retrograde.report import write

RECIPES = [Recipe(model=model, epochs=1, batch_size=64) for model in ("mlp-small", "vgg-small-bn")]


def test_every_model_has_a_row_for_plain_and_every_contestant(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    rows = compare(
        RECIPES,
        [{"dither": {"scale": 1.0}}],
        tmp_path / "runs",
        seeds=1,
        what="digits",
        command="retrograde demo",
        progress=lambda what, done, total: seen.append((done, total)),
    )
    labels = ["plain", "dither(scale=1.0)"]
    assert [(row.model, row.label) for row in rows] == [(r.model, label) for r in RECIPES for label in labels]
    for plain, dithered in (rows[:2], rows[2:]):
        assert (plain.zeros, plain.seconds_ratio, plain.needed, plain.executed) == (None, 1.0, 1.0, 1.0)
        assert dithered.zeros is not None
        assert dithered.zeros > (dithered.own_zeros or 0)
        assert dithered.needed < 1
        assert dithered.needed <= dithered.executed
        assert plain.parameters == dithered.parameters
        assert plain.accuracy > 0.1
    # The bar counts every step of every run, and ends full.
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}
    folders = sorted(path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert len(folders) == len(rows)
    assert all((folder / files.RESULT).is_file() for folder in folders)
    assert len({files.read_run(folder)["group"] for folder in folders}) == len(RECIPES)
    written = json.loads((tmp_path / "runs" / FILE).read_text(encoding="utf-8"))
    assert [row["label"] for row in written["rows"]] == labels * 2
    page = write([tmp_path / "runs"], tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(recipe.model in page for recipe in RECIPES)


def test_seeds_are_paired_and_averaged(tmp_path: Path) -> None:
    rows = compare([RECIPES[0].model_copy(update={"limit": 256})], [], tmp_path, seeds=2, what="", command="")
    runs = [
        json.loads((tmp_path / f"mlp-small-0-plain-{seed}" / files.RESULT).read_text()) for seed in range(2)
    ]
    scores = [run["test"]["accuracy"] for run in runs]
    (row,) = rows
    assert row.accuracy == pytest.approx(sum(scores) / 2)
    assert row.accuracy_deviation == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    assert scores[0] != scores[1]
    assert row.seconds_ratio == 1.0


def test_one_method_may_contend_with_several_settings(tmp_path: Path) -> None:
    rows = compare(
        [RECIPES[0].model_copy(update={"limit": 64})],
        [{"dither": {"scale": 1.0}}, {"dither": {"scale": 3.0}}],
        tmp_path,
        seeds=1,
        what="",
        command="",
    )
    assert [row.label for row in rows] == ["plain", "dither(scale=1.0)", "dither(scale=3.0)"]


def test_without_git_the_comparison_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours of training must not be lost for want of a commit's name."""

    def no_git(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    compare([RECIPES[0].model_copy(update={"limit": 64})], [], tmp_path, seeds=1, what="", command="")
    assert json.loads((tmp_path / FILE).read_text())["commit"] is None

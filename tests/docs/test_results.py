"""The page of results is what its script makes from ``repro/`` and ``results/``: no figure can be typed by hand."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from generated_page import imported, texts

from retrograde.lab.claims.definition import Claim
from retrograde.lab.claims.library import Library
from retrograde.lab.claims.result import Entry, Reading, Result, Run, write_result
from retrograde.lab.claims.verdict import complete

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "make_results.py"
PAGE = ROOT / "docs" / "results.md"

DEFINITION = """\
title = "A made-up claim"
claim = "97.77 % with half | of the FLOPs"
source = "Nobody 2020, Table 7"
table = ["accuracy", "executed", "seconds"]
note = "A note with *stars*."

[contestants.plain]

[contestants.ours]
methods = { dither = {} }
source = { accuracy = 0.9777 }

[contestants.worse]
peers = { meprop = {} }

[contestants.better]
label = "the better peer"
peers = { meprop = { k = 7 } }

[[checks]]
says = "as accurate as plain"
of = "ours"
metric = "accuracy"
minus = "plain"
at_least = -0.01
"""
PENDING = """\
title = "Later"
claim = "66.6 % less"
source = "Somebody"
pending = "its data set is not here"
"""


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with imported(SCRIPT) as module:
        yield module


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """Two definitions without results."""
    folder = tmp_path / "repro" / "dither"
    folder.mkdir(parents=True)
    (folder / "made-up.toml").write_text(DEFINITION, encoding="utf-8")
    (folder / "later.toml").write_text(PENDING, encoding="utf-8")
    return Library(tmp_path / "repro")


def made(claim: Claim, ours: float = 0.95, seeds: int = 3) -> Result:
    heights = {"plain": 0.94, "ours": ours, "worse": 0.81, "better": 0.92}
    runs = [
        Run(
            contestant=name,
            seed=seed,
            commit="abc123",
            metrics={"accuracy": height + seed / 1000, "executed": None, "seconds": 10.0},
            flops={},
            peak_memory_bytes=None,
            curve=[Reading(step=at, seconds=at * 5.0, accuracy=height * at / 2) for at in (1, 2)],
        )
        for seed in range(seeds)
        for name, height in heights.items()
    ]
    entries = {
        name: Entry(
            label=one.label or name,
            recipe={"methods": one.methods, "peers": one.peers},
            changes={"learning_rate": 0.0123456} if name == "ours" else {},
            trials=[],
            source=one.source,
        )
        for name, one in claim.contestants.items()
    }
    result = Result(
        claim=claim.id,
        hash=claim.hash,
        quick=False,
        title=claim.title,
        sentence=claim.claim,
        source=claim.source,
        note=claim.note,
        command=f"retrograde repro run {claim.id}",
        machine={"cpu": "A processor", "cores": 2, "torch": "2.13.0"},
        jobs=1,
        threads=2,
        seeds=list(range(seeds)),
        equal="steps",
        target=None,
        table=claim.table,
        contestants=entries,
        runs=runs,
    )
    return complete(result, claim.checks)


def publish(library: Library, **changed: object) -> Result:
    claim = library.claim("dither/made-up")
    result = made(claim).model_copy(update=changed)
    write_result(result, library.path(claim))
    return result


def numbers(text: str) -> set[str]:
    """Number tokens outside code spans, links and anchors."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|<a [^>]*>", "", text)
    return set(re.findall(r"\d+(?:\.\d+)?", text))


def test_page_is_that_of_the_results(script: ModuleType) -> None:
    """No figure is older than, or other than, what `results/` holds."""
    made_now = script.page(Library(ROOT / "repro").entries())
    assert PAGE.read_text(encoding="utf-8") == made_now, (
        "docs/results.md is stale: run python docs/make_results.py"
    )


def test_pictures_and_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8")):
        assert (ROOT / "docs" / target).exists(), target


def test_script_holds_no_figures() -> None:
    """What makes the text holds no digits but those of formats, and the confidence of all intervals."""
    found = texts(SCRIPT, drawn_by="def pictures(")
    assert any("# Results" in text for text in found)
    for text in found:
        assert not re.search(r"\d", text.replace("95 % interval", "")), text


def test_no_definitions(script: ModuleType) -> None:
    found = script.page([])
    assert "There is no definition yet." in found
    assert numbers(found) == {"95"}


def test_claims_without_results(script: ModuleType, library: Library) -> None:
    found = script.page(library.entries())
    assert "| `dither/later` | 66.6 % less | – | – | not run: its data set is not here | – |" in found, found
    assert "| `dither/made-up` | test accuracy 97.77 % | – | – | not run | – |" in found
    assert "![" not in found
    assert script.pictures(library.entries()) == {}


def test_overview_and_section(script: ModuleType, library: Library) -> None:
    """Seeds are 0, 0.1 and 0.2 points above the first: a mean 0.1 above it, and ± 0.25."""
    publish(library)
    found = script.page(library.entries())
    assert (
        "| [`dither/made-up`](#claim-dither-made-up) | test accuracy 97.77 % | test accuracy 95.10 ± 0.25 % | "
        "the better peer: test accuracy 92.10 ± 0.25 % | run | *reproduced* |"
    ) in found
    assert '<a id="claim-dither-made-up"></a>' in found
    assert "| ours | 95.10 ± 0.25 % | – | 10.0 s | ×1.00 | test accuracy 97.77 % |" in found
    assert "| as accurate as plain | holds | +1.00 points | at least −1.00 points" in found
    assert "half \\| of the FLOPs" in found
    assert "A note with \\*stars\\*." in found
    assert "| ours | 0.01235 | 0 |" in found
    assert "Made by `retrograde repro run dither/made-up`" in " ".join(found.split())
    assert "commit abc123" in " ".join(found.split())
    assert "pictures/results-dither-made-up.svg" in found
    assert list(script.pictures(library.entries())) == ["dither-made-up"]


def test_one_figure_changes_the_page(script: ModuleType, library: Library) -> None:
    claim = library.claim("dither/made-up")
    write_result(made(claim), library.path(claim))
    before = script.page(library.entries())
    write_result(made(claim, ours=0.7345), library.path(claim))
    after = script.page(library.entries())
    assert "73.55" in numbers(after) - numbers(before)
    assert "95.10" in numbers(before) - numbers(after)
    assert "*not reproduced*" in after


def test_results_that_decide_nothing(script: ModuleType, library: Library) -> None:
    publish(library, quick=True)
    assert "**Verdict: quick: decides nothing**" in script.page(library.entries())
    publish(library, hash="another")
    found = script.page(library.entries())
    assert "| the definition has changed since | – |" in found
    assert "*The definition has changed since this result was made.*" in found
    assert "*reproduced*" not in found.split("## All claims")[1]


def test_no_picture_of_single_readings(script: ModuleType, library: Library) -> None:
    result = publish(library)
    publish(library, runs=[run.model_copy(update={"curve": run.curve[-1:]}) for run in result.runs])
    assert "![" not in script.page(library.entries())


def test_command(library: Library, tmp_path: Path) -> None:
    """Without results no browser is needed; ``--check`` fails once anything changes."""
    out = tmp_path / "docs"
    out.mkdir()
    command = [sys.executable, str(SCRIPT), "--repro", str(library.folder), "--out", str(out)]
    assert subprocess.run([*command, "--check"], check=False).returncode == 1
    assert subprocess.run(command, check=False).returncode == 0
    assert subprocess.run([*command, "--check"], check=False).returncode == 0
    publish(library)
    assert subprocess.run([*command, "--check"], check=False).returncode == 1


@pytest.mark.browser
def test_pictures_are_drawn(library: Library, tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("no browser")
    out = tmp_path / "docs"
    (out / "pictures").mkdir(parents=True)
    (out / "pictures" / "results-gone.svg").write_text("", encoding="utf-8")
    publish(library)
    command = [sys.executable, str(SCRIPT), "--repro", str(library.folder), "--out", str(out)]
    assert subprocess.run(command, check=False).returncode == 0
    drawn = [file.name for file in (out / "pictures").iterdir()]
    assert drawn == ["results-dither-made-up.svg"]
    assert "the better peer" in (out / "pictures" / drawn[0]).read_text(encoding="utf-8")

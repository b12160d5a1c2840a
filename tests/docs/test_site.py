"""The site: pages that are made are up to date, examples run, and what the hook must refuse stops the build.

`make lint` builds the site itself, with warnings as errors.
"""

import re
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from generated_page import imported

import retrograde as rg
from retrograde.engine.slots import Method
from retrograde.methods.registry import available

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")]
CODE = {
    f"{page.stem} {at}": block
    for page in (DOCS / "start.md",)
    for at, block in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    )
}


@pytest.fixture(scope="module")
def hook() -> Iterator[ModuleType]:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    with imported(DOCS / "site_hook.py") as module:
        yield module


@pytest.fixture(scope="module")
def works_with() -> Iterator[ModuleType]:
    with imported(DOCS / "make_works_with.py") as module:
        yield module


@pytest.mark.parametrize("script", ["make_gain.py", "make_works_with.py"])
def test_made_files_are_up_to_date(script: str) -> None:
    done = subprocess.run(
        [sys.executable, f"docs/{script}", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", CODE)
def test_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(CODE[name], name, "exec"), {"__name__": "__main__"})


# Cards.


@pytest.mark.parametrize("name", available())
def test_every_method_has_a_card(name: str) -> None:
    """Made from its docstring, which `retrograde methods NAME` prints, and in the navigation."""
    page = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
    cls = available()[name]
    assert f"::: {cls.__module__}\n" in page
    assert f"::: retrograde.{cls.__name__}\n" in page
    assert f"methods/{name}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


# Public names.


def test_every_public_name_is_documented(hook: ModuleType) -> None:
    assert hook.undocumented(PAGES) == []
    assert {"attach", "Session", "Dither", "errors"} <= hook.public(rg).keys()
    assert "engine" not in hook.public(rg)


def test_a_name_on_no_page_is_found(hook: ModuleType) -> None:
    without = [text.replace("::: retrograde.attach\n", "") for text in PAGES]
    assert hook.undocumented(without) == ["attach: no page has `::: retrograde.attach`"]


class Silent(Method):
    def say(self) -> None:
        pass

    @property
    def word(self) -> str:
        return ""


@dataclass
class Spoken:
    """Says what one of its fields is.

    Attributes:
        first: a number.
    """

    first: int = 0
    second: int = 0


@pytest.mark.parametrize(
    ("value", "parts"),
    [(Silent, [".say", ".word"]), (Spoken, [".second"]), (lambda: None, [""])],
    ids=("silent", "spoken", "function"),
)
def test_parts_without_a_docstring_are_found(hook: ModuleType, value: Any, parts: list[str]) -> None:
    assert list(hook.silent(value)) == parts


def test_silent_parts_of_a_module_are_found(hook: ModuleType) -> None:
    module = types.ModuleType("somewhere")
    cls = type("Spoken", (), {"__module__": "somewhere", "__doc__": None})
    vars(module).update(Spoken=cls, Path=Path)
    assert list(hook.silent(module)) == [".Spoken"]


# Links.


def test_links_out_of_the_docs_lead_to_pages_of_their_own(hook: ModuleType) -> None:
    for path, uri, expected in (
        ("../tests/test_session.py", "page.md", "source/tests/test_session.py.md#test_fold"),
        ("../../tests/test_session.py", "methods/page.md", "../source/tests/test_session.py.md#test_fold"),
        ("../results/fuzz.json", "page.md", "source/results/fuzz.json#test_fold"),
        ("results.md", "page.md", "results.md#test_fold"),
    ):
        assert hook.link(path, "#test_fold", uri) == expected


def test_a_link_to_no_file_stops_the_build(hook: ModuleType) -> None:
    from mkdocs.exceptions import PluginError

    assert list(
        hook.outside("[a](../Makefile) [b](https://example.org) [c](design.md) [d](#here)", "page.md")
    ) == ["Makefile"]
    with pytest.raises(PluginError, match=r"no tests/gone\.py"):
        list(hook.outside("[a](../tests/gone.py)", "page.md"))


def test_readme_as_the_first_page(hook: ModuleType) -> None:
    text = hook.moved_readme()
    assert "](pictures/gain.svg)" in text
    assert "](results.md" in text
    assert "](../CHANGELOG.md)" in text
    assert "](docs/" not in text


def test_definitions_are_headings(hook: ModuleType) -> None:
    text = hook.definitions('"""Words."""\n\n\n@mark\ndef one():\n    pass\n\n\nclass Two: ...\n')
    assert re.findall(r"## .*", text) == ["## `one` { #one }", "## `Two` { #Two }"]
    assert 'linenums="4"\n@mark\ndef one' in text


def test_commands_are_those_of_the_usage(hook: ModuleType) -> None:
    from mkdocs.exceptions import PluginError

    assert {"train", "methods", "doctor"} <= set(hook.commands(hook.helped()))
    with pytest.raises(PluginError, match="lists no commands"):
        hook.commands("usage: retrograde")


# What each method is tested with.


def test_cells_count_the_cases_that_there_are(works_with: ModuleType) -> None:
    way = works_with.Way("a way", "holds", "tests/a.py::check", "tests/a.py::test", "-way")
    ids = [
        "tests/a.py::test[dither-linear-way]",
        "tests/a.py::test[dither-int8-conv-way]",
        "tests/a.py::test[dither-other]",
    ]
    assert works_with.cell(ids, way, "dither") == "[yes, 2 cases](../tests/a.py#test)"
    assert works_with.cell(ids, way, "spectral") == "not tested"
    refused = works_with.Way("another", "holds", "tests/a.py::test", "tests/a.py::test")
    assert works_with.cell(["tests/a.py::test_is_refused[dither]"], refused, "dither") == (
        "[refused](../tests/a.py#test_is_refused)"
    )


def test_every_method_has_a_column(works_with: ModuleType) -> None:
    assert set(works_with.METHODS) == set(available())

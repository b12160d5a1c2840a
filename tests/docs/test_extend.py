"""``docs/extend.md`` does what it says: each block is a file that runs, in a namespace of its own."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest

from retrograde.kernels import linear
from retrograde.lab import peers
from retrograde.methods import registry

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))


def test_there_are_four_sections_of_one_file_each() -> None:
    assert list(SECTIONS) == ["A method", "A layer kind", "A kernel", "A peer"]
    for text in SECTIONS.values():
        assert len(re.findall(r"```python\n(.*?)```", text, re.DOTALL)) == 1


@pytest.mark.parametrize("section", SECTIONS)
def test_blocks_run(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As modules in files of their own, as a package would hold them: what they define can be pickled."""
    # A kernel that is registered here is gone afterwards.
    monkeypatch.setattr(linear, "_registered", {})
    monkeypatch.setattr(linear, "SKIPPING", set(linear.SKIPPING))
    (block,) = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)
    name = f"extend_{section.replace(' ', '_').lower()}"
    file = tmp_path / f"{name}.py"
    file.write_text(block, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)


def test_entry_points_are_those_that_are_read() -> None:
    """Of the groups that the library looks in, and of classes that the blocks define."""
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    groups = tomllib.loads(block)["project"]["entry-points"]
    assert set(groups) == {registry.GROUP, peers.GROUP}
    for group in groups.values():
        for target in group.values():
            assert f"class {target.partition(':')[2]}(" in PAGE


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target

"""Methods by name, ours and a third party's."""

from dataclasses import dataclass
from typing import Any

import pytest

import retrograde as rg
from retrograde.errors import OptionError
from retrograde.methods import registry


@dataclass(frozen=True)
class Foreign(rg.Method):
    """What another package brings."""

    name = "foreign"
    strength: int = 1

    def make_rule(self, site: rg.Site) -> rg.Rule | str:
        return "nothing to do"


class Entry:
    """Stands for importlib.metadata.EntryPoint."""

    dist = None

    def __init__(self, name: str, target: Any) -> None:
        self.name, self.value, self._target = name, f"package:{name}", target

    def load(self) -> Any:
        if isinstance(self._target, Exception):
            raise self._target
        return self._target


def install(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    monkeypatch.setattr(
        registry, "entry_points", lambda group: list(entries) if group == registry.GROUP else []
    )


def test_ours() -> None:
    assert registry.available()["dither"] is rg.Dither
    assert registry.make("dither") == rg.Dither()
    assert registry.make("dither", {"scale": "3", "target_sparsity": "0.9", "bits": "4"}) == rg.Dither(
        3.0, 0.9, 4
    )


def test_third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Entry("foreign", Foreign), Entry("dither", rg.Dither))
    assert list(registry.available()) == ["dither", "foreign"]
    assert registry.make("foreign", {"strength": 4}) == Foreign(4)


@pytest.mark.parametrize(
    "target", [ImportError("no module"), AttributeError("no attribute"), dict, 3, rg.Method]
)
def test_broken_entry_points(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Entry("broken", target))
    with pytest.raises(OptionError, match=r"method 'broken' \(entry point package:broken\)"):
        registry.available()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dihter", {}, "no method 'dihter'. Did you mean 'dither'"),
        ("dither", {"scael": 1}, "no option 'scael'. Did you mean 'scale'"),
        ("dither", {"scale": "much"}, "scale='much'"),
        ("dither", {"scale": -1}, "scale=-1.0 must be"),
        ("dither", {"bits": "3.5"}, "bits='3.5'"),
        ("dither", {"name": "x"}, "no option 'name'"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError) as caught:
        registry.make(name, options)
    assert words in str(caught.value)
    assert "refuses =" not in str(caught.value)
    assert ".." not in str(caught.value)

"""Methods and peers by name, ours and a third party's."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

import retrograde as rg
from retrograde.errors import OptionError
from retrograde.lab import options as lab_options
from retrograde.lab import peers
from retrograde.methods import registry


@dataclass(frozen=True)
class Foreign(rg.Method):
    """What another package brings."""

    name = "foreign"
    strength: int = 1

    def make_rule(self, site: rg.Site) -> rg.Rule | str:
        return "nothing to do"


@dataclass(frozen=True)
class Rival(peers.Peer):
    """What another package brings to be compared with."""

    strength: int = 1


class Entry:
    """Stands for importlib.metadata.EntryPoint."""

    def __init__(self, name: str, target: Any, package: str = "") -> None:
        self.name, self._target = name, target
        self.value = f"{package or 'package'}:{name}"
        self.dist = SimpleNamespace(name=package) if package else None

    def load(self) -> Any:
        if isinstance(self._target, Exception):
            raise self._target
        return self._target


def install(monkeypatch: pytest.MonkeyPatch, *entries: Entry, group: str = registry.GROUP) -> None:
    wanted = group
    monkeypatch.setattr(registry, "entry_points", lambda group: list(entries) if group == wanted else [])


def test_ours() -> None:
    assert registry.available()["dither"] is rg.Dither
    assert lab_options.make("dither") == rg.Dither()
    assert lab_options.make("dither", {"scale": "3", "target_sparsity": "0.9", "bits": "4"}) == rg.Dither(
        3.0, 0.9, 4
    )


def test_third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Entry("foreign", Foreign), Entry("dither", rg.Dither))
    assert list(registry.available()) == ["dither", "foreign"]
    assert lab_options.make("foreign", {"strength": 4}) == Foreign(4)


@pytest.mark.parametrize(
    "target", [ImportError("no module"), AttributeError("no attribute"), dict, 3, rg.Method]
)
def test_broken_entry_points(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Entry("broken", target))
    with pytest.raises(OptionError, match=r"method 'broken' \(entry point package:broken\)"):
        registry.available()


def test_errors_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Entry("broken", ImportError("no module"), "acme"))
    with pytest.raises(
        OptionError, match=r"\(entry point acme:broken of the package acme\).*package acme\.$"
    ):
        registry.available()


def test_two_packages_with_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same entry may be listed twice; two different ones are refused, naming both."""
    install(monkeypatch, Entry("foreign", Foreign, "acme"), Entry("foreign", Foreign, "acme"))
    assert list(registry.available()) == ["foreign"]
    install(monkeypatch, Entry("foreign", Foreign, "acme"), Entry("foreign", Foreign, "other"))
    with pytest.raises(OptionError, match=r"two methods 'foreign': .*package acme and .*package other\."):
        registry.available()


def test_third_party_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers come as methods do, and are loaded one by one: a broken one is no matter until it is asked for."""
    entries = Entry("rival", Rival), Entry("broken", ImportError("no module"), "acme"), Entry("odd", Foreign)
    install(monkeypatch, *entries, group=peers.GROUP)
    assert peers.names() == ("broken", "odd", "rival")
    assert peers.make("rival", {"strength": "4"}) == Rival(4)
    with pytest.raises(OptionError, match=r"peer 'broken' \(entry point acme:broken of the package acme\)"):
        peers.find("broken")
    with pytest.raises(OptionError, match=r"peer 'odd' .* not a dataclass derived from .*\.Peer"):
        peers.find("odd")
    with pytest.raises(OptionError, match=r"no peer 'rivl'. Did you mean 'rival'"):
        peers.find("rivl")


def test_every_peer_of_ours_is_found() -> None:
    assert {"sam", "muon", "meprop", "lora"} <= set(peers.names())
    for name in peers.names():
        assert issubclass(peers.find(name), peers.Peer)


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
        lab_options.make(name, options)
    assert words in str(caught.value)
    assert "refuses =" not in str(caught.value)
    assert ".." not in str(caught.value)

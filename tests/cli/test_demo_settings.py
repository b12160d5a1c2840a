"""``demo`` runs every method at the settings that the method names for a short run."""

import pytest

import retrograde as rg
from retrograde.cli import demo
from retrograde.lab.options import make
from retrograde.methods.registry import available


def test_settings_are_the_methods_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rg.Decorrelate, "short_run", {"rank": 5})
    *alone, together = demo._contestants()
    assert {name: options for one in alone for name, options in one.items()} == {
        name: dict(method.short_run) for name, method in available().items()
    }
    assert together == {"decorrelate": {"rank": 5}, "dither": {"scale": 1.0}}


def test_every_named_setting_is_one_that_the_method_takes() -> None:
    for name, method in available().items():
        for options in (method.short_run, *(o for found in method.benchmarks.values() for o in found)):
            make(name, dict(options))
        assert set(method.benchmarks) <= {"float32", "bfloat16"}

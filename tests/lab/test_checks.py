"""``run_checks`` finds what is broken and goes on."""

import re
from pathlib import Path
from typing import Any

import pytest

from retrograde.engine.maps.base import Gradients
from retrograde.engine.maps.linear import LinearMap
from retrograde.kernels import rehearse
from retrograde.lab import checks, precisions, tensorboard
from retrograde.lab.checks import Check, run_checks
from retrograde.lab.precisions import Precision


def find(found: list[Check], name: str) -> Check:
    (check,) = [check for check in found if check.name == name]
    return check


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_compile", lambda: ("ok", "not run"))
    monkeypatch.setattr(checks, "_precisions", lambda: ("ok", "not run"))


def test_this_machine_is_fit() -> None:
    found = run_checks()
    assert [check.name for check in found] == [
        *("machine", "versions", "methods", "gradients", "precisions", "compile", "kernels"),
        *("accelerator", "data sets", "TensorBoard"),
    ]
    assert not [check for check in found if check.status == "failed"]
    assert "dither" in find(found, "methods").detail
    assert find(found, "data sets").status == "note"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "name", ["_machine", "_versions", "_methods", "_gradients", "_kernels", "_accelerator"]
)
def test_one_broken_check_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def broken(*told: object) -> tuple[str, str]:
        raise RuntimeError("broken")

    monkeypatch.setattr(checks, name, broken)
    found = run_checks()
    assert len(found) == 10
    (failed,) = [check for check in found if check.status == "failed"]
    assert failed.detail == "RuntimeError: broken"


@pytest.mark.usefixtures("quick")
def test_each_check_is_told_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(rehearse, "_SIZE", 8)
    monkeypatch.setattr(rehearse, "_IMAGES", (1, 64, 4, 4))
    found = run_checks(None, lambda name: told.append(f"begin {name}"), told.append)
    assert told[0] == "begin machine"
    assert re.fullmatch(r"machine: \d+\.\d s", told[1])
    start = told.index("begin kernels")
    assert told[start + 1].startswith("kernels: linear layer, 8 rows")
    assert told[start + 2].startswith("kernels: 3×3 convolution")
    assert re.fullmatch(r"kernels: \d+\.\d s", told[start + 3])
    assert all(check.seconds >= 0 for check in found)


def test_the_fastest_precision_is_named_and_emulation_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(half: float) -> list[Precision]:
        return [
            Precision(op, "8x8x8", name, 0.002 / ratio, ratio)
            for op in ("linear", "conv")
            for name, ratio in (("float32", 1.0), ("bfloat16", half))
        ]

    monkeypatch.setattr(precisions, "measure", lambda: measured(0.02))
    status, detail = checks._precisions()
    assert status == "note"
    assert "linear layer 8x8x8, fastest in float32: float32 2 ms (×1), bfloat16 100 ms (×0.02)" in detail
    assert "50.0 times (linear) and 50.0 times (conv): train in float32, without autocast" in detail
    monkeypatch.setattr(precisions, "measure", lambda: measured(5.0))
    status, detail = checks._precisions()
    assert status == "ok"
    assert "convolution 8x8x8, fastest in bfloat16" in detail
    assert "emulated" not in detail


@pytest.mark.usefixtures("quick")
def test_wrong_gradients_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that scale the weight gradient by 1.5 are biased ones."""
    original = LinearMap.gradients

    def scaled(*args: Any) -> Gradients:
        dx, dw, db = original(*args)
        return dx, None if dw is None else 1.5 * dw, db

    assert find(run_checks(), "gradients").status == "ok"
    monkeypatch.setattr(LinearMap, "gradients", scaled)
    assert find(run_checks(), "gradients").status == "failed"


@pytest.mark.usefixtures("quick")
def test_missing_data_folder_fails(tmp_path: Path) -> None:
    check = find(run_checks(tmp_path / "gone"), "data sets")
    assert check.status == "failed"
    assert "gone" in check.detail
    assert find(run_checks(tmp_path), "data sets").status == "ok"


@pytest.mark.usefixtures("quick")
def test_without_tensorboard_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "is_available", lambda: False)
    assert find(run_checks(), "TensorBoard").status == "note"


def test_without_a_compiler_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no C++ compiler found\nsecond line")

    monkeypatch.setattr("torch.compile", broken)
    status, detail = checks._compile()
    assert status == "note"
    assert "no C++ compiler found" in detail
    assert "second line" not in detail

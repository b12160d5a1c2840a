"""Precisions are measured in turns, and leave torch's flags as they were. No time is asserted."""

import pytest
import torch

from retrograde.lab import precisions
from retrograde.lab.contestants import Convolution, Linear
from retrograde.lab.precisions import FLAG, Precision, fastest


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precisions, "SHAPES", (Linear(32, 32, 32), Convolution(2, 4, 6, 8, 3)))


def test_every_precision_is_measured_for_both_kinds_of_layer() -> None:
    assert [(one.op, one.name) for one in precisions.measure()] == [
        *(("linear", name) for name in ("float32", FLAG, "bfloat16", "int8")),
        *(("conv", name) for name in ("float32", FLAG, "bfloat16")),
    ]


def test_the_flag_holds_inside_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
    before = [backend.fp32_precision for backend in backends]
    seen: list[list[str]] = []

    def plain(*operands: object) -> None:
        seen.append([backend.fp32_precision for backend in backends])

    monkeypatch.setattr(Linear, "plain", plain)
    runs = precisions._runs(precisions.SHAPES[0])
    runs[FLAG]()
    runs["float32"]()
    assert seen == [["bf16", "bf16"], before]
    assert [backend.fp32_precision for backend in backends] == before


def test_the_fastest_is_that_of_its_kind_of_layer_and_beats_float32_clearly() -> None:
    ratios = {"linear": {"float32": 1.0, "int8": 2.0}, "conv": {"float32": 1.0, "bfloat16": 1.1}}
    found = [
        Precision(op, "", name, 1 / ratio, ratio)
        for op, named in ratios.items()
        for name, ratio in named.items()
    ]
    assert fastest(found, "linear").name == "int8"
    assert fastest(found, "conv").name == "float32"

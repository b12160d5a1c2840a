"""Generated models, loops and methods: as plain training, or a typed error; ``repro/fuzz.py`` runs many more."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import retrograde as rg
from fuzzing.models import Part
from fuzzing.programs import SAME, TYPED, WRONG, Program, outcome
from fuzzing.strategies import programs
from retrograde.engine.slots import Call, Rule, Site, Step
from retrograde.kernels.delta import Delta


@settings(
    max_examples=300,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(programs())
def test_generated_programs(case: Program) -> None:
    found = outcome(case)
    assert found.kind != WRONG, found.why


class Broken(rg.Method):
    """A method whose slots are functions that are given."""

    name = "broken"

    def __init__(self, **slots: Callable[..., Any]) -> None:
        self.slots = slots

    def make_rule(self, site: Site) -> Rule:
        functions = {name: staticmethod(slot) for name, slot in self.slots.items()}
        return type("BrokenRule", (Rule,), functions)(site.name)


def _scaled(call: Call, delta: Delta) -> Delta:
    return Delta(delta.values * 1.01)


def _nan(step: Step) -> None:
    step.layer.weight.data.fill_(torch.nan)


def _lost(layer: nn.Module) -> nn.Module:
    return nn.Linear(3, 2)


def _refused(step: Step) -> None:
    raise rg.errors.OptionError("refused")


@pytest.mark.parametrize(
    ("slots", "neutral", "kind", "why"),
    [
        ({}, True, SAME, ""),
        ({"delta": _scaled}, False, SAME, ""),
        ({"delta": _scaled}, True, WRONG, "not as in plain training"),
        ({"delta": lambda call, delta: 1 // 0}, False, WRONG, "ZeroDivisionError"),
        ({"local": _nan}, False, WRONG, "is not finite"),
        ({"local": lambda step: torch.rand(1)}, False, WRONG, "random state"),
        ({"fold": _lost}, False, WRONG, "folded model"),
        ({"grad": _refused}, False, TYPED, "OptionError"),
    ],
)
def test_what_is_wrong_is_found(slots: dict[str, Any], neutral: bool, kind: str, why: str) -> None:
    found = outcome(Program((Part("linear"),), (Broken(**slots),), neutral))
    assert found.kind == kind
    assert why in found.why


def test_what_plain_training_raises_is_no_fault_of_a_method() -> None:
    spoiled = Part("linear"), Part("relu in place"), Part("tanh"), Part("add in place")
    found = outcome(Program(spoiled, (rg.Dither(scale=0.0),), neutral=True))
    assert found.kind == TYPED
    assert "RuntimeError" in found.why


def test_a_program_is_its_repr() -> None:
    parts = Part("conv2", options=(("kernel_size", 3),)), Part("nested", inner=(Part("relu"),))
    case = Program(parts, (rg.Dither(scale=1.0), rg.Spectral()), neutral=False, dtype=torch.float64)
    assert eval(repr(case), {"Program": Program, "Part": Part, "rg": rg, "torch": torch}) == case

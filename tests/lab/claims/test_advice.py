"""The recommendation: time first, then memory, and plain backpropagation where nothing pays."""

from typing import Any

import pytest
from small_claims import made_up

from retrograde.lab.claims.advice import advise
from retrograde.lab.claims.verdict import complete

PLAIN: dict[str, list[float | None]] = {
    "step_seconds": [1.0, 1.0, 1.0],
    "best_validation": [0.9, 0.9, 0.9],
    "saved_bytes": [100.0, 100.0, 100.0],
    "executed": [1.0, 1.0, 1.0],
}


def advice(
    curves: dict[str, list[tuple[int, float, float]]] | None = None, **contestants: dict[str, Any]
) -> Any:
    figures = {"plain": PLAIN, **{name: {**PLAIN, **own} for name, own in contestants.items()}}
    return advise(complete(made_up(figures, curves=curves, target="plain" if curves else None), []))


def test_the_fastest_that_is_as_accurate_is_recommended() -> None:
    found = advice(fast={"step_seconds": [0.7, 0.72, 0.71]}, faster={"step_seconds": [0.5, 0.52, 0.51]})
    assert found.recommended == "faster"
    assert 0.48 < found.saves < 0.5
    assert "×0.51" in found.why


def test_speed_that_costs_accuracy_is_not() -> None:
    found = advice(wrong={"step_seconds": [0.5, 0.5, 0.5], "best_validation": [0.8, 0.81, 0.8]})
    assert found.recommended == "plain"
    assert found.saves == 0


def test_a_saving_within_the_noise_is_none() -> None:
    found = advice(noisy={"step_seconds": [0.6, 1.3, 0.8]}, slow={"step_seconds": [1.0, 1.1, 1.0]})
    assert found.recommended == "plain"
    assert "for sure. noisy may: ×0.90" in found.why


def test_where_nobody_may_save_nobody_is_named() -> None:
    assert advice(slow={"step_seconds": [1.0, 1.1, 1.0]}).why.endswith("on this model and machine")


def test_time_to_plains_accuracy_counts_before_the_time_of_a_step() -> None:
    curves = {"plain": [(1, 5.0, 0.5), (2, 10.0, 0.9)], "learns": [(1, 4.0, 0.91), (2, 15.0, 0.95)]}
    found = advice(curves, learns={"step_seconds": [1.5, 1.5, 1.5], "best_validation": [0.95, 0.94, 0.95]})
    assert found.recommended == "learns"
    assert found.contestants["learns"].to_target.mean == pytest.approx(0.4)
    assert abs(found.saves - 0.6) < 1e-9


def test_memory_is_the_second_reason() -> None:
    found = advice(small={"saved_bytes": [30.0, 31.0, 30.0], "step_seconds": [1.1, 1.1, 1.1]})
    assert found.recommended == "small"
    assert "no method saves time" in found.why
    assert found.saves < 0


def test_plain_values_tell_every_contestant() -> None:
    content = advice(fast={"step_seconds": [0.5, 0.5, 0.5]}).model_dump()
    assert content["recommended"] == "fast"
    assert content["contestants"]["fast"]["step"]["mean"] == 0.5
    assert content["contestants"]["fast"]["to_target"] is None

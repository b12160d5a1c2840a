"""A cell of a published result, run again."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
from small_claims import STEPS, TUNING, small

from retrograde.errors import RunError
from retrograde.lab.claims.definition import Claim
from retrograde.lab.claims.grid import Grid, Places
from retrograde.lab.claims.result import Result
from retrograde.lab.claims.verify import Verified, run_again
from retrograde.lab.recipe import Recipe

CLAIM = small(tuning=TUNING)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return Grid(CLAIM, Places(tmp_path_factory.mktemp("grid"))).run()


def verify(result: Result, folder: Path, claim: Claim = CLAIM, seed: int = 0) -> Verified:
    return run_again(claim, result, folder, None, Random(seed), tell=lambda share: None, stop=lambda: False)


def shifted(result: Result, by: float) -> Result:
    """Every published test accuracy moved, the spread over seeds being none."""
    result = result.model_copy(deep=True)
    for run in result.runs:
        run.metrics["accuracy"] = (run.metrics["accuracy"] or 0.0) + by
    for summaries in result.summaries.values():
        summaries["accuracy"] = summaries["accuracy"].model_copy(update={"deviation": 0.0})
    return result


def test_on_the_same_machine_it_is_identical(tmp_path: Path, published: Result, steps: list[Recipe]) -> None:
    """Each cell, by what the search found; nothing is searched again."""
    seen: set[tuple[str, int]] = set()
    for number in range(6):
        found = verify(published, tmp_path / str(number), seed=number)
        assert found.identical
        assert found.agrees
        assert set(found.found) == {"accuracy", "best_validation"}, "plain backpropagation has no zeros"
        seen.add((found.contestant, found.seed))
    assert len(seen) > 1
    assert len(steps) == 6 * STEPS
    rates = {entry.changes["learning_rate"] for entry in published.contestants.values()}
    assert {made.learning_rate for made in steps} <= rates


@pytest.mark.parametrize(("by", "agrees"), [(0.004, True), (-0.004, True), (0.006, False), (-0.2, False)])
def test_half_a_point_is_as_far_as_it_may_be(
    tmp_path: Path, published: Result, by: float, agrees: bool
) -> None:
    found = verify(shifted(published, by), tmp_path)
    assert (found.identical, found.agrees) == (False, agrees)
    assert found.published["accuracy"] == pytest.approx(found.found["accuracy"] + by)


@pytest.mark.parametrize(("deviation", "agrees"), [(0.034, True), (0.033, False), (None, False)])
def test_or_three_deviations_over_seeds(
    tmp_path: Path, published: Result, deviation: float | None, agrees: bool
) -> None:
    result = shifted(published, 0.1)
    for summaries in result.summaries.values():
        changed: dict[str, Any] = {"deviation": deviation}
        summaries["accuracy"] = summaries["accuracy"].model_copy(update=changed)
    assert verify(result, tmp_path).agrees == agrees


def test_a_changed_definition_is_refused(tmp_path: Path, published: Result) -> None:
    with pytest.raises(RunError, match="toy/small: the definition has changed"):
        verify(published, tmp_path, small(tuning=TUNING, note="other"))
    assert list(tmp_path.iterdir()) == []

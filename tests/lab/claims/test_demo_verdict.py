"""The demonstration's verdicts: gains need their interval and their accuracy, losers get the measured reason."""

from dataclasses import replace
from typing import Any

import pytest
from small_claims import made_up

from retrograde.lab.claims.result import Result
from retrograde.lab.claims.verdict import complete
from retrograde.lab.demo.scenarios import Scenario, scenarios
from retrograde.lab.demo.verdict import Verdict, advice, judge

SCENARIOS = {one.name: one for one in scenarios()}
PLAIN: dict[str, list[float | None]] = {
    "accuracy": [0.9, 0.91, 0.9],
    "step_seconds": [1.0, 1.02, 1.0],
    "late_step_seconds": [1.0, 1.02, 1.0],
    "backward_seconds": [0.6, 0.61, 0.6],
    "executed": [1.0, 1.0, 1.0],
    "mean_saved_bytes": [100.0, 100.0, 100.0],
}
FAST = {"late_step_seconds": [0.5, 0.52, 0.5], "accuracy": [0.9, 0.9, 0.91]}


def measured(**methods: dict[str, Any]) -> Result:
    return complete(
        made_up({"plain": PLAIN, **{name: {**PLAIN, **own} for name, own in methods.items()}}), []
    )


def of(scenario: Scenario, **figures: Any) -> Verdict:
    (verdict,) = judge(scenario, measured(it=figures))
    return verdict


def test_a_gain_and_its_accuracy() -> None:
    verdict = of(SCENARIOS["dither"], **FAST)
    assert verdict.gains
    assert verdict.words == "2.0× faster a step, accuracy within the noise"
    better = of(SCENARIOS["dither"], **{**FAST, "accuracy": [0.95, 0.96, 0.95]})
    assert better.words.startswith("2.0× faster a step, accuracy +5.00 points")


def test_speed_that_costs_accuracy_is_no_gain() -> None:
    verdict = of(SCENARIOS["dither"], **{**FAST, "accuracy": [0.8, 0.81, 0.8]})
    assert not verdict.gains
    assert "but less accurate by −10.00 points" in verdict.words


@pytest.mark.parametrize(
    ("executed", "reason"),
    [(0.6, "it runs 60 % of the FLOPs, but its own work"), (1.3, "it runs 130 % of plain’s FLOPs")],
)
def test_a_loser_gets_its_reason(executed: float, reason: str) -> None:
    verdict = of(SCENARIOS["deepfocus"], backward_seconds=[0.9, 0.91, 0.9], executed=[executed] * 3)
    assert not verdict.gains
    assert verdict.words.startswith("no gain here: ×1.50 ± 0.01 of plain’s")
    assert reason in verdict.words


def test_noise_decides_nothing() -> None:
    verdict = of(SCENARIOS["dither"], late_step_seconds=[0.5, 1.3, 0.8])
    assert not verdict.gains
    assert verdict.words.startswith("not decided: ×0.86")


def test_the_way_to_an_accuracy() -> None:
    scenario = SCENARIOS["decorrelate"]
    never = of(scenario, seconds_to_target=[1.0, None, 1.0])
    assert never.words == "no gain here: it did not get to plain’s best accuracy in every seed"
    targets = {"seconds_to_target": [2.0, 2.0, 2.1], "steps_to_target": [20.0, 20.0, 20.0]}
    it = {
        "seconds_to_target": [3.0, 3.0, 3.1],
        "steps_to_target": [10.0, 10.0, 10.0],
        "step_seconds": [3.0] * 3,
    }
    figures = {"plain": {**PLAIN, **targets}, "it": {**PLAIN, **it}}
    (verdict,) = judge(scenario, complete(made_up(figures), []))
    assert "it takes ×0.50 of the steps, but each takes ×2.98" in verdict.words


def test_accuracy_at_equal_parameters_and_over_the_same_network_alone() -> None:
    scenario = SCENARIOS["perforate"]
    result = measured(narrow={"accuracy": [0.6, 0.61, 0.6]}, it={"accuracy": [0.7, 0.71, 0.7]})
    (verdict,) = judge(scenario, result)
    assert not verdict.gains
    assert "less accurate at equal parameters by −20.00 points" in verdict.words
    assert "+10.00 points over narrow alone" in verdict.words
    (other,) = judge(replace(scenario, without=None), measured(it={"accuracy": [0.95, 0.97, 0.95]}))
    assert other.gains
    assert other.words.startswith("more accurate at equal parameters by +5.33 ± 1.43 points")


def test_one_seed_has_no_interval() -> None:
    plain = {name: values[:1] for name, values in PLAIN.items()}
    result = complete(made_up({"plain": plain, "it": {**plain, "late_step_seconds": [0.5]}}), [])
    (verdict,) = judge(SCENARIOS["dither"], result)
    assert verdict.words == "2.0× faster a step, accuracy 0.00 points with one seed"


def test_the_machine_gains_most_from_time_then_from_memory() -> None:
    fast, spectral = measured(it=FAST), measured(it={"mean_saved_bytes": [50.0, 50.0, 50.0]})
    deep = measured(it={"backward_seconds": [0.1] * 3, "step_seconds": [0.7, 0.71, 0.7]})
    shown = [
        (SCENARIOS["dither"], fast),
        (SCENARIOS["deepfocus"], deep),
        (SCENARIOS["spectral"], spectral),
    ]
    assert "a step takes ×0.50" in advice(shown)
    assert "a step takes ×0.70" in advice(shown[1:])
    assert advice(shown[2:]).startswith("No method saves time on this machine here")
    assert "×0.50 of plain’s bytes" in advice(shown[2:])
    assert "plain backpropagation is best" in advice([(SCENARIOS["dither"], measured(it={}))])


def test_equal_parameters_are_equal() -> None:
    """The wider network has at least as many parameters as the narrow one with all its dendrites, to a tenth."""
    import retrograde as rg
    from retrograde.lab import data, models

    claim = SCENARIOS["perforate"].claim
    digits = data.load("digits")

    def parameters(name: str) -> int:
        recipe = claim.recipe_of(name)
        model = models.build(recipe.model, digits, options=recipe.model_options)
        if recipe.methods:
            rg.attach(model, recipe.make_methods())
        return sum(p.numel() for p in model.parameters())

    assert parameters("perforate") > parameters("narrow")
    assert 1 <= parameters("plain") / parameters("perforate") < 1.1

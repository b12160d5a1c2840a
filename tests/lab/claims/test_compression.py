"""How small a network may be: what is tried, and what is made of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_claims import made_up

import retrograde as rg
from retrograde.engine.layers import AttachedLayer
from retrograde.errors import OptionError
from retrograde.lab import models
from retrograde.lab.claims.compression import Compression, Ladder, compress, judge, ladder
from retrograde.lab.claims.verdict import complete
from retrograde.lab.data import first_batch
from retrograde.lab.measure import evaluate
from retrograde.lab.peers.structure import Shape
from retrograde.lab.recipe import make_recipe

pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")

RECIPE: dict[str, Any] = {
    "model": "mlp",
    "model_options": {"widths": (96, 96)},
    "data": "digits",
    "epochs": 1,
    "limit": 128,
}


def judged(figures: dict[str, tuple[float, list[float]]], tolerance: float = 0.01) -> Compression:
    made = {
        name: {
            "accuracy": list(accuracy),
            "parameters": [parameters] * len(accuracy),
            "macs": [1.0] * len(accuracy),
            "forward_seconds_128": [0.1] * len(accuracy),
        }
        for name, (parameters, accuracy) in figures.items()
    }
    return judge(complete(made_up(made), []), tolerance, Path("ladder"))  # pyright: ignore[reportArgumentType]


def test_all_others_have_no_more_parameters_than_the_one_with_dendrites() -> None:
    recipe = make_recipe(RECIPE, "test")
    data = recipe.load_data()
    claim = ladder(recipe, data, Ladder((0.25,), {"max_dendrites": 2}, seeds=2, trials=0))
    assert list(claim.contestants) == [
        "plain",
        "0.25",
        "0.25+dendrites",
        "0.25=width",
        "0.25=depth",
        "0.25=norm",
    ]
    whole, x = (
        models.build("mlp", data, seed=0, options=RECIPE["model_options"]),
        first_batch(data.train, 2)[0],
    )

    def parameters(name: str) -> int:
        one = claim.contestants[name]
        model = Shape(**one.peers["shape"]).shaped(whole, x)
        if one.methods:
            rg.attach(model, rg.Perforate(**one.methods["perforate"]))
        return sum(p.numel() for p in model.parameters())

    budget = parameters("0.25+dendrites")
    assert parameters("0.25") < budget
    for name in ("0.25=width", "0.25=depth", "0.25=norm"):
        assert 0.9 * budget < parameters(name) <= budget


def test_where_no_layer_gets_dendrites_that_is_said() -> None:
    recipe = make_recipe(RECIPE, "test")
    claim = ladder(recipe, recipe.load_data(), Ladder((0.5,), {"where": "no.such.layer"}, seeds=1, trials=0))
    assert "0.5+dendrites" not in claim.contestants
    assert "no layer of the network of width 0.5 gets dendrites" in claim.note


@pytest.mark.parametrize(
    "fields", [{"widths": ()}, {"widths": (1.0,)}, {"widths": (0.5, -1.0)}, {"seeds": 0}, {"trials": -1}]
)
def test_a_ladder_that_cannot_be_tried_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Ladder(**fields)


WHOLE = (1000.0, [0.90, 0.91, 0.92])


def test_the_smallest_that_keeps_the_accuracy_is_recommended() -> None:
    found = judged(
        {
            "plain": WHOLE,
            "0.5": (500.0, [0.895, 0.905, 0.916]),
            "0.1": (100.0, [0.80, 0.81, 0.82]),
            "0.1=norm": (90.0, [0.80, 1.0, 0.95]),
        }
    )
    assert found.recommended == "0.5", "0.1=norm is as good in the mean, and its interval says nothing"
    assert "500 parameters, 50.0 % of the whole network" in found.why
    assert [step.name for step in found.steps] == ["plain", "0.5", "0.1", "0.1=norm"]
    assert found.steps[0].lost is None


def test_where_nothing_keeps_it_the_whole_network_stays() -> None:
    found = judged({"plain": WHOLE, "0.5": (500.0, [0.80, 0.81, 0.82])})
    assert found.recommended == "plain"
    assert "no smaller network keeps its accuracy" in found.why


def test_what_dendrites_earned_is_said_against_the_narrow_network_and_the_best_of_as_many_parameters() -> (
    None
):
    found = judged(
        {
            "plain": WHOLE,
            "0.5": (500.0, [0.80, 0.81, 0.82]),
            "0.5+dendrites": (700.0, [0.85, 0.86, 0.87]),
            "0.5=width": (700.0, [0.84, 0.85, 0.86]),
            "0.5=norm": (700.0, [0.87, 0.88, 0.89]),
        }
    )
    assert found.dendrites == (
        "at width 0.5 dendrites change accuracy by +5.00 points, and by −2.00 points against 0.5=norm"
    )


def test_it_runs_and_resumes(tmp_path: Path) -> None:
    fields = {key: value for key, value in RECIPE.items() if key not in ("model", "data")}
    settings: dict[str, Any] = {"widths": (0.25,), "seeds": 1, "trials": 0, "folder": tmp_path, **fields}
    found = rg.compress("mlp", "digits", **settings)
    assert {step.name for step in found.steps} >= {"plain", "0.25", "0.25+dendrites", "0.25=width"}
    assert all(step.parameters > 0 and step.macs > 0 and step.seconds > 0 for step in found.steps)
    grown = found.step("0.25+dendrites")
    assert found.step("0.25").parameters < grown.parameters
    assert found.step("0.25=width").parameters <= grown.parameters
    assert compress("mlp", "digits", **settings) == found, "what has run is not run again"
    test = make_recipe(RECIPE, "test").load_data().test
    for step in found.steps:
        model = rg.load_run(step.run)
        assert sum(p.numel() for p in model.parameters()) == step.parameters
        figures = evaluate(model, test, torch.device("cpu"), "float32")
        assert figures["accuracy"] == pytest.approx(step.accuracy.mean)
        assert not model.training
        assert not any(isinstance(module, AttachedLayer) for module in model.modules())

"""Comparisons on a user's own model: who contends, what is searched, what is refused."""

import pytest

import retrograde as rg
from retrograde.errors import OptionError
from retrograde.lab.claims.adhoc import comparison
from retrograde.lab.claims.definition import Range
from retrograde.lab.recipe import Recipe

RECIPE = Recipe(learning_rate=0.01, methods={"spectral": {}}, seed=7, epochs=2)


def test_plain_comes_first_and_the_recipe_is_shared() -> None:
    claim = comparison(
        RECIPE,
        [{"dither": {"scale": 2.0}}, {"dither": {}, "decorrelate": {}}],
        [{"sam": {}}],
        seeds=3,
        trials=4,
    )
    assert list(claim.contestants) == ["plain", "dither", "dither+decorrelate", "sam"]
    assert claim.baseline == claim.target == "plain"
    plain = claim.recipe_of("plain")
    assert (plain.methods, plain.seed, plain.epochs, plain.decline) == ({}, 0, 2, True)
    assert claim.recipe_of("dither").methods == {"dither": {"scale": 2.0}}
    assert claim.recipe_of("sam").peers == {"sam": {}}


def test_learning_rates_are_searched_around_the_recipes() -> None:
    tuning = comparison(RECIPE, [{"dither": {}}], [], seeds=1, trials=4).tuning
    assert tuning is not None
    space = tuning.space["learning_rate"]
    assert isinstance(space, Range)
    assert (space.low, space.high, space.log) == (pytest.approx(0.001), pytest.approx(0.1), True)
    fixed = comparison(RECIPE, [{"dither": {}}], [], seeds=1, trials=0)
    assert fixed.tuning is None
    assert "not searched" in fixed.note


def test_parameters_are_shown_where_a_method_may_add_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the method itself says."""

    def shown(name: str) -> bool:
        return "parameters" in comparison(RECIPE, [{name: {}}], [], seeds=1, trials=0).table

    assert (shown("perforate"), shown("dither")) == (True, False)
    monkeypatch.setattr(rg.Dither, "adds_parameters", True)
    assert shown("dither")


@pytest.mark.parametrize(
    ("methods", "seeds", "trials", "says"),
    [
        ([], 1, 0, "nothing to compare"),
        ([{"dither": {}}, {"dither": {"scale": 1.0}}], 1, 0, "is named twice"),
        ([{"dither": {}}], 0, 0, "seeds=0"),
        ([{"dither": {}}], 1, -1, "trials=-1"),
    ],
)
def test_refused(methods: list[dict[str, dict[str, object]]], seeds: int, trials: int, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        comparison(RECIPE, methods, [], seeds=seeds, trials=trials)

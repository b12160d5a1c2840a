"""Comparisons on a user's own model and data, as claims without a source: the same search, seeds and turns."""

from collections.abc import Iterable, Sequence
from typing import Any

from retrograde.errors import OptionError
from retrograde.lab.claims.definition import Claim, Range, Tuning, Variant
from retrograde.lab.recipe import Recipe
from retrograde.methods.registry import available

BASELINE = "plain"

_AROUND = 10.0
"""Learning rates are searched from a tenth of the recipe's to ten times it."""

_TABLE = ["accuracy", "seconds_to_target", "step_seconds", "zeros", "executed", "saved_bytes", "parameters"]


def comparison(
    recipe: Recipe,
    methods: Sequence[dict[str, dict[str, Any]]],
    peers: Sequence[dict[str, dict[str, Any]]],
    *,
    seeds: int,
    trials: int,
    steps: int | None = None,
) -> Claim:
    """Plain backpropagation first, then every set of methods, then every peer.

    Args:
        recipe: what all share; its own methods, peers and seed are left out.
        methods: variants, each as a recipe's `methods`.
        peers: variants, each as a recipe's `peers`.
        seeds: paired.
        trials: of the search for each variant's learning rate; 0 runs all at the recipe's.
        steps: of every run; None: by the recipe's epochs.

    Raises:
        OptionError: nothing to compare, two of one name, or no seeds.
    """
    if seeds < 1 or trials < 0:
        raise OptionError(f"seeds={seeds} must be 1 or more, and trials={trials} must be 0 or more.")
    if not methods and not peers:
        raise OptionError("nothing to compare: pass --methods or --peers.")
    contestants = {BASELINE: Variant(label="plain")}
    for one, kind in (*((m, "methods") for m in methods), *((p, "peers") for p in peers)):
        name = "+".join(one)
        if name in contestants:
            raise OptionError(f"{name} is named twice. Name each method and peer once.")
        contestants[name] = Variant.model_validate({kind: one, "label": name})
    fields = recipe.model_dump(mode="json", exclude={"methods", "peers", "seed"}, exclude_unset=True)
    fields["decline"] = recipe.decline
    rate = rate_around(recipe)
    fixed = f"all at the learning rate {recipe.learning_rate:g}, which was not searched for"
    return Claim(
        id=f"compare/{recipe.model.replace(':', '.')}",
        title=f"{recipe.model} on {recipe.data}",
        claim="",
        source="",
        note=f"{trials} trials for each variant's learning rate, on the validation split"
        if trials
        else fixed,
        recipe={**fields, "steps": steps} if steps else fields,
        seeds=seeds,
        tuning=Tuning(trials=trials, space={"learning_rate": rate}) if trials else None,
        target=BASELINE,
        table=[m for m in _TABLE if m != "parameters" or _grows(contestants.values())],
        contestants=contestants,
    )


def rate_around(recipe: Recipe) -> Range:
    """Where a learning rate is searched for, on a user's own model."""
    return Range(low=recipe.learning_rate / _AROUND, high=recipe.learning_rate * _AROUND)


def _grows(contestants: Iterable[Variant]) -> bool:
    """Whether a model may end with another number of parameters than it began with."""
    known = available()
    return any(known[name].adds_parameters for one in contestants for name in one.methods if name in known)

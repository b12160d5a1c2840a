"""How small a network may be: narrower ones, what dendrites give them, and the same parameters spent otherwise."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from torch import Tensor, nn

from retrograde.errors import NoEffectError, OptionError
from retrograde.lab import models
from retrograde.lab.claims.adhoc import BASELINE, rate_around
from retrograde.lab.claims.definition import Claim, Tuning, Variant
from retrograde.lab.claims.grid import RUNS, Grid, Places
from retrograde.lab.claims.result import Result
from retrograde.lab.claims.statistics import Estimate, estimate
from retrograde.lab.claims.wording import points
from retrograde.lab.data import Data, first_batch
from retrograde.lab.options import make
from retrograde.lab.peers.structure import Shape
from retrograde.lab.recipe import Recipe, make_recipe
from retrograde.session import attach
from retrograde.spectral.factorisation.factors import parameters_of

TABLE = ["accuracy", "parameters", "macs", "forward_seconds_128", "step_seconds"]
_LAYERS = {"only", "skip"}
"""Fields of a recipe that choose layers for methods."""
_HALVINGS = 12


@dataclass(frozen=True)
class Ladder:
    """What is tried.

    Attributes:
        widths: shares of the hidden channels, each in (0, 1).
        dendrites: options of `Perforate`.
        seeds: paired.
        trials: of the search for each variant's learning rate; 0 runs all at the recipe's.
    """

    widths: Sequence[float] = (0.5, 0.25)
    dendrites: dict[str, Any] | None = None
    seeds: int = 3
    trials: int = 4

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.trials < 0:
            raise OptionError(
                f"seeds={self.seeds} must be 1 or more, and trials={self.trials} must be 0 or more."
            )
        if not self.widths or not all(0 < width < 1 for width in self.widths):
            raise OptionError(f"widths={list(self.widths)} must be shares of the hidden channels, 0 to 1.")


class Step(BaseModel):
    """One network of the ladder.

    Attributes:
        name: of the variant.
        label: in words.
        parameters: of the trained, folded model.
        macs: multiply-adds of a forward pass, a row.
        seconds: of a forward pass of 128 rows, mean over seeds.
        accuracy: on the test set.
        lost: accuracy minus that of the whole network, seed by seed; None for that network.
        run: folder of its first seed's run: ``rg.load_run(step.run)`` is the trained network, of code of your own
            ``rg.load_run(step.run, model="module:callable")``.
    """

    name: str
    label: str
    parameters: int
    macs: float
    seconds: float
    accuracy: Estimate
    lost: Estimate | None
    run: str


class Compression(BaseModel):
    """What came of it.

    Attributes:
        steps: all networks, the largest first.
        recommended: name of the smallest that keeps the accuracy.
        why: in words.
        dendrites: what they earned, in words.
    """

    steps: list[Step]
    recommended: str
    why: str
    dendrites: str

    def step(self, name: str) -> Step:
        """By name."""
        return next(step for step in self.steps if step.name == name)


def ladder(recipe: Recipe, data: Data, ladder: Ladder) -> Claim:
    """The claim that trains everything: the whole network, then for each width five others.

    They are the narrow network alone; with dendrites; and a wider one, a deeper one and one with BatchNorm, none of
    which has more parameters than the one with dendrites.

    Args:
        recipe: what all share; its own methods, peers and seed are left out.
        data: the recipe's.
        ladder: what is tried.

    Raises:
        OptionError: the network cannot be made narrower.
    """
    whole = models.build(recipe.model, data, seed=0, options=recipe.model_options)
    x = first_batch(data.train, 2)[0]
    contestants = {BASELINE: Variant(label="whole network")}
    skipped: list[str] = []
    options = ladder.dendrites or {}
    layers = recipe.model_dump(include=_LAYERS, exclude_none=True)
    for width in sorted(set(ladder.widths), reverse=True):
        shape = Shape(width=width)
        small, at = shape.shaped(whole, x), f"{width:g}"
        narrow = {"shape": {"width": width}}
        contestants[at] = Variant(label=f"width {at}", peers=narrow)
        budget = parameters_of(small)
        try:
            budget = _with_dendrites(small, options, recipe)
            contestants[f"{at}+dendrites"] = Variant(
                label=f"width {at}, dendrites", peers=narrow, methods={"perforate": options}, recipe=layers
            )
        except NoEffectError:
            skipped.append(
                f"no layer of the network of width {at} gets dendrites by Perforate's placement rule"
            )
        if budget >= parameters_of(whole):
            skipped.append(
                f"with dendrites the network of width {at} has {budget:,} parameters, more than the whole network: "
                "take a smaller width or fewer dendrites"
            )
        elif budget > parameters_of(small):
            contestants[f"{at}=width"] = _equal(whole, x, budget, {}, f"wider, as many parameters as {at}")
        for kind, changes in (("depth", {"deeper": 1}), ("norm", {"normalise": True})):
            words = "a layer deeper" if kind == "depth" else "BatchNorm"
            try:
                contestants[f"{at}={kind}"] = _equal(
                    whole, x, budget, changes, f"{words}, as many parameters as {at}"
                )
            except OptionError as error:
                skipped.append(str(error))
    left_out = {"methods", "peers", "seed", *_LAYERS}
    fields = recipe.model_dump(mode="json", exclude=left_out, exclude_unset=True)
    return Claim(
        id=f"compress/{recipe.model.replace(':', '.')}",
        title=f"How small may {recipe.model} be on {recipe.data}",
        claim="",
        source="",
        note="; ".join(dict.fromkeys(skipped)),
        recipe={**fields, "decline": False},
        seeds=ladder.seeds,
        tuning=Tuning(trials=ladder.trials, space={"learning_rate": rate_around(recipe)})
        if ladder.trials
        else None,
        measures=["macs", "forward_seconds_128"],
        table=TABLE,
        contestants=contestants,
    )


def judge(result: Result, tolerance: float, folder: Path) -> Compression:
    """The smallest network whose accuracy is within `tolerance` of the whole one's, as far as the seeds can tell.

    Args:
        result: of the claim of `ladder`.
        tolerance: of accuracy, a share: 0.005 is half a point. The lower end of the 95 % interval must keep to it, or
            the mean where there is one seed.
        folder: of the runs.
    """
    steps = [_step(result, name, folder) for name in result.contestants]
    steps.sort(key=lambda step: -step.parameters)
    whole = next(step for step in steps if step.name == BASELINE)

    def keeps(step: Step) -> bool:
        if step.lost is None:
            return True
        low = step.lost.mean if step.lost.low is None else step.lost.low
        return low >= -tolerance

    best = min((step for step in steps if keeps(step)), key=lambda step: step.parameters)
    if best.lost is None:
        why = f"no smaller network keeps its accuracy to {100 * tolerance:g} points, as far as these seeds can tell"
    else:
        share = 100 * best.parameters / whole.parameters
        why = (
            f"{best.label} has {best.parameters:,} parameters, {share:.1f} % of the whole network's, and its accuracy "
            f"differs by {points(best.lost)}"
        )
    if len(result.seeds) == 1:
        why += "; of one seed, which says nothing of how far that varies"
    return Compression(steps=steps, recommended=best.name, why=why, dendrites=_earned(result, steps))


def _earned(result: Result, steps: Sequence[Step]) -> str:
    """Dendrites against the narrow network alone, and against the best of as many parameters."""
    said: list[str] = []
    for step in steps:
        at, _, kind = step.name.partition("+")
        if kind != "dendrites":
            continue
        ours = result.figures(step.name, "accuracy")

        def minus(other: str, ours: Sequence[float | None] = ours) -> Estimate:
            pairs = zip(ours, result.figures(other, "accuracy"), strict=True)
            return estimate([a - b for a, b in pairs if a is not None and b is not None])

        rivals = [one for one in steps if one.name.startswith(f"{at}=")]
        text = f"at width {at} dendrites change accuracy by {points(minus(at))}"
        if rivals:
            best = max(rivals, key=lambda one: one.accuracy.mean)
            text += f", and by {points(minus(best.name))} against {best.label}"
        said.append(text)
    return "; ".join(said)


def _step(result: Result, name: str, folder: Path) -> Step:
    found = result.summaries[name]
    against = result.against_baseline.get(name, {}).get("accuracy")
    return Step(
        name=name,
        label=result.contestants[name].label,
        parameters=round(found["parameters"].mean),
        macs=found["macs"].mean,
        seconds=found["forward_seconds_128"].mean,
        accuracy=found["accuracy"],
        lost=against.minus if against else None,
        run=str(folder / RUNS / next(run.folder for run in result.runs if run.contestant == name)),
    )


def _equal(whole: nn.Module, x: Tensor, budget: int, changes: dict[str, Any], label: str) -> Variant:
    """The widest network with these changes and no more parameters than `budget`."""
    # Before the search, since within it a width that takes nothing away is refused as well.
    most = parameters_of(Shape(**changes).shaped(whole, x)) if changes else parameters_of(whole)
    if most <= budget:
        return Variant(label=label, peers={"shape": changes})
    fitting: float | None = None
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        try:
            count = parameters_of(Shape(width=middle, **changes).shaped(whole, x))
        except OptionError:
            count = most
        if count <= budget:
            low = fitting = middle
        else:
            high = middle
    if fitting is None:
        raise OptionError(f"{label}: no width of the network has {budget:,} parameters or fewer")
    return Variant(label=label, peers={"shape": {"width": fitting, **changes}})


def _with_dendrites(model: nn.Module, options: dict[str, Any], recipe: Recipe) -> int:
    """Parameters of the model with all its dendrites."""
    grown = copy.deepcopy(model)
    attach(grown, make("perforate", options), only=recipe.only, skip=recipe.skip)
    return parameters_of(grown)


def compress(
    model: str,
    data: str,
    *,
    widths: Sequence[float] = (0.5, 0.25),
    dendrites: dict[str, Any] | None = None,
    tolerance: float = 0.005,
    seeds: int = 3,
    trials: int = 4,
    jobs: int = 1,
    folder: str | Path | None = None,
    data_dir: str | Path | None = None,
    **recipe: Any,
) -> Compression:
    """Train narrower networks with and without dendrites, and others of as many parameters; say which is enough.

    Args:
        model: name of a model, or an importable ``module:callable``.
        data: a data set, as `retrograde train` takes it.
        widths: shares of the hidden channels that narrower networks keep.
        dendrites: options of `Perforate`.
        tolerance: share of accuracy that may be lost; 0.005 is half a point.
        seeds: paired.
        trials: of the search for each network's learning rate; 0 runs all at the recipe's.
        jobs: seeds at once; times can be trusted with 1 only.
        folder: of the runs; the same one resumes them. None: ``runs/compress/…``, by what is tried.
        data_dir: where data sets lie; None reads ``RETROGRADE_DATA``.
        recipe: other fields of a recipe (`retrograde.lab.recipe.Recipe`): ``epochs=20``.

    Raises:
        OptionError: a value is refused, or the network cannot be made narrower.
        MissingPackageError: `torch-pruning` is not installed.
    """
    made = make_recipe({**recipe, "model": model, "data": data}, "compress")
    where = None if data_dir is None else Path(data_dir)
    claim = ladder(made, made.load_data(where), Ladder(widths, dendrites, seeds, trials))
    place = Path(folder) if folder is not None else default_folder(claim)
    result = Grid(claim, Places(place, where, jobs)).run(command="rg.compress")
    return judge(result, tolerance, place)


def default_folder(claim: Claim) -> Path:
    """Where a ladder's runs go."""
    return Path("runs/compress") / claim.hash

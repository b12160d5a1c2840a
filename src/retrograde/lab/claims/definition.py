"""A claim's definition: a TOML file that says what is run, how every variant is tuned, and what decides."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from retrograde.errors import OptionError
from retrograde.lab.claims import metrics
from retrograde.lab.claims.result import targets_of
from retrograde.lab.experiments import Experiment, experiment
from retrograde.lab.recipe import Recipe, make_recipe, read_recipe, refuse_code
from retrograde.methods.registry import suggest


def _known(metric: str) -> str:
    if metric not in metrics.ALL:
        raise ValueError(
            f"there is no metric {metric!r}.{suggest(metric, metrics.ALL)} Metrics: {', '.join(metrics.ALL)}"
        )
    return metric


_M = TypeVar("_M", bound=BaseModel)

MetricName = Annotated[str, AfterValidator(_known)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Range(_Table):
    """A searched interval of one recipe field; `log` draws its logarithm uniformly."""

    low: float
    high: float
    log: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low={self.low} must be below high={self.high}, and above 0 where log is true")
        return self

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


Space = Range | list[float] | list[int] | list[str] | list[bool]
"""A range, or the values to choose from."""


class Tuning(_Table):
    """The search that every variant gets: as many trials each, on the validation split, by one seed.

    Attributes:
        trials: of each variant; the first is at the recipe's own values.
        space: recipe field, dotted where it lies deeper (``methods.dither.scale``), → what is searched.
        recipe: recipe fields of a trial that differ from the claim's: a shorter run.
        seed: of the trials; apart from those of the claim.
    """

    trials: int = Field(ge=1)
    space: dict[str, Space] = Field(min_length=1)
    recipe: dict[str, Any] = Field(default_factory=dict)
    seed: int = 1000


Measure = Literal["sharpness", "auc", "step_peak_bytes", "macs", "forward_seconds_128"]
"""λ_max of the Hessian, area under the ROC curve, the most that tensors take at once in a step; of the folded model
multiply-adds of a row, and seconds of a forward pass of 128."""


class Variant(_Table):
    """What is run beside the others.

    Attributes:
        label: in tables; empty: the methods and peers in words.
        methods: as in a recipe.
        peers: as in a recipe.
        recipe: other recipe fields of this variant's.
        space: searched for this one beside the common space.
        source: the source's figures of this variant, by metric.
    """

    label: str = ""
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    peers: dict[str, dict[str, Any]] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, Space] = Field(default_factory=dict)
    source: dict[str, float] = Field(default_factory=dict)


class Check(_Table):
    """One thing that must hold of the figures; all of them together are the verdict.

    Attributes:
        says: the check in words.
        of: variant.
        metric: see `retrograde.lab.claims.metrics`.
        minus: variant whose figure is taken off, seed by seed.
        over: variant by whose figure is divided, seed by seed.
        at_least: the figure must be this or more.
        at_most: this or less.
        by: what is held against the bound: the mean, or the far end of its 95 % interval; by default the interval of
            what is paired, and the mean of what stands alone.
        exceeds: beyond this, the source's figure is not only met but exceeded.
    """

    says: str
    of: str
    metric: MetricName
    minus: str | None = None
    over: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    by: Literal["mean", "interval"] | None = None
    exceeds: float | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> "Check":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give one of at_least and at_most")
        if self.minus is not None and self.over is not None:
            raise ValueError("give minus or over, not both")
        return self


class Claim(_Table):
    """A claim, whole.

    Attributes:
        id: ``method/name``, the file's place below ``repro``.
        title: of its section in documents.
        claim: what the source says, in a sentence, with its figure.
        source: where it says so.
        pending: why it cannot be run yet; then nothing else is needed.
        experiment: what is run in place of training; recipes are then its settings (`retrograde.lab.experiments`).
        note: what a reader of the result must know: how this differs from the source.
        recipe: what all variants share; the seed is replaced. No layer is declined unless it says so: a claim is of
            the method wherever it is attached, not of the forecast.
        seeds: paired seeds, from 0.
        tuning: None: all run at the recipe's own values, and the note says why.
        equal: what variants have the same of: ``steps`` as the recipe gives them, or ``seconds``: each one's steps
            are what fits into the time that the first variant takes.
        target: variant, or several, whose best validation accuracy, the better one seed by seed, is what the others'
            time is taken to, for ``seconds_to_target``.
        budgets: shares of the recipe's epochs that every variant is trained for besides, each with a schedule of its
            own. The time to the target is then that of the shortest run whose *end* reaches the end of the target's
            whole run: along one run that decays at its end, nothing is reached before that.
        measures: figures taken of the trained model beside those of training.
        contestants: by name; the first one is the baseline.
        checks: what decides.
        table: metrics of its table, in order.
        quick: fields of this table laid over it for a run within two minutes.
    """

    id: str
    title: str
    claim: str
    source: str
    pending: str | None = None
    experiment: str | None = None
    note: str = ""
    recipe: dict[str, Any] = Field(default_factory=dict)
    seeds: int = Field(default=5, ge=1)
    tuning: Tuning | None = None
    equal: Literal["steps", "seconds"] = "steps"
    target: str | list[str] | None = None
    budgets: list[float] = Field(default_factory=list)
    measures: list[Measure] = Field(default_factory=list)
    contestants: dict[str, Variant] = Field(default_factory=dict)
    checks: list[Check] = Field(default_factory=list)
    table: list[MetricName] = Field(default=["accuracy", "zeros", "needed", "executed", "seconds"])
    quick: dict[str, Any] = Field(default_factory=dict)

    @property
    def method(self) -> str:
        """The first part of the id."""
        return self.id.partition("/")[0]

    @property
    def baseline(self) -> str:
        """The first variant."""
        return next(iter(self.contestants))

    @property
    def hash(self) -> str:
        """Of the whole definition: a result belongs to one."""
        # The order of variants says which one is the baseline, and a hash sorts by name.
        unset = {name for name in ("experiment", "budgets") if not getattr(self, name)}
        content = self.model_dump(mode="json", exclude=unset)
        return content_hash([content, list(self.contestants)])

    @model_validator(mode="after")
    def _named(self) -> "Claim":
        if self.pending is None and not self.contestants:
            raise ValueError("`contestants` are missing, and `pending` does not say why")
        named = [
            *targets_of(self.target),
            *(name for check in self.checks for name in (check.of, check.minus, check.over)),
        ]
        for name in named:
            if name is not None and name not in self.contestants:
                raise ValueError(f"there is no variant {name!r}.{suggest(name, self.contestants)}")
        if self.experiment is not None:
            training = [name for name, one in self.contestants.items() if one.methods or one.peers]
            if training or self.equal != "steps" or self.target or self.measures or self.budgets:
                raise ValueError(
                    "an experiment has neither methods, peers, measures, a target, budgets nor an equal time"
                )
        if self.target is None and any(check.metric in metrics.TO_TARGET for check in self.checks):
            raise ValueError("a check of the time to a target needs `target`")
        self._require_budgets()
        return self

    def _require_budgets(self) -> None:
        if not self.budgets:
            return
        if self.target is None or self.equal != "steps":
            raise ValueError("`budgets` need a `target`, and variants of equal steps")
        for name, one in self.contestants.items():
            fields = {**self.recipe, **one.recipe}
            unit = "steps" if "steps" in fields else "epochs"
            for budget in self.budgets:
                epochs = fields.get("epochs", 0) * budget
                if not 0 < budget < 1 or unit == "steps" or epochs < 1 or epochs % 1:
                    raise ValueError(
                        f"budgets={self.budgets} must lie between 0 and 1 and give whole epochs, and {name!r} trains "
                        f"for {fields.get(unit)} {unit}"
                    )

    def recipe_of(self, name: str, changes: dict[str, Any] | None = None) -> Recipe | Experiment:
        """The recipe of a variant, or its settings of the experiment.

        Args:
            name: of the variant.
            changes: dotted recipe fields laid over it: tuned values, a seed.

        Raises:
            OptionError: a field that a recipe does not have, or a refused value.
        """
        one = self.contestants[name]
        fields = _merged(self.recipe, one.recipe)
        if self.experiment is None:
            fields = {"decline": False, **fields, "methods": one.methods, "peers": one.peers}
        for key, value in (changes or {}).items():
            fields = _merged(fields, _nested(key, value))
        where = f"{self.id}, variant {name!r}"
        # They come from files, of searches and of results.
        refuse_code(changes or {}, where)
        if self.experiment is not None:
            return _validated(experiment(self.experiment), fields, where, self.experiment)
        try:
            return make_recipe(fields, where)
        except OptionError as error:
            # What methods and peers refuse does not say of whom.
            raise error if str(error).startswith(where) else OptionError(f"{where}: {error}") from error

    def shortened(self) -> "Claim":
        """The quick form.

        Raises:
            OptionError: there is none, or it is refused.
        """
        if not self.quick:
            raise OptionError(
                f"{self.id} has no quick form: its definition has no table `quick`. Run it in full."
            )
        content = _merged(self.model_dump(mode="json", exclude={"quick"}), self.quick)
        return _checked(content, f"{self.id}, quick")


def content_hash(content: Any) -> str:
    """A short hash of plain values, the same for the same content."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_claim(path: Path, root: Path) -> Claim:
    """The claim of a file below `root`.

    Raises:
        OptionError: the file is missing, no TOML, no definition, or names code.
    """
    content = read_recipe(path, "the definition")
    identity = path.relative_to(root).with_suffix("").as_posix()
    claim = _checked({"id": identity, **content}, str(path))
    for name, one in claim.contestants.items():
        claim.recipe_of(name)
        common = claim.tuning.space if claim.tuning else {}
        for key, space in {**common, **one.space}.items():
            claim.recipe_of(name, {key: space.low if isinstance(space, Range) else space[0]})
    return claim


def _checked(content: dict[str, Any], where: str) -> Claim:
    return _validated(Claim, content, where, "the definition")


def _validated(kind: type[_M], content: dict[str, Any], where: str, whole: str) -> _M:
    """`content` as a model; what pydantic refuses is told of its place, or of the `whole`."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise OptionError(f"{where}: {place or whole} is refused: {first['msg']}.") from error


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, tables inside each other."""
    found = dict(below)
    for key, value in above.items():
        old = found.get(key)
        found[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return found


def _nested(key: str, value: Any) -> dict[str, Any]:
    head, dot, rest = key.partition(".")
    return {head: _nested(rest, value) if dot else value}

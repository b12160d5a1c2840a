"""``retrograde compare`` and ``retrograde advise``: methods and peers on a user's own model and data."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import tyro
from rich.markup import escape

from retrograde.cli import output
from retrograde.cli.flags import TaskFlags
from retrograde.cli.options import ALL_METHODS, Given
from retrograde.cli.repro import present, shown
from retrograde.cli.signals import stop_request
from retrograde.errors import OptionError
from retrograde.lab import data as lab_data
from retrograde.lab import peers
from retrograde.lab.claims.adhoc import BASELINE, comparison
from retrograde.lab.claims.advice import Advice, advise
from retrograde.lab.claims.definition import Claim
from retrograde.lab.claims.grid import Grid, Places
from retrograde.lab.claims.result import Result, write_result
from retrograde.lab.claims.wording import points, times
from retrograde.lab.files import writing
from retrograde.lab.options import make
from retrograde.lab.recipe import Recipe, make_recipe
from retrograde.methods.registry import available
from retrograde.report import write_claims

_READINGS = 10
"""Of the validation split in a short run: the time to an accuracy is known to a tenth of it."""

_Task = Annotated[Any, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Compare:
    """Plain backpropagation, methods and peers on your own model and data: a table, and a page with curves.

    Every contestant's learning rate is searched for with as many trials; then all train with the same seeds, in turns
    of an epoch. The same command goes on where it was interrupted.

    Attributes:
        model: a model's name, or any importable module:callable.
        data: digits, a folder of images or Parquet files, or a hub id.
        methods: methods to compare; A+B attaches both. all: every method by itself, with the options that each names
            for a short run. Their options are flags: --dither.scale 2.
        peers: rivals: adalora, asam, constant-dither, foof, galore, int8, lora, meprop, muon, psgd, sam, schedule-free,
            selective-backprop, shampoo, soap, vcas. Their options are flags too: --sam.rho 0.1.
        seeds: paired seeds.
        trials: of the search for each contestant's learning rate; 0: all run at the one given.
        jobs: seeds at once; times are honest with 1 alone.
        recipe: TOML recipe; flags given beside it win.
        output: the page to write.
        runs: folder for the runs; default: runs/compare/….
        data_dir: folder that holds data sets; default: the environment variable RETROGRADE_DATA.
        json: print the whole result as JSON.
    """

    model: Annotated[str, tyro.conf.Positional]
    data: Annotated[str, tyro.conf.Positional]
    fields: _Task = field(default_factory=TaskFlags)
    methods: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    seeds: int = 3
    trials: int = 4
    jobs: int = 1
    recipe: Path | None = None
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("compare.html")
    runs: Path | None = None
    data_dir: Path | None = None
    json: bool = False

    def run(self, given: Given) -> int:
        """Train, write the page, print the table."""
        recipe = _recipe(given, self.fields, self.model, self.data)
        claim = comparison(
            recipe,
            _methods(given, self.methods),
            _peers(given, self.peers),
            seeds=self.seeds,
            trials=self.trials,
        )
        folder = self.runs or Path("runs/compare") / claim.hash
        result = _run(claim, given, folder, self.data_dir, self.jobs)
        page = write_claims([result], self.output, f"Comparison: {claim.title}")
        present(result, None, as_json=self.json)
        if not self.json:
            output.print_line(f"report: {page}")
        return 0


@dataclass(frozen=True)
class Advise:
    """A few hundred steps of each method on your model, data and machine; recommends a recipe, and says why.

    All runs are whole trainings of that many steps by the recipe's own schedule, in turns, at the recipe's learning
    rate: `compare` searches for each one's own.

    Attributes:
        model: a model's name, or any importable module:callable.
        data: digits, a folder of images or Parquet files, or a hub id.
        methods: methods to try; default: all that short runs can judge.
        length: steps of each run.
        seeds: paired seeds.
        recipe: TOML recipe of the training that is planned; flags given beside it win.
        write: write the recommended recipe there, for `retrograde train --recipe`.
        output: the page to write.
        runs: folder for the runs; default: runs/advise/….
        data_dir: folder that holds data sets; default: the environment variable RETROGRADE_DATA.
        json: print JSON.
    """

    model: Annotated[str, tyro.conf.Positional]
    data: Annotated[str, tyro.conf.Positional]
    fields: _Task = field(default_factory=TaskFlags)
    methods: tuple[str, ...] = ()
    length: int = 300
    seeds: int = 3
    recipe: Path | None = None
    write: Path | None = None
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("advise.html")
    runs: Path | None = None
    data_dir: Path | None = None
    json: bool = False

    def run(self, given: Given) -> int:
        """Train a little, recommend."""
        if self.length < 20:
            raise OptionError(
                f"advise: length={self.length} is too short to judge by. Give 20 steps or more."
            )
        recipe = _recipe(given, self.fields, self.model, self.data)
        late = {name: method.whole_run for name, method in available().items() if method.whole_run}
        names = self.methods or [name for name in available() if name not in late]
        chosen = _methods(given, names)
        short = [_short(one, self.length) for one in chosen]
        probe = recipe.model_copy(update={"evaluations": self._readings(recipe)})
        claim = comparison(probe, short, [], seeds=self.seeds, trials=0, steps=self.length)
        folder = self.runs or Path("runs/advise") / claim.hash
        result = _run(claim, given, folder, self.data_dir, 1)
        advice = advise(result)
        page = write_claims(
            [result], self.output, f"Advice: {claim.title}", f"Recommended: {_recommendation(advice)}."
        )
        # With the warm-ups of a whole run.
        methods = next((one for one in chosen if "+".join(one) == advice.name), {})
        fields = {**recipe.model_dump(mode="json", exclude_unset=True), "methods": methods}
        if self.write is not None:
            with writing(self.write, UnicodeEncodeError):
                self.write.write_text(to_toml(fields), encoding="utf-8")
        left_out = {} if self.methods else late
        if self.json:
            output.print_json(
                {
                    **advice.to_dict(),
                    "recipe": fields,
                    "not_judged": left_out,
                    "report": str(page),
                    "runs": str(folder),
                }
            )
        else:
            _tell(advice, result, fields, left_out)
            output.print_line(f"report: {page}")
        return 0

    def _readings(self, recipe: Recipe) -> int:
        """Of each epoch, so that the whole run has about `_READINGS`."""
        train = recipe.load_data(self.data_dir).train
        in_epoch = lab_data.steps_in_epoch(train, recipe.batch_size)
        return max(1, round(_READINGS * in_epoch / self.length))


# The flags' class is made from the recipe; a checker cannot follow that, tyro can.
Compare.__annotations__["fields"] = Annotated[TaskFlags, tyro.conf.arg(name="")]
Advise.__annotations__["fields"] = Annotated[TaskFlags, tyro.conf.arg(name="")]


def _recipe(given: Given, flags: Any, model: str, data: str) -> Recipe:
    base = given.recipe.model_dump(include={"peers", "model_options"})
    return make_recipe({**base, **asdict(flags), "model": model, "data": data}, "flags")


def _methods(given: Given, names: Sequence[str]) -> list[dict[str, dict[str, Any]]]:
    found: list[dict[str, dict[str, Any]]] = []
    for entry in names:
        if entry == ALL_METHODS:
            known = available()
            short = {
                name: {**method.short_run, **given.recipe.methods.get(name, {})}
                for name, method in known.items()
            }
            found += [{name: _options(given, name, short, make)} for name in known]
        else:
            options = given.recipe.methods
            found.append({name: _options(given, name, options, make) for name in entry.split("+")})
    return found


def _peers(given: Given, names: Sequence[str]) -> list[dict[str, dict[str, Any]]]:
    return [{name: _options(given, name, given.recipe.peers, peers.make)} for name in names]


def _options(
    given: Given, name: str, recipe: dict[str, dict[str, Any]], make: Callable[[str, dict[str, Any]], object]
) -> dict[str, Any]:
    """What was asked for, in the types of its fields: flags are strings, and a recipe is written of them."""
    options = {**recipe.get(name, {}), **given.options.get(name, {})}
    made = make(name, options)
    return {option: getattr(made, option) for option in options}


def _run(claim: Claim, given: Given, folder: Path, data_dir: Path | None, jobs: int) -> Result:
    grid = Grid(claim, Places(folder, data_dir, jobs))
    with shown(claim.title) as show, stop_request() as stop:
        result = grid.run(command=given.line, show=show, stop=stop)
    write_result(result, folder / "result.json")
    return result


def _short(methods: dict[str, dict[str, Any]], steps: int) -> dict[str, dict[str, Any]]:
    """Warm-ups that fit into a short run, where nothing else was asked for: a tenth of it."""
    known = available()
    found: dict[str, dict[str, Any]] = {}
    for name, options in methods.items():
        warm = "warmup" in {f.name for f in dataclasses.fields(known[name])}  # pyright: ignore[reportArgumentType]
        found[name] = {"warmup": steps // 10, **options} if warm else options
    return found


def _tell(advice: Advice, result: Result, fields: dict[str, Any], left_out: dict[str, str]) -> None:
    steps = result.contestants[BASELINE].recipe["steps"]
    table = output.new_table(
        f"{result.title}: {len(result.seeds)} seed(s) of {steps} steps; mean and "
        "95 % interval over plain backpropagation with the same seeds"
    )
    for name in ("method", "a step", "to plain's accuracy", "accuracy", "activations", "FLOPs"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for one in advice.judged:
        reached = times(one.to_target) if one.to_target is not None else "not in every seed"
        table.add_row(
            escape(one.name),
            times(one.step),
            reached,
            points(one.accuracy),
            times(one.memory),
            times(one.flops),
        )
    output.print_table(table)
    for name, why in left_out.items():
        output.print_line(f"not judged: {name}: {why}")
    output.print_line("")
    output.print_line(f"Recommended: {_recommendation(advice)}.")
    if advice.name != BASELINE:
        output.print_line("")
        output.print_line(to_toml(fields))


def _recommendation(advice: Advice) -> str:
    name = "plain backpropagation" if advice.name == BASELINE else advice.name
    return f"{name}; {advice.why}"


def to_toml(fields: dict[str, Any]) -> str:
    """A recipe file."""
    return tomli_w.dumps({key: value for key, value in fields.items() if value not in (None, {}, [])})

"""``retrograde compare`` and ``retrograde advise``: methods and peers on a user's own model and data."""

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import tyro

from retrograde.cli import output
from retrograde.cli.flags import (
    DataFolder,
    DataSet,
    Methods,
    Model,
    Names,
    RecipeFile,
    Switch,
    TaskFields,
    said,
)
from retrograde.cli.options import ALL_METHODS, Given, split
from retrograde.cli.repro import present, run_grid
from retrograde.cli.signals import stop_request
from retrograde.errors import OptionError
from retrograde.lab import data as lab_data
from retrograde.lab import peers
from retrograde.lab.claims.adhoc import BASELINE, comparison
from retrograde.lab.claims.advice import Advice, advise
from retrograde.lab.claims.cells import seconds_of_seed
from retrograde.lab.claims.definition import Claim
from retrograde.lab.claims.grid import Places
from retrograde.lab.claims.result import Result, write_result
from retrograde.lab.claims.wording import points, times
from retrograde.lab.files import read_json, write_json, writing
from retrograde.lab.options import NONE
from retrograde.lab.recipe import Recipe
from retrograde.methods.registry import available
from retrograde.report import write_claims
from retrograde.report.table import Table, make_table

_READINGS = 10
"""Of the validation split in a short run: the time to an accuracy is known to a tenth of it."""

_LEAST_STEPS = 100
"""Of a run that is shortened; then there are fewer seeds."""

_PEERS = ", ".join(sorted({entry.name for entry in entry_points(group=peers.GROUP)}))


@dataclass(frozen=True)
class OnYourModel:
    """What commands on a user's own model take.

    Attributes:
        model: A model's name, or any importable module:callable.
        data: Digits, a folder of images or of Parquet files, a data set in the data folder, or a hub id.
        seeds: Number of paired seeds.
        recipe: TOML recipe of the training. Command-line flags override it.
        data_dir: Folder that holds data sets.
        json: Print the whole result as JSON.
    """

    model: Model
    data: DataSet
    fields: TaskFields
    seeds: int = 3
    recipe: RecipeFile = None
    data_dir: DataFolder = None
    json: Switch = False

    def build(self, given: Given) -> Recipe:
        """What all variants share."""
        fields = {**dataclasses.asdict(self.fields), "model": self.model, "data": self.data}
        return given.over_recipe(fields, self.data_dir)

    def train(self, claim: Claim, given: Given, folder: Path, jobs: int = 1) -> Result:
        """All runs of the comparison, whose result stays beside them."""
        result = run_grid(claim, Places(folder, self.data_dir, jobs), given.line)
        write_result(result, folder / "result.json")
        return result


@dataclass(frozen=True)
class Compare(OnYourModel):
    """Compare methods and peers with plain backpropagation on your model and data: a table, and a page with curves.

    Every variant's learning rate is searched for with as many trials; then all variants train with the same seeds,
    taking turns after each epoch. Re-running the same command resumes it.

    Attributes:
        method: Methods to compare; A+B attaches both, and all stands for every method by itself, with the options that
            it suggests for a short run. Their options are flags, which --help lists beside them.
        trials: Trials of the search for each variant's learning rate. With 0 all run at the learning rate given.
        jobs: Seeds trained at once. Times can be trusted with 1 only.
        output: Page to write.
        runs: Folder for the runs.
    """

    method: Methods = ()
    peers: Annotated[
        Names, tyro.conf.arg(metavar="NAME ...", help=f"Published rivals to compare with: {_PEERS}.")
    ] = ()
    trials: int = 4
    jobs: int = 1
    output: Annotated[Path, said("compare.html", "PATH", "-o")] = Path("compare.html")
    runs: Annotated[Path | None, said("runs/compare/…, by what is compared", "PATH")] = None

    def run(self, given: Given) -> int:
        """Train, write the page, print the table."""
        claim = comparison(
            self.build(given),
            _methods(given, self.method),
            [{name: given.with_options(name, given.recipe.peers)} for name in self.peers],
            seeds=self.seeds,
            trials=self.trials,
        )
        folder = self.runs or Path("runs/compare") / claim.hash
        result = self.train(claim, given, folder, self.jobs)
        page = write_claims([result], self.output, f"Comparison: {claim.title}")
        present(result, f"report: {page}", as_json=self.json)
        return 0


@dataclass(frozen=True)
class Advise(OnYourModel):
    """Train a few hundred steps by each method on your model, data and machine; recommend a recipe, and say why.

    Every run is a whole training of that many steps with the recipe's own schedule and learning rate; `compare`
    searches for each variant's learning rate. Re-running the same command resumes it.

    Attributes:
        method: Methods to try; A+B attaches both. Their options are flags, which --help lists beside them.
        length: Steps of each run.
        seconds: What all of it may take, about: where a few tried steps promise more, runs get fewer steps, and then
            fewer seeds. It says so beforehand.
        write: Where to write the recommended recipe, for `retrograde train --recipe`.
        output: Page to write.
        runs: Folder for the runs.
    """

    method: Annotated[Methods, said("all that short runs can judge")] = ()
    length: int = 300
    seconds: float = 600.0
    write: Annotated[Path | None, said("none: nothing is written", "PATH")] = None
    output: Annotated[Path, said("advise.html", "PATH", "-o")] = Path("advise.html")
    runs: Annotated[Path | None, said("runs/advise/…, by what is tried", "PATH")] = None

    def run(self, given: Given) -> int:
        """Train a little, recommend."""
        if self.length < 20:
            raise OptionError(
                f"advise: length={self.length} is too short to judge by. Give 20 steps or more."
            )
        if not self.seconds > 0:
            raise OptionError(f"advise: seconds={self.seconds} must be above 0.")
        recipe = self.build(given)
        late = {name: method.whole_run for name, method in available().items() if method.whole_run}
        names = self.method or [name for name in available() if name not in late]
        chosen = _methods(given, names)
        claim = self._claim(recipe, chosen, self.length, self.seeds)
        folder = self.runs or Path("runs/advise") / claim.hash
        length, seeds = self._within(claim, folder)
        claim = self._claim(recipe, chosen, length, seeds)
        shortened = ""
        if (length, seeds) != (self.length, self.seeds):
            shortened = (
                f"Shortened to stay near {_duration(self.seconds)}: {length} of {self.length} steps, {seeds} of "
                f"{self.seeds} seeds. Give more --seconds for surer advice."
            )
            output.log.print(shortened, highlight=False)
        result = self.train(claim, given, folder)
        advice = advise(result)
        name = "plain backpropagation" if advice.recommended == BASELINE else advice.recommended
        lead = f"Recommended: {name}; {advice.why}. {shortened}".rstrip()
        page = write_claims([result], self.output, f"Advice: {claim.title}", lead)
        # With the warm-ups of a whole run.
        methods = next((one for one in chosen if "+".join(one) == advice.recommended), {})
        fields = {**recipe.model_dump(mode="json", exclude_unset=True), "methods": methods}
        next_command = ""
        if self.write is not None:
            with writing(self.write, UnicodeEncodeError):
                self.write.write_text(to_toml(fields), encoding="utf-8")
            # A file alone must not name code.
            command = ["retrograde", "train", "--recipe", str(self.write)]
            command += ["--model", self.model] if ":" in self.model else []
            command += ["--data-dir", str(self.data_dir)] if self.data_dir else []
            next_command = shlex.join(command)
        left_out = {} if self.method else late
        recipe_lines = ["", to_toml(fields)] if advice.recommended != BASELINE else []
        output.tell(
            {
                **advice.model_dump(),
                "recipe": fields,
                "not_judged": left_out,
                "shortened": shortened,
                "train": next_command,
                "report": str(page),
                "runs": str(folder),
            },
            _table(advice, result),
            *(f"not judged: {name}: {why}" for name, why in left_out.items()),
            "",
            lead,
            *recipe_lines,
            *([f"train it: {next_command}"] if next_command else []),
            f"report: {page}",
            as_json=self.json,
        )
        return 0

    def _claim(
        self, recipe: Recipe, chosen: Sequence[dict[str, dict[str, Any]]], length: int, seeds: int
    ) -> Claim:
        """Runs of so many steps, each of which reads the validation split about `_READINGS` times."""
        train = recipe.load_data(self.data_dir).train
        in_epoch = lab_data.steps_in_epoch(train, recipe.batch_size)
        readings = max(1, round(_READINGS * in_epoch / length))
        probe = recipe.model_copy(update={"evaluations": readings})
        short = [_short(one, length) for one in chosen]
        return comparison(probe, short, [], seeds=seeds, trials=0, steps=length)

    def _within(self, claim: Claim, folder: Path) -> tuple[int, int]:
        """Steps and seeds that fit into the time, by a few tried steps, which the folder remembers."""
        path = folder / "seconds.json"
        if not path.is_file():
            with output.progress(claim.title, counted=False) as show, stop_request() as stop:
                show("a few steps of each variant, to see how long it takes")
                expected = seconds_of_seed(claim, folder / "tried", self.data_dir, stop)
            write_json(path, {"seed": expected})
        expected: float = read_json(path)["seed"]
        whole = self.seeds * expected
        output.log.print(
            f"{self.seeds} seed(s) of {self.length} steps by {len(claim.contestants)} variants should take about "
            f"{_duration(whole)}",
            highlight=False,
        )
        length = min(self.length, max(_LEAST_STEPS, int(self.length * self.seconds / whole)))
        fitting = int(self.seconds / (expected * length / self.length))
        return length, min(self.seeds, max(1, fitting))


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _methods(given: Given, names: Sequence[str]) -> list[dict[str, dict[str, Any]]]:
    found: list[dict[str, dict[str, Any]]] = []
    for entry in names:
        if entry == ALL_METHODS:
            short = {
                name: {**method.short_run, **given.recipe.methods.get(name, {})}
                for name, method in available().items()
            }
            found += [{name: given.with_options(name, short)} for name in short]
        else:
            found.append({name: given.with_options(name, given.recipe.methods) for name in split([entry])})
    return found


def _short(methods: dict[str, dict[str, Any]], steps: int) -> dict[str, dict[str, Any]]:
    """Warm-ups that fit into a short run, where nothing else was asked for: a tenth of it."""
    known = available()
    return {
        name: {"warmup": steps // 10, **options} if hasattr(known[name], "warmup") else options
        for name, options in methods.items()
    }


def _table(advice: Advice, result: Result) -> Table:
    steps = result.contestants[BASELINE].recipe["steps"]
    rows = (
        (
            name,
            times(one.step),
            times(one.to_target) if one.to_target is not None else "not in every seed",
            points(one.accuracy),
            times(one.memory),
            times(one.flops),
        )
        for name, one in advice.contestants.items()
    )
    caption = (
        f"{result.title}: {len(result.seeds)} seed(s) of {steps} steps; mean over plain backpropagation with the same "
        "seeds ± half of its 95 % interval"
    )
    columns = ("method", "a step", "to plain's accuracy", "accuracy", "activations", "FLOPs")
    return make_table(columns, rows, caption=caption)


def to_toml(fields: dict[str, Any]) -> str:
    """A recipe file."""
    written = {key: value for key, value in fields.items() if value not in (None, {}, [])}
    for part in {"methods", "peers"} & written.keys():
        written[part] = {
            name: {key: NONE if value is None else value for key, value in options.items()}
            for name, options in written[part].items()
        }
    return tomli_w.dumps(written)

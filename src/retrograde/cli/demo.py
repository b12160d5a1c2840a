"""``retrograde demo``: every method against plain backpropagation on the bundled digits."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from retrograde.cli import output
from retrograde.cli.options import Given
from retrograde.cli.repro import shown
from retrograde.cli.signals import stop_request
from retrograde.errors import OptionError
from retrograde.lab.claims import metrics, wording
from retrograde.lab.claims.adhoc import comparison
from retrograde.lab.claims.grid import RUNS, Grid, Places
from retrograde.lab.claims.result import Result, write_result
from retrograde.lab.recipe import Recipe
from retrograde.methods.registry import available
from retrograde.report import write

COMBINATION = ("decorrelate", "dither")
"""Methods that the demonstration also attaches together."""

MODELS = ("mlp", "resnet-small")

COLUMNS = ("needed", "executed", "parameters", "saved_bytes")

_MARK = ".retrograde-demo"


@dataclass(frozen=True)
class Demo:
    """Train every method and plain backpropagation on the bundled digits; a table and a report at the end.

    Attributes:
        output: the report to write.
        runs: folder for the run folders; an earlier demonstration's is replaced.
        seeds: paired seeds.
        epochs: epochs of each run.
        json: print JSON.
    """

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    runs: Path = Path("runs/demo")
    seeds: int = 3
    epochs: int = 8
    json: bool = False

    def run(self, given: Given) -> int:
        """Train, write the report, print the table."""
        if self.seeds < 1 or self.epochs < 1:
            raise OptionError(f"demo: seeds={self.seeds} and epochs={self.epochs} must be 1 or more.")
        _clear(self.runs)
        results = [self._result(model) for model in MODELS]
        page = write(
            [self.runs / model / RUNS for model in MODELS], self.output, "Demonstration on the digits"
        )
        if self.json:
            found = [result.model_dump(mode="json") for result in results]
            output.print_json({"results": found, "report": str(page)})
        else:
            output.print_table(_table(results, self.seeds))
            output.print_line(f"report: {page}")
        return 0

    def _result(self, model: str) -> Result:
        recipe = Recipe(data="digits", model=model, epochs=self.epochs, batch_size=64)
        claim = comparison(recipe, _contestants(), [], seeds=self.seeds, trials=0)
        folder = self.runs / model
        with shown(f"demo: {model}") as show, stop_request() as stop:
            result = Grid(claim, Places(folder)).run(command="retrograde demo", show=show, stop=stop)
        write_result(result, folder / "result.json")
        return result


def _contestants() -> list[dict[str, dict[str, Any]]]:
    settings = {name: dict(method.short_run) for name, method in available().items()}
    return [*({name: options} for name, options in settings.items()), {n: settings[n] for n in COMBINATION}]


def _clear(folder: Path) -> None:
    """Replace an earlier demonstration's folder, and nothing else."""
    ours = (folder / _MARK).exists()
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"{folder} is there already and no demonstration made it. Choose another --runs.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARK).touch()


def _table(results: list[Result], seeds: int) -> Table:
    table = output.new_table(
        f"digits, {seeds} seed(s), mean ± half of its 95 % interval; FLOPs as a share of the dense-equivalent; needed: "
        "with zeros skipped; executed: by the kernel in use, overhead included; saved: activations kept for the "
        "backward pass; time: ratio to plain, runs interleaved"
    )
    for name in ("model", "method"):
        table.add_column(name, overflow="fold")
    for name in ("test accuracy", "zeros (own)", *(metrics.ALL[metric].label for metric in COLUMNS), "time"):
        table.add_column(name, justify="right")
    for model, result in zip(MODELS, results, strict=True):
        for name, entry in result.contestants.items():
            table.add_row(
                model,
                entry.label,
                output.unbroken(wording.cell(result, name, "accuracy")),
                output.unbroken(zeros(result, name)),
                *(output.unbroken(wording.cell(result, name, metric)) for metric in COLUMNS),
                output.unbroken(wording.ratio(result, name, "seconds") or "×1"),
            )
    return table


def zeros(result: Result, name: str) -> str:
    """Zeros in the gradients, and those that they have of their own."""
    means = [result.summaries[name].get(metric) for metric in ("zeros", "own_zeros")]
    return (
        " ".join(
            form.format(wording.figure("zeros", found.mean))
            for form, found in zip(("{}", "({})"), means, strict=True)
            if found
        )
        or "–"
    )

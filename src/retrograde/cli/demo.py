"""``retrograde demo``: every method against plain backpropagation on the bundled digits."""

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from retrograde.cli import output
from retrograde.cli.options import Given
from retrograde.errors import OptionError
from retrograde.lab.comparison import Row, compare
from retrograde.lab.recipe import Recipe
from retrograde.methods.registry import available
from retrograde.report import write

SETTINGS: dict[str, dict[str, Any]] = {
    "deepfocus": {"warmup": 40},
    "dither": {"scale": 1.0},
    "perforate": {"patience": 2, "limit": 6, "max_dendrites": 2},
    "spectral": {"warmup": 20, "every": 20},
}
"""Options for a run of a few hundred steps; a method that is not named here runs at its defaults."""

COMBINATION = ("decorrelate", "dither")
"""Methods that the demonstration also attaches together."""

MODELS = ("mlp", "resnet-small")

_OPTIONS = re.compile(r"\([^)]*\)")
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
        with output.progress_bar() as bar:
            task = bar.add_task("demo", total=None, note="")
            rows = compare(
                [Recipe(data="digits", model=model, epochs=self.epochs, batch_size=64) for model in MODELS],
                _contestants(),
                self.runs,
                seeds=self.seeds,
                what=f"digits, {self.epochs} epochs",
                command="retrograde demo",
                progress=lambda what, done, total: bar.update(task, completed=done, total=total, note=what),
            )
        page = write([self.runs], self.output, "Demonstration on the digits")
        if self.json:
            output.print_json({"rows": [asdict(row) for row in rows], "report": str(page)})
        else:
            output.print_table(_table(rows, self.seeds))
            output.print_line(f"report: {page}")
        return 0


def _contestants() -> list[dict[str, dict[str, Any]]]:
    alone = [{name: SETTINGS.get(name, {})} for name in available()]
    return [*alone, {name: SETTINGS.get(name, {}) for name in COMBINATION}]


def _clear(folder: Path) -> None:
    """Replace an earlier demonstration's folder, and nothing else."""
    ours = (folder / _MARK).exists()
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"{folder} is there already and no demonstration made it. Choose another --runs.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARK).touch()


def _table(rows: list[Row], seeds: int) -> Table:
    table = output.new_table(
        f"digits, {seeds} seed(s); FLOPs as a share of the dense-equivalent; needed: with zeros skipped; executed: "
        "by the kernel in use, overhead included; saved: activations kept by the first step, rows for statistics "
        "included; time: ratio to plain, runs interleaved"
    )
    for name in ("model", "method"):
        table.add_column(name, overflow="fold")
    for name in (
        "test accuracy",
        "zeros (own)",
        "needed",
        "executed",
        "parameters",
        "saved",
        "seconds",
        "time",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        zeros = "–" if row.zeros is None else f"{row.zeros:.1%} ({row.own_zeros:.1%})"
        table.add_row(
            row.model,
            _OPTIONS.sub("", row.label),
            f"{row.accuracy:.2%} ± {row.accuracy_deviation:.2%}",
            zeros,
            f"{row.needed:.1%}",
            f"{row.executed:.1%}",
            f"{row.parameters:,}",
            f"{row.saved_bytes / 2**20:.2f} MiB",
            f"{row.seconds:.1f}",
            f"×{row.seconds_ratio:.2f}",
        )
    return table

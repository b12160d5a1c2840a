"""``retrograde demo``: each method on the kind of work that it is for, against plain backpropagation."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from retrograde.cli import output
from retrograde.cli.options import Given
from retrograde.cli.signals import stop_request
from retrograde.errors import OptionError
from retrograde.lab.claims import metrics, wording
from retrograde.lab.claims.result import Result, write_result
from retrograde.lab.demo.run import Demonstration
from retrograde.lab.demo.scenarios import Scenario, scenarios
from retrograde.lab.demo.verdict import advice, judge
from retrograde.report import write_claims
from retrograde.report.table import Column, Row, Table

_MARK = ".retrograde-demo"


@dataclass(frozen=True)
class Demo:
    """Show each method on the kind of work that it is for, on the bundled digits, in about two minutes.

    Every scenario trains plain backpropagation and a method in turns, with paired seeds, and ends in a verdict made of
    the measured figures. `retrograde compare MODEL DATA --method all` is the table of all methods on one model.

    Attributes:
        output: The page to write.
        runs: Folder for the run folders; an earlier demonstration's is replaced.
        seeds: Paired seeds.
        seconds: What all of it may take: a slow machine trains fewer epochs, and then fewer seeds, and says so.
        json: Print JSON.
    """

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    runs: Path = Path("runs/demo")
    seeds: int = 3
    seconds: float = 105.0
    json: bool = False

    def run(self, given: Given) -> int:
        """Train, write the page, print the verdicts."""
        if self.seeds < 1 or not self.seconds > 0:
            raise OptionError(
                f"demo: seeds={self.seeds} must be 1 or more, and seconds={self.seconds} more than 0."
            )
        _clear(self.runs)
        with output.progress("demo", counted=False) as show, stop_request() as stop:
            outcome = Demonstration(
                scenarios(),
                self.runs,
                seeds=self.seeds,
                seconds=self.seconds,
                show=show,
                stop=stop,
            ).run()
        last = advice(outcome.shown)
        told = [_told(scenario, result) for scenario, result in outcome.shown]
        for (scenario, _), result in zip(outcome.shown, told, strict=True):
            write_result(result, self.runs / scenario.name / "result.json")
        lead = " ".join(part for part in (last, outcome.shortened) if part)
        page = write_claims(told, self.output, "What each method is for, on the digits", lead)
        seeds = len(told[0].seeds)
        output.tell(
            {
                "results": [result.model_dump(mode="json") for result in told],
                "verdicts": [asdict(one) for shown in outcome.shown for one in judge(*shown)],
                "advice": last,
                "shortened": outcome.shortened,
                "seconds": outcome.seconds,
                "report": str(page),
            },
            *(part for shown in outcome.shown for part in (_table(*shown), "")),
            f"Means over {seeds} paired seed{'s' * (seeds > 1)} ± half of their 95 % interval; ×: over plain "
            "training's.",
            *filter(None, [outcome.shortened]),
            f"report: {page}",
            "",
            f"{last} For your own model: retrograde advise MODEL DATA",
            as_json=self.json,
        )
        return 0


def _clear(folder: Path) -> None:
    """Replace an earlier demonstration's folder, and nothing else."""
    ours = (folder / _MARK).exists()
    if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"{folder} is there already and no demonstration made it. Choose another --runs.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARK).touch()


def _told(scenario: Scenario, result: Result) -> Result:
    """The result with its verdicts behind the sentence that says what is compared."""
    verdicts = " ".join(f"{one.label}: {one.words}." for one in judge(scenario, result))
    return result.model_copy(update={"sentence": f"{result.sentence} {verdicts}"})


def _table(scenario: Scenario, result: Result) -> Table:
    shown = tuple(dict.fromkeys((scenario.metric, "accuracy")))
    verdicts = {one.name: one for one in judge(scenario, result)}
    rows: list[Row] = []
    for name, entry in result.contestants.items():
        verdict = verdicts.get(name)
        cells = (wording.cell(result, name, metric) for metric in shown)
        tone = "good" if verdict and verdict.gains else "plain"
        rows.append(Row((entry.label, *cells, verdict.words if verdict else ""), tone=tone))
    labels = (Column(metrics.ALL[metric].label) for metric in shown)
    return Table((Column(scenario.claim.title, "text"), *labels, Column("verdict", "text")), tuple(rows))

"""``retrograde compress``: how small a user's network may be, and whether dendrites have any part in it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from retrograde.cli import output
from retrograde.cli.compare import OnYourModel
from retrograde.cli.flags import said
from retrograde.cli.options import DENDRITES, Given
from retrograde.lab.claims.compression import Compression, Ladder, default_folder, judge, ladder
from retrograde.lab.claims.wording import figure, points, spread
from retrograde.report import write_claims
from retrograde.report.table import Table, make_table


@dataclass(frozen=True)
class Compress(OnYourModel):
    """Narrow a network, grow dendrites on it, and spend as many parameters on width, depth and BatchNorm instead.

    Each network's learning rate is searched for with as many trials; then all train with the same seeds, taking turns
    after each epoch. The smallest that keeps the accuracy is recommended, whichever kind it is. Re-running the same
    command resumes it.

    Attributes:
        widths: Shares of the hidden channels that narrower networks keep.
        tolerance: Points of accuracy that may be lost, with the far end of the 95 % interval.
        trials: Trials of the search for each network's learning rate. With 0 all run at the learning rate given.
        jobs: Seeds trained at once. Times can be trusted with 1 only.
        output: Page to write.
        runs: Folder for the runs.
    """

    widths: tuple[float, ...] = (0.5, 0.25)
    tolerance: float = 0.5
    trials: int = 4
    jobs: int = 1
    output: Annotated[Path, said("compress.html", "PATH", "-o")] = Path("compress.html")
    runs: Annotated[Path | None, said("runs/compress/…, by what is tried", "PATH")] = None

    def run(self, given: Given) -> int:
        """Train, write the page, print the table and the recommendation."""
        recipe = self.build(given)
        options = given.with_options(*DENDRITES, given.recipe.methods)
        rungs = Ladder(self.widths, options, self.seeds, self.trials)
        claim = ladder(recipe, recipe.load_data(self.data_dir), rungs)
        if claim.note:
            output.log.print(f"left out: {claim.note}", highlight=False)
        folder = self.runs or default_folder(claim)
        result = self.train(claim, given, folder, self.jobs)
        found = judge(result, self.tolerance / 100, folder)
        lead = f"Recommended: {found.step(found.recommended).label}: {found.why}."
        earned = f"Dendrites: {found.dendrites}." if found.dendrites else ""
        page = write_claims([result], self.output, claim.title, f"{lead} {earned}".rstrip())
        # A folder alone runs no code.
        code = f", model={recipe.model!r}" if ":" in recipe.model else ""
        output.tell(
            {**found.model_dump(), "report": str(page), "runs": str(folder)},
            _table(found, claim.title),
            "",
            lead,
            *([earned] if earned else []),
            f"load it: rg.load_run({found.step(found.recommended).run!r}{code})",
            f"report: {page}",
            as_json=self.json,
        )
        return 0


def _table(found: Compression, title: str) -> Table:
    rows = (
        (
            step.label,
            f"{step.parameters:,}",
            figure("macs", step.macs),
            figure("forward_seconds_128", step.seconds),
            spread("accuracy", step.accuracy),
            "" if step.lost is None else points(step.lost),
        )
        for step in found.steps
    )
    columns = (
        "network",
        "parameters",
        "multiply-adds",
        "forward pass of 128",
        "accuracy",
        "against the whole",
    )
    return make_table(columns, rows, caption=f"{title}: mean over seeds ± half of its 95 % interval")

"""``retrograde report``: run folders, or results of claims, as one self-contained HTML page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from retrograde.cli import output
from retrograde.cli.flags import Switch, said
from retrograde.cli.options import Given
from retrograde.report import read_claims, write, write_claims


@dataclass(frozen=True)
class Report:
    """Turn run folders, or results of claims, into one self-contained HTML page.

    Attributes:
        runs: Run folders or folders of run folders, or else JSON files with results of claims.
        output: Page to write.
        title: Headline of the page.
        json: Print JSON.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH ...")]
    output: Annotated[Path, said("report.html", "PATH", "-o")] = Path("report.html")
    title: Annotated[str | None, said("by what is reported", "TEXT")] = None
    json: Switch = False

    def run(self, given: Given) -> int:
        """Write the page and print where it is."""
        if any(path.suffix == ".json" for path in self.runs):
            page = write_claims(read_claims(self.runs), self.output, self.title)
        else:
            page = write(self.runs, self.output, self.title)
        if self.json:
            output.print_json({"report": str(page), "bytes": page.stat().st_size})
        else:
            output.print_line(f"report: {page}")
        return 0

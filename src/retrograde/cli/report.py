"""``retrograde report``: run folders, or results of claims, as one self-contained HTML page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from retrograde.cli import output
from retrograde.cli.flags import Switch, said
from retrograde.cli.options import Given
from retrograde.report import write


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
        page = write(self.runs, self.output, self.title)
        content = {"report": str(page), "bytes": page.stat().st_size}
        output.tell(content, f"report: {page}", as_json=self.json)
        return 0

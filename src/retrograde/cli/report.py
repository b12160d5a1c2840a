"""``retrograde report``: run folders as one self-contained HTML page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from retrograde.cli import output
from retrograde.cli.options import Given
from retrograde.report import write


@dataclass(frozen=True)
class Report:
    """Turn run folders into one self-contained HTML page.

    Attributes:
        runs: run folders, or folders of run folders.
        output: the page to write.
        title: its headline.
        json: print JSON.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    title: str | None = None
    json: bool = False

    def run(self, given: Given) -> int:
        """Write the page and print where it is."""
        page = write(self.runs, self.output, self.title)
        if self.json:
            output.print_json({"report": str(page), "bytes": page.stat().st_size})
        else:
            output.print_line(f"report: {page}")
        return 0

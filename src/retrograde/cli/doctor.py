"""``retrograde doctor``: is this machine fit, and what is missing?"""

from dataclasses import asdict, dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from retrograde.cli import output
from retrograde.cli.options import Given
from retrograde.lab.checks import run_checks

_STYLES = {"ok": "green", "note": "yellow", "failed": "bold red"}


@dataclass(frozen=True)
class Doctor:
    """Check the machine: versions, gradients against autograd, compilation, data sets.

    Attributes:
        data_dir: folder that holds data sets; default: the environment variable RETROGRADE_DATA.
        json: print JSON.
    """

    data_dir: Path | None = None
    json: bool = False

    def run(self, given: Given) -> int:
        """Print the findings; 1 when a check failed."""
        with output.log.status("checking"):
            checks = run_checks(self.data_dir)
        if self.json:
            output.print_json({"checks": [asdict(check) for check in checks]})
        else:
            table = Table(box=None, pad_edge=False, show_header=False)
            for check in checks:
                table.add_row(check.name, f"[{_STYLES[check.status]}]{check.status}", escape(check.detail))
            output.print_table(table)
        return int(any(check.status == "failed" for check in checks))

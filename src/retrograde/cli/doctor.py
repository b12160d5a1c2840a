"""`retrograde doctor`: is this machine fit, and what is missing?"""

from dataclasses import asdict, dataclass

from retrograde.cli import output
from retrograde.cli.flags import DataFolder, Switch
from retrograde.cli.options import Given
from retrograde.lab.checks import run_checks
from retrograde.report.table import Column, Row, Table


@dataclass(frozen=True)
class Doctor:
    """Check the machine: versions, gradients against autograd, the fastest precision, compilation, data sets.

    The first run compiles the kernels and measures which of them are fastest, which takes minutes on a slow machine
    and then no training run has to do. Each step is told on stderr, with its seconds.

    Attributes:
        forget_kernels: First delete the choices of kernels that are kept, which were measured while the machine was
            busy, for example. They are measured anew, by this command and by training.
        data_dir: Folder that holds data sets.
        json: Print JSON.
    """

    forget_kernels: Switch = False
    data_dir: DataFolder = None
    json: Switch = False

    def run(self, given: Given) -> int:
        """Print the findings; 1 when a check failed."""
        if self.forget_kernels:
            from retrograde.kernels import choose  # a compiler comes with it

            output.log.print(f"choices of kernels: {choose.forget()} file(s) deleted", highlight=False)
        with output.log.status("starting") as status:

            def note(line: str) -> None:
                status.update(line)
                output.log.print(line, style="dim", highlight=False)

            checks = run_checks(self.data_dir, status.update, note)
        rows = tuple(Row((check.name, check.status, check.detail)) for check in checks)
        table = Table((Column("", "text"), Column("", "badge"), Column("", "text")), rows)
        output.tell({"checks": [asdict(check) for check in checks]}, table, as_json=self.json)
        return int(any(check.status == "failed" for check in checks))

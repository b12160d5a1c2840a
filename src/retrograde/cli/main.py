"""Entry point: finds the command, runs it, and turns errors into messages and exit codes."""

import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import torch
import tyro

from retrograde.cli import output
from retrograde.cli.bench import Bench
from retrograde.cli.compare import Advise, Compare
from retrograde.cli.demo import Demo
from retrograde.cli.doctor import Doctor
from retrograde.cli.flags import TaskFlags, from_recipe
from retrograde.cli.methods import Methods
from retrograde.cli.options import Given, read_given
from retrograde.cli.plan import PlanCommand
from retrograde.cli.report import Report
from retrograde.cli.repro import Repro
from retrograde.cli.train import Train
from retrograde.errors import RetrogradeError
from retrograde.lab import machine

EXIT_BAD_INPUT = 3
EXIT_INTERRUPTED = 130

_DESCRIPTION = """Better backward passes for PyTorch: what they do to your model, and what they save.

Exit codes: 0 done, 1 a check failed (doctor), 2 wrong usage, 3 bad input, 130 interrupted. --version: the version."""


@output.escapes()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    argv = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in argv
    if argv in (["--version"], ["-V"]):
        output.print_line(f"retrograde {version('retrograde')}")
        return 0
    # Sparse gradients let Adam's moments decay to denormal numbers, which slow every product with them threefold.
    flushed = machine.flushes_denormals()
    torch.set_flush_denormal(True)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _Warnings()
            return _run(read_given(argv))
    except (RetrogradeError, OSError) as error:  # a file or folder that the command was given
        if as_json:
            output.print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        output.log.print(f"[bold red]{type(error).__name__}[/]", highlight=False, end=": ")
        output.log.print(str(error), markup=False, highlight=False)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        output.log.print("interrupted", style="bold yellow")
        return EXIT_INTERRUPTED
    finally:
        # Who calls this from Python has their own mind about denormal numbers.
        torch.set_flush_denormal(flushed)


class _Warnings:
    """Prints each warning once, however many runs of a command bring it.

    A user of the command line cannot act on the line of code that it points at.
    """

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def __call__(self, message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if str(message) not in self._shown:
            self._shown.add(str(message))
            output.log.print(f"warning: {message}", style="yellow", markup=False, highlight=False)


def _run(given: Given) -> int:
    flags, tasks = from_recipe(given.recipe), from_recipe(given.recipe, TaskFlags)
    try:
        command: Any = tyro.cli(
            Annotated[
                Advise, tyro.conf.subcommand("advise", default=Advise(tyro.MISSING, tyro.MISSING, tasks))
            ]
            | Annotated[Bench, tyro.conf.subcommand("bench")]
            | Annotated[
                Compare, tyro.conf.subcommand("compare", default=Compare(tyro.MISSING, tyro.MISSING, tasks))
            ]
            | Annotated[Demo, tyro.conf.subcommand("demo")]
            | Annotated[Methods, tyro.conf.subcommand("methods")]
            | Annotated[PlanCommand, tyro.conf.subcommand("plan", default=PlanCommand(flags))]
            | Annotated[Train, tyro.conf.subcommand("train", default=Train(flags))]
            | Annotated[Repro, tyro.conf.subcommand("repro")]
            | Annotated[Report, tyro.conf.subcommand("report")]
            | Annotated[Doctor, tyro.conf.subcommand("doctor")],
            prog="retrograde",
            description=_DESCRIPTION,
            args=given.rest or ["--help"],
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except SystemExit as error:
        if error.code and given.flags:
            # The parser knows nothing of these: they were taken out of the command line before it saw it.
            output.log.print(f"Options of those that were chosen: {', '.join(given.flags)}")
        raise
    return command.run(given)

"""Entry point: finds the command, runs it, and turns errors into messages and exit codes."""

import dataclasses
import functools
import itertools
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated, Any, Union

import torch
import tyro

from retrograde import host
from retrograde.cli import output
from retrograde.cli.bench import Bench
from retrograde.cli.compare import Advise, Compare
from retrograde.cli.compress import Compress
from retrograde.cli.demo import Demo
from retrograde.cli.doctor import Doctor
from retrograde.cli.flags import PlanFlags, TaskFlags, from_recipe
from retrograde.cli.methods import Methods
from retrograde.cli.options import Given, option_flags, read_chosen, registry
from retrograde.cli.plan import PlanCommand
from retrograde.cli.report import Report
from retrograde.cli.repro import Repro
from retrograde.cli.train import Train
from retrograde.errors import RetrogradeError
from retrograde.lab import machine

EXIT_BAD_INPUT = 3
EXIT_INTERRUPTED = 130

_DESCRIPTION = """Better backward passes for PyTorch: what they do to your model, and what they save.

Exit codes: 0: done; 1: a check of `doctor` failed, or `repro verify` does not agree; 2: wrong usage; 3: bad input;
130: interrupted. `--version` prints the version."""


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
    if {"--version", "-V"} & set(argv):
        output.print_line(f"retrograde {version('retrograde')}")
        return 0
    # Sparse gradients let Adam's moments decay to denormal numbers, which slow every product with them threefold.
    flushed = machine.flushes_denormals()
    host.keep_freed_memory()
    torch.set_flush_denormal(True)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn(functools.cache(output.log.print))
            return _run(argv)
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


def _warn(write: Callable[..., None]) -> Callable[..., None]:
    """A warning on stderr, without the line of code that it points at, on which a user cannot act.

    Args:
        write: remembers what it has printed: several runs of a command may bring the same warning.
    """

    def show(message: Warning | str, *rest: object, **others: object) -> None:
        write(f"warning: {message}", style="yellow", markup=False, highlight=False)

    return show


def _run(arguments: list[str]) -> int:
    recipe, classes = read_chosen(arguments)
    flags, tasks = from_recipe(recipe), from_recipe(recipe, TaskFlags)
    commands: dict[str, Any] = {
        "methods": Methods(),
        "plan": PlanCommand(from_recipe(recipe, PlanFlags)),
        "train": Train(flags),
        "advise": Advise(tyro.MISSING, tyro.MISSING, tasks),
        "compare": Compare(tyro.MISSING, tyro.MISSING, tasks),
        "compress": Compress(tyro.MISSING, tyro.MISSING, tasks),
        "report": Report(tyro.MISSING),
        "demo": Demo(),
        "repro": Repro(tyro.MISSING),
        "bench": Bench(tyro.MISSING),
        "doctor": Doctor(),
    }
    kinds = (
        Annotated[type(made), tyro.conf.subcommand(name, default=made)] for name, made in commands.items()
    )
    command: Any = Union[tuple(kinds)]  # noqa: UP007  (of as many as there are)
    line = [("command", Annotated[command, tyro.conf.arg(name="")])]
    if classes and (options := option_flags(classes, type(commands[arguments[0]]))):
        line.append(("options", Annotated[tyro.conf.CascadeSubcommandArgs[options], tyro.conf.arg(name="")]))
    parsed: Any = tyro.cli(
        dataclasses.make_dataclass("Line", line),
        prog="retrograde",
        description=_DESCRIPTION,
        args=_help_first(arguments),
        registry=registry(),
    )
    options = {
        # As a recipe file has them: sequences are lists.
        name: {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
        for name, given in getattr(parsed, "options", {}).items()
    }
    return parsed.command.run(Given(recipe, options, shlex.join(["retrograde", *arguments])))


def _help_first(arguments: list[str]) -> list[str]:
    """A line that asks for help, without what help does not depend on: the parser would leave out what it has read."""
    if arguments and not {"--help", "-h"} & set(arguments):
        return arguments
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    return [*words[: 2 if words[:1] == ["repro"] else 1], "--help"]

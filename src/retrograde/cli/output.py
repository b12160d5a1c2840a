"""What the commands print: results on stdout, as a table or as JSON; progress and messages on stderr."""

import contextlib
import io
import sys
from collections.abc import Generator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from retrograde.lab.files import to_json

log = Console(stderr=True, soft_wrap=True)


@contextlib.contextmanager
def escapes() -> Generator[None]:
    """Inside, the streams show what their encoding lacks (names of files that are not UTF-8) by escapes."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


def print_json(content: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print_line(to_json(content, indent=2))


def print_line(text: str) -> None:
    """Text as it is on stdout: nothing wrapped, no markup read."""
    Console().file.write(text + "\n")


def print_table(table: Any) -> None:
    """What `rich` can show on stdout, as wide as the terminal; 120 columns where there is none."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)


def progress_bar() -> Progress:
    """A bar with the time left, on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("[dim]{task.fields[note]}"),
        console=log,
    )


def share_bar() -> Progress:
    """A bar for work that has no natural count, with the time left, on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=log,
        # The contestants of a seed take their turns: a shorter memory would see one of them alone.
        speed_estimate_period=600,
    )

"""What the commands print: results on stdout, as a table or as JSON; progress and messages on stderr."""

import contextlib
import io
import sys
from collections.abc import Callable, Generator
from typing import Any

from rich.console import Console
from rich.markup import escape
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


def tell(content: dict[str, Any], *parts: Any, as_json: bool) -> None:
    """A result on stdout: as JSON, or in parts for people: lines of text, and what `rich` can show."""
    if as_json:
        print_json(content)
        return
    console = Console()
    # As wide as the terminal; 120 columns where there is none.
    console = console if console.is_terminal else Console(width=120)
    for part in parts:
        if isinstance(part, str):
            print_line(part)
        else:
            console.print(part)


@contextlib.contextmanager
def progress(title: str, note: str = "", *, counted: bool = True) -> Generator[Callable[..., None]]:
    """A bar with the time left, on stderr.

    Args:
        title: in front.
        note: behind, at first.
        counted: the work has a natural count; of other work the bar says the share, and the time that it took.

    Yields:
        A function of the note, of what is done, and of the whole where it has changed.
    """
    if counted:
        columns = (MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    else:
        columns = (
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("so far,"),
            TimeRemainingColumn(),
            TextColumn("to go"),
        )
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        *columns,
        TextColumn("[dim]{task.fields[note]}"),
        console=log,
        # Variants of a seed take their turns: a shorter memory would see one of them alone.
        speed_estimate_period=30 if counted else 600,
    )
    with bar:
        task = bar.add_task(escape(title), total=None, note=escape(note))

        def show(note: str, done: float = 0, total: float | None = None) -> None:
            bar.update(task, completed=done, total=total, note=escape(note))

        yield show

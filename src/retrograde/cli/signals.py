"""Ctrl-C and polite kills: the run ends between two steps, with its checkpoint written."""

import contextlib
import signal
from collections.abc import Callable, Generator

from retrograde.cli import output


@contextlib.contextmanager
def stop_request() -> Generator[Callable[[], bool]]:
    """Inside, a first SIGINT or SIGTERM is only noted; a second one interrupts at once.

    Yields:
        A function that says whether to stop.
    """
    asked = False

    def note(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        output.log.print("stopping after this step; once more to stop at once", style="yellow")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

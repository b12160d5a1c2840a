"""Jobs in this process or in several, with one account of what is done."""

import contextlib
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

Tell = Callable[[float], None]
Stop = Callable[[], bool]
Show = Callable[[str, float, float], None]
"""Called with what is being done, how much is done, and of how much."""

_TELL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """Something that one process does.

    Attributes:
        what: in words; no two jobs share them.
        weight: its share of all work.
        work: called with a function that is told how much is done, 0 to 1, and one that says whether to stop. It is
            sent to another process where there are several.
    """

    what: str
    weight: float
    work: Callable[[Tell, Stop], None]


@dataclass
class State:
    """What is done of all jobs, for a display.

    Attributes:
        display: called whenever something changes.
        total: of all weights.
        what: is being done.
    """

    display: Show
    total: float
    what: str = ""
    finished: float = 0.0
    running: dict[str, float] = field(default_factory=dict)

    @property
    def done(self) -> float:
        """Of the total."""
        return self.finished + sum(self.running.values())

    def tell(self, job: Job, share: float) -> None:
        """So much of a job is done."""
        self.running[job.what] = share * job.weight
        self.what = " · ".join(self.running)
        self.show()

    def finish(self, job: Job) -> None:
        """All of a job is done."""
        self.running.pop(job.what, None)
        self.finished += job.weight
        self.show()

    def show(self) -> None:
        """Tell the display."""
        self.display(self.what, self.done, self.total)


def run_all(jobs: Sequence[Job], processes: int, state: State, stop: Stop) -> None:
    """Run all jobs, several at once where there are processes for it.

    Raises:
        KeyboardInterrupt: `stop` said so; every job has been given the time to keep what it has.
    """
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            job.work(lambda share, job=job: state.tell(job, share), stop)
            state.finish(job)
        return
    threads = max(1, torch.get_num_threads() // processes)
    context = multiprocessing.get_context("spawn")
    told: Any = context.Queue()
    halt: Any = context.Event()
    with ProcessPoolExecutor(processes, context, _begin, (told, halt, threads, os.getpid())) as pool:
        running = {pool.submit(_work, job.what, job.work): job for job in jobs}
        try:
            _watch(running, told, state, stop)
        except BaseException:
            halt.set()
            for future in running:
                future.cancel()
            raise


def _watch(running: dict[Future[None], Job], told: Any, state: State, stop: Stop) -> None:
    """See all jobs to their ends; what has ended is taken out of `running`."""
    while running:
        with contextlib.suppress(queue.Empty):
            what, share = told.get(timeout=_TELL_SECONDS)
            # A child's last word may come after the news of its end.
            for job in running.values():
                if job.what == what:
                    state.tell(job, share)
        for future in [future for future in running if future.done()]:
            future.result()
            state.finish(running.pop(future))
        if stop():
            raise KeyboardInterrupt


# In the other process.

_told: Any = None
_halt: Any = None
_parent = 0


def _begin(told: Any, halt: Any, threads: int, parent: int) -> None:
    global _told, _halt, _parent
    _told, _halt, _parent = told, halt, parent
    # The terminal interrupts the whole group: the parent says when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)


def _work(what: str, work: Callable[[Tell, Stop], None]) -> None:
    last = 0.0

    def tell(share: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _TELL_SECONDS:
            last = now
            _told.put((what, share))

    # A parent that was killed sets no event.
    work(tell, lambda: bool(_halt.is_set()) or os.getppid() != _parent)

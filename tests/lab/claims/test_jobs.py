"""Jobs here and in other processes: one account of what is done, and a stop that all of them hear."""

import os
import queue
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from light_jobs import Fails, WaitsForStop, Work

from retrograde.errors import OptionError
from retrograde.lab.claims import jobs as jobs_module
from retrograde.lab.claims.jobs import Job, State, Stop, Tell, run_all


def never() -> bool:
    return False


def job(name: str, weight: float, *told: float) -> Job:
    def work(tell: Tell, stop: Stop) -> None:
        for share in told:
            tell(share)

    return Job(name, weight, work)


def seen(total: float) -> tuple[State, list[tuple[float, str]]]:
    found: list[tuple[float, str]] = []
    return State(lambda what, done, total: found.append((done, what)), total), found


# The account.


def test_shares_are_weighted() -> None:
    state, found = seen(10.0)
    run_all([job("first", 4.0, 0.25, 1.0), job("second", 6.0, 0.5)], 1, state, never)
    assert found == [(1, "first"), (4, "first"), (4, "first"), (7, "second"), (10, "second")]
    assert state.done == state.total


def test_several_at_once_are_summed_and_named() -> None:
    state, found = seen(10.0)
    one, two = job("first", 4.0), job("second", 6.0)
    state.tell(one, 0.5)
    state.tell(two, 0.5)
    state.tell(one, 0.75)
    assert found[-1] == (6.0, "first · second")
    state.finish(one)
    assert state.done == 7.0
    state.finish(two)
    assert (state.done, state.running) == (10.0, {})


def test_one_job_needs_no_other_process(tmp_path: Path) -> None:
    run_all([Job("one", 1.0, Work(tmp_path / "a"))], 4, seen(1.0)[0], never)
    assert (tmp_path / "a").read_text() == str(os.getpid())


def test_an_error_ends_the_others_here(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    jobs = [Job("one", 1.0, Fails(tmp_path / "a")), Job("two", 1.0, Work(tmp_path / "b"))]
    with pytest.raises(OptionError, match="cannot"):
        run_all(jobs, 1, seen(2.0)[0], never)
    assert not (tmp_path / "b").exists()


# Other processes.


def test_a_childs_exception_reaches_the_parent(tmp_path: Path) -> None:
    """As it was; the others are told to stop and are waited for, and what has not begun does not begin."""
    jobs = [
        Job("one", 1.0, WaitsForStop(tmp_path / "a")),
        Job("two", 1.0, Fails(tmp_path / "a.begun")),
        *(Job(name, 1.0, WaitsForStop(tmp_path / name)) for name in "bcdefg"),
    ]
    with pytest.raises(OptionError, match="the second job cannot"):
        run_all(jobs, 2, seen(2.0)[0], never)
    assert (tmp_path / "a").read_text() == "kept"
    assert not (tmp_path / "g.begun").exists()


class Told:
    """A queue of what children told, in an order of the test's own."""

    def __init__(self, *items: tuple[str, float] | Callable[[], None]) -> None:
        self.items = list(items)

    def get(self, timeout: float) -> Any:
        item = self.items.pop(0)
        if callable(item):
            item()
            raise queue.Empty
        return item


def test_what_a_finished_job_told_late_is_not_counted() -> None:
    """A child's last word may come after the news that it has ended."""
    state, found = seen(2.0)
    jobs = [job("first", 1.0), job("second", 1.0)]
    futures: list[Future[None]] = [Future(), Future()]
    futures[0].set_result(None)
    told = Told(("second", 0.5), ("first", 0.9), lambda: futures[1].set_result(None))
    jobs_module._watch(dict(zip(futures, jobs, strict=True)), told, state, never)
    assert [done for done, _ in found] == sorted(done for done, _ in found)
    assert (state.done, state.running) == (2.0, {})

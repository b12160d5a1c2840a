"""`retrograde bench`: what backward passes take, against torch's in float32 and under bfloat16 autocast."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.table import Table

from retrograde.cli import output
from retrograde.cli.flags import Methods, Names, Switch, output_arg
from retrograde.cli.options import Given
from retrograde.errors import OptionError
from retrograde.kernels import choose
from retrograde.lab import bench, machine, precisions, timing
from retrograde.lab.bench import Dropped, Limits, Measured, Row
from retrograde.lab.files import write_json
from retrograde.lab.overhead import Overhead, overhead
from retrograde.methods.registry import available, suggest

SCHEMA = 2
ROUNDS = {"kernels": 25, "layers": 25, "steps": 5}
QUICK_ROUNDS = {"kernels": 7, "layers": 10, "steps": 3}
SECONDS, QUICK_SECONDS = 120.0, 20.0
QUICK_PART = 8
"""Batches of quick steps are one part in so many."""
OVERHEAD_PART = 0.25
"""Of the time of `layers`: what attaching costs small ones."""


def _default(text: str) -> Any:
    return tyro.conf.arg(help_behavior_hint=f"(default: {text})")


@dataclass(frozen=True)
class Bench:
    """Time backward passes against torch's own in float32 and under bfloat16 autocast.

    kernels: both products of one layer's backward pass, from the gradient at its output on, by every kernel.
    layers: forward and backward pass of a dithered layer, and the cost of attaching a small one.
    steps: whole training steps of small models by every method.

    Variants take turns, round by round, for two minutes at most. A variant that takes ten times as long as float32 is
    dropped, and the table lists it with its ratio.

    Attributes:
        what: What to time.
        model: Models of `steps`.
        method: Methods of `steps`, each at its defaults and at the settings that it names for benchmarks.
        rounds: Timed rounds to make.
        seconds: Time budget, after which no round begins. At least one is always made.
        quick: Time fewer shapes and rounds, and smaller batches, in about twenty seconds.
        compiled: Time the cost of attaching under torch.compile too (`layers`). Compiling takes minutes.
        output: JSON file to write, with the machine and the commit.
        json: Print JSON.
    """

    what: Annotated[Literal["kernels", "layers", "steps"], tyro.conf.Positional]
    model: Annotated[Names, tyro.conf.arg(aliases=("--models",), help_behavior_hint="(default: all)")] = ()
    method: Annotated[Methods, _default("all")] = ()
    rounds: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 5 of steps, 25 of the others)")
    ] = None
    seconds: Annotated[
        float | None,
        tyro.conf.arg(
            metavar="FLOAT", help_behavior_hint=f"(default: {SECONDS:g}; no budget if --rounds is given)"
        ),
    ] = None
    quick: Switch = False
    compiled: Switch = False
    output: Annotated[Path | None, output_arg()] = None
    json: Switch = False

    def run(self, given: Given) -> int:
        """Time, then print."""
        self._check()
        limits, measure = self._limits(), self._choose()
        with output.progress_bar() as bar:
            task = bar.add_task(f"bench {self.what}", total=None, note="")

            def show(what: str, done: float = 0, total: float | None = None) -> None:
                bar.update(task, completed=done, total=total, note=what)

            for family in choose.FAMILIES:
                show(f"compiling and calibrating the kernels, once for all: {family}")
                choose.model().complete(family)
            show("measuring the precisions")
            measured = measure(limits, show, precisions.measure())
            if self.what == "layers":
                show("attaching small layers")
            extra = self._overhead(limits)
        made = [row.rounds for row in measured.rows]
        result = {
            "schema": SCHEMA,
            "what": self.what,
            "command": given.line,
            "rounds": min(made, default=0),
            "most_rounds": max(made, default=0),
            "machine": machine.describe(torch.device("cpu")),
            "commit": machine.commit(),
            "rows": [asdict(row) for row in measured.rows],
            "dropped": [asdict(one) for one in measured.dropped],
            **({"overhead": [asdict(row) for row in extra]} if extra else {}),
        }
        if self.output is not None:
            write_json(self.output, result)
        if self.json:
            output.print_json(result)
        else:
            output.print_table(_table(self.what, measured))
            if measured.dropped:
                output.print_line("")
                output.print_table(_dropped_table(measured.dropped))
            if extra:
                output.print_table(_overhead_table(extra))
        return 0

    def _limits(self) -> Limits:
        budget = QUICK_SECONDS if self.quick else SECONDS
        if self.rounds is not None:
            return Limits(self.rounds, self.seconds)
        rounds = (QUICK_ROUNDS if self.quick else ROUNDS)[self.what]
        return Limits(rounds, budget if self.seconds is None else self.seconds)

    def _check(self) -> None:
        """Refuse before minutes are spent."""
        if self.rounds is not None and self.rounds < 1:
            raise OptionError(f"bench: rounds={self.rounds} must be 1 or more.")
        if self.compiled and self.what != "layers":
            raise OptionError(f"bench {self.what} has no --compiled: it is of `retrograde bench layers`.")
        if self.seconds is not None and not self.seconds > 0:
            raise OptionError(f"bench: seconds={self.seconds} must be above 0.")
        if self.what != "steps" and (self.model or self.method):
            raise OptionError(
                f"bench {self.what} has no --model and no --method: they choose what `retrograde bench steps` times."
            )
        if self.output is not None and (self.output.is_dir() or not self.output.parent.is_dir()):
            raise OptionError(
                f"bench: {self.output} cannot be written: it is a folder, or lies in none. Choose another --output."
            )

    def _choose(self) -> Callable[..., Measured]:
        """What to time, given the limits."""
        shapes = bench.QUICK_SHAPES if self.quick else bench.SHAPES
        if self.what == "kernels":
            return functools.partial(bench.kernels, shapes, bench.SPARSITIES)
        if self.what == "layers":
            return functools.partial(bench.layers, shapes)
        known = bench.workloads(QUICK_PART if self.quick else 1)
        models = {name: known[name] for name in _known("model", self.model, known)}
        return functools.partial(bench.steps, models, _known("method", self.method, available()))

    def _overhead(self, limits: Limits) -> list[Overhead]:
        if self.what != "layers":
            return []
        seconds = None if limits.seconds is None else OVERHEAD_PART * limits.seconds
        found = overhead(limits.rounds, seconds=seconds)
        return [
            *found,
            *(overhead(limits.rounds, (1,), compiled=True, seconds=seconds) if self.compiled else []),
        ]


def _known(kind: str, names: Sequence[str], known: Iterable[str]) -> list[str]:
    known = list(known)
    for name in names:
        if name not in known:
            raise OptionError(
                f"bench steps: there is no {kind} {name!r}.{suggest(name, known)} Known are {', '.join(known)}."
            )
    return list(dict.fromkeys(names)) or known


def _table(what: str, measured: Measured) -> Table:
    rows = measured.rows
    caption = {
        "kernels": "dx and dW from δ on: statistics, noise, indexing and packing included",
        "layers": f"forward and backward pass, dithered at scale {bench.SCALE:g}",
        "steps": "whole steps with Adam; methods that warm up do so in an untimed first step",
    }[what]
    late = [name for name in _methods(rows) if available()[name].whole_run]
    caption += f"; not begun so early in a run: {', '.join(late)}" if late else ""
    ratio = "ratio of the medians" if what == "steps" else "median ratio"
    table = output.new_table(
        f"{caption}; ×: times as fast, {ratio} with quartiles of {_rounds([row.rounds for row in rows])}; torch's own "
        f"time, fp32 / bf16 autocast: {_baselines(rows)}"
    )
    views: dict[str, dict[str, Callable[[Row], str]]] = {
        "kernels": {"op": _op, "zeros": _zeros, "kernel": _kernel},
        "layers": {"op": _op, "zeros": _zeros, "kernels": _kernel},
        "steps": {
            "model": lambda row: str(row.model),
            "method": lambda row: str(row.method),
            "zeros": _zeros,
            "kernels": _kernel,
        },
    }
    columns = views[what]
    for name in columns:
        table.add_column(name, justify="right" if name == "zeros" else "left", overflow="fold")
    for name in ("ms", "× fp32", "", "× bf16", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(show(row) for show in columns.values()),
            f"{row.seconds * 1e3:.1f}",
            *_ratio(row.speedup_fp32, row.spread_fp32),
            *_ratio(row.speedup_bf16, row.spread_bf16),
        )
    return table


def _rounds(made: Sequence[int]) -> str:
    """How many there were, which a time budget makes fewer where a round takes long."""
    least, most = min(made, default=0), max(made, default=0)
    return f"{most if least == most else f'{least} to {most}'} interleaved rounds"


def _dropped_table(dropped: Sequence[Dropped]) -> Table:
    table = output.new_table(
        f"not run, or not run again: they take {timing.DROPPED_AT:g} times as long as float32 or longer"
    )
    for name in ("dropped", "variant", "time over float32's", "seen"):
        table.add_column(name, justify="right" if name.startswith("time") else "left", overflow="fold")
    alike: dict[tuple[str, str, str], list[Dropped]] = {}
    for one in dropped:
        # One line for all cells that the same small product speaks of.
        where = one.what if one.seen == "in the first round" else ""
        alike.setdefault((one.variant, one.seen, where), []).append(one)
    for (variant, seen, where), group in alike.items():
        table.add_row(where or f"in {len(group)} cells", variant, f"×{group[0].ratio:.0f}", seen)
    return table


def _overhead_table(rows: Sequence[Overhead]) -> Table:
    made = _rounds([row.rounds for row in rows])
    table = output.new_table(
        "forward and backward pass of layers too small to save anything; ×: time, median ratio to plain, quartiles of "
        f"{made}; bare function: a Python autograd function that computes the same"
    )
    for name in ("layer", "threads", "run"):
        table.add_column(name, overflow="fold")
    for name in ("µs", "× plain", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        threads = f"{row.threads}, compiled" if row.compiled else str(row.threads)
        ratio = _ratio(row.ratio, row.spread)
        table.add_row(row.layer, threads, row.run, f"{row.microseconds:.1f}", *ratio)
    return table


def _methods(rows: Sequence[Row]) -> list[str]:
    """Names of the methods in steps, whose labels begin with them."""
    return list(dict.fromkeys(row.method.partition("(")[0] for row in rows if row.model and row.method))


def _op(row: Row) -> str:
    return f"{row.op} {row.shape}"


def _zeros(row: Row) -> str:
    return "–" if row.sparsity is None else f"{row.sparsity:.0%}"


def _kernel(row: Row) -> str:
    if row.chosen is None:
        return row.kernel
    return f"{row.kernel}: {row.chosen}" if row.method is None else row.chosen


def _ratio(ratio: float | None, spread: tuple[float, float] | None) -> tuple[str, str]:
    if ratio is None or spread is None:
        return "–", ""
    return f"×{ratio:.2f}", rf"[dim]\[{spread[0]:.2f}–{spread[1]:.2f}][/]"


def _baselines(rows: Sequence[Row]) -> str:
    """Median seconds of both, for each shape or model."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(_op(row) if row.model is None else row.model, []).append(row)
    return "; ".join(
        f"{name} {_median([row.seconds_fp32 for row in group])} / {_median([row.seconds_bf16 for row in group])} ms"
        for name, group in found.items()
    )


def _median(seconds: Sequence[float | None]) -> str:
    known = [one for one in seconds if one is not None]
    return f"{median(known) * 1e3:.1f}" if known else "–"

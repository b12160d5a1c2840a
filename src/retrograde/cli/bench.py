"""`retrograde bench`: what backward passes take, against torch's in float32 and under bfloat16 autocast."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import torch
import tyro

from retrograde.cli import output
from retrograde.cli.flags import Methods, Names, Switch, said
from retrograde.cli.options import Given
from retrograde.errors import OptionError
from retrograde.kernels import compiled
from retrograde.lab import bench, machine, precisions, timing
from retrograde.lab.bench import Dropped, Limits, Measured, Row
from retrograde.lab.files import write_json
from retrograde.lab.options import require_known
from retrograde.lab.overhead import Overhead, overhead
from retrograde.methods.registry import available
from retrograde.report.table import Table, make_table

SCHEMA = 2
ROUNDS = {"kernels": 25, "layers": 25, "steps": 5}
QUICK_ROUNDS = {"kernels": 7, "layers": 10, "steps": 3}
SECONDS, QUICK_SECONDS = 120.0, 20.0
QUICK_PART = 8
"""Batches of quick steps are one part in so many."""
OVERHEAD_PART = 0.25
"""Of the time of `layers`: what attaching costs small ones."""


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
    model: Annotated[Names, said("all", None, "--models")] = ()
    method: Annotated[Methods, said("all")] = ()
    rounds: Annotated[int | None, said("5 of steps, 25 of the others", "INT")] = None
    seconds: Annotated[float | None, said(f"{SECONDS:g}; no budget if --rounds is given", "FLOAT")] = None
    quick: Switch = False
    compiled: Switch = False
    output: Annotated[Path | None, said("none: nothing is written", "PATH", "-o")] = None
    json: Switch = False

    def run(self, given: Given) -> int:
        """Time, then print."""
        self._check()
        limits, measure = self._limits(), self._choose()
        with output.progress(f"bench {self.what}") as show:
            if compiled.usable():
                from retrograde.kernels.rehearse import rehearse  # a compiler comes with it

                rehearse(lambda layer: show(f"compiling the kernels, once for all: {layer}"))
            show("measuring the precisions")
            measured = measure(Measured(limits, show, precisions.measure()))
            extra: list[Overhead] = []
            if self.what == "layers":
                show("attaching small layers")
                seconds = None if limits.seconds is None else OVERHEAD_PART * limits.seconds
                extra = overhead(limits.rounds, compiled=self.compiled, seconds=seconds)
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
        tables = [_table(self.what, measured)]
        tables += [_dropped_table(measured.dropped)] if measured.dropped else []
        tables += [_overhead_table(extra)] if extra else []
        output.tell(result, *tables, as_json=self.json)
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

    def _choose(self) -> Callable[[Measured], Measured]:
        """What to time, and to note there."""
        shapes = bench.QUICK_SHAPES if self.quick else bench.SHAPES
        if self.what == "kernels":
            return functools.partial(bench.kernels, shapes, bench.SPARSITIES)
        if self.what == "layers":
            return functools.partial(bench.layers, shapes)
        known = bench.workloads(QUICK_PART if self.quick else 1)
        methods = list(dict.fromkeys(self.method)) or list(available())
        require_known("there is no model", self.model, known)
        require_known("there is no method", methods, available())
        return functools.partial(bench.steps, {name: known[name] for name in self.model or known}, methods)


def _table(what: str, measured: Measured) -> Table:
    rows = measured.rows
    caption = {
        "kernels": "dx and dW from δ on: statistics, noise, indexing and packing included",
        "layers": f"forward and backward pass, dithered at scale {bench.SCALE:g}",
        "steps": "whole steps with Adam; methods that warm up do so in an untimed first step",
    }[what]
    # In steps, labels begin with the method's name.
    methods = dict.fromkeys(row.method.partition("(")[0] for row in rows if row.model and row.method)
    late = [name for name in methods if available()[name].whole_run]
    caption += f"; not begun so early in a run: {', '.join(late)}" if late else ""
    ratio = "ratio of the medians" if what == "steps" else "median ratio"
    caption = (
        f"{caption}; ×: times as fast, {ratio} with quartiles of {_rounds(rows)}; torch's own time, fp32 / bf16 "
        f"autocast: {_baselines(rows)}"
    )
    names = ("model", "method") if what == "steps" else ("op",)
    cells = (
        (
            row.what,
            *((str(row.method),) if what == "steps" else ()),
            "–" if row.sparsity is None else f"{row.sparsity:.0%}",
            _kernel(row),
            f"{row.seconds * 1e3:.1f}",
            _ratio(row.speedup_fp32, row.spread_fp32),
            _ratio(row.speedup_bf16, row.spread_bf16),
        )
        for row in rows
    )
    columns = (*names, "zeros", "kernel" if what == "kernels" else "kernels", "ms", "× fp32", "× bf16")
    return make_table(columns, cells, texts=len(names) + 2, caption=caption)


def _rounds(rows: Sequence[Row | Overhead]) -> str:
    """How many there were, which a time budget makes fewer where a round takes long."""
    made = [row.rounds for row in rows] or [0]
    return f"{' to '.join(map(str, sorted({min(made), max(made)})))} interleaved rounds"


def _dropped_table(dropped: Sequence[Dropped]) -> Table:
    alike: dict[tuple[str, str, str], list[Dropped]] = {}
    for one in dropped:
        # One line for all cells that the same small product speaks of.
        where = one.what if one.seen == "in the first round" else ""
        alike.setdefault((one.variant, one.seen, where), []).append(one)
    rows = (
        (where or f"in {len(group)} cells", variant, f"×{group[0].ratio:.0f}", seen)
        for (variant, seen, where), group in alike.items()
    )
    caption = f"not run, or not run again: they take {timing.DROPPED_AT:g} times as long as float32 or longer"
    return make_table(("dropped", "variant", "time over float32's", "seen"), rows, texts=4, caption=caption)


def _overhead_table(rows: Sequence[Overhead]) -> Table:
    cells = (
        (
            row.layer,
            f"{row.threads}, compiled" if row.compiled else str(row.threads),
            row.run,
            f"{row.microseconds:.1f}",
            _ratio(row.ratio, row.spread),
        )
        for row in rows
    )
    caption = (
        "forward and backward pass of layers too small to save anything; ×: time, median ratio to plain, quartiles of "
        f"{_rounds(rows)}; bare function: a Python autograd function that computes the same"
    )
    return make_table(("layer", "threads", "run", "µs", "× plain"), cells, texts=3, caption=caption)


def _kernel(row: Row) -> str:
    if row.chosen is None:
        return row.kernel
    return f"{row.kernel}: {row.chosen}" if row.method is None else row.chosen


def _ratio(ratio: float | None, spread: tuple[float, float] | None) -> str:
    if ratio is None or spread is None:
        return "–"
    return f"×{ratio:.2f} [{spread[0]:.2f}–{spread[1]:.2f}]"


def _baselines(rows: Sequence[Row]) -> str:
    """Median seconds of both, for each shape or model."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.what, []).append(row)
    return "; ".join(
        f"{name} {_median([row.seconds_fp32 for row in group])} / {_median([row.seconds_bf16 for row in group])} ms"
        for name, group in found.items()
    )


def _median(seconds: Sequence[float | None]) -> str:
    known = [one for one in seconds if one is not None]
    return f"{median(known) * 1e3:.1f}" if known else "–"

"""``retrograde bench``: what backward passes take, against torch's in float32 and under bfloat16 autocast."""

import functools
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

import torch
import tyro
from rich.table import Table

from retrograde.cli import output
from retrograde.cli.options import Given
from retrograde.errors import OptionError
from retrograde.lab import bench, machine
from retrograde.lab.bench import Row
from retrograde.lab.files import write_json
from retrograde.lab.overhead import Overhead, overhead
from retrograde.methods.registry import available, suggest

SCHEMA = 1
ROUNDS = {"kernels": 25, "layers": 25, "steps": 5}
QUICK_ROUNDS = {"kernels": 7, "layers": 10, "steps": 3}
QUICK_PART = 8
"""Batches of quick steps are one part in so many."""


@dataclass(frozen=True)
class Bench:
    """Time backward passes side by side: ours, torch's in float32, and torch's under bfloat16 autocast.

    kernels: both products of one layer's backward pass, from the gradient at its output on, by every kernel.
    layers: forward and backward pass of a dithered layer, and what attaching costs small ones.
    steps: whole training steps of small models by every method.

    Contestants take turns, round by round. torch under autocast is what a user would otherwise pick.

    Attributes:
        what: what to time.
        models: of steps; default: all.
        methods: of steps; default: all, each at its defaults and at the settings that it names for benchmarks.
        rounds: timed rounds; default: as many as end within about two minutes on two cores.
        quick: fewer shapes and rounds, smaller batches: about twenty seconds.
        compiled: of layers: what attaching costs under torch.compile too, which takes minutes to compile.
        output: write the result as JSON too, with the machine and the commit.
        json: print JSON.
    """

    what: Annotated[Literal["kernels", "layers", "steps"], tyro.conf.Positional]
    models: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    rounds: int | None = None
    quick: bool = False
    compiled: bool = False
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    json: bool = False

    def run(self, given: Given) -> int:
        """Time, then print."""
        self._check()
        rounds = (QUICK_ROUNDS if self.quick else ROUNDS)[self.what] if self.rounds is None else self.rounds
        measure = self._choose()
        with output.progress_bar() as bar:
            task = bar.add_task(f"bench {self.what}", total=None, note="")
            rows = measure(
                rounds, lambda what, done, total: bar.update(task, completed=done, total=total, note=what)
            )
            extra = self._overhead(rounds)
        result = {
            "schema": SCHEMA,
            "what": self.what,
            "command": self._command(),
            "rounds": rounds,
            "machine": machine.describe(torch.device("cpu")),
            "commit": machine.commit(),
            "rows": [asdict(row) for row in rows],
            **({"overhead": [asdict(row) for row in extra]} if extra else {}),
        }
        if self.output is not None:
            write_json(self.output, result)
        if self.json:
            output.print_json(result)
        else:
            output.print_table(_table(self.what, rows, rounds))
            if extra:
                output.print_table(_overhead_table(extra, rounds))
        return 0

    def _check(self) -> None:
        """Refuse before minutes are spent."""
        if self.rounds is not None and self.rounds < 1:
            raise OptionError(f"bench: rounds={self.rounds} must be 1 or more.")
        if self.compiled and self.what != "layers":
            raise OptionError(f"bench {self.what} has no --compiled: it is of `retrograde bench layers`.")
        if self.what != "steps" and (self.models or self.methods):
            raise OptionError(
                f"bench {self.what} has no --models and no --methods: they choose what `retrograde bench steps` times."
            )
        if self.output is not None and (self.output.is_dir() or not self.output.parent.is_dir()):
            raise OptionError(
                f"bench: {self.output} cannot be written: it is a folder, or lies in none. Choose another --output."
            )

    def _choose(self) -> Callable[[int, bench.Progress], list[Row]]:
        """What to time, given the rounds."""
        shapes = bench.QUICK_SHAPES if self.quick else bench.SHAPES
        if self.what == "kernels":
            return functools.partial(bench.kernels, shapes, bench.SPARSITIES)
        if self.what == "layers":
            return functools.partial(bench.layers, shapes)
        known = bench.workloads(QUICK_PART if self.quick else 1)
        models = {name: known[name] for name in _known("model", self.models, known)}
        return functools.partial(bench.steps, models, _known("method", self.methods, available()))

    def _overhead(self, rounds: int) -> list[Overhead]:
        if self.what != "layers":
            return []
        return [*overhead(rounds), *(overhead(rounds, (1,), compiled=True) if self.compiled else [])]

    def _command(self) -> str:
        words = ["retrograde", "bench", self.what]
        for flag, values in (("--models", self.models), ("--methods", self.methods)):
            words += [flag, *values] if values else []
        words += ["--rounds", str(self.rounds)] if self.rounds is not None else []
        words += ["--compiled"] if self.compiled else []
        return shlex.join(words + (["--quick"] if self.quick else []))


def _known(kind: str, names: Sequence[str], known: Iterable[str]) -> list[str]:
    known = list(known)
    for name in names:
        if name not in known:
            raise OptionError(
                f"bench steps: there is no {kind} {name!r}.{suggest(name, known)} Known are {', '.join(known)}."
            )
    return list(dict.fromkeys(names)) or known


def _table(what: str, rows: Sequence[Row], rounds: int) -> Table:
    caption = {
        "kernels": "dx and dW from δ on: statistics, noise, indexing and packing included",
        "layers": f"forward and backward pass, dithered at scale {bench.SCALE:g}",
        "steps": "whole steps with Adam; methods that warm up do so in an untimed first step",
    }[what]
    late = [name for name in _methods(rows) if available()[name].whole_run]
    caption += f"; not begun so early in a run: {', '.join(late)}" if late else ""
    ratio = "ratio of the medians" if what == "steps" else "median ratio"
    table = output.new_table(
        f"{caption}; ×: times as fast, {ratio} with quartiles of {rounds} interleaved rounds; torch's own time, "
        f"fp32 / bf16 autocast: {_baselines(rows)}"
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


def _overhead_table(rows: Sequence[Overhead], rounds: int) -> Table:
    table = output.new_table(
        "forward and backward pass of layers too small to save anything; ×: time, median ratio to plain, quartiles of "
        f"{rounds} interleaved rounds; bare function: a Python autograd function that computes the same"
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


def _ratio(ratio: float, spread: tuple[float, float]) -> tuple[str, str]:
    return f"×{ratio:.2f}", rf"[dim]\[{spread[0]:.2f}–{spread[1]:.2f}][/]"


def _baselines(rows: Sequence[Row]) -> str:
    """Median seconds of both, for each shape or model."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(_op(row) if row.model is None else row.model, []).append(row)
    return "; ".join(
        f"{name} {median(r.seconds_fp32 for r in group) * 1e3:.1f} / "
        f"{median(r.seconds_bf16 for r in group) * 1e3:.1f} ms"
        for name, group in found.items()
    )

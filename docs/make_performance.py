"""Makes ``performance.md`` and its pictures from ``results/``; ``--check`` only says whether the page is up to date.

    python docs/make_performance.py [--check] [--results FOLDER] [--out FOLDER]

Every figure on the page is read from a result; what a missing result would have shown is left out. The pictures need
Chromium.
"""

import argparse
import json
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np

from retrograde.report.table import make_table

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ROOT = Path(__file__).parent.parent
PAGE = "performance.md"
RESULTS = (
    "kernel-growth",
    "never-slower",
    "bench-kernels",
    "bench-steps",
    "decorrelate-overhead",
    "gpu-kernels",
)
"""In their order; those of other classes of processor stand beside them, with the class behind the name."""
WORST = 12
"""Rows of the table of the worst ratios."""

Row = dict[str, Any]
Result = dict[str, Any]
Columns = dict[str, Callable[[Any], str]]


@dataclass(frozen=True)
class Sweep:
    """One way in which the work grows; `shares`: by the zeros, drawn against what is left."""

    heading: str
    axis: str
    what: str
    shares: bool = False

    def grows(self, at: float) -> float:
        """What the work grows with."""
        return 1 - at if self.shares else at

    def label(self, at: float) -> str:
        return f"{100 * at:g}" if self.shares else f"{at:g}"

    def spans(self, every: Sequence[float], held: Iterable[float]) -> str:
        """Those of the places that are held, as runs of neighbours."""
        kept = set(held)
        runs = [list(run) for inside, run in groupby(every, kept.__contains__) if inside]
        ends = [dict.fromkeys((run[0], run[-1])) for run in runs]
        found = ", ".join("–".join(map(self.label, run)) for run in ends)
        return f"{found} %" if found and self.shares else found or "–"


SWEEPS = {
    "rows": Sweep("Against the batch", "rows of the batch", "rows"),
    "width": Sweep("Against the width", "inputs and outputs of the layer", "width"),
    "zeros": Sweep("Against the zeros", "zeros in δ̃ (%)", "zeros", shares=True),
    "convolution-channels": Sweep(
        "Convolution, against the channels", "input and output channels", "channels"
    ),
    "convolution-zeros": Sweep("Convolution, against the zeros", "zeros in δ̃ (%)", "zeros", shares=True),
}
BASELINES = {"fp32": "torch float32", "bf16": "torch bfloat16"}
OPS = {"linear": "Linear layers", "conv": "Convolutions"}


# Figures as text.


def digits(value: float, count: int = 3) -> str:
    """A number with so many digits that count, without an exponent."""
    places = max(0, count - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{places}f}"


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else digits(1e3 * seconds)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def zeros(share: float | None) -> str:
    return "–" if share is None else f"{round(100 * share, 1):g} %"


def times(ratio: float | None, spread: Sequence[float] | None = None) -> str:
    """Nothing where the baseline was dropped."""
    return (
        "–" if ratio is None else f"×{ratio:.2f}" + (f" ({spread[0]:.2f}–{spread[1]:.2f})" if spread else "")
    )


def mebibytes(count: float) -> str:
    return f"{count / 2**20:g} MiB"


def name_of(kernel: str) -> str:
    return BASELINES.get(kernel, kernel)


def code(kernel: str) -> str:
    return BASELINES.get(kernel, f"`{kernel}`")


def by_value(key: str, value: Any) -> str:
    """One value by what its name says."""
    if value is None or isinstance(value, str | bool):
        return {None: "–", True: "yes", False: "no"}.get(value, str(value))
    if "seconds" in key:
        return milliseconds(value)
    if key in ("zeros", "sparsity") or "share" in key:
        return zeros(value)
    if "speedup" in key or "ratio" in key:
        return times(value)
    return digits(value) if isinstance(value, float) else str(value)


# Pieces of the document.


def prose(text: str, hanging: str = "") -> str:
    """A paragraph in lines of ordinary length."""
    return textwrap.fill(text, 120, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)


def table(columns: Columns, rows: Iterable[Any], texts: int = 1) -> str:
    """Markdown, the first `texts` columns to the left, the others to the right."""
    cells = [[show(row) for show in columns.values()] for row in rows]
    return make_table(list(columns), cells, texts=texts).markdown(literal=False)


def at(key: str, show: Callable[[Any], str] = str) -> Callable[[Row], str]:
    """A column that shows one value of a row."""
    return lambda row: show(row[key])


def speedups(op: str = "as fast as") -> Columns:
    """How many times as fast as both of torch's own."""
    return {
        f"{op} {name}": lambda row, key=key: times(row[f"speedup_{key}"], row[f"spread_{key}"])
        for key, name in BASELINES.items()
    }


def picture(name: str, alt: str) -> str:
    return f"![{alt}](pictures/performance-{name}.svg)"


def source(result: Result, name: str) -> str:
    """Where a result comes from."""
    machine, commit = result["machine"], result.get("commit")
    rounds = f"{result['rounds']} rounds, " if "rounds" in result else ""
    on = machine.get("gpu") or f"{machine['threads']} threads on {machine['cores']} cores ({machine['cpu']})"
    checkout = f", commit {commit}" if commit else ""
    return prose(
        f"*{rounds}{on}, torch {machine['torch']}{checkout}. Made by `{result['command']}`; all of it is in "
        f"[results/{name}.json](../results/{name}.json).*"
    )


# Rows of the growth.


def of_sweep(result: Result, name: str) -> list[Row]:
    return [row for row in result["rows"] if row["sweep"] == name]


def places(rows: Iterable[Row]) -> list[float]:
    """Along a sweep's axis."""
    return list(dict.fromkeys(row["at"] for row in rows))


def kernels(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["kernel"] for row in rows))


def line(rows: Iterable[Row], kernel: str) -> list[Row]:
    return [row for row in rows if row["kernel"] == kernel]


def fixed(rows: Iterable[Row]) -> list[Row]:
    """Without torch's own and the choice."""
    return [row for row in rows if row["kernel"] not in (*BASELINES, "auto")]


def fastest(rows: Sequence[Row]) -> dict[float, Row]:
    """The fixed kernel with the least median at each place."""
    ordered = sorted(fixed(rows), key=lambda row: -row["seconds"])
    return {row["at"]: row for row in ordered}


def growth(rows: Sequence[Row], sweep: Sweep) -> float:
    """The exponent p of seconds ~ work^p that fits best."""
    work = np.log([sweep.grows(row["at"]) for row in rows])
    return float(np.polyfit(work, np.log([row["seconds"] for row in rows]), 1)[0])


def standard(result: Result) -> dict[str, tuple[list[Row], float]]:
    """By operation: the rows of the shape at which the zeros are varied, and the zeros at which shapes are."""
    swept = [of_sweep(result, name) for name, sweep in SWEEPS.items() if sweep.shares]
    usual = {row["op"]: row["sparsity"] for row in reversed(result["rows"])}
    return {rows[0]["op"]: (rows, usual[rows[0]["op"]]) for rows in swept if rows}


# Roofs.


def rate(result: Result, precision: str) -> float:
    """The most operations a second."""
    return max(row["rate"] for row in result["roofs"]["rates"] if row["precision"] == precision)


def bandwidth(result: Result, moved: float) -> float:
    """Bytes a second of a copy that moves as many, or of the next smaller one that was measured."""
    copies = {row["bytes"]: row["rate"] for row in result["roofs"]["copies"]}
    size = max((size for size in copies if size <= moved), default=min(copies))
    return max(rate for other, rate in copies.items() if other >= size)


def operations(row: Row) -> int:
    return 2 * sum(row["multiply_adds"].values())


def least(result: Result, row: Row) -> tuple[float, str]:
    """Seconds for the arithmetic or for the traffic at the machine's best, whichever are more."""
    arithmetic = sum(2 * count / rate(result, name) for name, count in row["multiply_adds"].items())
    return max((arithmetic, "arithmetic"), (row["bytes"] / bandwidth(result, row["bytes"]), "bytes"))


def reached(result: Result, row: Row) -> float:
    """Share of the roof."""
    return least(result, row)[0] / row["seconds"]


# The page.

INTRODUCTION = """\
# Performance

What the products of a backward pass cost on a CPU: how their time grows with the batch, the width and the share of
zeros, how far each kernel is from what the machine could do, and what is left of that in whole training steps. This
page and its pictures are written by `docs/make_performance.py` from [`results/`](../results); no figure is typed by
hand. Figures hold for the machines that are named with them; the same commands measure another one.

## What is measured, and how

A *call* is what a layer does in the backward pass from δ on: both products, dx = δ W and dW = δᵀ x. What is compared:

| name | what it does |
|---|---|
| torch float32 | torch's own pair of products, on plain δ |
| torch bfloat16 | the same, all operands in bfloat16 already and both results left so, as under autocast |
| `dense` | every entry of δ̃, in float32, by torch |
| `skip` | the non-zeros of δ̃ alone, in float32 |
| `bfloat16` | every entry; the dense operand rounded to bfloat16 |
| `skip-bfloat16` | the non-zeros alone; the dense operand held in bfloat16, sums in float32 |
| `int8` | every entry; the dense operand rounded to eight bits |
| `auto` | for each product the kernel with the least predicted time; `reference` is torch's, as in `dense` |

All but torch's own begin with a plain float32 δ and dither it: their time includes the statistics, the random numbers,
the rounding to levels, and all listing, packing and rounding of operands. All but torch's bfloat16 give float32
results.

Contestants take turns: each runs once in every round, every other round in reverse order, so that whatever else the
machine does happens to all of them alike. A time is the median over the rounds, with bars from the first to the third
quartile. A ratio is the median of the ratios within rounds, whose runs are neighbours in time. *Faster* and *slower*
mean that both quartiles of these ratios lie on the same side of one.
"""


def page(results: dict[str, Result]) -> str:
    """The document, from the results that there are."""
    sections: dict[str, Callable[[Result], list[str]]] = {
        "kernel-growth": growth_sections,
        "never-slower": never_slower,
        "bench-kernels": bench_kernels,
        "bench-steps": bench_steps,
        "decorrelate-overhead": decorrelate_overhead,
        "gpu-kernels": gpu_kernels,
    }
    parts = [INTRODUCTION.strip()]
    for name, make in sections.items():
        for file in (file for file in results if re.fullmatch(rf"{name}(-[\w-]+)?", file)):
            heading, *rest = make(results[file])
            parts += [
                f"{heading}{processor_class(name, file, results[file])}",
                *rest,
                source(results[file], file),
            ]
    return "\n\n".join(parts) + "\n"


def processor_class(name: str, file: str, result: Result) -> str:
    """Of the machine of one of several results, which no table mixes."""
    if file == name:
        return ""
    machine = result["machine"]
    masked = ", by settings" if machine.get("settings") else ""
    return f": {machine.get('instructions') or file.removeprefix(f'{name}-').upper()}{masked}"


def growth_sections(result: Result) -> list[str]:
    parts = ["## In short", "\n".join(prose(f"- {said}", "  ") for said in in_short(result))]
    for name, sweep in SWEEPS.items():
        if rows := of_sweep(result, name):
            parts += sweep_section(name, sweep, rows)
    return [*parts, *exponents(result), *roofs(result), *distances(result)]


def in_short(result: Result) -> list[str]:
    """Sentences that the figures make."""
    said: list[str] = []
    for op, (swept, usual) in standard(result).items():
        rows = [row for row in swept if row["sparsity"] == usual]
        best = min(fixed(rows), key=lambda row: row["seconds"])
        auto, single, half = (line(rows, name)[0] for name in ("auto", *BASELINES))
        said.append(
            f"{op} {auto['shape']} with {zeros(usual)} zeros: torch takes {milliseconds(single['seconds'])} ms in "
            f"float32 and {milliseconds(half['seconds'])} ms in bfloat16; the fastest kernel, "
            f"{code(best['kernel'])}, {milliseconds(best['seconds'])} ms with all that belongs to it; `auto` (here "
            f"{' and '.join(auto['chosen'])}) {milliseconds(auto['seconds'])} ms, which is "
            f"{auto['speedup_fp32']:.2f} times as fast as torch in float32 and {auto['speedup_bf16']:.2f} times as "
            "fast as torch in bfloat16."
        )
        skipping = kernels(row for row in fixed(rows) if "skip" in row["kernel"])
        crossed = "; ".join(f"`{kernel}` is {crossings(line(swept, kernel))}" for kernel in skipping)
        said.append(f"{op} {auto['shape']}: {crossed}.")
    swept = [of_sweep(result, name) for name in SWEEPS]
    lost = [
        row["seconds"] / fastest(rows)[row["at"]]["seconds"] for rows in swept for row in line(rows, "auto")
    ]
    said.append(
        f"Over all {len(lost)} points `auto` took {median(lost):.2f} times as long as the fastest fixed kernel in "
        f"the median, {max(lost):.2f} times as long at the worst."
    )
    return said


def crossings(rows: Sequence[Row]) -> str:
    """From how many zeros on a kernel is faster than torch's own, in both precisions."""
    said: list[str] = []
    for key, name in BASELINES.items():
        behind = [row["at"] for row in rows if row[f"spread_{key}"][0] <= 1]
        ahead = [place for place in places(rows) if place > max(behind, default=-math.inf)]
        if ahead:
            said.append(f"faster than {name} from {zeros(ahead[0])} zeros on")
        else:
            said.append(f"never, up to {zeros(rows[-1]['at'])} zeros, faster than {name}")
    return " and ".join(said)


def sweep_section(name: str, sweep: Sweep, rows: Sequence[Row]) -> list[str]:
    shapes, linear = list(dict.fromkeys(row["shape"] for row in rows)), rows[0]["op"] == "linear"
    order = "rows x outputs x inputs" if linear else "images x channels x height x width -> outputs"
    share = "" if sweep.shares else f", {zeros(rows[0]['sparsity'])} zeros"
    every, best, auto = places(rows), fastest(rows), line(rows, "auto")

    def where(key: str, way: int) -> Callable[[str], str]:
        """Where a kernel is faster, or with a negative way slower, than torch's own."""

        def show(kernel: str) -> str:
            spreads = {
                row["at"]: [way * (ratio - 1) for ratio in row[f"spread_{key}"]] for row in line(rows, kernel)
            }
            return sweep.spans(every, (place for place, spread in spreads.items() if min(spread) > 0))

        return show

    def leads(kernel: str) -> str:
        return sweep.spans(every, (place for place, row in best.items() if row["kernel"] == kernel))

    columns: Columns = {f"by {sweep.what}": code}
    for key, torchs in BASELINES.items():
        columns |= {f"faster than {torchs}": where(key, 1), f"slower than {torchs}": where(key, -1)}
    columns["fastest fixed kernel"] = lambda kernel: "" if kernel == "auto" else leads(kernel)
    chosen = {place["at"]: " and ".join(place["chosen"]) for place in auto}
    said = [
        f"{names} at {sweep.spans(every, (place for place in every if chosen[place] == names))}"
        for names in dict.fromkeys(chosen.values())
    ]
    return [
        f"## {sweep.heading}",
        prose(f"{rows[0]['op']} {' to '.join(dict.fromkeys((shapes[0], shapes[-1])))} ({order}){share}."),
        picture(
            name, f"Time of a call against {sweep.axis}, both axes logarithmic, a line for each variant."
        ),
        table(columns, [kernel for kernel in kernels(rows) if kernel not in BASELINES]),
        prose(f"Chosen by `auto`: {'; '.join(said)}."),
    ]


def exponents(result: Result) -> list[str]:
    def show(name: str) -> Callable[[str], str]:
        sweep = SWEEPS[name]

        def ends(kernel: str) -> str:
            found = sorted(line(of_sweep(result, name), kernel), key=lambda row: sweep.grows(row["at"]))
            half = (len(found) + 1) // 2
            if half < 2:
                return "–"
            return " → ".join(f"{growth(end, sweep):.2f}" for end in (found[:half], found[-half:]))

        return ends

    present = [name for name in SWEEPS if of_sweep(result, name)]
    columns: Columns = {"": code, **{name.replace("-", ": "): show(name) for name in present}}
    return [
        "## How the time grows",
        prose(
            "The exponent p for which time grows as the p-th power: on the left fitted to the half of the points "
            "with the least work, on the right to the half with the most. Arithmetic alone would give one for rows, "
            "two for width and channels, and for zeros (counted by what is left of δ̃) one for kernels that skip "
            "them and nought for the others. Smaller exponents show what does not grow with the work: starting "
            "threads, the passes over δ, reading and writing the operands."
        ),
        table(columns, kernels(result["rows"])),
    ]


def roofs(result: Result) -> list[str]:
    caches = [f"level {c['level']}: {c['size']}" for c in result["caches"] if c["type"] != "Instruction"]
    told = f" The caches of a core, as the system tells them: {', '.join(caches)}." if caches else ""
    found = result["roofs"]
    ways: dict[tuple[str, int | None], dict[str, float]] = {}
    for row in found["rates"]:
        ways.setdefault((row["how"], row["size"]), {})[row["precision"]] = row["rate"]

    def show(precision: str) -> Callable[[Any], str]:
        return lambda way: digits(ways[way][precision] / 1e9) if precision in ways[way] else "–"

    precisions = dict.fromkeys(row["precision"] for row in found["rates"])
    rates: Columns = {"Gop/s": lambda way: " of size ".join(map(str, filter(None, way)))}
    rates |= {precision: show(precision) for precision in precisions}
    copies: Columns = {"a copy that moves": at("bytes", mebibytes), "by": at("how")}
    copies["GB/s"] = at("rate", lambda speed: digits(speed / 1e9))
    parts = [
        "## The roofs of the machine",
        prose(
            "Measured by the same process before and after the sweeps, the best run of all. A multiply-add is two "
            "operations, and a Gop a thousand million of them. What a copy moves is what it reads and what it "
            f"writes. *In registers* are fused multiply-adds that touch no memory.{told}"
        ),
        table(rates, ways),
        table(copies, found["copies"], 2),
        "## The roofline",
        prose(
            "A point is a kernel at a shape: the operations that it executed (on non-zeros alone where it skips "
            "zeros) over the bytes that must move at the least (δ, x and W read once, dx and dW written once, in "
            "the types in which they come), and over its time, dithering included. Sloping lines are copies of "
            "three sizes, level ones the highest rates. A kernel that skips zeros goes down and to the left as "
            "zeros grow: it does less work for the same bytes."
        ),
    ]
    for op, heading in OPS.items():
        if any(row["op"] == op for row in result["rows"]):
            alt = f"{heading}: operations per second against operations per byte, with the machine's roofs."
            parts.append(picture(f"roofline-{op}", alt))
    return parts


def distances(result: Result) -> list[str]:
    """How far from the roof."""
    picked: list[Row] = []
    for swept, usual in standard(result).values():
        for share in dict.fromkeys((usual, swept[-1]["sparsity"])):
            picked += [row for row in swept if row["sparsity"] == share]
    columns: Columns = {
        "shape": lambda row: f"{row['op']} {row['shape']}",
        "zeros": at("sparsity", zeros),
        "kernel": at("kernel", code),
        "Gop": lambda row: digits(operations(row) / 1e9),
        "MB": lambda row: digits(row["bytes"] / 1e6),
        "ms": at("seconds", milliseconds),
        "least ms": lambda row: milliseconds(least(result, row)[0]),
        "bound by": lambda row: least(result, row)[1],
        "of the roof": lambda row: percent(reached(result, row)),
    }
    groups = {
        (op, kernel): sorted(line(rows, kernel), key=lambda row: reached(result, row))
        for op in OPS
        for rows in [[row for row in result["rows"] if row["op"] == op]]
        for kernel in kernels(rows)
    }
    overall: Columns = {
        "over all points": lambda key: key[0],
        "kernel": lambda key: code(key[1]),
        "least": lambda key: percent(reached(result, groups[key][0])),
        "median": lambda key: percent(median(reached(result, row) for row in groups[key])),
        "most": lambda key: percent(reached(result, groups[key][-1])),
        "most at": lambda key: f"{groups[key][-1]['shape']}, {zeros(groups[key][-1]['sparsity'])} zeros",
    }
    return [
        "## How far from the roof",
        prose(
            "The least time is that of the executed arithmetic at the highest rate of its precision, or that of the "
            "least traffic at the speed of a copy that moves as much, whichever is longer. Its share of the "
            "measured time is how much of the roof is reached. The rest is dithering, listing, packing, operands "
            "read more than once, and waiting."
        ),
        table(columns, picked, 3),
        table(overall, groups, 2),
    ]


def never_slower(result: Result) -> list[str]:
    rows = sorted(result["rows"], key=lambda row: -row["ratio_to_plain"])
    ratios = [row["ratio_to_plain"] for row in rows]
    columns: Columns = {
        "shape": lambda row: f"{row['op']} {row['shape']}",
        "declined": at("declined", lambda declined: "yes" if declined else "no"),
        "zeros": at("sparsity", zeros),
        "time to plain": at("ratio_to_plain", times),
        "predicted ms": at("predicted_seconds", milliseconds),
        "measured ms": at("measured_seconds", milliseconds),
    }
    drawn = picture("predicted", "Measured against predicted time, both axes logarithmic.")
    return [
        "## When a method declines",
        prose(
            "Where the cost model predicts that dithering and the fastest kernels would together take longer than "
            f"torch's own products, δ is left alone. Of {len(rows)} points that was so at "
            f"{sum(bool(row['declined']) for row in rows)}. The time was {times(median(ratios))} that of plain "
            f"backpropagation in the median and {times(ratios[0])} at the most; it was longer at "
            f"{sum(ratio > 1 for ratio in ratios)} points. Those with the highest ratios:"
        ),
        table(columns, rows[:WORST], 2),
        *([drawn] if predicted(result) else []),
    ]


def predicted(result: Result) -> list[Row]:
    return [row for row in result["rows"] if row["predicted_seconds"] and row["measured_seconds"]]


def decorrelate_overhead(result: Result) -> list[str]:
    rows = [row for row in result["rows"] if row["way"] != "plain"]
    columns: Columns = {
        "model": at("model"),
        "`Decorrelate`": lambda row: code(row["way"]) if "=" in row["way"] else row["way"],
        "ms of a step": at("step_ms", lambda ms: milliseconds(ms / 1e3)),
        "to plain": at("ratio", times),
        "settled": at("settled", times),
        "forecast": at("forecast", times),
    }
    return [
        "## What decorrelation adds to a step",
        prose(
            f"Whole training steps under AdamW, {result['rounds']} readings of {result['steps']} steps in turns with "
            "the plain model. *To plain* is the ratio of the sums, with all updates of R and their statistics in them; "
            "*settled* the median of the readings' ratios. Inputs are random walks, whose leading directions are few "
            "and stay; where they keep changing, R is learnt more often. *Forecast* is what the plan said of the "
            f"forward and backward pass beforehand, with a refresh every {result['steps']} steps."
        ),
        table(columns, rows, 2),
    ]


def bench_kernels(result: Result) -> list[str]:
    parts = [
        "## Kernels at the usual shapes",
        prose(
            "Milliseconds of a call. The ratios are those of `auto`, with their quartiles. Here δ is heavy-tailed: "
            "normal entries, each times a log-normal size."
        ),
    ]
    for op in OPS:
        rows = [row for row in result["rows"] if row["op"] == op]
        seconds = {(row["shape"], row["sparsity"], row["kernel"]): row["seconds"] for row in rows}
        columns: Columns = {op: at("shape"), "chosen": at("chosen"), "zeros": at("sparsity", zeros)}
        columns |= {name: at(f"seconds_{key}", milliseconds) for key, name in BASELINES.items()}
        for kernel in kernels(rows):
            columns[code(kernel)] = lambda row, kernel=kernel, seconds=seconds: milliseconds(
                seconds.get((row["shape"], row["sparsity"], kernel))
            )
        if rows:
            parts.append(table(columns | speedups(), line(rows, "auto"), 2))
    return parts


def bench_steps(result: Result) -> list[str]:
    rows = result["rows"]
    ahead = {key: sum((row[f"spread_{key}"] or (0,))[0] > 1 for row in rows) for key in BASELINES}
    columns: Columns = {
        "model": at("model"),
        "method": at("method"),
        "kernels that ran": at("chosen", lambda names: names or "–"),
        "zeros": at("sparsity", zeros),
        "ms": at("seconds", milliseconds),
        **{f"{name}, ms": at(f"seconds_{key}", milliseconds) for key, name in BASELINES.items()},
        **speedups(),
    }
    return [
        "## Whole training steps",
        prose(
            "Forward pass, backward pass and Adam, on random data, by every method at its defaults and by dithering "
            "at larger scales. Most of a step is not what the kernels speed up, and every method adds work of its "
            f"own. Of {len(rows)} rows {ahead['fp32']} are faster than torch in float32, {ahead['bf16']} faster than "
            "torch under bfloat16 autocast. Ratios are those of the medians, with the quartiles of the rounds' "
            "ratios."
        ),
        table(columns, rows, 3),
    ]


def gpu_kernels(result: Result) -> list[str]:
    """Whatever plain columns the rows have."""
    rows = result["rows"]
    filled = [(key, value) for row in rows for key, value in row.items() if value is not None]
    keys = dict.fromkeys(key for key, value in filled if not isinstance(value, list | dict))
    words = [key for key in keys if any(k == key and isinstance(value, str) for k, value in filled)]
    columns: Columns = {
        key.replace("seconds", "ms").replace("_", " "): lambda row, key=key: by_value(key, row.get(key))
        for key in dict.fromkeys([*words, *keys])
    }
    return ["## On a GPU", prose(f"{result['what']}."), table(columns, rows, max(1, len(words)))]


# The pictures.

WIDTH, HEIGHT = 800, 470
INK, FAINT, GRID = "#202124", "#5f6368", "#e3e5e8"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "x", "cross")
DASHES = ("dash", "dot")
_DRAWN = re.compile(r"\b((?:top)?defs-|clip|legend|trace)([0-9a-f]{6})")


@dataclass(frozen=True)
class Style:
    """Of one contestant, the same in all pictures."""

    colour: str
    symbol: str
    dash: str = "solid"
    width: float = 1.8

    @property
    def marker(self) -> dict[str, Any]:
        # Stars and triangles look smaller than they are.
        size = 7.5 if self.symbol in SYMBOLS[:3] else 9.5
        return {"color": self.colour, "symbol": self.symbol, "size": size}


def styles(rows: Sequence[Row]) -> dict[str, Style]:
    from retrograde.report.comparison import COLOURS

    baselines = zip(BASELINES, SYMBOLS, DASHES, strict=False)
    found = {key: Style(FAINT, f"{symbol}-open", dash) for key, symbol, dash in baselines}
    found["auto"] = Style(INK, "star", width=2.6)
    for place, kernel in enumerate(kernels(fixed(rows))):
        found[kernel] = Style(COLOURS[place % len(COLOURS)], SYMBOLS[place % len(SYMBOLS)])
    return found


def figures(results: dict[str, Result]) -> dict[str, "Figure"]:
    """All pictures by name."""
    found: dict[str, Figure] = {}
    if growing := results.get("kernel-growth"):
        look = styles(growing["rows"])
        for name, sweep in SWEEPS.items():
            if rows := of_sweep(growing, name):
                found[name] = sweep_figure(sweep, rows, look)
        for op in OPS:
            if any(row["op"] == op for row in growing["rows"]):
                found[f"roofline-{op}"] = roofline_figure(growing, op, look)
    if (declining := results.get("never-slower")) and predicted(declining):
        found["predicted"] = predicted_figure(predicted(declining))
    return found


def frame(figure: "Figure", x: str, y: str, height: int = HEIGHT) -> "Figure":
    """Axes and legend, which stands beside the plot."""
    axis = {
        "type": "log",
        "showline": True,
        "linecolor": INK,
        "ticks": "outside",
        "gridcolor": GRID,
        "zeroline": False,
    }
    figure.update_layout(
        template="none",
        width=WIDTH,
        height=height,
        font={"family": "Arial, Helvetica, sans-serif", "size": 14, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin={"l": 70, "r": 10, "t": 14, "b": 54},
        legend={"x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top", "font": {"size": 13}},
        showlegend=True,
    )
    figure.update_xaxes(title={"text": x, "font": {"size": 15}}, **axis)
    figure.update_yaxes(title={"text": y, "font": {"size": 15}}, **axis)
    return figure


def ticks(values: Iterable[float], steps: Sequence[int] = (1, 2, 5)) -> dict[str, list[Any]]:
    """Round numbers from below the values to above them."""
    found = sorted(values)
    first, last = (math.floor(math.log10(end)) for end in (found[0], found[-1]))
    round_ = [step * 10.0**k for k in range(first, last + 2) for step in steps]
    return {"tickvals": round_, "ticktext": [f"{value:,g}" for value in round_]}


def around(values: Iterable[float], room: float = 1.4) -> list[float]:
    """The range of a logarithmic axis."""
    found = sorted(values)
    return [math.log10(found[0] / room), math.log10(found[-1] * room)]


def sweep_figure(sweep: Sweep, rows: Sequence[Row], look: dict[str, Style]) -> "Figure":
    import plotly.graph_objects as go

    figure, every = go.Figure(), places(rows)
    # auto lies beneath the kernels that it follows.
    for kernel in sorted(kernels(rows), key=lambda name: name != "auto"):
        found, style = line(rows, kernel), look[kernel]
        figure.add_scatter(
            x=[sweep.grows(row["at"]) for row in found],
            y=[1e3 * row["seconds"] for row in found],
            error_y={
                "symmetric": False,
                "array": [1e3 * (row["quartiles"][1] - row["seconds"]) for row in found],
                "arrayminus": [1e3 * (row["seconds"] - row["quartiles"][0]) for row in found],
                "thickness": 1,
                "width": 3,
            },
            name=name_of(kernel),
            mode="lines" if kernel in BASELINES else "lines+markers",
            line={"color": style.colour, "dash": style.dash, "width": style.width},
            marker=style.marker,
            legendrank=kernels(rows).index(kernel),
        )
    frame(figure, sweep.axis, "time of a call (ms)")
    work, labels = [sweep.grows(place) for place in every], [sweep.label(place) for place in every]
    ends = around(work, 1.25)
    figure.update_xaxes(range=ends[::-1] if sweep.shares else ends, tickvals=work, ticktext=labels)
    spread = [1e3 * quartile for row in rows for quartile in row["quartiles"]]
    figure.update_yaxes(range=around(spread), **ticks(spread))
    return figure


def roofline_figure(result: Result, op: str, look: dict[str, Style]) -> "Figure":
    import plotly.graph_objects as go

    rows = [row for row in result["rows"] if row["op"] == op]
    across = {id(row): operations(row) / row["bytes"] for row in rows}
    up = {id(row): operations(row) / row["seconds"] / 1e9 for row in rows}
    peaks = {row["precision"]: rate(result, row["precision"]) / 1e9 for row in result["roofs"]["rates"]}
    copies = result["roofs"]["copies"]
    speeds = {copy["bytes"]: bandwidth(result, copy["bytes"]) / 1e9 for copy in copies}
    ends = around(across.values(), 1.6)
    # Names of the level lines stand to the left of these and need a fifth of the width.
    lowest = math.log10(min(peaks.values()) / max(speeds.values()))
    ends[0] = min(ends[0], (lowest - ends[1] / 5) / (1 - 1 / 5))
    left, right = (10**end for end in ends)
    figure = go.Figure()
    for name, peak in peaks.items():
        ridge = max(left, peak / max(speeds.values()))
        level = {"color": INK, "width": 1.2}
        figure.add_scatter(x=[ridge, right], y=[peak] * 2, mode="lines", line=level, showlegend=False)
        figure.add_annotation(
            x=math.log10(ridge),
            y=math.log10(peak),
            text=f"{name}: {digits(peak)} Gop/s ",
            showarrow=False,
            xanchor="right",
            yanchor="middle",
            font={"size": 12},
        )
    shown = dict.fromkeys(copy["bytes"] for copy in (copies[0], copies[len(copies) // 2], copies[-1]))
    for size, dash in zip(shown, ("solid", *DASHES), strict=False):
        end = min(right, max(peaks.values()) / speeds[size])
        figure.add_scatter(
            x=[left, end],
            y=[left * speeds[size], end * speeds[size]],
            mode="lines",
            line={"color": FAINT, "dash": dash, "width": 1.5},
            name=f"copy of {mebibytes(size)}:<br>{digits(speeds[size])} GB/s",
            legendrank=len(SYMBOLS) + 1000,
        )
    for kernel in kernels(rows):
        found = line(rows, kernel)
        figure.add_scatter(
            x=[across[id(row)] for row in found],
            y=[up[id(row)] for row in found],
            mode="markers",
            marker={**look[kernel].marker, "opacity": 0.85},
            name=name_of(kernel),
        )
    frame(figure, "operations executed per byte that must move", "Gop/s", HEIGHT + 60)
    heights = [*up.values(), *peaks.values()]
    figure.update_xaxes(range=ends, **ticks(across.values(), (1,)))
    figure.update_yaxes(range=around(heights, 1.8), **ticks(heights, (1,)))
    return figure


def predicted_figure(rows: Sequence[Row]) -> "Figure":
    import plotly.graph_objects as go

    from retrograde.report.comparison import COLOURS

    both = [1e3 * row[key] for row in rows for key in ("predicted_seconds", "measured_seconds")]
    ends, figure = around(both), go.Figure()
    same, dashed = [10**end for end in ends], {"color": FAINT, "dash": "dash", "width": 1.2}
    figure.add_scatter(x=same, y=same, mode="lines", line=dashed, name="as predicted")
    for declined, name in enumerate(("dithered", "declined")):
        found = [row for row in rows if bool(row["declined"]) == bool(declined)]
        figure.add_scatter(
            x=[1e3 * row["predicted_seconds"] for row in found],
            y=[1e3 * row["measured_seconds"] for row in found],
            mode="markers",
            marker={**Style(COLOURS[declined], SYMBOLS[declined]).marker, "opacity": 0.8},
            name=name,
        )
    frame(figure, "predicted time (ms)", "measured time (ms)", HEIGHT + 60)
    figure.update_xaxes(range=ends, **ticks(both))
    figure.update_yaxes(range=ends, **ticks(both))
    return figure


def draw(made: dict[str, "Figure"], folder: Path, page: str = "performance") -> None:
    """Every figure as an SVG named after its page, by Chromium."""
    from playwright.sync_api import sync_playwright
    from plotly.offline import get_plotlyjs

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("Chromium is needed to make the pictures: install the package chromium.")
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        sheet = browser.new_page()
        sheet.add_script_tag(content=get_plotlyjs())
        for name, figure in made.items():
            size = {"format": "svg", "width": figure.layout.width, "height": figure.layout.height}
            url = sheet.evaluate(
                "([spec, size]) => Plotly.toImage(JSON.parse(spec), size)", [figure.to_json(), size]
            )
            svg = unquote(url.split(",", 1)[1])
            # Identifiers are drawn at random, but the same results should make the same file.
            numbers: dict[str, int] = {}
            svg = _DRAWN.sub(lambda m, n=numbers: f"{m[1]}{n.setdefault(m[2], len(n))}", svg)
            (folder / f"{page}-{name}.svg").write_text(svg + "\n", encoding="utf-8")
        browser.close()


def load(folder: Path) -> dict[str, Result]:
    """The results that there are."""
    files = [file for name in RESULTS for file in sorted(folder.glob(f"{name}*.json"))]
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def is_stale(document: Path, made: str) -> bool:
    """Whether a document is to be made anew, which is printed, too."""
    stale = not document.is_file() or document.read_text(encoding="utf-8") != made
    print(f"{document.name} {'is to be made anew' if stale else 'is up to date'}")
    return stale


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    results, document = load(options.results), options.out / PAGE
    text = page(results)
    if options.check:
        return int(is_stale(document, text))
    if made := figures(results):
        draw(made, options.out / "pictures")
    document.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

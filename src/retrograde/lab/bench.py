"""What backward passes take against torch's in float32 and under bfloat16 autocast: kernels, layers, whole steps."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from retrograde.lab import contestants
from retrograde.lab.contestants import Contestant, Convolution, Linear, Shape, Work, Workload
from retrograde.lab.models import GPT, MLP, VGG
from retrograde.lab.options import make
from retrograde.lab.recipe import Recipe
from retrograde.methods.dither import Dither
from retrograde.session import Session

Progress = Callable[[str, int, int], None]
"""Called with (what, runs done, runs in all)."""

SHAPES: tuple[Shape, ...] = (
    Linear(512, 1024, 1024),
    Linear(4096, 512, 512),
    Convolution(64, 128, 16, 128, 3),
    Convolution(64, 64, 32, 64, 3),
    Convolution(64, 64, 32, 128, 3, stride=2),
    Convolution(64, 256, 16, 128, 1),
    Convolution(64, 128, 16, 128, 3, groups=8),
)
QUICK_SHAPES = (SHAPES[0], SHAPES[2])
SPARSITIES = (0.8, 0.92, 0.98)
SCALE = 2.0
"""Of dithering in `layers`."""
WARMUPS = 1
"""Rounds that do not count."""


@dataclass(frozen=True)
class Row:
    """One contestant against both baselines, which ran in the same rounds.

    Attributes:
        op: ``"linear"``, ``"conv"`` or ``"step"``.
        shape: of the product, or of a step's batch.
        sparsity: share of zeros in δ̃.
        kernel: a fixed one, or ``"auto"``.
        seconds: median over the rounds.
        speedup_fp32: how many times as fast as float32: for kernels and layers the median of the rounds' ratios, for
            steps the ratio of the medians.
        speedup_bf16: the same against bfloat16 autocast.
        spread_fp32: first and third quartile of the rounds' ratios.
        spread_bf16: the same against bfloat16 autocast.
        seconds_fp32: median of the baseline.
        seconds_bf16: median of the baseline.
        chosen: kernels that ran under ``"auto"``, the most frequent first.
        model: of a step.
        method: of a layer or step.
    """

    op: str
    shape: str
    sparsity: float | None
    kernel: str
    seconds: float
    speedup_fp32: float
    speedup_bf16: float
    spread_fp32: tuple[float, float]
    spread_bf16: tuple[float, float]
    seconds_fp32: float
    seconds_bf16: float
    chosen: str | None = None
    model: str | None = None
    method: str | None = None


def workloads(part: int = 1) -> dict[str, Workload]:
    """The models of ``bench steps``, with batches of one part in so many."""
    mlp, gpt, images = 512 // part, 16 // part, 128 // part
    return {
        "mlp": Workload(lambda: MLP((784,), 10, (4096, 4096)), (mlp, 784), (mlp,), 10),
        "gpt": Workload(lambda: GPT(256, 128, width=512, heads=8), (gpt, 128), (gpt, 128), 256, tokens=256),
        "vgg-small": Workload(lambda: VGG((3, 32, 32), 10), (images, 3, 32, 32), (images,), 10),
    }


def settings(names: Sequence[str], warmup: int) -> dict[str, Contestant]:
    """Contestants by label: at `Method.benchmarks` in float32, at their defaults, and under autocast, each once.

    Args:
        names: of methods.
        warmup: steps of it for methods that warm up: they run plain ones until then.
    """
    found: dict[str, Contestant] = {}
    for name in names:
        method = make(name)
        shortened = {"warmup": warmup} if hasattr(method, "warmup") else {}
        chosen = {
            "float32": (*method.benchmarks.get("float32", ()), {}),
            "bfloat16": method.benchmarks.get("bfloat16", ()),
        }
        for precision, choices in chosen.items():
            for given in choices:
                options = {**given, **shortened}
                contestant = Contestant(make(name, options), precision)
                if contestant not in found.values():
                    over = "" if precision == "float32" else f" under {precision}"
                    found[Recipe(methods={name: options}).label + over] = contestant
    return found


# Timing.


@dataclass(frozen=True)
class Speedup:
    """How many times as fast as a baseline.

    Attributes:
        ratio: median over rounds of the baseline's seconds divided by the contestant's.
        quartiles: first and third, of these ratios.
        of_medians: the baseline's median seconds divided by the contestant's.
    """

    ratio: float
    quartiles: tuple[float, float]
    of_medians: float


@dataclass(frozen=True)
class Times:
    """Seconds of each contestant, round by round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Of a contestant."""
        return median(self.seconds[name])

    def speedup(self, name: str, baseline: str) -> Speedup:
        """Of a contestant against another that ran in the same rounds."""
        pairs = zip(self.seconds[baseline], self.seconds[name], strict=True)
        ratios = [theirs / mine for theirs, mine in pairs]
        low, middle, high = quantiles(ratios if len(ratios) > 1 else ratios * 2, method="inclusive")
        return Speedup(middle, (low, high), self.median(baseline) / self.median(name))


def interleave(
    runs: Mapping[str, Work],
    rounds: int,
    *,
    warmups: int = WARMUPS,
    clock: Callable[[], float] = time.perf_counter,
    tick: Callable[[], None] = lambda: None,
) -> Times:
    """Time every contestant once in each round: whatever the machine does meanwhile, it does to all of them.

    Every other round is run in reverse, which cancels a steady drift and changes who finds whose data in the caches.

    Args:
        runs: contestants by name.
        rounds: that count, 1 or more.
        warmups: rounds before those.
        clock: seconds.
        tick: called after every run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-warmups, rounds):
        order = list(runs.items())
        for name, run in reversed(order) if number % 2 else order:
            start = clock()
            run()
            took = clock() - start
            if number >= 0:
                seconds[name].append(took)
            tick()
    return Times(seconds)


class _Counter:
    """Runs of all contestants together."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self.what = ""

    def tick(self) -> None:
        self._done += 1
        self._progress(self.what, self._done, self._total)


# The three benchmarks.


def kernels(
    shapes: Sequence[Shape],
    sparsities: Sequence[float],
    rounds: int,
    progress: Progress = lambda what, done, total: None,
) -> list[Row]:
    """Both backward products of a layer from δ on: every fixed kernel, and what is chosen."""
    each = sum(len(_contending(shape)) + 2 for shape in shapes) * len(sparsities)
    counter = _Counter(progress, each * (rounds + WARMUPS))
    rows: list[Row] = []
    for shape in shapes:
        layer, x, delta = contestants.operands(shape)
        weight = layer.get_parameter("weight").detach()
        for sparsity in sparsities:
            counter.what = f"{shape.op} {shape} at {sparsity:.0%}"
            scale = contestants.scale_for(delta, sparsity)
            runs = contestants.products(shape, weight, x, delta, scale)
            times = interleave(runs, rounds, tick=counter.tick)
            chosen = {
                name: _names(Counter(work.kernel for work in run()))
                for name, run in contestants.chosen(shape, weight, x, delta, scale).items()
            }
            for name in _contending(shape):
                facts = {"op": shape.op, "shape": str(shape), "sparsity": sparsity}
                rows.append(_row(times, name, facts, kernel=name, chosen=chosen.get(name)))
    return rows


def _contending(shape: Shape) -> tuple[str, ...]:
    """Names of all but the baselines."""
    after = (contestants.AFTER_INT8,) if isinstance(shape, Linear) else ()
    return (*contestants.kernels_for(shape), "auto", *after)


def layers(
    shapes: Sequence[Shape], rounds: int, progress: Progress = lambda what, done, total: None
) -> list[Row]:
    """Forward and backward pass of a dithered layer."""
    counter = _Counter(progress, 3 * len(shapes) * (rounds + WARMUPS))
    method = Dither(scale=SCALE)
    label = Recipe(methods={"dither": {"scale": SCALE}}).label
    rows: list[Row] = []
    for shape in shapes:
        counter.what = f"{shape.op} {shape}"
        runs, session = contestants.passes(shape, method)
        times = interleave(runs, rounds, tick=counter.tick)
        facts = {"op": shape.op, "shape": str(shape), "kernel": "auto", "method": label}
        rows.append(_row(times, "auto", facts, **_seen(session)))
    return rows


def steps(
    workloads: Mapping[str, Workload],
    methods: Sequence[str],
    rounds: int,
    progress: Progress = lambda what, done, total: None,
) -> list[Row]:
    """Whole training steps with Adam, by every method at its defaults and at `Method.benchmarks`.

    Methods that warm up do so in the round that does not count.
    """
    chosen = settings(methods, WARMUPS)
    counter = _Counter(progress, len(workloads) * (len(chosen) + 2) * (rounds + WARMUPS))
    rows: list[Row] = []
    for name, workload in workloads.items():
        counter.what = name
        runs, sessions = contestants.steps(workload, chosen)
        times = interleave(runs, rounds, tick=counter.tick)
        shape = "x".join(map(str, workload.input_shape))
        for label, session in sessions.items():
            facts = {"op": "step", "shape": shape, "kernel": "auto", "model": name, "method": label}
            rows.append(_row(times, label, facts, of_medians=True, **_seen(session)))
    return rows


def _row(times: Times, name: str, facts: dict[str, Any], *, of_medians: bool = False, **more: Any) -> Row:
    single, half = times.speedup(name, "fp32"), times.speedup(name, "bf16")
    return Row(
        seconds=times.median(name),
        speedup_fp32=single.of_medians if of_medians else single.ratio,
        speedup_bf16=half.of_medians if of_medians else half.ratio,
        spread_fp32=single.quartiles,
        spread_bf16=half.quartiles,
        seconds_fp32=times.median("fp32"),
        seconds_bf16=times.median("bf16"),
        **facts,
        **more,
    )


def _seen(session: Session) -> dict[str, Any]:
    """Share of zeros, and the kernels that ran."""
    metrics = session.metrics()
    shares: Counter[str] = Counter()
    for layer in metrics["layers"].values():
        for name, share in layer.items():
            if name.startswith("kernel_"):
                shares[name.removeprefix("kernel_")] += share
    return {"sparsity": metrics["zeros"], "chosen": _names(shares)}


def _names(counts: "Counter[str]") -> str:
    return ", ".join(name for name, _ in counts.most_common())

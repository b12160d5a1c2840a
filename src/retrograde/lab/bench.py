"""What backward passes take against torch's in float32 and under bfloat16 autocast: kernels, layers, whole steps."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retrograde.lab import contestants, timing
from retrograde.lab.contestants import Contestant, Convolution, Linear, Shape, Work, Workload
from retrograde.lab.models.convolutional import VGG
from retrograde.lab.models.mlp import MLP
from retrograde.lab.models.transformer import GPT
from retrograde.lab.options import make
from retrograde.lab.precisions import Precision
from retrograde.lab.recipe import Recipe
from retrograde.lab.timing import WARMUPS, Times, interleave
from retrograde.methods.dither import Dither
from retrograde.session import Session

Progress = Callable[[str, float, float], None]
"""Called with (what, cells done, cells in all); a cell is what takes its turns together."""

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
BASELINES = {"fp32": "torch in float32", "bf16": "torch in bfloat16"}


@dataclass(frozen=True)
class Limits:
    """How long a benchmark may take.

    Attributes:
        rounds: that count, in each cell.
        seconds: shared out among the cells; where they are spent there are fewer rounds, at least one; None: no limit.
    """

    rounds: int
    seconds: float | None = None


@dataclass(frozen=True)
class Dropped:
    """A variant that was not run, or not run again, because it loses by `DROPPED_AT` times or more.

    Attributes:
        what: the shape or model.
        variant: its name.
        ratio: its time over float32's.
        seen: where: in the first round, or in a small product of the same precision, before it was run at all.
    """

    what: str
    variant: str
    ratio: float
    seen: str


@dataclass(frozen=True)
class Row:
    """One variant against both baselines, which ran in the same rounds.

    Attributes:
        op: ``"linear"``, ``"conv"`` or ``"step"``.
        shape: of the product, or of a step's batch.
        sparsity: share of zeros in δ̃.
        kernel: a fixed one, or ``"auto"``.
        seconds: median over the rounds.
        speedup_fp32: how many times as fast as float32: for kernels and layers the median of the rounds' ratios, for
            steps the ratio of the medians.
        speedup_bf16: the same against bfloat16 autocast; None where that was dropped.
        spread_fp32: first and third quartile of the rounds' ratios.
        spread_bf16: the same against bfloat16 autocast.
        seconds_fp32: median of the baseline.
        seconds_bf16: median of the baseline.
        rounds: that were made.
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
    speedup_bf16: float | None
    spread_fp32: tuple[float, float]
    spread_bf16: tuple[float, float] | None
    seconds_fp32: float
    seconds_bf16: float | None
    rounds: int
    chosen: str | None = None
    model: str | None = None
    method: str | None = None

    @property
    def what(self) -> str:
        """The model, or the layer's kind and shape."""
        return self.model or f"{self.op} {self.shape}"


def workloads(part: int = 1) -> dict[str, Workload]:
    """The models of ``bench steps``, with batches of one part in so many."""
    mlp, gpt, images = 512 // part, 16 // part, 128 // part
    return {
        "mlp": Workload(lambda: MLP((784,), 10, (4096, 4096)), (mlp, 784), (mlp,), 10),
        "gpt": Workload(lambda: GPT(256, 128, width=512, heads=8), (gpt, 128), (gpt, 128), 256, tokens=256),
        "vgg-small": Workload(lambda: VGG((3, 32, 32), 10), (images, 3, 32, 32), (images,), 10),
    }


def settings(names: Sequence[str], warmup: int) -> dict[str, Contestant]:
    """Variants by label: at `Method.benchmarks` in float32, at their defaults, and under autocast, each once.

    Args:
        names: of methods.
        warmup: steps of it for methods that warm up: they run plain ones until then.
    """
    found: dict[str, Contestant] = {}
    for name in names:
        method = make(name)
        shortened = {"warmup": warmup} if hasattr(method, "warmup") else {}
        for precision, defaults in (("float32", ({},)), ("bfloat16", ())):
            for given in (*method.benchmarks.get(precision, ()), *defaults):
                options = {**given, **shortened}
                contestant = Contestant(make(name, options), precision)
                if contestant not in found.values():
                    over = "" if precision == "float32" else f" under {precision}"
                    found[Recipe(methods={name: options}).label + over] = contestant
    return found


_LOSES_BY = timing.DROPPED_AT
"""In a small product: a precision that takes so many times as long as float32 is not run."""


class Measured:
    """The cells of a benchmark one after the other: their rows, and what has none.

    Args:
        limits: rounds and time.
        progress: told of it.
        slow: what `precisions.measure` found: variants whose precision loses by far there are not run.
    """

    def __init__(
        self,
        limits: Limits,
        progress: Progress = lambda what, done, total: None,
        slow: Sequence[Precision] = (),
    ) -> None:
        self._limits, self._progress, self._slow = limits, progress, slow
        self.rows: list[Row] = []
        self.dropped: list[Dropped] = []

    def begin(self, cells: int) -> None:
        """So many will follow."""
        self._cells, self._cell, self._begun = cells, 0, time.perf_counter()

    def time(self, what: str, op: str, runs: Mapping[str, Work]) -> Times:
        """All variants of a cell that are worth it."""
        slow = {name: one for name in runs if (one := self._too_slow(name, op))}
        running = {name: run for name, run in runs.items() if name not in slow}
        done, total = 0, len(running) * (self._limits.rounds + WARMUPS)

        def tick() -> None:
            nonlocal done
            done += 1
            self._progress(what, self._cell + done / total, self._cells)

        times = interleave(running, self._limits.rounds, against="fp32", seconds=self._share(), tick=tick)
        self._cell += 1
        self._progress(what, self._cell, self._cells)
        lost = {name: (1 / one.ratio, f"in a product of {one.shape}") for name, one in slow.items()}
        lost |= {name: (ratio, "in the first round") for name, ratio in times.dropped.items()}
        self.dropped += [Dropped(what, BASELINES.get(name, name), *why) for name, why in lost.items()]
        return times

    def add(self, times: Times, name: str, facts: dict[str, Any], *, of_medians: bool = False) -> None:
        """A variant's row, unless it was dropped."""
        if name not in times.seconds or name in times.dropped:
            return
        single = times.speedup(name, "fp32")
        with_half = "bf16" in times.seconds and "bf16" not in times.dropped
        half = times.speedup(name, "bf16") if with_half else None
        self.rows.append(
            Row(
                seconds=times.median(name),
                speedup_fp32=single.of_medians if of_medians else single.ratio,
                speedup_bf16=(half.of_medians if of_medians else half.ratio) if half else None,
                spread_fp32=single.quartiles,
                spread_bf16=half.quartiles if half else None,
                seconds_fp32=times.median("fp32"),
                seconds_bf16=times.median("bf16") if half else None,
                rounds=times.rounds,
                **facts,
            )
        )

    def _share(self) -> float | None:
        """Of the seconds that are left, this cell's."""
        if self._limits.seconds is None:
            return None
        left = self._limits.seconds - (time.perf_counter() - self._begun)
        return max(0.0, left / (self._cells - self._cell))

    def _too_slow(self, name: str, op: str) -> Precision | None:
        """What was measured of the precision that a variant multiplies in, where that loses by far."""
        found = (one for one in self._slow if one.name == _precision(name) and 1 / one.ratio >= _LOSES_BY)
        # torch multiplies integers in linear layers alone.
        return next((one for one in found if one.op == op or one.name == "int8"), None)


def _precision(name: str) -> str | None:
    """The one that a variant multiplies in throughout, where it is not float32 and nothing chooses it."""
    if name == "bf16":
        return "bfloat16"
    for precision in ("bfloat16", "int8"):
        if name == precision or f"under {precision}" in name or f"forward={precision}" in name:
            return precision
    return None


# The three benchmarks.


def kernels(shapes: Sequence[Shape], sparsities: Sequence[float], measured: Measured) -> Measured:
    """Both backward products of a layer from δ on: every fixed kernel, and what is chosen.

    Args:
        shapes: of the layers.
        sparsities: shares of zeros in δ̃.
        measured: what takes the rows.

    Returns:
        `measured`.
    """
    measured.begin(len(shapes) * len(sparsities))
    for shape in shapes:
        layer, x, delta = contestants.operands(shape)
        weight = layer.get_parameter("weight").detach()
        for sparsity in sparsities:
            scale = contestants.scale_for(delta, sparsity)
            runs = contestants.products(shape, weight, x, delta, scale)
            times = measured.time(f"{shape.op} {shape} at {sparsity:.0%}", shape.op, runs)
            chosen = {
                name: _names(Counter(work.kernel for work in run()))
                for name, run in contestants.chosen(shape, weight, x, delta, scale).items()
            }
            for name in list(runs)[len(BASELINES) :]:
                facts = {"op": shape.op, "shape": str(shape), "sparsity": sparsity}
                measured.add(times, name, {**facts, "kernel": name, "chosen": chosen.get(name)})
    return measured


def layers(shapes: Sequence[Shape], measured: Measured) -> Measured:
    """Forward and backward pass of a dithered layer; arguments as of `kernels`."""
    measured.begin(len(shapes))
    method = Dither(scale=SCALE)
    label = Recipe(methods={"dither": {"scale": SCALE}}).label
    for shape in shapes:
        runs, session = contestants.passes(shape, method)
        times = measured.time(f"{shape.op} {shape}", shape.op, runs)
        facts = {"op": shape.op, "shape": str(shape), "kernel": "auto", "method": label}
        measured.add(times, "auto", {**facts, **_seen(session)})
    return measured


def steps(workloads: Mapping[str, Workload], methods: Sequence[str], measured: Measured) -> Measured:
    """Whole training steps with Adam, by every method at its defaults and at `Method.benchmarks`.

    Methods that warm up do so in the round that does not count. Arguments as of `kernels`.
    """
    chosen = settings(methods, WARMUPS)
    measured.begin(len(workloads))
    for name, workload in workloads.items():
        runs, sessions = contestants.steps(workload, chosen)
        # Of a network for images convolutions take most of the time.
        times = measured.time(name, "conv" if len(workload.input_shape) == 4 else "linear", runs)
        shape = "x".join(map(str, workload.input_shape))
        for label, session in sessions.items():
            if label in times.seconds:
                facts = {"op": "step", "shape": shape, "kernel": "auto", "model": name, "method": label}
                measured.add(times, label, {**facts, **_seen(session)}, of_medians=True)
    return measured


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

"""How the time of a backward pass's products grows with the batch, the width and the zeros, and the machine's roofs.

    python repro/kernel_growth.py [--quick] [--rounds 25] [--threads N] [--out FILE]

At every point of five sweeps all contestants of ``retrograde bench kernels`` take turns, round by round: every kernel
and the choice among them, each with dithering's statistics and noise and with all listing, packing and rounding, and
torch's own pair of products in float32 and in bfloat16. Beside the seconds stand the multiply-adds that were executed,
by precision, and the bytes that must move at the least: every operand read once and every result written once.

Before and after the sweeps the same process measures what the machine can do: rates of torch's largest products,
fused multiply-adds in registers, and copies from the size of a cache to the size of memory. The best run counts.

Writes ``results/kernel-growth.json``, from which ``docs/make_performance.py`` makes ``docs/performance.md``. With
``--quick`` a few tiny points in seconds, to see that it runs; that writes nothing unless ``--out`` says where.

Results: results/kernel-growth.json
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, set_num_threads, types
from numba.core import cgutils
from numba.extending import intrinsic
from reports import RESULTS, arguments, head
from torch import Tensor

from retrograde.kernels import linear
from retrograde.kernels.rehearse import rehearse
from retrograde.lab import contestants, files
from retrograde.lab.contestants import Convolution, Linear, Shape
from retrograde.lab.timing import interleave

RESULT = RESULTS / "kernel-growth.json"
ROUNDS, QUICK_ROUNDS = 25, 2
USUAL = 0.92
"""Zeros where something else is varied."""
ZEROS = (0.0, 0.3, 0.6, 0.8, 0.92, 0.96, 0.98, 0.99, 0.995)
FLOOR = 0.05
"""Least magnitude of an entry of δ in standard deviations: at the smallest step of 8-bit levels none becomes zero."""


@dataclass(frozen=True)
class Point:
    """One shape at one share of zeros; `at` is its place on the sweep's axis."""

    at: float
    shape: Shape
    sparsity: float


def sweeps(quick: bool) -> dict[str, list[Point]]:
    """All that is measured."""
    zeros = (0.0, 0.92) if quick else ZEROS
    rows = (32, 64) if quick else tuple(2**k for k in range(5, 14))
    widths = (128, 256) if quick else tuple(2**k for k in range(7, 13))
    channels = (16,) if quick else (16, 32, 64, 128, 256)
    plain = Linear(64, 128, 128) if quick else Linear(512, 1024, 1024)
    images = Convolution(2, 16, 8, 16, 3) if quick else Convolution(64, 128, 16, 128, 3)
    return {
        "rows": [Point(n, Linear(n, plain.outputs, plain.inputs), USUAL) for n in rows],
        "width": [Point(w, Linear(plain.rows, w, w), USUAL) for w in widths],
        "zeros": [Point(share, plain, share) for share in zeros],
        "convolution-channels": [
            Point(c, Convolution(images.images, c, images.side, c, 3), USUAL) for c in channels
        ],
        "convolution-zeros": [Point(share, images, share) for share in zeros],
    }


# The products.


def gradient(like: Tensor) -> Tensor:
    """δ with normal entries, none of them nearly zero: dithering can leave any share of zeros, none included."""
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(0))
    return drawn.abs().clamp_min_(FLOOR).copysign_(drawn).mul_(1e-3)


def measure(sweep: str, point: Point, rounds: int) -> list[dict[str, Any]]:
    """Every contestant at one point."""
    shape = point.shape
    layer, x, like = contestants.operands(shape)
    weight, delta = layer.get_parameter("weight").detach(), gradient(like)
    scale = contestants.scale_for(delta, point.sparsity)
    times = interleave(contestants.products(shape, weight, x, delta, scale), rounds)
    levels = contestants.dithered(delta, scale)
    everything = delta.numel() * weight[0].numel()
    needed = (delta.numel() - levels.zeros) * weight[0].numel()
    chosen = shape.chosen(levels, x, weight)
    # δ, x and the weight are read, gradients of the latter two written.
    numbers = delta.numel() + 2 * x.numel() + 2 * weight.numel()

    def work(name: str) -> dict[str, int]:
        """Multiply-adds of both products, by precision."""
        if name == "auto":
            counts: Counter[str] = Counter()
            for how in chosen:
                counts[precision(how.kernel)] += round(how.executed / 2)
            return dict(counts)
        return {precision(name): 2 * (needed if name in linear.SKIPPING else everything)}

    rows: list[dict[str, Any]] = []
    for name in times.seconds:
        single, half = times.speedup(name, "fp32"), times.speedup(name, "bf16")
        rows.append(
            {
                "sweep": sweep,
                "at": point.at,
                "op": shape.op,
                "shape": str(shape),
                "sparsity": point.sparsity,
                "zeros": levels.zeros / delta.numel(),
                "kernel": name,
                "chosen": list(dict.fromkeys(how.kernel for how in chosen)) if name == "auto" else None,
                "seconds": times.median(name),
                "quartiles": np.quantile(times.seconds[name], (0.25, 0.75)).tolist(),
                "speedup_fp32": single.ratio,
                "spread_fp32": single.quartiles,
                "speedup_bf16": half.ratio,
                "spread_bf16": half.quartiles,
                "multiply_adds": work(name),
                "bytes": numbers * (2 if name == "bf16" else 4),
            }
        )
    return rows


def precision(kernel: str) -> str:
    """What a kernel multiplies in; skipping ones widen what they hold in bfloat16."""
    if kernel == "bf16":
        return "bfloat16"
    return "float32" if kernel in linear.SKIPPING else linear.PRECISION.get(kernel, "float32")


# The machine.

_LANES, _SUMS = 16, 12
"""Numbers in a vector, and independent sums: enough to hide an instruction's latency."""


@intrinsic
def _fused(typingctx: Any, out: Any, count: Any) -> Any:
    """`count` fused multiply-adds on each of some vectors that stay in registers; their sum goes to the address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, count = arguments
        vector, i64 = ir.VectorType(ir.FloatType(), _LANES), ir.IntType(64)
        kind = ir.FunctionType(vector, [vector] * 3)
        fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{_LANES}f32")
        # Every sum tends to two: neither overflow nor denormal numbers.
        half, one = ir.Constant(vector, [0.5] * _LANES), ir.Constant(vector, [1.0] * _LANES)
        before, loop = builder.block, builder.append_basic_block("loop")
        done = builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k, sums = builder.phi(i64), [builder.phi(vector) for _ in range(_SUMS)]
        results = [builder.call(fma, [total, half, one]) for total in sums]
        following = builder.add(k, ir.Constant(i64, 1))
        for place, (total, result) in enumerate(zip(sums, results, strict=True)):
            total.add_incoming(ir.Constant(vector, [float(place)] * _LANES), before)
            total.add_incoming(result, loop)
        k.add_incoming(ir.Constant(i64, 0), before)
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
        builder.position_at_end(done)
        total = results[0]
        for result in results[1:]:
            total = builder.fadd(total, result)
        builder.store(total, builder.inttoptr(out, vector.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@njit(parallel=True, nogil=True)
def _multiply_in_registers(count: int, out: Any) -> None:
    for thread in prange(out.shape[0]):
        _fused(out.ctypes.data + 4 * thread * out.shape[1], count)


@njit(parallel=True, nogil=True)
def _copy_to_and_fro(there: Any, back: Any, times: int) -> None:
    # Each thread keeps to its own part, which stays in its own cache if it fits.
    for thread in prange(there.shape[0]):
        for turn in range(times):
            if turn % 2:
                back[thread, :] = there[thread]
            else:
                there[thread, :] = back[thread]


class Roofs:
    """What the machine can do at the best; every call of `measure` may raise it."""

    def __init__(self, quick: bool) -> None:
        self._repeats = 1 if quick else 6
        self._products = (256,) if quick else (1024, 2048, 4096)
        self._copies = tuple(2**k for k in ((20, 22) if quick else (*range(20, 27), 28, 31)))
        self._spins = 2**14 if quick else 2**24
        self._best: dict[tuple[str, str, int], float] = {}

    def measure(self) -> None:
        """All rates once more."""
        for size in self._products:
            factor, other = torch.randn(size, size), torch.randn(size, size)
            whole = [torch.randint(-100, 100, (size, size), dtype=torch.int8) for _ in range(2)]
            halves = factor.bfloat16(), other.bfloat16()
            work = 2 * size**3
            self._record("float32", "torch product", size, work, lambda a=factor, b=other: a @ b)
            self._record("bfloat16", "torch product", size, work, lambda a=halves[0], b=halves[1]: a @ b)
            self._record(
                "int8", "torch product", size, work, lambda a=whole[0], b=whole[1]: torch._int_mm(a, b)
            )
        threads = torch.get_num_threads()
        # Starting its threads, numba would change torch's number of them.
        set_num_threads(threads)
        torch.set_num_threads(threads)
        sums = np.empty((threads, 4 * _LANES), np.float32)
        spun = 2 * _LANES * _SUMS * self._spins * threads
        self._record("float32", "in registers", 0, spun, lambda: _multiply_in_registers(self._spins, sums))
        for moved in self._copies:
            there, back = (np.zeros((threads, moved // 8 // threads), np.float32) for _ in range(2))
            times = max(1, 2**26 // moved)
            self._record(
                "bytes",
                "copy",
                moved,
                moved * times,
                lambda a=there, b=back, n=times: _copy_to_and_fro(a, b, n),
            )
            one, two = torch.from_numpy(there), torch.from_numpy(back)
            self._record("bytes", "torch copy", moved, moved, lambda a=one, b=two: a.copy_(b))

    def _record(self, what: str, how: str, size: int, work: int, run: Callable[[], object]) -> None:
        run()
        for _ in range(self._repeats):
            start = time.perf_counter()
            run()
            rate = work / (time.perf_counter() - start)
            self._best[what, how, size] = max(rate, self._best.get((what, how, size), 0.0))

    def found(self) -> dict[str, list[dict[str, Any]]]:
        """Operations a second by precision, and bytes a second, read and written together, by how many are moved."""
        rates: list[dict[str, Any]] = []
        copies: dict[int, dict[str, Any]] = {}
        for (what, how, size), rate in self._best.items():
            if what != "bytes":
                rates.append({"precision": what, "how": how, "size": size or None, "rate": rate})
            elif size not in copies or copies[size]["rate"] < rate:
                copies[size] = {"bytes": size, "how": how, "rate": rate}
        return {"rates": rates, "copies": list(copies.values())}


def caches() -> Iterator[dict[str, Any]]:
    """Of one core, as Linux tells them."""
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        found = {name: (folder / name).read_text().strip() for name in ("level", "type", "size")}
        yield {**found, "level": int(found["level"])}


def main() -> None:
    """Measure all, and write."""
    parser = arguments(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help=f"default: results/{RESULT.name}; none with --quick")
    options = parser.parse_args()
    rounds: int = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    out: Path | None = options.out or (None if options.quick else RESULT)
    torch.set_num_threads(options.threads)
    report = head("kernels of a backward pass against batch, width, channels and zeros; roofs of the machine")
    began = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {what}", file=sys.stderr, flush=True)

    say("the kernels: compiled now if they are not yet")
    rehearse()
    say("roofs")
    roofs = Roofs(options.quick)
    roofs.measure()
    rows: list[dict[str, Any]] = []
    for sweep, points in sweeps(options.quick).items():
        for point in points:
            say(f"{sweep}: {point.shape} at {point.sparsity:.1%}")
            rows += measure(sweep, point, rounds)
    say("roofs")
    roofs.measure()
    say("done")
    report |= {
        "rounds": rounds,
        "seconds": time.perf_counter() - began,
        "caches": list(caches()),
        "roofs": roofs.found(),
        "rows": rows,
    }
    if out is None:
        print(files.to_json(report["roofs"], indent=2))
    else:
        files.write_json(out, report)


if __name__ == "__main__":
    main()

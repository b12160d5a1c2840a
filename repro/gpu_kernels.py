"""The CUDA kernels of dithered backpropagation on a GPU: first whether they are right, then what they are worth.

    python repro/gpu_kernels.py [--rounds 30] [--no-tiles] [--out FILE]

Made for one data-centre GPU (H100, H200); takes a few minutes there, most of them compilation. What is checked: levels
bit for bit against the CPU's reference, products against float64, and that a second run repeats the first. A failed
check ends the script before anything is measured.

What is measured is a linear layer's backward pass, dx = δ W and dW = δᵀ x: in float32 (TF32 allowed), in bfloat16, in
bfloat16 under ``torch.compile``, and by each kernel from given levels, with zeros here and there or row by row. The
contestants take turns, so that whatever else the machine does hits all alike; ratios are those of one round. *Whole*
counts the passes of dithering along, with their waits for the host; a kernel whose whole does not win is marked
declined. Writes ``results/gpu-kernels.json``.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrograde.kernels import reference
from retrograde.lab import files, machine
from retrograde.maths import dither
from retrograde.maths.philox import mix_key

RESULT = Path(__file__).parent.parent / "results" / "gpu-kernels.json"
SHAPES = ((4096, 4096, 4096), (8192, 1024, 4096), (512, 1024, 1024))
"""(rows, outputs, inputs) of the layers."""
ZEROS = (0.6, 0.92, 0.98)
PATTERNS = ("unstructured", "rows")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CALLS = 5
"""Backward passes between two events."""
STEP = 0.01
WARMUPS = 3
BASELINES = ("float32", "bfloat16", "bfloat16-compiled")

Contestants = dict[str, Callable[[], object]]


def sparse(rows: int, columns: int, zeros: float, pattern: str, device: str) -> Tensor:
    """int8 levels with that share of zeros: anywhere, or in whole rows."""
    levels = torch.randint(1, 128, (rows, columns), device=device)
    levels *= torch.randint(0, 2, levels.shape, device=device) * 2 - 1
    if pattern == "rows":
        keep = torch.arange(rows, device=device)[:, None] >= round(zeros * rows)
        keep = keep[torch.randperm(rows, device=device)]
    else:
        keep = torch.rand(levels.shape, device=device) >= zeros
    return (levels * keep).to(torch.int8)


def tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed


# Whether they are right.


def check(device: str, sizes: Sequence[int], shapes: Sequence[tuple[int, int, int]]) -> dict[str, bool]:
    """Each check by name, and whether it passed."""
    from retrograde.kernels import cuda

    found: dict[str, bool] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in sizes:
            delta = torch.randn(size).to(dtype)
            std, peak = dither.statistics(delta.double())
            seen = cuda.statistics(delta.to(device))
            found[f"statistics/{dtype}/{size}"] = abs(seen[0] - std) <= 1e-5 * std and seen[1] == peak
            step, key = dither.step_size(std, peak, 2.0, 8), mix_key(size, 1)
            expected = reference.nsd(delta, step, key)
            levels = cuda.nsd(delta.to(device), step, key, 8)
            found[f"levels/{dtype}/{size}"] = (
                torch.equal(levels.values.cpu(), expected)
                and levels.zeros == int((expected == 0).sum())
                and levels.largest == int(expected.abs().max())
            )
    for shape in shapes:
        for pattern in PATTERNS:
            for transposed in (False, True):
                for name, passed in check_products(shape, pattern, device, transposed=transposed):
                    turned = "/transposed" if transposed else ""
                    found["/".join((name, "x".join(map(str, shape)), pattern)) + turned] = passed
    return found


def check_products(
    shape: tuple[int, int, int], pattern: str, device: str, *, transposed: bool
) -> list[tuple[str, bool]]:
    """Every kernel's product against float64's, and against itself."""
    from retrograde.kernels import cuda

    a, m, i = shape
    values = sparse(*((m, a) if transposed else (a, m)), 0.9, pattern, device)
    factor = (values.T if transposed else values).double() * STEP
    found: list[tuple[str, bool]] = []
    unit = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    for dtype, own in unit.items():
        dense = torch.randn(m, i, device=device).to(dtype)
        wide = dense.double()
        expected, terms = factor @ wide, factor.abs() @ wide.abs()
        for kernel in cuda.KERNELS:
            for rounding in (False, True) if dtype == torch.float32 else (False,):
                tf32(rounding)
                once, twice = (cuda.run(kernel, values, STEP, dense, transposed=transposed) for _ in range(2))
                operand = 2.0**-8 if kernel == "bfloat16" else 2.0**-10 if rounding else own
                allowed = 4 * (operand + own) * terms
                if kernel == "int8":
                    allowed = factor.abs().sum(1, keepdim=True) * wide.abs().amax(0) / 250 + allowed
                passed = bool(((once.double() - expected).abs() <= allowed + 1e-9).all())
                name = f"{kernel}/{dtype}" + "/tf32" * rounding
                found.append((name, passed and torch.equal(once, twice) and once.dtype == dtype))
    return found


# What they are worth.


def backward(delta: Tensor, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both products, in plain torch."""
    return delta @ weight, delta.T @ x


def contestants(
    shape: tuple[int, int, int], zeros: float, pattern: str, compiled: Any, device: str
) -> Contestants:
    """What takes turns on one layer."""
    from retrograde.kernels import cuda

    rows, outputs, inputs = shape
    delta, weight = (torch.randn(size, device=device) for size in ((rows, outputs), (outputs, inputs)))
    x = torch.randn(rows, inputs, device=device)
    levels = sparse(rows, outputs, zeros, pattern, device)
    operands = {name: tuple(t.to(dtype) for t in (delta, weight, x)) for name, dtype in DTYPES.items()}

    def plain(name: str, products: Any = backward) -> Callable[[], object]:
        return lambda: products(*operands[name])

    def quantised(name: str) -> Callable[[], object]:
        def call() -> object:
            std, peak = cuda.statistics(operands[name][0])
            return cuda.nsd(operands[name][0], dither.step_size(std, peak, 2.0, 8), 1, 8)

        return call

    def products(kernel: str, name: str) -> Callable[[], object]:
        _, weight, x = operands[name]
        return lambda: (
            cuda.run(kernel, levels, STEP, weight),
            cuda.run(kernel, levels, STEP, x, transposed=True),
        )

    found: Contestants = {
        "float32": plain("float32"),
        "bfloat16": plain("bfloat16"),
        "bfloat16-compiled": plain("bfloat16", compiled),
    }
    for name in DTYPES:
        found[f"dither/{name}"] = quantised(name)
        found |= {f"{kernel}/{name}": products(kernel, name) for kernel in cuda.KERNELS}
    # It is dense there.
    del found["bfloat16/bfloat16"]
    return found


def seconds(call: Callable[[], object], calls: int = CALLS) -> float:
    """Of one call, by the device's clock."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(calls):
        call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000 / calls


def interleave(found: Contestants, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant, round by round; each round begins with another one."""
    for call in found.values():
        seconds(call, WARMUPS)
    names = list(found)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds(found[name]))
    return times


def ratio(slow: list[float], *fast: list[float]) -> dict[str, float]:
    """Median and quartiles of how many times as fast, round by round."""
    each = [old / sum(new) for old, *new in zip(slow, *fast, strict=True)]
    low, median, high = statistics.quantiles(each, n=4)
    return {"median": median, "low": low, "high": high}


def rows_of(times: dict[str, list[float]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What the report says of each contestant."""
    found: list[dict[str, Any]] = []
    for name, spent in times.items():
        row: dict[str, Any] = {**facts, "contestant": name, "seconds": statistics.median(spent)}
        kernel, _, dtype = name.partition("/")
        if dtype and kernel != "dither":
            passes = times[f"dither/{dtype}"]
            row["products"] = {against: ratio(times[against], spent) for against in BASELINES}
            row["whole"] = {against: ratio(times[against], spent, passes) for against in BASELINES}
            # Against the same precision as it trains in, the faster of two.
            rivals = ("float32",) if dtype == "float32" else BASELINES[1:]
            row["declined"] = min(row["whole"][rival]["median"] for rival in rivals) <= 1
        found.append(row)
    return found


def measure(shapes: Sequence[tuple[int, int, int]], rounds: int, device: str) -> list[dict[str, Any]]:
    """Every contestant on every layer, with every share and pattern of zeros."""
    tf32(True)
    compiled = torch.compile(backward, dynamic=False)
    found: list[dict[str, Any]] = []
    for shape in shapes:
        for pattern in PATTERNS:
            for zeros in ZEROS:
                times = interleave(contestants(shape, zeros, pattern, compiled, device), rounds)
                facts = {"shape": list(shape), "pattern": pattern, "zeros": zeros}
                new = rows_of(times, facts)
                found += new
                show(new)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """One line for each contestant."""
    print("{shape} {pattern} {zeros}".format(**rows[0]))
    for row in rows:
        text = f"  {row['contestant']:22}{row['seconds'] * 1e3:9.3f} ms"
        if "whole" in row:
            for part in ("products", "whole"):
                speeds = (f"{row[part][against]['median']:5.2f}" for against in BASELINES)
                text += f"   {part} ×{' ×'.join(speeds)}"
            text += "   declined" if row["declined"] else ""
        print(text)


def tiles(shape: tuple[int, int, int], rounds: int, device: str) -> list[dict[str, Any]]:
    """Other ways to cut the products up, as a hint where the fixed ones could be better: dW, in bfloat16."""
    from retrograde.kernels import cuda_products
    from retrograde.kernels.cuda_products import Tile

    rows, outputs, inputs = shape
    x = torch.randn(rows, inputs, device=device).bfloat16()
    levels = sparse(rows, outputs, 0.6, "rows", device)
    eight = [
        (128, 128, 8, 3),
        (128, 128, 8, 4),
        (128, 128, 4, 4),
        (128, 256, 8, 3),
        (256, 128, 8, 3),
        (64, 64, 4, 4),
    ]
    skip = [
        (cuda_products.BLOCK_A, *rest)
        for rest in ((128, 4, 3), (128, 4, 4), (128, 4, 7), (256, 4, 4), (256, 8, 4))
    ]
    works: Contestants = {}

    def consider(name: str, product: Any, cut: tuple[int, int, int, int]) -> None:
        def call() -> object:
            return product(levels, STEP, x, transposed=True, tile=Tile(*cut))

        try:
            call()
        except Exception as error:
            print(f"  {name}: {type(error).__name__}")  # as a rule, more memory than the chip has
        else:
            works[name] = call

    for cut in eight:
        consider(f"int8/{cut}", cuda_products.int8_product, cut)
    for cut in skip:
        consider(f"skip-blocks/{cut}", cuda_products.skip_product, cut)
    times = {name: statistics.median(spent) for name, spent in interleave(works, rounds).items()}
    for name, spent in times.items():
        print(f"  {name:36}{spent * 1e3:9.3f} ms")
    return [{"shape": list(shape), "tile": name, "seconds": spent} for name, spent in times.items()]


def described() -> dict[str, Any]:
    """The machine, also where retrograde is a source folder on the path rather than installed."""
    device = torch.device("cuda")
    try:
        found = machine.describe(device)
    except PackageNotFoundError:
        found = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__}
    import triton

    return {**found, "cuda": torch.version.cuda, "triton": triton.__version__}


def main() -> None:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-tiles", action="store_true", help="leave out other ways to cut products up")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_kernels: torch sees no CUDA device here; this script measures one.")
    if find_spec("triton") is None:
        sys.exit("gpu_kernels: Triton is not installed; torch's CUDA builds bring it along.")
    from retrograde.kernels import cuda

    probe = torch.ones(1, 1, device="cuda")
    if not cuda.supports(probe, probe):
        sys.exit("gpu_kernels: the kernels need an NVIDIA GPU of compute capability 8.0 or later.")
    torch.manual_seed(0)
    commit = machine.commit()
    checks = check("cuda", (1, 3, 4099, 5_000_001), ((64, 64, 64), (333, 517, 259), (1024, 2048, 512)))
    failed = [name for name, passed in checks.items() if not passed]
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed")
    if failed:
        sys.exit("gpu_kernels: wrong results, so nothing was measured: " + ", ".join(failed))
    found = measure(SHAPES, options.rounds, "cuda")
    cuts = [] if options.no_tiles else tiles(SHAPES[0], options.rounds, "cuda")
    report = {
        "schema": 1,
        "what": "CUDA kernels of dithered backpropagation: a linear layer's backward pass against torch's",
        "command": "python repro/gpu_kernels.py",
        "machine": described(),
        "commit": commit,
        "checks": len(checks),
        "rounds": options.rounds,
        "calls": CALLS,
        "rows": found,
        "tiles": cuts,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(options.out, report)


if __name__ == "__main__":
    main()

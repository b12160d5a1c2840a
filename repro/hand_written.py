"""What the kernels' hand-written LLVM gains over plain numba.

    python repro/hand_written.py [--rounds 15]

Each intrinsic is replaced by the loop that one would write in numba, and everything else stays: a whole product of a
linear layer 512×1024×1024 or of a convolution 64×128×16×16→128 with 92 % zeros, or the list of its non-zeros, is timed
in turns with both. What gains less than 15 % goes.

Results: results/hand-written.json
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numba
import numpy as np
import torch
from numba import carray  # pyright: ignore[reportPrivateImportUsage]
from reports import arguments, head

from retrograde.kernels import (
    cpu,
    cpu_convolution,
    cpu_convolution_input,
    cpu_convolution_weight,
    cpu_linear,
    cpu_lists,
    linear,
)
from retrograde.kernels.cpu_lanes import LANES
from retrograde.kernels.cpu_threads import address as memory
from retrograde.kernels.geometry import Geometry
from retrograde.lab.files import write_json
from retrograde.lab.timing import interleave

FAST: Any = {"contract", "reassoc", "nsz"}
plain: Any = numba.njit(nogil=True, fastmath=FAST)
TILE = cpu_linear.TILE


@plain
def tile_of_sums(out: Any, dense: Any, index: Any, value: Any, count: Any, scale: Any) -> None:
    """`cpu_linear`: one row of a product, one tile of its columns."""
    sums = np.zeros(TILE, np.float32)
    places = carray(memory(index), count, np.int32)
    values = carray(memory(value), count, np.float32)
    for k in range(count):
        row = carray(memory(dense + places[k] * TILE * 4), TILE, np.float32)
        for j in range(TILE):
            sums[j] += values[k] * row[j]
    target = carray(memory(out), TILE, np.float32)
    for j in range(TILE):
        target[j] = sums[j] * scale


@plain
def sums_of_rows(out: Any, dense: Any, index: Any, value: Any, runs: Any, count: Any, vectors: Any) -> None:
    """`cpu_rows`: what both products of a convolution are made of."""
    size = vectors * LANES
    target = carray(memory(out), size, np.float32)
    table = carray(memory(runs), 3 * count, np.int64)
    for r in range(count):
        first, last, shift = table[3 * r], table[3 * r + 1], table[3 * r + 2]
        places = carray(memory(index), last, np.int32)
        values = carray(memory(value), last, np.float32)
        for k in range(first, last):
            row = carray(memory(dense + 4 * (shift + places[k])), size, np.float32)
            for j in range(size):
                target[j] += values[k] * row[j]


@plain
def unpacked(part: Any, c: Any, dx: Any, at: Any, stride: Any, scale: Any) -> None:
    """`cpu_lanes.turn`: sums of an input's pixels, transposed."""
    for p in range(part.shape[0]):
        for i in range(c):
            dx[at + i * stride + p] = part[p, i] * scale


@numba.njit(nogil=True, parallel=True)
def counted(values: Any, first: Any, rows: Any, columns: Any, stride: Any, counts: Any) -> None:
    """`cpu_lists`: the number of non-zeros of each part."""
    planes, parts = counts.shape
    for task in numba.prange(planes * parts):
        m, part = task // parts, task % parts
        found = 0
        for r in range(part * rows // parts, (part + 1) * rows // parts):
            line = values[first[m] + r * stride : first[m] + r * stride + columns]
            for j in range(columns):
                found += line[j] != 0
        counts[m, part] = found


@numba.njit(nogil=True, parallel=True)
def listed(
    values: Any, first: Any, columns: Any, stride: Any, ends: Any, start: Any, index: Any, value: Any
) -> None:
    """`cpu_lists`: the non-zeros themselves."""
    planes, rows = start.shape[0], start.shape[1] - 1
    parts = ends.size // planes
    for task in numba.prange(ends.size):
        m, part = task // parts, task % parts
        used = ends[task - 1] if task else 0
        for r in range(part * rows // parts, (part + 1) * rows // parts):
            start[m, r] = used
            line = values[first[m] + r * stride : first[m] + r * stride + columns]
            for j in range(columns):
                if line[j] != 0:
                    index[used] = j
                    value[used] = np.float32(line[j])
                    used += 1
        if part == parts - 1:
            start[m, rows] = used


def again(module: ModuleType, kernel: str, **replaced: Any) -> Any:
    """A kernel of `module` compiled anew, with other functions in it; kept nowhere."""
    function = getattr(module, kernel).py_func
    made: Any = numba.njit(nogil=True, parallel=True, fastmath=FAST)(
        type(function)(
            function.__code__, {**function.__globals__, **replaced}, kernel, None, function.__closure__
        )
    )
    return made


def swapped(module: ModuleType, names: dict[str, Any], run: Callable[[], object]) -> Callable[[], object]:
    """`run` with other kernels in a module."""

    def swap() -> object:
        before = {name: getattr(module, name) for name in names}
        try:
            vars(module).update(names)
            return run()
        finally:
            vars(module).update(before)

    return swap


def main() -> None:
    parser = arguments(__doc__, "hand-written.json")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    report = head("hand-written LLVM against plain numba")
    generator = torch.Generator().manual_seed(0)

    def delta(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        return values * (torch.rand(shape, generator=generator) > 0.92)

    rows, weight = delta(512, 1024), torch.randn(1024, 1024)
    images, kernel, x = delta(64, 128, 16, 16), torch.randn(128, 128, 3, 3), torch.randn(64, 128, 16, 16)
    geometry = Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    lists, sparse = cpu.lists(rows), cpu_convolution.compact(images, None)

    def product() -> torch.Tensor:
        return linear.run("skip", rows, None, weight, lists=lists)

    def input_grad() -> torch.Tensor:
        return cpu_convolution.convolution_input_grad(sparse, kernel, (64, 128, 16, 16), geometry)

    def weight_grad() -> torch.Tensor:
        return cpu_convolution.convolution_weight_grad(sparse, x, (128, 128, 3, 3), geometry)

    def make_lists() -> torch.Tensor:
        found = cpu.lists(rows)
        return torch.from_numpy(found.value[: found.size].copy())

    closed = cpu_linear._product_kernel(tile_of_sums)  # pyright: ignore[reportPrivateUsage]
    numbas = numba.njit(nogil=True, parallel=True, fastmath=FAST)(closed.py_func)
    sums = {"accumulate": sums_of_rows}
    pieces: dict[str, tuple[ModuleType, dict[str, Any], Callable[[], torch.Tensor]]] = {
        "tile of sums (`cpu_linear`)": (cpu_linear, {"_product_single": numbas}, product),
        "sums of rows, dx (`cpu_rows`)": (
            cpu_convolution_input,
            {"_input_grad": again(cpu_convolution_input, "_input_grad", **sums)},
            input_grad,
        ),
        "sums of rows, dW (`cpu_rows`)": (
            cpu_convolution_weight,
            {"_weight_grad": again(cpu_convolution_weight, "_weight_grad", **sums)},
            weight_grad,
        ),
        "transposed sums (`cpu_lanes.turn`)": (
            cpu_convolution_input,
            {"_input_grad": again(cpu_convolution_input, "_input_grad", _unpack=unpacked)},
            input_grad,
        ),
        "lists of non-zeros (`cpu_lists`)": (cpu_lists, {"_count": counted, "_list": listed}, make_lists),
    }
    report["pieces"] = []
    for name, (module, names, run) in pieces.items():
        other = swapped(module, names, run)
        torch.testing.assert_close(other(), run(), rtol=1e-4, atol=1e-4)
        timed = interleave({"ours": run, "numba": other}, options.rounds)
        gain = timed.speedup("ours", "numba")
        report["pieces"].append(
            {
                "name": name,
                **{who: timed.median(who) for who in ("ours", "numba")},
                "gain": gain.ratio,
                "quartiles": gain.quartiles,
            }
        )
        print(f"{name}: {gain.ratio:.2f} ({gain.quartiles[0]:.2f} to {gain.quartiles[1]:.2f})", flush=True)
    write_json(options.out, report)


if __name__ == "__main__":
    main()

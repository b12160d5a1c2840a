"""The calibration of the cost model: every kernel on a few shapes, and the fits to what they took."""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrograde.kernels import convolution, int8, linear
from retrograde.kernels.choose import ConvolutionProblem, Problem, kernels_for
from retrograde.kernels.delta import Delta
from retrograde.kernels.geometry import Geometry

_SHAPES = (
    (16, 64, 64),
    (64, 128, 512),
    (64, 512, 512),
    (256, 256, 1024),
    (512, 512, 512),
    (512, 1024, 1024),
    (128, 2048, 784),
    (2048, 256, 512),
    (256, 3072, 256),
)
"""(a, m, i) of the calibration."""
_CONVOLUTIONS = (
    (32, 3, 32, 64, 3, 1, 1),
    (16, 16, 32, 16, 3, 1, 1),
    (16, 64, 32, 64, 3, 1, 1),
    (16, 128, 16, 128, 3, 1, 1),
    (32, 256, 8, 256, 3, 1, 1),
    (16, 64, 32, 128, 3, 2, 1),
    (32, 256, 16, 128, 1, 1, 1),
    (16, 128, 16, 128, 3, 1, 8),
)
"""(images, inputs, height and width, outputs, kernel, stride, groups) of the calibration."""
_SHARES = (0.5, 0.8, 0.92, 0.98)
_REPEATS = 3
_ENOUGH = 0.02
"""Seconds of runs after which there are no more."""
_HOPELESS = 5.0
"""What multiplies all entries and takes so many times as long as ``dense`` is not measured further: an emulated
precision takes up to 50 times, most of the calibration."""
_LEAST = 1e-4
"""Seconds of ``dense`` below which a call's own cost decides."""
_EVICTED = 1 << 22
"""Entries that are read and written before each run: more than the cores' own caches hold."""


class _Measured:
    """Terms and seconds by fit."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[list[float], float]]] = {}
        self._other = torch.zeros(_EVICTED)
        self._dense = 0.0
        self._hopeless: set[str] = set()

    def add(self, kernel: str, problem: Problem | ConvolutionProblem, work: Callable[[], Any]) -> None:
        """Measure a kernel; ``dense`` comes first for each product, and the others are compared with it."""
        fit = problem.fit(kernel)
        if fit in self._hopeless:
            return
        seconds = _time(work, self._other)
        self._rows.setdefault(fit, []).append((problem.terms(kernel), seconds))
        if kernel == "dense":
            self._dense = seconds
        elif not problem.skips(kernel) and self._dense > _LEAST and seconds > _HOPELESS * self._dense:
            self._hopeless.add(fit)

    def fits(self) -> dict[str, list[float]]:
        """Seconds for each term of each fit."""
        return {name: _fit(rows) for name, rows in self._rows.items()}


def calibrate(family: str) -> dict[str, list[float]]:
    """Measure every kernel of a family of products on a few shapes.

    Args:
        family: one of `retrograde.kernels.choose.FAMILIES`.

    Returns:
        Seconds for each term of each fit.
    """
    measured = _Measured()
    kind, _, operand = family.partition("/")
    if kind == "convolution":
        for shape in _CONVOLUTIONS:
            _measure_convolution(measured, *shape, channels_last=operand == "last")
    else:
        # Every other shape tells enough of operands that come in another precision.
        for shape in _SHAPES if operand == "float32" else _SHAPES[1::2]:
            _measure_linear(measured, *shape, operand=operand)
    return measured.fits()


def _measure_linear(measured: _Measured, a: int, m: int, i: int, operand: str) -> None:
    dense = torch.randn(m, i)
    comes = {"bfloat16": dense.bfloat16, "int8": lambda: int8.quantise_columns(dense)}
    given = comes[operand]() if operand in comes else dense
    for transposed in (False, True):
        run = functools.partial(linear.run, transposed=transposed)
        shape = (m, a) if transposed else (a, m)
        if operand == "float32":
            plain = Problem(a, m, i, a * m, levels=False, transposed=transposed)
            measured.add("dense", plain, functools.partial(run, "dense", torch.randn(shape), None, dense))
        for share in _SHARES:
            levels = _levels(shape, share)
            nonzeros = int(levels.count_nonzero())
            problem = Problem(a, m, i, nonzeros, levels=True, transposed=transposed, operand=operand)
            for kernel in kernels_for(operand):
                # What multiplies zeros takes as long with any number of them.
                if kernel in linear.SKIPPING or share == _SHARES[0]:
                    measured.add(kernel, problem, functools.partial(run, kernel, levels, 0.5, given))


def _measure_convolution(
    measured: _Measured,
    images: int,
    inputs: int,
    size: int,
    outputs: int,
    kernel: int,
    stride: int,
    groups: int,
    channels_last: bool,
) -> None:
    order = torch.channels_last if channels_last else torch.contiguous_format
    geometry = Geometry((stride,) * 2, (kernel // 2,) * 2, (1, 1), False, (0, 0), groups)
    places = (size + 2 * (kernel // 2) - kernel) // stride + 1
    x = torch.randn(images, inputs, size, size).contiguous(memory_format=order)
    weight = torch.randn(outputs, inputs // groups, kernel, kernel)
    for share in _SHARES:
        levels = _levels((images, outputs, places, places), share).contiguous(memory_format=order)
        delta = Delta(levels, 0.5)
        for name in convolution.KERNELS:
            if name not in convolution.SKIPPING and share != _SHARES[0]:
                continue
            for product in ("input", "weight"):
                problem = ConvolutionProblem(
                    product,
                    levels.numel(),
                    x.numel(),
                    (outputs, inputs // groups, kernel, kernel),
                    groups,
                    int(levels.count_nonzero()),
                    levels=True,
                    channels_last=channels_last,
                )
                if product == "input":
                    work = functools.partial(convolution.input_grad, name, delta, weight, x.shape, geometry)
                else:
                    work = functools.partial(convolution.weight_grad, name, delta, x, weight, geometry)
                measured.add(name, problem, work)


def _levels(shape: tuple[int, ...], share: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(shape, generator=generator) >= share
    return (kept * torch.randint(1, 20, shape, generator=generator)).to(torch.int8)


def _time(work: Callable[[], Any], other: Tensor) -> float:
    """The least of a few runs: whatever else the machine does only ever adds.

    Operands come from beyond the cores' own caches, which `other` fills, as in training, where a layer's passes lie far
    apart. What takes long is disturbed little, and is run fewer times.
    """
    work()
    times: list[float] = []
    while len(times) < _REPEATS and sum(times) < _ENOUGH:
        other.add_(1.0)
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _fit(rows: Sequence[tuple[list[float], float]]) -> list[float]:
    terms = np.array([term for term, _ in rows])
    seconds = np.array([second for _, second in rows])
    # Every row over its own time: relative errors count alike. Columns are scaled for the solver's sake.
    relative = terms / seconds[:, None]
    scale = relative.max(0)
    return (_nonnegative(relative / scale, np.ones(len(rows))) / scale).tolist()


def _nonnegative(matrix: Any, target: Any) -> Any:
    """The non-negative x with the least ‖matrix · x − target‖, of few entries.

    Least squares over the entries that are not zero in it solve the problem: the best of all choices of these whose
    solution is non-negative. (scipy's `nnls` would be the only use of scipy.)
    """
    columns = range(matrix.shape[1])
    best, least = np.zeros(matrix.shape[1]), float(np.linalg.norm(target))
    for number in range(1, matrix.shape[1] + 1):
        for chosen in map(list, itertools.combinations(columns, number)):
            solution = np.linalg.lstsq(matrix[:, chosen], target, rcond=None)[0]
            distance = float(np.linalg.norm(matrix[:, chosen] @ solution - target))
            if solution.min() >= 0 and distance < least:
                best, least = np.zeros(matrix.shape[1]), distance
                best[chosen] = solution
    return best

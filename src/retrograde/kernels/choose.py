"""Which kernel a product takes: predicted seconds for each that is allowed, from one calibration for each machine.

A backward product of a linear layer is ``(a × m) · (m × i)``: the gradient's matrix, sparse or not, times a dense
operand. Each kernel's time is a sum of a few terms (a constant, multiply-adds, entries read and written), whose weights
are fitted to measured times, all positive, relative errors alike. The fit is kept in ``$RETROGRADE_CACHE/kernels``, or
``~/.cache/retrograde/kernels``, by processor, threads and versions; it takes seconds, and happens when a product first
needs it, or in ``retrograde doctor``.
"""

import functools
import hashlib
import itertools
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from retrograde.kernels import convolution, linear
from retrograde.kernels.delta import Delta
from retrograde.kernels.geometry import Geometry

_VERSION = 3
"""Raised with every change of a kernel or of a term, so that older fits are no longer found."""

_LANES = 16
"""Numbers in a vector register that convolutions fill."""

_WORTH = 10_000_000
"""Fewer multiply-adds take torch a tenth of a millisecond, which no choice repays."""

_LOG = logging.getLogger("retrograde")

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
    (16, 128, 16, 128, 3, 1, 4),
)
"""(images, inputs, height and width, outputs, kernel, stride, groups) of the calibration."""
_SHARES = (0.5, 0.8, 0.92, 0.98)
_REPEATS = 5


@dataclass(frozen=True)
class Problem:
    """One product of a linear layer: shape, non-zeros of the gradient, and how it comes.

    Attributes:
        a: rows of the result.
        m: rows of the dense operand.
        i: columns of both.
        nonzeros: of the gradient.
        levels: whether the gradient is integer levels.
        transposed: whether its matrix is read by columns (``dW``).
        share: part of the index lists that this product pays for; the call's other product pays the rest.
    """

    a: int
    m: int
    i: int
    nonzeros: int
    levels: bool
    transposed: bool
    share: float = 1.0

    def fit(self, kernel: str) -> str:
        """The name of the fit that holds for `kernel`."""
        turned = "/turned" if self.transposed else ""
        return f"{kernel}/levels{turned}" if self.levels and kernel == "dense" else f"{kernel}{turned}"

    def terms(self, kernel: str) -> list[float]:
        """What the kernel's time is a sum of."""
        if kernel in linear.SKIPPING:
            padded = -(-self.i // linear.TILE) * linear.TILE
            listing = self.share * self.a * self.m
            visits = self.nonzeros * (self.share + self.transposed)
            return [1.0, self.nonzeros * padded, self.a * padded, self.m * self.i, listing, visits]
        return [1.0, self.a * self.m * self.i, self.a * self.m, self.m * self.i, self.a * self.i]


@dataclass(frozen=True)
class ConvolutionProblem:
    """One product of a 2-D convolution.

    Attributes:
        product: ``"input"`` for dx or ``"weight"`` for dW.
        entries: of δ.
        inputs: entries of x.
        weight: shape (C_out, C_in/groups, kh, kw).
        groups: of the convolution.
        nonzeros: of δ̃.
        levels: whether δ̃ is integer levels.
        channels_last: whether δ̃ lies so in memory.
        share: part of the index lists that this product pays for.
    """

    product: str
    entries: int
    inputs: int
    weight: tuple[int, int, int, int]
    groups: int
    nonzeros: int
    levels: bool
    channels_last: bool
    share: float = 1.0

    def fit(self, kernel: str) -> str:
        """The name of the fit that holds for `kernel`."""
        return f"convolution/{self.product}/{kernel}{'/last' if self.channels_last else ''}"

    def terms(self, kernel: str) -> list[float]:
        """What the kernel's time is a sum of."""
        outputs, channels, height, width = self.weight
        lanes = -(-channels // _LANES) * _LANES
        if kernel == "skip":
            visits = self.nonzeros * height * width
            return [1.0, visits * lanes, self.nonzeros * height, self.inputs, self.share * self.entries]
        # Vectors of outputs and of inputs are filled up.
        filled = -(-outputs // self.groups // _LANES) * _LANES * self.groups / outputs
        work = self.entries * filled * lanes * height * width
        return [1.0, work, self.inputs, self.entries, self.entries * lanes]


class CostModel:
    """Predicted seconds of each kernel on one machine.

    Args:
        weights: seconds for each term of each fit.
    """

    def __init__(self, weights: dict[str, list[float]]) -> None:
        self.weights = weights

    def seconds(self, kernel: str, problem: Problem | ConvolutionProblem) -> float:
        """Predicted time of one product."""
        return float(np.dot(self.weights[problem.fit(kernel)], problem.terms(kernel)))

    @functools.lru_cache(maxsize=4096)  # noqa: B019  the model lives as long as the process
    def best(self, problem: Problem | ConvolutionProblem, allowed: tuple[str, ...]) -> str:
        """The kernel with the least predicted time."""
        return min(allowed, key=lambda kernel: self.seconds(kernel, problem))


class _Measured:
    """Terms and seconds by fit."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[list[float], float]]] = {}

    def add(self, kernel: str, problem: Problem | ConvolutionProblem, work: Callable[[], Any]) -> None:
        self._rows.setdefault(problem.fit(kernel), []).append((problem.terms(kernel), _time(work)))

    def model(self) -> CostModel:
        return CostModel({name: _fit(rows) for name, rows in self._rows.items()})


def calibrate() -> CostModel:
    """Measure every kernel on a few shapes; seconds."""
    measured = _Measured()
    for shape in _SHAPES:
        _measure_linear(measured, *shape)
    for shape in _CONVOLUTIONS:
        for channels_last in (False, True):
            _measure_convolution(measured, *shape, channels_last)
    return measured.model()


def _measure_linear(measured: _Measured, a: int, m: int, i: int) -> None:
    dense = torch.randn(m, i)
    for transposed in (False, True):
        run = functools.partial(linear.run, transposed=transposed)
        shape = (m, a) if transposed else (a, m)
        plain = Problem(a, m, i, a * m, levels=False, transposed=transposed)
        measured.add("dense", plain, functools.partial(run, "dense", torch.randn(shape), None, dense))
        for share in _SHARES:
            levels = _levels(shape, share)
            problem = Problem(a, m, i, int(levels.count_nonzero()), levels=True, transposed=transposed)
            for kernel in linear.KERNELS:
                # What multiplies zeros takes as long with any number of them.
                if kernel in linear.SKIPPING or share == _SHARES[0]:
                    measured.add(kernel, problem, functools.partial(run, kernel, levels, 0.5, dense))


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
            if name == "dense" and share != _SHARES[0]:
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


def _time(work: Callable[[], Any]) -> float:
    """The least of a few runs: whatever else the machine does only ever adds."""
    work()
    times: list[float] = []
    for _ in range(_REPEATS):
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
    solution, _ = nnls(relative / scale, np.ones(len(rows)))
    return (solution / scale).tolist()


_models: dict[int, CostModel] = {}


def model() -> CostModel:
    """The cost model of this machine at torch's present number of threads: cached, stored, or calibrated now."""
    threads = torch.get_num_threads()
    known = _models.get(threads)
    if known is None:
        known = _models[threads] = _stored(_path()) or _calibrated(_path())
    return known


def _calibrated(path: Path) -> CostModel:
    start = time.perf_counter()
    found = calibrate()
    _LOG.info("kernels calibrated in %.1f s; the result is kept in %s", time.perf_counter() - start, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(found.weights, file)
        os.replace(file.name, path)
    except OSError as error:
        _LOG.warning("the calibration of kernels cannot be kept in %s: %s", path, error)
    return found


def _stored(path: Path) -> CostModel | None:
    try:
        weights = json.loads(path.read_text())
        found = {str(name): [float(w) for w in row] for name, row in weights.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    fits: dict[str, int] = {}
    for transposed, levels, kernel in itertools.product((False, True), (False, True), linear.KERNELS):
        probe = Problem(1, 1, 1, 1, levels=levels, transposed=transposed)
        fits[probe.fit(kernel)] = len(probe.terms(kernel))
    for product, last, kernel in itertools.product(("input", "weight"), (False, True), convolution.KERNELS):
        other = ConvolutionProblem(product, 1, 1, (1, 1, 1, 1), 1, 1, levels=True, channels_last=last)
        fits[other.fit(kernel)] = len(other.terms(kernel))
    whole = all(len(found.get(name, ())) == length for name, length in fits.items())
    return CostModel(found) if whole else None


def _path() -> Path:
    cache = os.environ.get("RETROGRADE_CACHE") or Path.home() / ".cache" / "retrograde"
    facts = (_VERSION, _processor(), torch.get_num_threads(), torch.__version__, np.__version__)
    # Environment settings of oneDNN and MKL change how fast torch's own products are.
    settings = [(k, v) for k, v in sorted(os.environ.items()) if k.startswith(("ONEDNN_", "DNNL_", "MKL_"))]
    digest = hashlib.sha256(repr((facts, settings)).encode()).hexdigest()[:16]
    return Path(cache) / "kernels" / f"{digest}.json"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    return "".join(
        sorted({line for line in info.read_text().splitlines() if line.startswith(("model name", "flags"))})
    )


def worthwhile(products: int) -> bool:
    """Whether a product of so many multiply-adds is large enough for the choice to matter."""
    return products >= _WORTH

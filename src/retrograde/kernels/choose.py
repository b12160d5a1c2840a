"""Which kernel a product takes: predicted seconds for each that is allowed, from one calibration for each machine.

A backward product of a linear layer is ``(a × m) · (m × i)``: the gradient's matrix, sparse or not, times a dense
operand. Each kernel's time is a sum of a few terms (a constant, multiply-adds, entries read and written), whose weights
are fitted to measured times, all positive, relative errors alike. The fit is kept in ``$RETROGRADE_CACHE/kernels``, or
``~/.cache/retrograde/kernels``, by processor, threads and versions; it takes seconds, and happens when a product first
needs it, or in ``retrograde doctor``.
"""

import functools
import hashlib
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

from retrograde.kernels import linear

_VERSION = 1
"""Raised with every change of a kernel or of a term, so that older fits are no longer found."""

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
_SHARES = (0.5, 0.8, 0.92, 0.98)
_REPEATS = 5


@dataclass(frozen=True)
class Problem:
    """One product: shape, non-zeros of the gradient, and whether it holds levels and comes transposed.

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


def _terms(kernel: str, p: Problem) -> list[float]:
    """What the kernel's time is proportional to."""
    if kernel in linear.SKIPPING:
        padded = -(-p.i // linear.TILE) * linear.TILE
        listing = p.share * p.a * p.m
        visits = p.nonzeros * (p.share + p.transposed)
        return [1.0, p.nonzeros * padded, p.a * padded, p.m * p.i, listing, visits]
    return [1.0, p.a * p.m * p.i, p.a * p.m, p.m * p.i, p.a * p.i]


class CostModel:
    """Predicted seconds of each kernel on one machine.

    Args:
        weights: seconds for each term of each kernel.
    """

    def __init__(self, weights: dict[str, list[float]]) -> None:
        self.weights = weights

    def seconds(self, kernel: str, problem: Problem) -> float:
        """Predicted time of one product."""
        name = f"{kernel}/levels" if problem.levels and kernel == "dense" else kernel
        return float(np.dot(self.weights[name], _terms(kernel, problem)))

    @functools.lru_cache(maxsize=4096)  # noqa: B019  the model lives as long as the process
    def best(self, problem: Problem, allowed: tuple[str, ...]) -> str:
        """The kernel with the least predicted time."""
        return min(allowed, key=lambda kernel: self.seconds(kernel, problem))


def calibrate() -> CostModel:
    """Measure every kernel on a few shapes; seconds."""
    found: dict[str, list[tuple[list[float], float]]] = {}
    for a, m, i in _SHAPES:
        dense = torch.randn(m, i)
        for share in _SHARES:
            levels = _levels(a, m, share)
            nonzeros = int(levels.count_nonzero())
            problem = Problem(a, m, i, nonzeros, levels=True, transposed=False)
            for kernel in linear.KERNELS:
                if kernel not in linear.SKIPPING and share != _SHARES[0]:
                    continue  # what multiplies zeros takes as long with any number of them
                name = f"{kernel}/levels" if kernel == "dense" else kernel
                seconds = _time(functools.partial(linear.run, kernel, levels, 0.5, dense))
                found.setdefault(name, []).append((_terms(kernel, problem), seconds))
                if kernel not in linear.SKIPPING:
                    continue
                other = levels.T.contiguous()
                seconds = _time(functools.partial(linear.run, kernel, other, 0.5, dense, transposed=True))
                turned = Problem(a, m, i, nonzeros, levels=True, transposed=True)
                found[name].append((_terms(kernel, turned), seconds))
        plain = Problem(a, m, i, a * m, levels=False, transposed=False)
        seconds = _time(functools.partial(linear.run, "dense", torch.randn(a, m), None, dense))
        found.setdefault("dense", []).append((_terms("dense", plain), seconds))
    return CostModel({name: _fit(rows) for name, rows in found.items()})


def _levels(a: int, m: int, share: float) -> Tensor:
    generator = torch.Generator().manual_seed(a + m)
    kept = torch.rand(a, m, generator=generator) >= share
    return (kept * torch.randint(1, 20, (a, m), generator=generator)).to(torch.int8)


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
    probe = Problem(1, 1, 1, 1, levels=True, transposed=False)
    whole = all(
        len(found.get(name, ())) == len(_terms(name.removesuffix("/levels"), probe))
        for name in (*linear.KERNELS, "dense/levels")
    )
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


def worthwhile(a: int, m: int, i: int) -> bool:
    """Whether a product is large enough for the choice to matter."""
    return 2.0 * a * m * i >= _WORTH


_WORTH = 2e7
"""FLOPs below which torch's own product runs: a tenth of a millisecond, which no choice repays."""

"""Which kernel a product takes: predicted seconds for each that is allowed, from one calibration for each machine.

A backward product of a linear layer is ``(a × m) · (m × i)``: the gradient's matrix, sparse or not, times a dense
operand. Each kernel's time is a sum of a few terms (a constant, multiply-adds, entries read and written), whose weights
are fitted to measured times, all positive, relative errors alike. The fit is kept in ``$RETROGRADE_CACHE/kernels``, or
``~/.cache/retrograde/kernels``, by processor, threads and versions. Each family of products is fitted by itself when a
product of it is first asked for, which takes some seconds and is said, or all of them in ``retrograde doctor``.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retrograde import host
from retrograde.errors import RetrogradeWarning
from retrograde.kernels import convolution, cpu, linear

_VERSION = 10
"""Raised with every change of a kernel or of a term, so that older fits are no longer found."""

_LANES = 16
"""Numbers in a vector register that convolutions fill."""

_PATIENCE = 3.0
"""Seconds of calibration before a user is told of it."""

_LOG = logging.getLogger("retrograde")

OPERANDS = {
    "float32": linear.KERNELS,
    "bfloat16": ("dense", "skip-bfloat16", "int8"),
    "int8": linear.KERNELS,
}
"""Our kernels of a linear layer by how the dense operand comes: those that could be the fastest."""


def kernels_for(operand: str) -> tuple[str, ...]:
    """Ours, and for a float32 operand the registered ones."""
    return OPERANDS[operand] + (linear.registered() if operand == "float32" else ())


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
        operand: how the dense operand comes: a key of `OPERANDS`.
    """

    a: int
    m: int
    i: int
    nonzeros: int
    levels: bool
    transposed: bool
    share: float = 1.0
    operand: str = "float32"

    @property
    def family(self) -> str:
        """What is calibrated together with it."""
        return f"linear/{self.operand}"

    @property
    def entries(self) -> int:
        """Of the gradient."""
        return self.a * self.m

    def skips(self, kernel: str) -> bool:
        """Whether `kernel` visits the non-zeros one by one."""
        return kernel in linear.SKIPPING

    def fit(self, kernel: str) -> str:
        """The name of the fit that holds for `kernel`."""
        levels = "/levels" if self.levels and kernel == "dense" else ""
        return f"{kernel}{levels}{'/turned' if self.transposed else ''}@{self.operand}"

    def terms(self, kernel: str) -> list[float]:
        """What the kernel's time is a sum of."""
        if kernel in linear.SKIPPING:
            padded = -(-self.i // cpu.TILE) * cpu.TILE
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

    @property
    def family(self) -> str:
        """What is calibrated together with it."""
        return "convolution/last" if self.channels_last else "convolution"

    def skips(self, kernel: str) -> bool:
        """Whether `kernel` visits the non-zeros one by one."""
        return kernel in convolution.SKIPPING

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


FAMILIES = (*(f"linear/{operand}" for operand in OPERANDS), "convolution", "convolution/last")
"""Products whose kernels are calibrated together."""


class CostModel:
    """Predicted seconds of each kernel on one machine.

    Args:
        weights: seconds for each term of each fit.
        calibrate: called with a family of which `weights` has no fits, for its fits; None: that is an error.
    """

    def __init__(
        self,
        weights: dict[str, list[float]],
        calibrate: Callable[[str], dict[str, list[float]]] | None = None,
    ) -> None:
        self.weights = weights
        self._calibrate = calibrate
        self._lock = threading.Lock()

    def seconds(self, kernel: str, problem: Problem | ConvolutionProblem) -> float:
        """Predicted time of one product."""
        fit = problem.fit(kernel)
        if fit not in self.weights:
            self.complete(problem.family)
        return float(np.dot(self.weights[fit], problem.terms(kernel)))

    @functools.lru_cache(maxsize=4096)  # noqa: B019  the model lives as long as the process
    def best(self, problem: Problem | ConvolutionProblem, allowed: tuple[str, ...]) -> str:
        """The kernel with the least predicted time."""
        if 2 * problem.nonzeros > problem.entries:
            # A non-zero that is visited by itself takes several times its share of a dense product on any processor.
            # Whoever measured otherwise did so while the machine was busy.
            allowed = tuple(kernel for kernel in allowed if not problem.skips(kernel)) or allowed
        if len(allowed) == 1:
            return allowed[0]
        return min(allowed, key=lambda kernel: self.seconds(kernel, problem))

    def complete(self, family: str) -> None:
        """Calibrate the kernels of a family, unless that was done.

        Args:
            family: one of `FAMILIES`.
        """
        # Backward passes of two threads may ask at once.
        with self._lock:
            if self._calibrate is not None and not self.weights.keys() >= _fits(family).keys():
                self.weights.update(self._calibrate(family))


_models: dict[tuple[object, ...], CostModel] = {}
"""By threads and registered kernels."""


def model() -> CostModel:
    """The cost model of this machine at torch's present number of threads: what it lacks is calibrated when needed."""
    which = _which()
    known = _models.get(which)
    if known is None:
        known = _models[which] = CostModel(_stored(_path()), _calibrated)
    return known


def _which() -> tuple[object, ...]:
    return torch.get_num_threads(), *linear.registered()


def state_dict() -> dict[str, Any] | None:
    """The calibration in use at the present number of threads; None where no product has needed one."""
    known = _models.get(_which())
    return (
        None
        if known is None or not known.weights
        else {"for": list(_which()), "weights": dict(known.weights)}
    )


def load_state_dict(state: dict[str, Any]) -> None:
    """Choose by the calibration that a run began with, so that it goes on with the same kernels.

    Where this process has chosen by another one already, or runs on another number of threads, it says so.
    """
    found, which = _complete(state["weights"]), _which()
    if list(which) == state["for"] and found.keys() == state["weights"].keys():
        known = _models.setdefault(which, CostModel({}, _calibrated))
        for name, weights in found.items():
            known.weights.setdefault(name, weights)
        if all(known.weights[name] == weights for name, weights in found.items()):
            return
    warnings.warn(
        "kernels are chosen by a calibration other than the one that this run started with (another number of threads, "
        "other kernels, or another run in this process), so it may continue with other kernels, whose results differ "
        "in rounding. To get the same ones, resume in a process of its own, with as many threads as before.",
        RetrogradeWarning,
        stacklevel=2,
    )


def _calibrated(family: str) -> dict[str, list[float]]:
    from retrograde.kernels.calibrate import calibrate

    path = _path()
    start = time.perf_counter()
    with _announced(family, path):
        found = calibrate(family)
    _LOG.info("%s: kernels calibrated in %.1f s", family, time.perf_counter() - start)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may have calibrated another family in the meantime.
        text = json.dumps({**_stored(path), **found})
        host.write_atomically(path, lambda file: file.write(text.encode()), shared=True)
    except OSError as error:
        _LOG.warning("the calibration of kernels cannot be stored in %s: %s", path, error)
    return found


@contextlib.contextmanager
def _announced(family: str, path: Path) -> Generator[None]:
    """Say why a backward pass takes so long, where it does."""
    text = (
        "the first backward pass of this kind (%s) on this machine compiles the kernels and measures which are "
        "fastest, with %d thread(s): some seconds, or a minute on a slow machine. It happens once, the result is kept "
        "in %s; `retrograde doctor` does it beforehand."
    )
    timer = threading.Timer(_PATIENCE, _LOG.warning, (text, family, torch.get_num_threads(), path.parent))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _stored(path: Path) -> dict[str, list[float]]:
    try:
        return _complete(json.loads(path.read_text()))
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _complete(weights: dict[str, list[float]]) -> dict[str, list[float]]:
    """Those of the weights that make up whole families."""
    given = {str(name): [float(w) for w in row] for name, row in weights.items()}
    found: dict[str, list[float]] = {}
    for fits in map(_fits, FAMILIES):
        if all(len(given.get(name, ())) == size for name, size in fits.items()):
            found |= {name: given[name] for name in fits}
    return found


def _fits(family: str) -> dict[str, int]:
    """The number of terms of each fit of a family."""
    kind, _, operand = family.partition("/")
    if kind == "linear":
        problems = [
            Problem(1, 1, 1, 1, levels=levels, transposed=transposed, operand=operand)
            # An exact gradient meets operands in its own precision alone.
            for levels, transposed in itertools.product(
                (True, False) if operand == "float32" else (True,), (False, True)
            )
        ]
        return {
            one.fit(kernel): len(one.terms(kernel)) for one in problems for kernel in kernels_for(operand)
        }
    others = [
        ConvolutionProblem(product, 1, 1, (1, 1, 1, 1), 1, 1, levels=True, channels_last=operand == "last")
        for product in ("input", "weight")
    ]
    return {one.fit(kernel): len(one.terms(kernel)) for one in others for kernel in convolution.KERNELS}


def _path() -> Path:
    versions = (torch.__version__, np.__version__)
    facts = (_VERSION, host.processor(), host.instructions(), torch.get_num_threads(), versions)
    facts += linear.registered()
    digest = hashlib.sha256(repr((facts, host.settings())).encode()).hexdigest()[:16]
    return host.cache_folder("kernels") / f"{digest}.json"

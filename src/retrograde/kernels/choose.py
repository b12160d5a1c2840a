"""Which kernel a product takes: those that may take it are tried on it, and the fastest has it from then on.

A product's time depends on its shape, on how its operands lie in memory, on the zeros of the gradient and on the
machine, and no formula of these holds for all kernels. So a product that was not met before is computed by every kernel
that may take it, a few times in turns, on the operands themselves. Shares of zeros and numbers of rows, which change
from batch to batch, are distinguished in steps of √2. A kernel is not tried where what is known of other shares
decides: dense ones do not depend on them, and what skips zeros takes no less time for more of the others.

The answers are kept in ``$RETROGRADE_CACHE/kernels``, or ``~/.cache/retrograde/kernels``, by processor, threads,
versions and torch's settings of precision, and in the state of a session, so that a run that is resumed goes on with
the same kernels.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
import re
import threading
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retrograde import host
from retrograde.errors import RetrogradeWarning
from retrograde.kernels import int8, linear
from retrograde.kernels.kept import COMPACT

_VERSION = 14
"""Raised with every change of a kernel, so that what was measured of older ones is no longer found."""

_PATIENCE = 3.0
"""Seconds of trials before a user is told of them."""
_ROUNDS = 3
_ENOUGH = 0.1
"""Seconds of trials of one product after which two rounds are enough."""
_HOPELESS = 2.0
"""What takes so many times as long as the fastest is not tried again."""
_EVICTED = 1 << 22
"""Entries that are read and written before each trial: more than the cores' own caches hold."""
_FEWEST = 1 / 1024
"""Smaller shares are not distinguished: nothing is left to be saved."""

_KEY = re.compile(r".+ \d+ \d+: .+")

_LOG = logging.getLogger("retrograde")


@dataclass(frozen=True)
class Problem:
    """One product of a backward call, as far as its time depends on it.

    Attributes:
        product: which one of which layer kind.
        form: how its operands come: dtypes, memory order.
        shape: all sizes but the rows.
        size: the number of rows, in steps of √2.
        nonzeros: share of the gradient's entries that are not zero, in steps of 1/√2.
        kept: share of the gradient that is left without its zero rows and columns, likewise.
        rows: their number.
    """

    product: str
    form: str
    shape: tuple[int, ...]
    size: int
    nonzeros: int
    kept: int
    rows: int = field(compare=False)

    @classmethod
    def of(
        cls, product: str, form: str, shape: tuple[int, ...], rows: int, nonzeros: float, kept: float = 1.0
    ) -> "Problem":
        """From numbers and shares as they are."""
        return cls(product, form, shape, round(2 * math.log2(rows)), _step(nonzeros), _step(kept), rows)

    @property
    def name(self) -> str:
        """All but the zeros."""
        return f"{self.product} {self.form} {'x'.join(map(str, self.shape))} {self.size}"

    def key(self, allowed: Sequence[str]) -> str:
        """By which the answer is kept."""
        return f"{self.name} {self.nonzeros} {self.kept}: {' '.join(allowed)}"


def _step(share: float) -> int:
    return round(-2 * math.log2(max(share, _FEWEST)))


class Chooser:
    """The kernels of one machine.

    Args:
        answers: what is known: for each key the kernel, and the seconds for a row of those that were tried.
        keep: is called with all answers after every new one.
    """

    def __init__(
        self,
        answers: dict[str, dict[str, Any]] | None = None,
        keep: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        self.answers = answers or {}
        self._keep = keep
        self._points: dict[tuple[str, str], dict[int, float]] = {}
        """Seconds for a row by product and kernel, for each step of the share that they depend on."""
        for key, answer in self.answers.items():
            self._learn(key, answer["seconds"])
        self._taken: dict[tuple[Problem, tuple[str, ...]], str] = {}
        self._lock = threading.Lock()
        self._other = torch.empty(0)

    def best(self, problem: Problem, allowed: tuple[str, ...], compute: Callable[[str], object]) -> str:
        """The kernel that has the product.

        Args:
            problem: the product.
            allowed: the kernels that may take it.
            compute: computes the product by a kernel.
        """
        if len(allowed) == 1:
            return allowed[0]
        found = self._taken.get((problem, allowed))
        if found is None:
            key = problem.key(allowed)
            # Backward passes of two threads may ask at once.
            with self._lock:
                if key not in self.answers:
                    self._answer(problem, allowed, compute)
            found = self._taken[problem, allowed] = self.answers[key]["kernel"]
        return found

    def seconds(self, problem: Problem, kernel: str) -> float:
        """What a kernel is expected to take; NaN where too little is known."""
        _, expected = self._expected(problem, kernel)
        return math.nan if expected is None else expected * problem.rows

    def adopt(self, answers: dict[str, dict[str, Any]]) -> bool:
        """Take other answers for what was not asked yet; False, and nothing is taken, where they contradict."""
        taken = {problem.key(allowed): kernel for (problem, allowed), kernel in self._taken.items()}
        if any(taken.get(key, answer["kernel"]) != answer["kernel"] for key, answer in answers.items()):
            return False
        self.answers.update(answers)
        for key, answer in answers.items():
            self._learn(key, answer["seconds"])
        return True

    def _learn(self, key: str, seconds: dict[str, float]) -> None:
        name, nonzeros, kept = key.partition(": ")[0].rsplit(" ", 2)
        for kernel, value in seconds.items():
            step = (0, int(nonzeros), int(kept))[_depends(kernel)]
            self._points.setdefault((name, kernel), {})[step] = value

    def _expected(self, problem: Problem, kernel: str) -> tuple[float, float | None]:
        """Seconds for a row that a kernel takes at least, and those that it should take, where enough is known."""
        points = self._points.get((problem.name, kernel), {})
        step = (0, problem.nonzeros, problem.kept)[_depends(kernel)]
        if step in points:
            return points[step], points[step]
        # Time is a fixed part and one that is proportional to the share, 2 ** (-step / 2).
        denser, sparser = [s for s in points if s < step], [s for s in points if s > step]
        least = max(
            [points[s] * 2 ** ((s - step) / 2) for s in denser] + [points[s] for s in sparser], default=0
        )
        if not denser or not sparser:
            return least, None
        above, below = max(denser), min(sparser)
        share, high, low = (2 ** (-s / 2) for s in (step, above, below))
        return least, points[below] + (points[above] - points[below]) * (share - low) / (high - low)

    def _answer(self, problem: Problem, allowed: tuple[str, ...], compute: Callable[[str], object]) -> None:
        expected = {kernel: self._expected(problem, kernel) for kernel in allowed}
        known = {kernel: value for kernel, (_, value) in expected.items() if value is not None}
        best = min(known.values(), default=math.inf)
        untried = tuple(k for k in allowed if k not in known and expected[k][0] < best)
        with _announced(), torch.no_grad():
            tried = {k: seconds / problem.rows for k, seconds in self._try(untried, compute).items()}
        known |= tried
        key = problem.key(allowed)
        answer = {"kernel": min(known, key=known.__getitem__), "seconds": tried}
        self.answers[key] = answer
        self._learn(key, tried)
        if self._keep is not None:
            self._keep(self.answers)

    def _try(self, kernels: tuple[str, ...], compute: Callable[[str], object]) -> dict[str, float]:
        """The least of a few runs in turns: whatever else the machine does only ever adds.

        Operands come from beyond the cores' own caches, as in training, where a layer's passes lie far apart.
        """
        if not self._other.numel():
            self._other = torch.zeros(_EVICTED)
        seconds = dict.fromkeys(kernels, math.inf)
        for kernel in kernels:
            compute(kernel)  # the first call compiles it
        begin = time.perf_counter()
        for number in range(_ROUNDS):
            least = min(seconds.values(), default=0.0)
            for kernel in kernels:
                if math.inf > seconds[kernel] > _HOPELESS * least:
                    continue
                self._other.add_(1.0)
                start = time.perf_counter()
                compute(kernel)
                seconds[kernel] = min(seconds[kernel], time.perf_counter() - start)
            if number and time.perf_counter() - begin > _ENOUGH:
                break
        return seconds


def _depends(kernel: str) -> int:
    """What a kernel's time depends on: nothing (0), non-zeros (1), rows and columns that stay (2)."""
    return 2 if kernel == COMPACT else int(kernel in linear.SKIPPING)


_choosers: dict[tuple[object, ...], Chooser] = {}
"""By what the time of a product depends on and a process may change."""


def chooser() -> Chooser:
    """That of this machine at torch's present number of threads and settings of precision."""
    which = _which()
    known = _choosers.get(which)
    if known is None:
        path = _path()
        known = _choosers[which] = Chooser(_stored(path), lambda answers: _store(path, answers))
    return known


def fast_precision(name: str) -> bool:
    """Whether this machine multiplies in ``"bfloat16"`` or ``"int8"`` faster than in float32: some emulate them.

    int8 stands for torch's product with sums in int32.
    """
    size = 256

    @functools.cache
    def operand(kind: str) -> torch.Tensor:
        return torch.ones(size, size, dtype=getattr(torch, kind))

    def compute(kind: str) -> object:
        a = operand(kind)  # made where it is tried: this is asked in every call
        return int8.int_product(a, a) if kind == "int8" else a @ a

    problem = Problem.of("precision", name, (size, size), size, 1.0)
    return chooser().best(problem, ("float32", name), compute) == name


def _which() -> tuple[object, ...]:
    # Read one by one: this stands in every backward call.
    backend: Any = torch.backends.mkldnn
    return torch.get_num_threads(), backend.matmul.fp32_precision, backend.conv.fp32_precision


def state_dict() -> dict[str, Any] | None:
    """The answers in use; None where no product has needed one."""
    known = _choosers.get(_which())
    if known is None or not known.answers:
        return None
    return {"for": _machine(), "answers": dict(known.answers)}


def load_state_dict(state: dict[str, Any]) -> None:
    """Take the kernels that a run began with, so that it goes on with the same.

    Where this process has chosen others already, or runs with other settings, it says so.
    """
    if "weights" not in state:  # by which earlier versions chose
        given = _valid(state["answers"])
        if given != state["answers"]:
            raise ValueError("damaged answers")
        if _machine() == state["for"] and chooser().adopt(given):
            return
    warnings.warn(
        "kernels are chosen by a calibration other than the one that this run started with (another number of threads, "
        "another version, or another run in this process), so it may continue with other kernels, whose results differ "
        "in rounding. To get the same ones, resume in a process of its own, with as many threads as before.",
        RetrogradeWarning,
        stacklevel=2,
    )


def forget() -> int:
    """Delete all answers that are kept, for every machine and setting, and those in use; how many files there were."""
    _choosers.clear()
    found = list(_path().parent.glob("*.json"))
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


@functools.cache
def _announce() -> None:
    """Say why a backward pass takes so long: once for all products of a process."""
    _LOG.warning(
        "the first backward passes on this machine compile the kernels and measure which is the fastest, with %d "
        "thread(s): some seconds for each kind of product, or half a minute on a slow machine. It happens once for "
        "each kind, and the result is kept in %s. `retrograde doctor` compiles beforehand; measuring remains.",
        torch.get_num_threads(),
        _path().parent,
    )


@contextlib.contextmanager
def _announced() -> Generator[None]:
    """Say so where trials take long."""
    timer = threading.Timer(_PATIENCE, _announce)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _stored(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return _valid(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError):
        return {}


def _store(path: Path, answers: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may have met other products in the meantime.
        text = json.dumps({**answers, **_stored(path)})
        host.write_atomically(path, lambda file: file.write(text.encode()), shared=True)
    except OSError as error:
        _LOG.warning("which kernels are fastest cannot be stored in %s: %s", path, error)


def _valid(given: Any) -> dict[str, dict[str, Any]]:
    """Those of the answers that are whole."""
    if not isinstance(given, dict):
        return {}
    return {
        key: answer
        for key, answer in given.items()
        if isinstance(answer, dict)
        and isinstance(answer.get("kernel"), str)
        and isinstance(answer.get("seconds"), dict)
        and all(isinstance(second, float) and 0 < second < math.inf for second in answer["seconds"].values())
        and _KEY.fullmatch(key)
        and {answer["kernel"], *answer["seconds"]} <= {*key.partition(": ")[2].split()}
    }


def _machine() -> str:
    """All that answers depend on."""
    versions = (torch.__version__, np.__version__)
    facts = (_VERSION, host.processor(), host.instructions(), *_which(), versions, host.settings())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _path() -> Path:
    return host.cache_folder("kernels") / f"{_machine()}.json"

"""Statistics of a layer's input, shared by the methods that need them: mean, and the top of the covariance's spectrum.

The eigenbasis is tracked by subspace iteration, warm-started from the last one: with C the covariance of fresh rows,

    Q ← orth(C Q)          a few times
    Qᵀ C Q = V Λ Vᵀ,  U = Q V

at 4·m·d·k operations an iteration for m rows; C itself is never formed unless d is small.

A refresh happens in the first step and then every `StatisticsSpec.every`. One step seldom brings all the rows that are
asked for, so the steps just before a refresh bring theirs too, as many of them as it takes.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrograde.engine import ranks
from retrograde.maths.spectral import eigh

_MEAN_MOMENTUM = 0.5
_COLD_ITERATIONS = 5
_WARM_ITERATIONS = 2
_LARGE = 1e7
"""Rows beyond this are taken in float64: norms of their second moment's columns, fourth powers, overflow float32."""
_STATE = ("mean", "basis", "eigenvalues", "variance")


@dataclass(frozen=True)
class StatisticsSpec:
    """What a rule needs of its layer's input; several rules on one layer share the most demanding wishes.

    Attributes:
        rows: budget of sampled rows for each refresh.
        every: steps between refreshes.
        rank: eigenpairs to track; 0 for none.
        until: no refresh from this step on; None refreshes to the end.
        portion: the largest share of a call's input that rows may hold: they are kept for its backward pass.
    """

    rows: int = 2048
    every: int = 32
    rank: int = 0
    until: int | None = None
    portion: float = 1.0

    def merged(self, other: "StatisticsSpec") -> "StatisticsSpec":
        """Enough for both."""
        until = None if self.until is None or other.until is None else max(self.until, other.until)
        return StatisticsSpec(
            max(self.rows, other.rows),
            min(self.every, other.every),
            max(self.rank, other.rank),
            until,
            max(self.portion, other.portion),
        )

    def budget(self, entries: int, width: int) -> int:
        """Rows of one call, at least one, for an input of so many entries and rows of so many."""
        return self.rows if self.portion == 1 else max(1, min(self.rows, int(self.portion * entries / width)))


class InputStatistics:
    """Mean and leading eigenpairs of the covariance of a layer's input rows.

    All tensors have a leading dimension for a convolution's groups (1 otherwise) and are float32, or float64 for inputs
    that are float64 or very large. Where the model is moved or cast, they follow its input.

    Attributes:
        spec: budget, period and rank.
        rows: (groups, m, d), what the last refresh saw; None before it.
        mean: (groups, d), running mean over refreshes; None before the first.
        basis: (groups, d, k), orthonormal columns U, leading first; None when no rank is tracked or before the first.
        eigenvalues: (groups, k), Λ.
        variance: (groups,), mean eigenvalue, trace(C)/d.
        drift: (groups,), k − ‖Uᵀ U_before‖²_F of the last refresh.
        refreshes: how many there have been.
        flops: cost of the last refresh.
    """

    def __init__(self, spec: StatisticsSpec) -> None:
        self.spec = spec
        self.rows: Tensor | None = None
        self.mean: Tensor | None = None
        self.basis: Tensor | None = None
        self.eigenvalues: Tensor | None = None
        self.variance: Tensor | None = None
        self.drift: Tensor | None = None
        self.refreshes = 0
        self.flops = 0.0
        self._step = 0
        self._window = 1
        self._pending: list[Tensor] = []

    def due(self, step: int) -> bool:
        """Whether the backward passes of `step`, the one that begins now, bring rows."""
        self._step = step
        left = -step % self.spec.every
        stopped = self.spec.until is not None and step + left >= self.spec.until
        return left < self._window and not stopped

    @property
    def share(self) -> float:
        """Of the steps, those that bring rows, in the long run: none where refreshes end."""
        return 0.0 if self.spec.until is not None else self._window / self.spec.every

    def complete(self) -> None:
        """Let the rows that one step brought stand for those of the steps before it: for a forecast."""
        if self._pending:
            self._pending = [self._pending[-1]] * self._window

    def collect(self, rows: Tensor) -> None:
        """Rows of one backward call; a step's calls fill the budget together."""
        missing = self.spec.rows - sum(r.shape[1] for r in self._pending)
        if missing > 0 and rows.shape[1]:
            self._pending.append(rows[:, :missing])

    def refresh(self) -> bool:
        """After a step: where a refresh is due, take the rows in; all ranks end with the same statistics.

        Returns:
            Whether anything new was learnt.
        """
        if self._step % self.spec.every:
            return False
        rows = torch.cat([r.to(self._pending[-1]) for r in self._pending], 1) if self._pending else None
        self._pending = []
        # Ranks decide together: one without rows, or with bad ones, would leave the others waiting.
        peak = math.nan if rows is None else float(rows.abs().amax())
        wide = self.mean is not None and self.mean.dtype == torch.float64
        here = torch.tensor([math.isfinite(peak), wide or peak > _LARGE], device=self._device(rows)).float()
        good, large = ranks.mean(here).tolist()
        if good < 1 or rows is None:
            return False
        if not self.refreshes:
            self._window = max(1, min(self.spec.every, math.ceil(self.spec.rows / rows.shape[1])))
        self.rows = rows = rows.double() if large else rows
        for name in _STATE:
            if (known := getattr(self, name)) is not None:
                setattr(self, name, known.to(rows))
        mean = ranks.mean(rows.mean(1))
        self.mean = mean if self.mean is None else self.mean.lerp(mean, 1 - _MEAN_MOMENTUM)
        centred = rows - mean.unsqueeze(1)
        squares = torch.linalg.vector_norm(centred, dim=(1, 2)).square()
        self.variance = ranks.mean(squares / centred[0].numel())
        self.flops = 4.0 * rows.numel()
        if self.spec.rank:
            self._track(centred)
        self.refreshes += 1
        return True

    def _device(self, rows: Tensor | None) -> torch.device:
        known = rows if rows is not None else self.mean
        return torch.device("cpu") if known is None else known.device

    def _track(self, centred: Tensor) -> None:
        m, d = centred.shape[1:]
        k = min(self.spec.rank, d)

        def times_covariance(q: Tensor) -> Tensor:
            self.flops += 4.0 * centred.numel() * k
            return ranks.mean(centred.mT @ (centred @ q) / m)

        before = self.basis
        if d <= 2 * k:
            self.flops += 2.0 * centred.numel() * d
            values, vectors = eigh(ranks.mean(centred.mT @ centred / m))
            basis = vectors[..., -k:].flip(-1)
        else:
            if before is None:
                generator = torch.Generator().manual_seed(
                    0
                )  # any start will do; this one is the same on all ranks
                q = torch.randn(d, k, generator=generator).to(centred).expand(centred.shape[0], d, k)
            else:
                q = before
            for _ in range(_COLD_ITERATIONS if before is None else _WARM_ITERATIONS):
                q, _ = torch.linalg.qr(times_covariance(q))
            values, vectors = eigh(q.mT @ times_covariance(q))
            basis = q @ vectors.flip(-1)
        self.eigenvalues, self.basis = values[:, -k:].flip(-1).clamp_min(0), basis
        if before is not None:
            self.drift = k - (basis.mT @ before).square().sum((1, 2))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and counts; rows waiting for the next refresh included."""
        names = ("rows", "mean", "basis", "eigenvalues", "variance", "drift", "refreshes", "flops")
        counts = {"step": self._step, "window": self._window, "pending": list(self._pending)}
        return {**{name: getattr(self, name) for name in names}, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        state = dict(state)
        self._step, self._window = int(state.pop("step")), int(state.pop("window"))
        self._pending = list(state.pop("pending"))
        for name, value in state.items():
            setattr(self, name, value)

"""Statistics of a layer's input, shared by the methods that need them: mean, and the top of the covariance's spectrum.

The eigenbasis is tracked by subspace iteration. With C the covariance of fresh rows the first refresh takes

    Q ← orth(C Q)          a few times
    Qᵀ C Q = V Λ Vᵀ,  U = Q V                               (1)

and each later one goes on from the last basis by one product alone,

    C U = U' Λ' Vᵀ                                          (2)   the singular value decomposition

which for the eigenvectors U gives them back with their eigenvalues. A product costs 4·m·d·k operations for m rows; C
itself is never formed unless d is small.

A refresh happens in the first step and then every `StatisticsSpec.every`; where the layer took no part in that step, or
its rows were not finite, in the next one, for as many steps as there are between refreshes. One step seldom brings all
the rows that are asked for, so the steps just before a refresh bring theirs too, as many of them as it takes. A refresh
that finds what the last one found, up to what a sample of m rows can tell,

    ‖UΛUᵀ − U'Λ'U'ᵀ‖² ≤ 2·2(tr²C + ‖C‖²)/m,  ‖μ − μ'‖² ≤ 2·2·trC/m          (3)   or a twentieth of ‖UΛUᵀ‖, of trC

doubles the time to the next one, up to `StatisticsSpec.longest`; one that finds something else sets it back.
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
_NOISE = 2.0
"""A change of so many times the variance that sampling alone gives it is none."""
_SLIGHT = 0.05
"""Nor is one of this share."""
_LARGE = 1e7
"""Rows beyond this are taken in float64: norms of their second moment's columns, fourth powers, overflow float32."""
_STATE = ("mean", "basis", "eigenvalues", "variance")


@dataclass(frozen=True)
class StatisticsSpec:
    """What a rule needs of its layer's input; several rules on one layer share the most demanding wishes.

    Attributes:
        rows: budget of sampled rows for each refresh.
        every: steps between refreshes.
        longest: most steps between them while they find nothing new; None keeps to `every`.
        rank: eigenpairs to track; 0 for none.
        until: no refresh from this step on; None refreshes to the end.
        portion: the largest share of a call's input that rows may hold: they are kept for its backward pass.
    """

    rows: int = 2048
    every: int = 32
    rank: int = 0
    until: int | None = None
    portion: float = 1.0
    longest: int | None = None

    def merged(self, other: "StatisticsSpec") -> "StatisticsSpec":
        """Enough for both."""
        until = None if self.until is None or other.until is None else max(self.until, other.until)
        return StatisticsSpec(
            max(self.rows, other.rows),
            min(self.every, other.every),
            max(self.rank, other.rank),
            until,
            max(self.portion, other.portion),
            None
            if self.longest is None and other.longest is None
            else min(self.longest or self.every, other.longest or other.every),
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
        period: steps from the last refresh to the next.
        refreshes: how many there have been.
        flops: cost of the last refresh.
        product: FLOPs of the layer's own forward product, over all calls of the step of the last refresh.
    """

    def __init__(self, spec: StatisticsSpec) -> None:
        self.spec = spec
        self._rank = spec.rank
        self.rows: Tensor | None = None
        self.mean: Tensor | None = None
        self.basis: Tensor | None = None
        self.eigenvalues: Tensor | None = None
        self.variance: Tensor | None = None
        self.drift: Tensor | None = None
        self.refreshes = 0
        self.flops = 0.0
        self.product = 0.0
        self._work = 0.0
        self._step = 0
        self._next = 0
        """The step of the next refresh."""
        self.period = spec.every
        self._window = 1
        self._missed = 0
        """Refreshes in a row for which there were no rows."""
        self._pending: list[Tensor] = []

    def due(self, step: int) -> bool:
        """Whether the backward passes of `step`, the one that begins now, bring rows."""
        self._step = step
        self._work = 0.0
        while self._next < step:
            # Steps that this layer took no part in.
            self._next += self.period
        stopped = self.spec.until is not None and self._next >= self.spec.until
        return self._next - step < self._window and not stopped

    @property
    def share(self) -> float:
        """Of the steps, those that bring rows, in the long run: none where refreshes end."""
        return 0.0 if self.spec.until is not None else self._window / self.spec.every

    def complete(self) -> None:
        """Let the rows that one step brought stand for those of the steps before it: for a forecast."""
        if self._pending:
            self._pending = [self._pending[-1]] * self._window

    def collect(self, rows: Tensor, flops: float = 0.0) -> None:
        """Rows of one backward call, and what its forward product took; a step's calls fill the budget together."""
        self._work += flops
        missing = self.spec.rows - sum(r.shape[1] for r in self._pending)
        if missing > 0 and rows.shape[1]:
            self._pending.append(rows[:, :missing])

    def narrow(self, rank: int) -> None:
        """Track so many directions from now on, for a rule that has found out what it can use."""
        # Not in the specification, which compiled code guards.
        self._rank = rank
        if self.basis is not None and self.eigenvalues is not None:
            self.basis, self.eigenvalues = self.basis[..., :rank].contiguous(), self.eigenvalues[:, :rank]

    def refresh(self) -> bool:
        """After a step: where a refresh is due, take the rows in; all ranks end with the same statistics.

        Returns:
            Whether anything new was learnt.
        """
        if self._step != self._next:
            return False
        rows = torch.cat([r.to(self._pending[-1]) for r in self._pending], 1) if self._pending else None
        self._pending = []
        # Ranks decide together: one without rows, or with bad ones, would leave the others waiting.
        peak = math.nan if rows is None else _peak(rows)
        wide = self.mean is not None and self.mean.dtype == torch.float64
        count = 0 if rows is None else rows.shape[1]
        here = [math.isfinite(peak), wide or peak > _LARGE, count, self._work]
        found = torch.tensor(here, device=self._device(rows), dtype=torch.float32)
        good, large, count, work = ranks.mean(found).tolist()
        if good < 1 or rows is None:
            # A layer of every second step would else be asked in the other ones for ever.
            self._missed += 1
            self._next = self._step + (1 if self._missed < self.period else self.period)
            return False
        self._missed = 0
        self._next = self._step + self.period
        if not self.refreshes:
            self._window = max(1, min(self.spec.every, math.ceil(self.spec.rows / rows.shape[1])))
        self.product = work
        self.rows = rows = rows.double() if large else rows
        for name in _STATE:
            if (known := getattr(self, name)) is not None:
                setattr(self, name, known.to(rows))
        before = self.mean, self.basis, self.eigenvalues
        mean = ranks.mean(rows.mean(1))
        self.mean = mean if self.mean is None else self.mean.lerp(mean, 1 - _MEAN_MOMENTUM)
        centred = rows - mean.unsqueeze(1)
        squares = torch.linalg.vector_norm(centred, dim=(1, 2)).square()
        self.variance = ranks.mean(squares / centred[0].numel())
        self.flops = 4.0 * rows.numel()
        if self._rank:
            self._track(centred)
        self._pace(*before, mean, count)
        self.refreshes += 1
        return True

    def _pace(
        self,
        old_mean: Tensor | None,
        old_basis: Tensor | None,
        old_eigenvalues: Tensor | None,
        mean: Tensor,
        m: float,
    ) -> None:
        """Equation (3); all that it rests on is the same on every rank."""
        longest = self.spec.longest or self.spec.every
        if longest <= self.spec.every or old_mean is None:
            return
        assert self.variance is not None
        trace = self.variance * mean.shape[-1]
        moved = (mean - old_mean).square().sum(-1)
        settled = moved <= torch.maximum(_NOISE * 2 * trace / m, _SLIGHT**2 * trace)
        if old_basis is not None and old_eigenvalues is not None:
            assert self.basis is not None
            assert self.eigenvalues is not None
            size = self.eigenvalues.square().sum(-1)
            overlap = (self.basis.mT @ old_basis).square()
            shared = (self.eigenvalues.unsqueeze(1) @ overlap @ old_eigenvalues.unsqueeze(-1)).flatten()
            turned = size + old_eigenvalues.square().sum(-1) - 2 * shared
            noise = _NOISE * 2 * (trace.square() + size) / m
            settled &= turned <= torch.maximum(noise, _SLIGHT**2 * size)
        self.period = min(2 * self.period, longest) if bool(settled.all()) else self.spec.every
        self._next = self._step + self.period

    def _device(self, rows: Tensor | None) -> torch.device:
        known = rows if rows is not None else self.mean
        return torch.device("cpu") if known is None else known.device

    def _track(self, centred: Tensor) -> None:
        m, d = centred.shape[1:]
        k = min(self._rank, d)

        def times_covariance(q: Tensor) -> Tensor:
            self.flops += 4.0 * centred.numel() * k
            return ranks.mean(centred.mT @ (centred @ q) / m)

        before = self.basis
        if d <= 2 * k:
            self.flops += 2.0 * centred.numel() * d
            values, vectors = eigh(ranks.mean(centred.mT @ centred / m))
            basis = vectors[..., -k:].flip(-1)
        elif before is None:
            # Any start will do; this one is the same on all ranks.
            generator = torch.Generator().manual_seed(0)
            q = torch.randn(d, k, generator=generator).to(centred).expand(centred.shape[0], d, k)
            for _ in range(_COLD_ITERATIONS):
                q, _ = torch.linalg.qr(times_covariance(q))
            values, vectors = eigh(q.mT @ times_covariance(q))
            basis = q @ vectors.flip(-1)
        else:
            q, r = torch.linalg.qr(times_covariance(before))
            squares, vectors = eigh(r @ r.mT)
            values, basis = squares.clamp_min(0).sqrt(), q @ vectors.flip(-1)
        self.eigenvalues, self.basis = values[:, -k:].flip(-1).clamp_min(0), basis
        if before is not None:
            self.drift = k - (basis.mT @ before).square().sum((1, 2))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and counts; rows waiting for the next refresh included."""
        names = ("rows", "mean", "basis", "eigenvalues", "variance", "drift", "refreshes", "flops", "product")
        times = {"step": self._step, "next": self._next, "period": self.period}
        counts = {**times, "window": self._window, "missed": self._missed, "pending": list(self._pending)}
        return {**{name: getattr(self, name) for name in names}, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        state = dict(state)
        self._step, self._window = int(state.pop("step")), int(state.pop("window"))
        self._next, self.period = int(state.pop("next")), int(state.pop("period"))
        self._missed = int(state.pop("missed"))
        self._pending = list(state.pop("pending"))
        for name, value in state.items():
            setattr(self, name, value)
        if self.basis is not None:
            self.narrow(min(self._rank, self.basis.shape[-1]))


def _peak(rows: Tensor) -> float:
    """The largest |x|, NaN where one is: by way of torch's fastest pass over them."""
    least, most = torch.aminmax(rows)
    return max(-float(least), float(most))

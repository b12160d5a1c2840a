"""Statistics of a layer's input, shared by the methods that need them: mean, and the top of the covariance's spectrum.

The eigenbasis is tracked by subspace iteration, warm-started from the last one: with C the covariance of fresh rows,

    Q ← orth(C Q)          a few times
    Qᵀ C Q = V Λ Vᵀ,  U = Q V

at 4·m·d·k operations an iteration for m rows; C itself is never formed unless d is small.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MEAN_MOMENTUM = 0.9
_COLD_ITERATIONS = 5
_WARM_ITERATIONS = 2


@dataclass(frozen=True)
class StatisticsSpec:
    """What a rule needs of its layer's input; several rules on one layer share the most demanding wishes.

    Attributes:
        rows: budget of sampled rows for each refresh.
        every: steps between refreshes.
        rank: eigenpairs to track; 0 for none.
    """

    rows: int = 2048
    every: int = 32
    rank: int = 0

    def merged(self, other: "StatisticsSpec") -> "StatisticsSpec":
        """Enough for both."""
        return StatisticsSpec(
            max(self.rows, other.rows), min(self.every, other.every), max(self.rank, other.rank)
        )


class InputStatistics:
    """Mean and leading eigenpairs of the covariance of a layer's input rows.

    All tensors have a leading dimension for a convolution's groups (1 otherwise) and are float32 (float64 for float64
    inputs).

    Attributes:
        spec: budget, period and rank.
        rows: (groups, m, d), what the last sampled step saw; None before it.
        mean: (groups, d), running mean over refreshes; None before the first.
        basis: (groups, d, k), orthonormal columns U, leading first; None when no rank is tracked or before the first.
        eigenvalues: (groups, k), Λ.
        variance: (groups,), mean eigenvalue, trace(C)/d.
        drift: (groups,), k − ‖Uᵀ U_before‖²_F of the last refresh.
        refreshes: how many there have been.
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
        self._pending: list[Tensor] = []

    def due(self, step: int) -> bool:
        """Whether the backward passes of this step bring rows: the first step, then every `spec.every`."""
        return step % self.spec.every == 0

    def collect(self, rows: Tensor) -> None:
        """Rows of one backward call; a step's calls fill the budget together."""
        missing = self.spec.rows - sum(r.shape[1] for r in self._pending)
        if missing > 0 and rows.shape[1]:
            self._pending.append(rows[:, :missing])

    def refresh(self) -> bool:
        """After the step: take the rows in; under data parallelism every rank ends with the same statistics.

        Returns:
            Whether anything new was learnt.
        """
        if not self._pending:
            return False
        rows = torch.cat(self._pending, 1)
        self._pending = []
        if not bool(torch.isfinite(rows).all()):
            return False
        self.rows = rows
        mean = _across_ranks(rows.mean(1))
        self.mean = mean if self.mean is None else self.mean.lerp(mean, 1 - _MEAN_MOMENTUM)
        centred = rows - mean.unsqueeze(1)
        self.variance = _across_ranks(centred.square().mean((1, 2)))
        if self.spec.rank:
            self._track(centred)
        self.refreshes += 1
        return True

    def _track(self, centred: Tensor) -> None:
        m, d = centred.shape[1:]
        k = min(self.spec.rank, d)

        def times_covariance(q: Tensor) -> Tensor:
            return _across_ranks(centred.mT @ (centred @ q) / m)

        before = self.basis
        if d <= 2 * k:
            values, vectors = torch.linalg.eigh(_across_ranks(centred.mT @ centred / m))
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
            values, vectors = torch.linalg.eigh(q.mT @ times_covariance(q))
            basis = q @ vectors.flip(-1)
        self.eigenvalues, self.basis = values[:, -k:].flip(-1).clamp_min(0), basis
        if before is not None:
            self.drift = k - (basis.mT @ before).square().sum((1, 2))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and counts; rows waiting for the next refresh included."""
        names = ("rows", "mean", "basis", "eigenvalues", "variance", "drift", "refreshes")
        return {**{name: getattr(self, name) for name in names}, "pending": list(self._pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        state = dict(state)
        self._pending = list(state.pop("pending"))
        for name, value in state.items():
            setattr(self, name, value)


def _across_ranks(tensor: Tensor) -> Tensor:
    """The mean over ranks; `tensor` itself in one process."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return tensor
    tensor = tensor.contiguous()
    distributed.all_reduce(tensor)
    return tensor / distributed.get_world_size()

"""One leading subspace that a rule follows: its basis, its rank, and how both are refreshed."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from retrograde.engine import ranks
from retrograde.maths import spectral
from retrograde.maths.philox import mix_key

_COLD_STEPS = 5
_WARM_STEPS = 1

Update = Literal["qr", "lie"]
Directions = Literal["top", "random", "bulk"]


@dataclass(frozen=True)
class Policy:
    """How a subspace is chosen and followed; see `Spectral` for the fields of the same names.

    Attributes:
        rank: fixed rank, or None for the one that holds `energy`.
        cap: the largest rank.
        energy: θ.
        random: how many of the directions are random.
        directions: ``basis`` of `Spectral`.
        update: QR or Cayley.
        tau: length of a Cayley step.
        seed: of the random directions, the same on every rank.
    """

    rank: int | None
    cap: int
    energy: float
    random: int
    directions: Directions
    update: Update
    tau: float
    seed: int


class Subspace:
    """The leading eigenvectors of a second moment E[xxᵀ], refreshed from rows of x.

    The moment is not centred: the bound on the gradient's error is one on XᵀX, and the mean of ReLU's outputs is often
    its largest direction. Tensors have a leading dimension of groups, and are replaced, never written to: a backward
    pass may still hold the last ones.

    Attributes:
        basis: (groups, d, k) orthonormal, what gradients are projected on; None before the first refresh.
        eigenvalues: (groups, k'), those of the leading directions.
        trace: (groups,), the sum of all eigenvalues.
        drift: k' − ‖U_oldᵀU_new‖², largest of the groups, of the last refresh.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.basis: Tensor | None = None
        self.eigenvalues: Tensor | None = None
        self.trace: Tensor | None = None
        self.drift = 0.0
        self._leading: Tensor | None = None
        self._settled = False
        self._refreshes = 0

    @property
    def rank(self) -> int:
        """k; 0 before the first refresh."""
        return 0 if self.basis is None else self.basis.shape[-1]

    def first_eigenpair(self) -> tuple[Tensor, Tensor] | None:
        """λ₁ (groups,) and e₁ (groups, d)."""
        if self.eigenvalues is None or self._leading is None:
            return None
        return self.eigenvalues[:, 0], self._leading[..., 0]

    def refresh(self, rows: Tensor) -> float:
        """Follow the second moment of fresh rows (groups, m, d). Returns the FLOPs that this took."""
        local = spectral.second_moment(rows)

        def multiply(q: Tensor) -> Tensor:
            return ranks.mean(local(q))

        groups, m, d = rows.shape
        if self._leading is not None:
            self._leading = self._leading.to(rows)
        trace = ranks.mean(rows.square().mean(1).sum(-1))
        alive = trace > 0
        if not bool(alive.any()):
            # Rows of zeros have no directions.
            return 0.0
        before, steps = self._leading, _WARM_STEPS
        k = self._tracked(d)
        if before is None:
            before, steps = self._start(groups, d, k, rows), _COLD_STEPS
        if self._policy.update == "lie" and self._leading is not None:
            q = spectral.lie_steps(multiply, before, steps, self._policy.tau)
        elif d <= 2 * k:
            eye = torch.eye(d, dtype=rows.dtype, device=rows.device).expand(groups, d, d)
            moment = multiply(eye)
            q = spectral.eigh((moment + moment.mT) / 2)[1][..., -k:]
        else:
            q = spectral.qr_steps(multiply, before, steps)
        eigenvalues, leading = spectral.leading_eigenpairs(multiply, q)
        if self._leading is not None and self.eigenvalues is not None and self.trace is not None:
            # A group that is silent this time keeps what it had.
            leading = torch.where(alive[:, None, None], leading, self._leading)
            eigenvalues = torch.where(alive[:, None], eigenvalues, self.eigenvalues.to(eigenvalues))
            trace = torch.where(alive, trace, self.trace.to(trace))
        self.eigenvalues, self.trace = eigenvalues, trace
        if self._leading is not None:
            self.drift = float(spectral.drift(self._leading, leading).max())
        self._leading = leading
        self._refreshes += 1
        self.basis = self._chosen(leading)
        # C Q once an iteration and once for the eigenpairs; QR at about 6dk², Cayley's step with its check at 10dk².
        update = 6.0 if self._policy.update == "qr" else 10.0
        return groups * (steps + 1) * (4.0 * m * d * k + update * d * k * k)

    def begin(self, groups: int, d: int, like: Tensor) -> None:
        """Random directions until the first refresh, on the device of `like` and in its dtype."""
        self.basis = self._start(groups, d, self._tracked(d), like)

    def settle(self) -> None:
        """Fix the rank for good: from here on shapes stay, so compiled code does too."""
        if self._settled or self._leading is None or self.eigenvalues is None or self.trace is None:
            return
        self._settled = True
        policy = self._policy
        if policy.rank is None:
            k = spectral.rank_for_energy(self.eigenvalues, self.trace, policy.energy)
            self._leading, self.eigenvalues = self._leading[..., :k].contiguous(), self.eigenvalues[:, :k]
            self.basis = self._chosen(self._leading)

    def _tracked(self, d: int) -> int:
        if self._leading is not None:
            return self._leading.shape[-1]
        policy = self._policy
        return min(policy.cap if policy.rank is None else policy.rank, d)

    def _start(self, groups: int, d: int, k: int, like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(mix_key(self._policy.seed, self._refreshes) >> 1)
        return torch.linalg.qr(torch.randn(groups, d, k, generator=generator).to(like))[0]

    def _chosen(self, leading: Tensor) -> Tensor:
        """What of the leading directions, and of random ones, gradients are projected on."""
        groups, d, k = leading.shape
        if self._policy.directions == "random":
            return self._start(groups, d, k, leading)
        drawn = min(self._policy.random, k - 1)
        if not drawn:
            return leading
        fixed = leading[..., : k - drawn]
        # Projected out twice: once leaves rounding behind.
        rest = self._start(groups, d, drawn, fixed)
        for _ in range(2):
            rest, _ = torch.linalg.qr(rest - fixed @ (fixed.mT @ rest))
        return torch.cat((fixed, rest), -1)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and counts."""
        return {key.removeprefix("_"): value for key, value in self.__dict__.items() if key != "_policy"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for key in self.__dict__:
            if key != "_policy":
                setattr(self, key, state[key.removeprefix("_")])

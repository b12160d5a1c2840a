"""How well a basis follows a subspace that turns at a known speed, and what following costs."""

import time
from statistics import median
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from retrograde.lab.experiments.base import Context, Experiment
from retrograde.maths import spectral

Update = Literal["qr", "oja", "lie", "wen-yin"]


class Tracking(Experiment):
    """A stream of rows x = Q_t diag(s) z + noise, of which span(Q_t) turns by `speed` radians a step.

    All k principal angles between Q_t and Q_{t+1} are the speed: Q_t = Q cos(speed · t) + P sin(speed · t), with P
    orthogonal to Q. Each step brings `rows` fresh rows, C is their second moment, and the basis makes one update:

    - ``qr``: Q ← orth(C Q);
    - ``oja``: Q ← orth(Q + τ C Q/λ₁), by QR: the same step as Cayley's to first order;
    - ``lie``: Cayley's transform, `retrograde.maths.spectral.lie_steps`;
    - ``wen-yin``: the same transform by the 2k × 2k system of Wen and Yin.

    C is that of the last `window` steps' rows together, which any of them may pay for. The basis starts in the
    true subspace, and the first third of the steps is not counted. A trial runs on a stream of its own.
    """

    update: Update = "qr"
    tau: Annotated[float, Field(gt=0)] = 1.0
    dimension: PositiveInt = 512
    rank: PositiveInt = 32
    rows: PositiveInt = 64
    window: PositiveInt = 1
    strongest: float = 20.0
    weakest: float = 5.0
    speeds: dict[str, float] = Field(
        default_factory=lambda: {"still": 0.0, "slow": 0.003, "middle": 0.01, "fast": 0.03}
    )
    steps: PositiveInt = 300
    long: PositiveInt = 10_000

    def run(self, context: Context) -> dict[str, float]:
        """Errors (k − ‖Q_tᵀQ‖²)/k by speed, the share captured on average (``accuracy`` too), and the update's cost."""
        started = time.perf_counter()
        errors: dict[str, float] = {}
        spent: list[float] = []
        for at, (name, speed) in enumerate(self.speeds.items()):
            errors[f"tracking_error_{name}"] = self._follow(speed, 2 * self.seed + context.trial, spent)
            context.note((at + 1) / (len(self.speeds) + 1))
        captured = 1 - sum(errors.values()) / len(errors)
        found = {"accuracy": captured, "captured": captured, **errors}
        if context.trial:
            return found
        return {
            **found,
            "orthonormality": self._after_many_steps(),
            "update_flops": self.flops(),
            "update_seconds": median(spent),
            "seconds": time.perf_counter() - started,
        }

    def flops(self) -> float:
        """Of one update: both products with C, 4ndk, and the basis's own work."""
        d, k = self.dimension, self.rank
        own = {
            "qr": 4 * d * k**2 - 4 / 3 * k**3,
            "oja": 4 * d * k**2 - 4 / 3 * k**3 + 4 * d * k,
            # With the check of orthonormality; a polish, where it is due, adds 4dk².
            "lie": 10 * d * k**2 + 2 * k**3 + 4 * d * k,
            "wen-yin": 18 * d * k**2 + 40 / 3 * k**3 + 4 * d * k,
        }
        return 4.0 * self.window * self.rows * d * k + own[self.update]

    def _follow(self, speed: float, seed: int, spent: list[float]) -> float:
        generator = torch.Generator().manual_seed(seed)
        d, k = self.dimension, self.rank
        both = torch.linalg.qr(torch.randn(d, 2 * k, generator=generator, dtype=torch.float64))[0].float()
        start, beside = both[:, :k], both[:, k:]
        scales = torch.linspace(self.strongest, self.weakest, k).sqrt()
        q, errors, recent = start.clone(), list[float](), list[Tensor]()
        for step in range(self.steps):
            angle = torch.tensor(speed * step, dtype=torch.float64)
            truth = start * angle.cos() + beside * angle.sin()
            rows = torch.randn(self.rows, k, generator=generator) * scales @ truth.mT.float()
            recent = [*recent, rows + torch.randn(self.rows, d, generator=generator)][-self.window :]
            began = time.perf_counter()
            q = self._updated(q, torch.cat(recent))
            spent.append(time.perf_counter() - began)
            if step >= self.steps // 3:
                errors.append(float(spectral.drift(truth.float(), q)) / k)
        return sum(errors) / len(errors)

    def _updated(self, q: Tensor, rows: Tensor) -> Tensor:
        multiply = spectral.second_moment(rows)
        if self.update == "qr":
            return spectral.qr_steps(multiply, q, 1)
        if self.update == "lie":
            return spectral.lie_steps(multiply, q, 1, self.tau)
        m = multiply(q)
        m = self.tau * m / (q * m).sum(0).max()
        return torch.linalg.qr(q + m)[0] if self.update == "oja" else wen_yin(q, m)

    def _after_many_steps(self) -> float:
        """The worst ``max |QᵀQ − I|`` within `long` steps in float32, at a size where that is quick."""
        generator = torch.Generator().manual_seed(self.seed)
        batches = torch.randn(16, 16, 32, generator=generator)
        q, worst = torch.linalg.qr(torch.randn(32, 8, generator=generator))[0], 0.0
        for step in range(self.long):
            q = self._updated(q, batches[step % 16])
            if step % 50 == 49:
                worst = max(worst, spectral.orthonormality(q))
        return worst


def wen_yin(q: Tensor, m: Tensor) -> Tensor:
    """``Q + L(I − RᵀL/2)⁻¹RᵀQ``, L = [M, Q], R = [Q, −M]: Wen and Yin 2013; polished past 4 units of rounding."""
    left, right = torch.cat((m, q), -1), torch.cat((q, -m), -1)
    eye = torch.eye(left.shape[-1], dtype=q.dtype, device=q.device)
    q = q + left @ torch.linalg.solve(eye - 0.5 * right.mT @ left, right.mT @ q)
    limit = 4 * torch.finfo(q.dtype).eps
    return spectral.polish(q) if spectral.orthonormality(q) > limit else q

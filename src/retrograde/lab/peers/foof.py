r"""FOOF: gradient descent on neurons, each layer's gradient by the inverse second moment of its input.

    Σ ← decay · Σ + (1 − decay) · XᵀX/n        (1)   rows X (n, d) of the layer's input in this step
    P = (Σ + γI)⁻¹                             (2)   γ: `damping`
    dW ← dW P                                  (3)   before the optimizer's step

Σ starts as XᵀX/n. (1) and (2) run in the first step and then every `every` steps; (3) in all. With γ → 0 and plain SGD
a step moves each neuron's outputs on the batch straight against δ, as far as its inputs can.

Deviations from the paper: Σ and P are refreshed together, where it has a period for each; of a batch with more than
`rows` input rows an even sample enters Σ; biases get their plain gradient. Convolutions: rows are patches of
C_in/groups · kernel values (transposed: pixels), each group with its own Σ.

With `optimizer="sgd"` the paper's optimizer, SGD with momentum, takes the recipe's place: one that divides by the
gradient's size (Adam) would undo part of (3). SGD adds weight decay behind (3).

Cost: 2·o·d² for each step; every T steps 2·n·d² + 2·d³ more, in each group.

Suggested settings: tune the learning rate and γ together, over powers of ten; γ is in units of Σ's eigenvalues.

Reference:
    Benzing. *Gradient descent on neurons and its link to approximate second-order optimization.* ICML 2022,
    arXiv 2201.12250.
"""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from retrograde.engine import ranks
from retrograde.engine.slots import Call, Method, Rule, Site, Step
from retrograde.errors import OptionError
from retrograde.kernels.delta import Delta
from retrograde.lab.peers.base import Base, Peer


@dataclass(frozen=True)
class Foof(Peer, Method):
    """FOOF (module docstring: equations, deviations, source).

    Args:
        damping: γ, above 0, in units of Σ.
        every: T, steps between refreshes.
        decay: of Σ at a refresh, in [0, 1).
        rows: the most input rows of one call that enter Σ.
        optimizer: ``"sgd"`` is the paper's; ``"recipe"`` keeps the recipe's.
        momentum: of the paper's optimizer.

    Raises:
        OptionError: in training, a γ that rounding loses beside Σ.
    """

    name: ClassVar[str] = "foof"

    damping: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    every: PositiveInt = 10
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
    rows: PositiveInt = 4096
    optimizer: Literal["sgd", "recipe"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9

    def make_optimizer(
        self, model: nn.Module, learning_rate: float, weight_decay: float, base: Base
    ) -> torch.optim.Optimizer | None:
        """SGD with momentum, or none of its own."""
        if self.optimizer == "recipe":
            return None
        return torch.optim.SGD(
            model.parameters(), lr=learning_rate, momentum=self.momentum, weight_decay=weight_decay
        )

    def make_rule(self, site: Site) -> Rule | str:
        """Every linear or convolutional layer that owns a trained weight alone."""
        if site.tied:
            return "its weight is shared with another layer, whose input has another Σ"
        if site.weight is None:
            return "its weight is computed anew in every forward pass and has no gradient of its own"
        return _FoofRule(site, self)


class _FoofRule(Rule):
    def __init__(self, site: Site, method: Foof) -> None:
        super().__init__(site.name)
        self._method = method
        self._step = 0
        self._batch: Tensor | None = None
        """XᵀX of this step's calls, (groups, d, d); n beside it."""
        self._count = 0
        self._moment: Tensor | None = None
        self._inverse: Tensor | None = None

    def observe(self, call: Call, delta: Delta) -> None:
        """In the steps that bring a refresh: XᵀX of the call."""
        if self._step % self._method.every or not call.saved:
            return
        rows = call.map.rows(call.saved[0], call.weight, self._method.rows)
        moment = rows.mT @ rows
        call.spend(2.0 * rows.numel() * rows.shape[-1])
        self._batch = moment if self._batch is None else self._batch + moment
        self._count += rows.shape[1]

    def grad(self, step: Step) -> None:
        """Equations (1) and (2) where they are due, then (3)."""
        if self._batch is not None and self._count:
            self._refresh(step, self._batch / self._count)
        self._batch, self._count = None, 0
        weight, map = step.weight, step.map
        if weight is None or weight.grad is None or map is None or self._inverse is None:
            return
        matrix = map.matrix(weight.grad).to(self._inverse.dtype)
        weight.grad.copy_(map.from_matrix(matrix @ self._inverse, weight.shape))
        step.spend(2.0 * weight.numel() * self._inverse.shape[-1])

    def _refresh(self, step: Step, fresh: Tensor) -> None:
        fresh = ranks.mean(fresh)
        if not bool(torch.isfinite(fresh).all()):
            return
        decay, d = self._method.decay, fresh.shape[-1]
        self._moment = fresh if self._moment is None else self._moment.lerp(fresh, 1 - decay)
        damped = self._moment + self._method.damping * torch.eye(d, dtype=fresh.dtype, device=fresh.device)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if bool(failed.any()):
            raise OptionError(
                f"Foof: layer {self.name!r}: Σ + γI has no Cholesky factor in {damped.dtype}: "
                f"damping={self._method.damping} is lost beside the largest eigenvalue of its input. Raise it."
            )
        self._inverse = torch.cholesky_inverse(factor)
        step.spend(2.0 * fresh.shape[0] * d**3)

    def local(self, step: Step) -> None:
        """Note which step begins."""
        self._step = step.index + 1

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "moment": self._moment, "inverse": self._inverse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = int(state["step"])
        self._moment, self._inverse = state["moment"], state["inverse"]

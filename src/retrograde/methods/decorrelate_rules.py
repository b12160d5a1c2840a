"""The rules of decorrelated backpropagation; equations (1) to (8) are those of `retrograde.methods.decorrelate`.

The low-rank and the full mode change coordinates around the optimizer's step and differ in R; the precondition mode
changes gradients alone.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from retrograde.engine import ranks
from retrograde.engine.maps.base import Map, wide
from retrograde.engine.slots import Method, Rule, Step
from retrograde.engine.statistics import StatisticsSpec
from retrograde.errors import OptionError
from retrograde.kernels.coordinates import Coordinates
from retrograde.maths import decorrelate

if TYPE_CHECKING:
    from retrograde.methods.decorrelate import Decorrelate

_VARIANCE_FLOOR = 1e-3
_MEASURED_FEATURES = 256
_MOST, _FEWEST = 32, 4
"""Directions, where no rank is given."""
_SLOW = 4.0
"""FLOPs of statistics take so many times longer than a product's: they are passes over memory for the most part."""


@dataclass(frozen=True)
class Settings:
    """The options of `Decorrelate` with their defaults filled in; `until` in steps."""

    rank: int | None
    max_overhead: float
    every: int
    longest: int
    kappa: float
    lr: float
    variant: str
    damping: float
    power: float
    rows: int
    until: int | None


class DecorrelateRule(Rule):
    """What the three modes share: when to act, and what to measure."""

    def __init__(self, name: str, settings: Settings, rank: int | None) -> None:
        super().__init__(name)
        self._settings = settings
        self._next = 0
        self._overhead = 0.0
        self.needs_statistics = StatisticsSpec(
            settings.rows,
            settings.every,
            _MOST if rank is None else rank,
            settings.until,
            # The full R moves with each refresh, whatever that finds.
            longest=settings.longest if rank != 0 else None,
        )

    def adjust(self, method: Method) -> None:
        """From the next R on."""
        self._settings = cast("Decorrelate", method).settings()

    def _spend(self, step: Step, flops: float) -> None:
        self._overhead += flops
        step.spend(flops)

    def _refuse_line_search(self, step: Step) -> None:
        if isinstance(step.optimizer, torch.optim.LBFGS):
            raise OptionError(
                f"Decorrelate: layer {self.name!r} is trained by LBFGS, whose line search needs the loss's own "
                "gradient. Use another optimizer, or leave Decorrelate out."
            )

    def local(self, step: Step) -> None:
        """Every T steps: a new R from the statistics of the input."""
        last = self._settings.until
        if step.refreshed and step.index >= self._next and (last is None or step.index < last):
            self._next = step.index + self._settings.every
            self._update(step)

    def _update(self, step: Step) -> None:
        raise NotImplementedError

    def _follow(self, like: Tensor) -> None:
        """R and μ where the layer is now, in its precision: a model may be moved or cast at any time."""
        for name, value in list(self.__dict__.items()):
            if isinstance(value, Tensor):
                setattr(self, name, value.to(like))

    def state_dict(self) -> dict[str, Any]:
        """When to act next, and the work counted so far."""
        return {"next": self._next, "overhead": self._overhead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._next, self._overhead = int(state["next"]), float(state["overhead"])

    def metrics(self) -> dict[str, float]:
        """Work so far (FLOPs), without the statistics'."""
        return {"overhead": self._overhead}


class CoordinateRule(DecorrelateRule):
    """Equations (6) to (8): the optimizer sees the gradient of W, and its step counts as one of W."""

    def __init__(self, name: str, settings: Settings, rank: int | None) -> None:
        super().__init__(name, settings, rank)
        self._mean: Tensor | None = None
        self._before: Tensor | None = None
        """A (g, o, d) before the optimizer's step."""
        self._centred = False
        """Whether the mean is taken away in this step."""

    # What R is.

    def _ready(self) -> bool:
        """Whether R is another matrix than I."""
        raise NotImplementedError

    def _turn(self, gradient: Tensor, rows: Tensor | None) -> None:
        """Equation (6) for dA (g, o, d), in place, and db (g, o), where a mean is taken away."""
        raise NotImplementedError

    def _advance(self, matrix: Tensor, before: Tensor, kept: float) -> Tensor | None:
        """Equation (7), in place, where the optimizer kept this share of A; `before` may be overwritten.

        Returns:
            ``ΔA μ``, (g, o); None where no mean is taken away.
        """
        raise NotImplementedError

    def _vector_flops(self) -> float:
        """Multiplying one vector by R."""
        raise NotImplementedError

    def _learn(self, step: Step) -> None:
        """A new R."""
        raise NotImplementedError

    # Around the step.

    @torch.no_grad()
    def grad(self, step: Step) -> None:
        """Equation (6)."""
        weight, bias, map = step.weight, step.bias, step.map
        self._before = None
        self._refuse_line_search(step)
        if weight is None or weight.grad is None or map is None or not self._ready():
            return
        matrix, gradient = _matrix(weight, map), _matrix(weight.grad, map)
        self._follow(matrix)
        rows = None
        if self._mean is not None and bias is not None and bias.grad is not None:
            rows = map.per_row(wide(ranks.whole(bias.grad)), weight.shape)
        self._centred, self._before = rows is not None, matrix.clone()
        self._turn(gradient, rows)
        _store(weight.grad, gradient, map)
        self._spend(step, 2 * weight.numel() / matrix.shape[-1] * self._vector_flops())

    @torch.no_grad()
    def remember(self, step: Step) -> None:
        """What equations (7) and (8) need, of A as it is now."""
        if self._before is None or step.weight is None or step.map is None:
            return
        self._before = _matrix(step.weight, step.map).clone()

    @torch.no_grad()
    def _finish(self, step: Step) -> None:
        """Equations (7) and (8)."""
        weight, map, before = step.weight, step.map, self._before
        self._before = None
        if before is None or weight is None or map is None:
            return
        matrix = _matrix(weight, map)
        moved = self._advance(matrix, before, _kept(step, weight))
        bias = step.bias
        if moved is not None and bias is not None:
            ranks.write(bias, ranks.whole(bias) - map.per_output(moved, weight.shape).to(bias.dtype))
        _store(weight, matrix, map)

    def local(self, step: Step) -> None:
        """The end of a step, then a new R where one is due."""
        self._finish(step)
        super().local(step)

    @torch.no_grad()
    def _update(self, step: Step) -> None:
        bias = step.bias
        # A bias that is not trained cannot take up the mean; nor can one that is not there.
        self._mean = self.statistics.mean if bias is not None and bias.requires_grad else None
        self._learn(step)

    def metrics(self) -> dict[str, float]:
        """Mean squared correlation between features of z and of x, on the rows of the last update, and the work.

        Of wide inputs 256 features are measured, evenly spread.
        """
        found = super().metrics()
        rows = self.statistics.rows
        if rows is None or not self._ready():
            return found
        d = rows.shape[-1]
        chosen = torch.arange(0, d, -(-d // _MEASURED_FEATURES), device=rows.device)
        with torch.no_grad():
            found["correlation"] = float(decorrelate.correlation(self._features(rows, chosen)).mean())
            found["correlation_input"] = float(decorrelate.correlation(rows[..., chosen]).mean())
        return found

    def _features(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """The `chosen` features of z = R x."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """μ and what every mode keeps; R is added by each."""
        return {**super().state_dict(), "mean": self._mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        super().load_state_dict(state)
        self._mean = state["mean"]


class LeadingRule(DecorrelateRule):
    """R of equations (2) and (3): U (g, d, k), g (g, k) and γ."""

    passes: ClassVar[float] = 0.0
    """Operations of a step for each direction and entry of the weight."""

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, settings, settings.rank)
        self._basis: Tensor | None = None
        self._gain: Tensor | None = None
        self._scale = 1.0
        self._coordinates: Coordinates | None = None
        """Of R, or of its power."""

    def _affordable(self, step: Step) -> int:
        """The most directions whose products and statistics keep to `max_overhead`, four at least.

        No more are tracked from now on.
        """
        found = self.statistics
        if step.weight is None or not found.product or found.basis is None:
            return _MOST
        groups, d, tracked = found.basis.shape
        products = self.passes * step.weight.numel()
        statistics = _SLOW * 4 * found.spec.rows * groups * d / self._settings.every
        k = max(_FEWEST, int(self._settings.max_overhead * 3 * found.product / (products + statistics)))
        k = k if k < 8 else k // 8 * 8
        k = min(k, tracked)
        found.narrow(k)
        return k

    def _take(self, mean: Tensor | None, step: Step) -> None:
        """Equations (2) and (3), of E[xxᵀ] when the `mean` is not taken away, of Cov when it is None."""
        found = self.statistics
        assert found.basis is not None
        assert found.eigenvalues is not None
        assert found.variance is not None
        d, k = found.basis.shape[-2:]
        k = min(k, self._affordable(step) if self._settings.rank is None else self._settings.rank)
        basis, eigenvalues, variance = found.basis[..., :k], found.eigenvalues[:, :k], found.variance
        if mean is not None:
            rest = decorrelate.rest_variance(eigenvalues, variance, d)
            basis, eigenvalues = decorrelate.second_moment(mean, basis, eigenvalues, rest)
            variance = variance + mean.square().mean(-1)
        self._basis = basis
        self._gain = decorrelate.gains(eigenvalues, self._settings.damping * variance)
        self._scale = decorrelate.scale(eigenvalues, self._gain, variance, d)
        self._prepare()

    def _prepare(self) -> None:
        if self._basis is None or self._gain is None:
            self._coordinates = None
        else:
            self._coordinates = self._weighed(self._basis, self._gain, self._scale)

    def _weighed(self, basis: Tensor, gain: Tensor, scale: float) -> Coordinates:
        raise NotImplementedError

    def _follow(self, like: Tensor) -> None:
        super()._follow(like)
        now = self._coordinates
        if now is not None and (now.scaled.dtype, now.scaled.device) != (like.dtype, like.device):
            # From what is saved, as a resumed run makes them.
            self._prepare()

    def state_dict(self) -> dict[str, Any]:
        """U, g and γ too."""
        return {**super().state_dict(), "basis": self._basis, "gain": self._gain, "scale": self._scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        super().load_state_dict(state)
        self._basis = state["basis"]
        self._gain, self._scale = state["gain"], float(state["scale"])
        self._prepare()


class LowRankRule(LeadingRule, CoordinateRule):
    """Coordinates of that R."""

    passes = 10.0
    """Eight, and as much again as two for the copy of the weights."""

    def _ready(self) -> bool:
        return self._coordinates is not None

    def _weighed(self, basis: Tensor, gain: Tensor, scale: float) -> Coordinates:
        return Coordinates.of(basis, gain, scale, self._mean)

    def _turn(self, gradient: Tensor, rows: Tensor | None) -> None:
        assert self._coordinates is not None
        self._coordinates.turn(gradient, rows)

    def _advance(self, matrix: Tensor, before: Tensor, kept: float) -> Tensor | None:
        assert self._coordinates is not None
        return self._coordinates.advance(matrix, before, kept, self._centred)

    def _learn(self, step: Step) -> None:
        self._take(None if self._mean is not None else self.statistics.mean, step)

    def _vector_flops(self) -> float:
        # Of each of the gradient and the step 4·d·k.
        return 0.0 if self._basis is None else 4.0 * self._basis.shape[-2] * self._basis.shape[-1]

    def _features(self, rows: Tensor, chosen: Tensor) -> Tensor:
        assert self._basis is not None
        assert self._gain is not None
        basis = self._basis.to(rows)
        turned = ((rows @ basis) * (self._gain.to(rows) - 1).unsqueeze(-2)) @ basis[:, chosen].mT
        return self._scale * (rows[..., chosen] + turned)

    def metrics(self) -> dict[str, float]:
        """How many directions there are, γ, and the steps between updates; see `CoordinateRule.metrics`."""
        if self._gain is None:
            return super().metrics()
        own = {"rank": self._gain.shape[-1], "scale": self._scale, "period": self.statistics.period}
        return {**super().metrics(), **own}


class FullRule(CoordinateRule):
    """Equations (4) and (5): R follows the published rule."""

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, settings, rank=0)
        self._matrix: Tensor | None = None

    def _ready(self) -> bool:
        return self._matrix is not None

    def _turn(self, gradient: Tensor, rows: Tensor | None) -> None:
        assert self._matrix is not None
        if rows is not None and self._mean is not None:
            gradient.baddbmm_(rows.unsqueeze(-1), self._mean.unsqueeze(-2), alpha=-1)
        gradient.copy_(gradient @ self._matrix.mT)

    def _advance(self, matrix: Tensor, before: Tensor, kept: float) -> Tensor | None:
        assert self._matrix is not None
        step = matrix.sub(before, alpha=kept)
        matrix.copy_(torch.baddbmm(before, step, self._matrix, beta=kept))
        if not self._centred or self._mean is None:
            return None
        return ((matrix - before) @ self._mean.unsqueeze(-1)).squeeze(-1)

    def _learn(self, step: Step) -> None:
        settings, found = self._settings, self.statistics
        assert found.rows is not None
        assert found.variance is not None
        rows = found.rows if self._mean is None else found.rows - self._mean.unsqueeze(1)
        g, n, d = rows.shape
        eye = torch.eye(d, dtype=rows.dtype, device=rows.device)
        matrix = eye.repeat(g, 1, 1) if self._matrix is None else self._matrix.to(rows)
        z = rows @ matrix.mT
        floor = _VARIANCE_FLOOR * found.variance.unsqueeze(-1) * matrix.square().sum(-1)
        # Ranks see different rows: what R learns from is their mean.
        direction = decorrelate.direction(z, settings.kappa, settings.variant, floor)
        largest = ranks.mean(decorrelate.largest_eigenvalue(z)) + floor.amax(-1)
        weight = max(1.0, 2 * settings.kappa) if settings.variant == "normalized" else 1.0
        length = (settings.lr / (weight * largest.clamp_min(1.0)))[:, None, None]
        self._matrix = (eye - length * ranks.mean(direction)) @ matrix
        self._spend(step, g * (4.0 * n * d**2 + 2.0 * d**3))

    def _vector_flops(self) -> float:
        # Of each of the gradient and the weight.
        return 0.0 if self._matrix is None else 2.0 * self._matrix.shape[-1] ** 2

    def _features(self, rows: Tensor, chosen: Tensor) -> Tensor:
        assert self._matrix is not None
        return rows @ self._matrix[:, chosen].mT.to(rows)

    def state_dict(self) -> dict[str, Any]:
        """R too."""
        return {**super().state_dict(), "matrix": self._matrix}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        super().load_state_dict(state)
        self._matrix = state["matrix"]


class PreconditionRule(LeadingRule):
    """The gradient alone."""

    passes = 4.0

    def _weighed(self, basis: Tensor, gain: Tensor, scale: float) -> Coordinates:
        power = 2 * self._settings.power
        return Coordinates.of(basis, gain**power, scale**power, None)

    @torch.no_grad()
    def grad(self, step: Step) -> None:
        """``dW ← γ^(2p) dW (I + U diag(g^(2p) − 1) Uᵀ)``."""
        self._refuse_line_search(step)
        weight, map = step.weight, step.map
        if weight is None or weight.grad is None or map is None or self._coordinates is None:
            return
        matrix = _matrix(weight.grad, map)
        self._follow(matrix)
        self._coordinates.turn(matrix)
        _store(weight.grad, matrix, map)
        self._spend(step, 4.0 * weight.numel() * self._coordinates.k)

    def _update(self, step: Step) -> None:
        assert self.statistics.mean is not None
        self._take(self.statistics.mean, step)


def _kept(step: Step, weight: Tensor) -> float:
    """The share of A that decoupled weight decay leaves: decay is of A, and no change of W."""
    optimizer = step.optimizer
    decoupled = isinstance(optimizer, torch.optim.AdamW | torch.optim.Muon | torch.optim.Adafactor)
    for group in optimizer.param_groups:
        if any(parameter is weight for parameter in group["params"]):
            if not (decoupled or group.get("decoupled_weight_decay") or group.get("weight_decouple")):
                return 1.0
            # A step that a fused optimizer left out for GradScaler decays nothing.
            missed = getattr(optimizer, "found_inf", None)
            factor = 0.0 if missed is not None and float(missed) else 1.0
            return 1.0 - factor * float(group["lr"]) * float(group["weight_decay"])
    return 1.0


def _matrix(tensor: Tensor, map: Map) -> Tensor:
    """What is shaped like the weight, as (g, o, d) in the precision of statistics: a view where it can be one."""
    return wide(map.matrix(ranks.whole(tensor)))


def _store(target: Tensor, matrix: Tensor, map: Map) -> None:
    """Write `matrix` back where it is not a view of `target`."""
    if ranks.whole(target) is not target or matrix.data_ptr() != target.data_ptr():
        ranks.write(target, map.from_matrix(matrix, target.shape))

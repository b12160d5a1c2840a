"""The rules of decorrelated backpropagation; equations (1) to (5) are those of `retrograde.methods.decorrelate`.

The low-rank and the full mode put A in place of W and differ in R; the precondition mode changes gradients alone.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retrograde.engine.rows import weight_from_matrix, weight_matrix
from retrograde.engine.slots import Call, Operands, Rule, Step
from retrograde.engine.statistics import StatisticsSpec, across_ranks
from retrograde.kernels.delta import Delta
from retrograde.maths import decorrelate

_VARIANCE_FLOOR = 1e-3
_MEASURED_FEATURES = 256
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KNOWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
"""Layer types whose weight has a layout that we know."""


@dataclass(frozen=True)
class Settings:
    """The options of `Decorrelate` with their defaults filled in; `until` in steps."""

    rank: int
    every: int
    kappa: float
    lr: float
    variant: str
    damping: float
    power: float
    rows: int
    until: int | None


class DecorrelateRule(Rule):
    """What the three modes share: when to act, and what to measure."""

    def __init__(self, name: str, settings: Settings, rank: int) -> None:
        super().__init__(name)
        self._settings = settings
        self._next = 0
        self._overhead = 0.0
        self._owed = 0.0
        self.needs_statistics = StatisticsSpec(settings.rows, settings.every, rank, settings.until)

    def prepare(self, layer: nn.Module) -> None:
        """Note how the layer lays its weight out."""
        assert isinstance(layer, KNOWN)
        self._layer = layer
        self._transposed = isinstance(layer, _TRANSPOSED)
        self._groups = 1 if isinstance(layer, nn.Linear) else layer.groups

    def _matrix(self, weight: Tensor) -> Tensor:
        """W as (groups, o, d)."""
        return weight_matrix(weight, self._groups, self._transposed)

    def _weight(self, matrix: Tensor) -> Tensor:
        return weight_from_matrix(matrix, self._layer.weight.shape, self._transposed)

    def _call_flops(self, call: Call) -> float:
        """What slot 1 cost in this call, both ways."""
        return 0.0

    def observe(self, call: Call, delta: Delta) -> None:
        """Count: what slot 1 cost in this call, and what was learnt since the last one."""
        flops = self._call_flops(call) + self._owed
        self._owed = 0.0
        self._overhead += flops
        call.counters.overhead += flops

    def local(self, step: Step) -> None:
        """Every T steps: a new R from the statistics of the input."""
        last = self._settings.until
        if step.refreshed and step.index >= self._next and (last is None or step.index < last):
            self._next = step.index + self._settings.every
            self._update()

    def _update(self) -> None:
        raise NotImplementedError

    def _leading(self, mean: Tensor | None) -> tuple[Tensor, Tensor]:
        """U and g of equations (2) and (3); of E[xxᵀ] when the `mean` is not taken away, of Cov when it is None."""
        found = self.statistics
        assert found.basis is not None
        assert found.eigenvalues is not None
        assert found.variance is not None
        k, d = min(self._settings.rank, found.basis.shape[1]), found.basis.shape[1]
        basis, eigenvalues, variance = found.basis[..., :k], found.eigenvalues[:, :k], found.variance
        if mean is not None:
            rest = decorrelate.rest_variance(eigenvalues, variance, d)
            basis, eigenvalues = decorrelate.second_moment(mean, basis, eigenvalues, rest)
            variance = variance + mean.square().mean(-1)
        return basis, decorrelate.gains(eigenvalues, self._settings.damping * variance)

    def state_dict(self) -> dict[str, Any]:
        """When to act next, and the work counted so far."""
        return {"next": self._next, "overhead": self._overhead, "owed": self._owed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._next = int(state["next"])
        self._overhead, self._owed = float(state["overhead"]), float(state["owed"])

    def metrics(self) -> dict[str, float]:
        """Work so far (FLOPs), without the statistics'."""
        return {"overhead": self._overhead}


class ReparameterRule(DecorrelateRule):
    """Equation (1), on the rows or on the weight, and the corrections that keep the layer's function."""

    def prepare(self, layer: nn.Module) -> None:
        """Add μ and R as buffers, with the values that change nothing."""
        super().prepare(layer)
        weight = self._matrix(self._layer.weight.detach())
        self._wide = weight.dtype if weight.dtype == torch.float64 else torch.float32
        self._dimension = weight.shape[-1]
        bias = self._layer.bias
        # A bias that is not trained cannot take up the mean; nor can one that is not there.
        self._centred = bias is not None and bias.requires_grad
        if self._centred:
            layer.register_buffer(
                "decorrelation_mean", weight.new_zeros(weight[:, 0].shape, dtype=self._wide)
            )
        self._register(layer, weight.to(self._wide))

    def _register(self, layer: nn.Module, weight: Tensor) -> None:
        raise NotImplementedError

    def _transform(self, layer: nn.Module, matrix: Tensor, *, transposed: bool = False) -> Tensor:
        """``M R``, or ``M Rᵀ``, for M (groups, any, d), with the buffers of `layer`."""
        raise NotImplementedError

    def _vector_flops(self) -> float:
        """Multiplying one vector by R."""
        raise NotImplementedError

    def _fused(self, layer: nn.Module, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """A in the layer's shape, and ``A μ``."""
        with torch.autocast(weight.device.type, enabled=False):
            fused = self._transform(layer, self._matrix(weight))
            shift = self._shift(fused, layer.get_buffer("decorrelation_mean")) if self._centred else None
        return self._weight(fused).to(weight.dtype), shift

    def _shift(self, fused: Tensor, mean: Tensor) -> Tensor:
        """``A μ``, one value for each output channel."""
        shift = fused @ mean.unsqueeze(-1)
        if not isinstance(self._layer, _TRANSPOSED):
            return shift.flatten()
        layer = self._layer
        stride: Any = layer.stride
        # Users may have set one number for all dimensions after building the layer.
        places = math.prod(stride) if isinstance(stride, tuple) else stride ** (layer.weight.dim() - 2)
        return shift.reshape(layer.out_channels, -1).sum(-1) / places

    def _vectors(self, weight: Tensor, shape: Sequence[int], needs_input: bool) -> tuple[float, float]:
        """Vectors that R multiplies forward and backward, on the side of the rows and on that of the weight."""
        if not isinstance(self._layer, nn.Linear):
            # Patches are never formed.
            return math.inf, 2 * weight.numel() / self._dimension
        return math.prod(shape[:-1]) * (1 + needs_input), 2 * weight.shape[0]

    def input(self, operands: Operands) -> Operands:
        """Equation (1), on the side that is cheaper: ``W (R x)`` or ``(W R) x``."""
        rows, outputs = self._vectors(operands.weight, operands.x.shape, operands.x.requires_grad)
        if rows < outputs:
            return dataclasses.replace(operands, x=self._decorrelated(operands.x))
        weight, shift = self._fused(self._layer, operands.weight)
        bias = operands.bias
        if shift is not None and bias is not None:
            bias = bias - shift.to(bias.dtype)
        return dataclasses.replace(operands, weight=weight, bias=bias)

    def _decorrelated(self, x: Tensor) -> Tensor:
        """``R (x − μ)``."""
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1]).to(self._wide)
            if self._centred:
                rows = rows - self._layer.get_buffer("decorrelation_mean")
            return self._transform(self._layer, rows, transposed=True).to(x.dtype).view(x.shape)

    def _call_flops(self, call: Call) -> float:
        return min(self._vectors(call.weight, call.input_shape, call.needs.input)) * self._vector_flops()

    @torch.no_grad()
    def _update(self) -> None:
        layer = self._layer
        fused = self._transform(layer, self._matrix(layer.weight))
        if self._centred and layer.bias is not None:
            mean, before = self.statistics.mean, layer.get_buffer("decorrelation_mean")
            assert mean is not None
            layer.bias.add_(self._shift(fused, mean - before).to(layer.bias.dtype))
            before.copy_(mean)
        layer.weight.copy_(self._weight(self._learn(fused)))

    def _learn(self, fused: Tensor) -> Tensor:
        """Change R; return the W' of ``A = W' R'``."""
        raise NotImplementedError

    def fold(self, layer: nn.Module) -> nn.Module:
        """``W ← W R``, ``b ← b − A μ``; the buffers go."""
        with torch.no_grad():
            assert isinstance(layer, KNOWN)
            weight, shift = self._fused(layer, layer.weight)
            layer.weight.copy_(weight)
            if shift is not None and layer.bias is not None:
                layer.bias.sub_(shift.to(layer.bias.dtype))
        for name in [n for n, _ in layer.named_buffers(recurse=False) if n.startswith("decorrelation_")]:
            delattr(layer, name)
        return layer

    def release(self, layer: nn.Module) -> None:
        """The plain layer computes what the attached one did."""
        self.fold(layer)

    def metrics(self) -> dict[str, float]:
        """Mean squared correlation between features of z and of x, on the rows of the last update, and the work.

        Of wide inputs 256 features are measured, evenly spread.
        """
        found = super().metrics()
        rows = self.statistics.rows
        if rows is None:
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


class LowRankRule(ReparameterRule):
    """Equations (2) and (3)."""

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, settings, rank=settings.rank)

    def _register(self, layer: nn.Module, weight: Tensor) -> None:
        groups, _, d = weight.shape
        k = min(self._settings.rank, d)
        layer.register_buffer("decorrelation_basis", weight.new_zeros(groups, d, k))
        layer.register_buffer("decorrelation_gain", weight.new_ones(groups, k))

    def _transform(self, layer: nn.Module, matrix: Tensor, *, transposed: bool = False) -> Tensor:
        basis, gain = layer.get_buffer("decorrelation_basis"), layer.get_buffer("decorrelation_gain")
        # This R is symmetric.
        return decorrelate.transform(matrix.to(basis.dtype), basis, gain)

    def _learn(self, fused: Tensor) -> Tensor:
        layer = self._layer
        basis, gain = self._leading(None if self._centred else self.statistics.mean)
        layer.get_buffer("decorrelation_basis").copy_(basis)
        layer.get_buffer("decorrelation_gain").copy_(gain)
        self._owed += 8.0 * fused.numel() * gain.shape[-1]
        return decorrelate.untransform(fused, basis, gain)

    def _vector_flops(self) -> float:
        return 4.0 * self._dimension * self._layer.get_buffer("decorrelation_gain").shape[-1]

    def _features(self, rows: Tensor, chosen: Tensor) -> Tensor:
        layer = self._layer
        basis, gain = layer.get_buffer("decorrelation_basis"), layer.get_buffer("decorrelation_gain")
        return rows[..., chosen] + (rows @ basis) * (gain - 1).unsqueeze(-2) @ basis[:, chosen].mT


class FullRule(ReparameterRule):
    """Equations (4) and (5)."""

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, settings, rank=0)

    def _register(self, layer: nn.Module, weight: Tensor) -> None:
        groups, _, d = weight.shape
        eye = torch.eye(d, dtype=weight.dtype, device=weight.device)
        layer.register_buffer("decorrelation_matrix", eye.repeat(groups, 1, 1))

    def _transform(self, layer: nn.Module, matrix: Tensor, *, transposed: bool = False) -> Tensor:
        r = layer.get_buffer("decorrelation_matrix")
        return matrix.to(r.dtype) @ (r.mT if transposed else r)

    def _learn(self, fused: Tensor) -> Tensor:
        layer, settings, found = self._layer, self._settings, self.statistics
        matrix = layer.get_buffer("decorrelation_matrix")
        assert found.rows is not None
        assert found.mean is not None
        assert found.variance is not None
        rows = found.rows - found.mean.unsqueeze(1) if self._centred else found.rows
        z = rows @ matrix.mT
        floor = _VARIANCE_FLOOR * found.variance.unsqueeze(-1) * matrix.square().sum(-1)
        # Ranks see different rows: what R learns from is their mean.
        direction = decorrelate.direction(z, settings.kappa, settings.variant, floor)
        largest = across_ranks(decorrelate.largest_eigenvalue(z)) + floor.amax(-1)
        weight = max(1.0, 2 * settings.kappa) if settings.variant == "normalized" else 1.0
        step = (settings.lr / (weight * largest.clamp_min(1.0)))[:, None, None] * across_ranks(direction)
        change = torch.eye(rows.shape[-1], dtype=z.dtype, device=z.device) - step
        before = self._matrix(layer.weight.detach()).to(matrix.dtype)
        matrix.copy_(change @ matrix)
        g, n, d = rows.shape
        self._owed += g * (4.0 * n * d**2 + 3.0 * d**3) + 2.0 * fused.numel() * d
        # R R'⁻¹ = (I − εG)⁻¹, so W' needs no inverse of R itself.
        return torch.linalg.solve(change, before, left=False)

    def _vector_flops(self) -> float:
        return 2.0 * self._dimension**2

    def _features(self, rows: Tensor, chosen: Tensor) -> Tensor:
        return rows @ self._layer.get_buffer("decorrelation_matrix")[:, chosen].mT


class PreconditionRule(DecorrelateRule):
    """Slot 7: the gradient alone."""

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, settings, settings.rank)
        self._basis: Tensor | None = None
        self._gain: Tensor | None = None

    def grad(self, step: Step) -> None:
        """``dW ← dW (I + U diag(g^(2p) − 1) Uᵀ)``."""
        gradient = self._layer.weight.grad
        if gradient is None or self._basis is None or self._gain is None:
            return
        matrix = self._matrix(gradient).to(self._basis.dtype)
        changed = decorrelate.transform(matrix, self._basis, self._gain ** (2 * self._settings.power))
        gradient.copy_(self._weight(changed))
        self._owed += 4.0 * gradient.numel() * self._gain.shape[-1]

    def _update(self) -> None:
        assert self.statistics.mean is not None
        self._basis, self._gain = self._leading(self.statistics.mean)

    def state_dict(self) -> dict[str, Any]:
        """U and g too: they change gradients alone, and are in no buffer."""
        return {**super().state_dict(), "basis": self._basis, "gain": self._gain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        super().load_state_dict(state)
        self._basis, self._gain = state["basis"], state["gain"]

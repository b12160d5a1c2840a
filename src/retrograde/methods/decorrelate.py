r"""Decorrelated backpropagation: every layer learns from an input whose features no longer move together.

Beside its weight W a layer holds a decorrelating matrix R and a mean μ, learnt from its input alone:

    y = W R (x − μ) + b = A x + (b − A μ),  A = W R      (1)   R₀ = I, μ₀ = 0; dW = dA Rᵀ by autograd

**Low rank** (default): U and λ are the k leading eigenpairs of the input's covariance, refreshed every T steps,

    R = I + U diag(g − 1) Uᵀ                             (2)
    g = sqrt((λ_k + c) / (λ + c)),  c = damping · tr/d   (3)   λ_k: the least of the k; tr/d: the mean eigenvalue

**Full**: R (d × d) follows the published rule on decorrelated rows z, S = ZᵀZ/n, C its off-diagonal, V = mean z² − 1,

    R ← (I − εG) R,  G = (1−κ) C + κ V                   (4)   "normalized": G = (1−κ)/(d−1) C + 2κ V
    ε = lr / max(1, λ_max(S))                            (5)

**Precondition**: no R in the layer; before each optimizer step ``dW ← dW (Σ + cI)^(−p)``, Σ = E[xxᵀ] in the low-rank
form, scaled so that the directions outside U keep their gradient: dW (I + U diag(g^(2p) − 1) Uᵀ). With p = 1 plain SGD
then moves A as (2) does.

Whenever R or μ changes, the layer keeps its function: W' = (W R) R'⁻¹ and b' = b + A(μ' − μ), exactly but for rounding.

Convolutions: R acts on patches, of C_in/groups · kernel values, each group with its own R, one for all positions. The
layer is always ``conv(x, A) + (b − A μ)``, which `fold` reproduces everywhere; it equals W R (x − μ) on whole patches,
while at zero-padded borders the padding counts as an input of 0, not of μ. Transposed convolutions: R acts on the
channels of a pixel, and a pixel's mean reaches an output through kernel/stride places on average, which is what
``A μ`` sums. A layer without bias has none after `fold` either: it keeps μ = 0, and Σ = Cov + mean·meanᵀ takes the
covariance's place.

Deviations from the paper: the low-rank form, centring, and updates that preserve the function are not in it; without
them inputs far from zero diverge. In (4) R changes every T steps, not in each, with a step that λ_max bounds, and the
variance of each feature has c = 0.001·tr/d (seen through R) added, without which the row of a silent feature grows
for ever. The optimizer's moments are left as they are when W changes coordinates.

Cost for each call, W (o × d): 8·o·d·k operations for A and its gradient (full: 4·o·d²), whatever the number of rows;
every T steps about 16·n·d·k for the statistics of n rows and 8·o·d·k for W (full: 4·n·d² + 3·d³ + 2·o·d²).

Suggested settings: rank 32 every 32 steps with Adam at 1e-3. It helps most where inputs are correlated and nothing
normalises them: multilayer perceptrons, networks without BatchNorm.

Reference:
    Dalm, Offergeld, Ahmad, van Gerven. *Efficient Deep Learning with Decorrelated Backpropagation.* arXiv 2405.02385.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from retrograde.engine.rows import weight_from_matrix, weight_matrix
from retrograde.engine.slots import Call, Method, Operands, Rule, Site, Step
from retrograde.engine.statistics import StatisticsSpec, across_ranks
from retrograde.errors import OptionError
from retrograde.kernels.delta import Delta
from retrograde.maths import decorrelate

_LR = 0.5
_VARIANCE_FLOOR = 1e-3
_MEASURED_FEATURES = 256
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KNOWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_ONLY_IN = {"kappa": "full", "variant": "full", "lr": "full", "power": "precondition"}


@dataclass(frozen=True)
class Decorrelate(Method):
    """Decorrelated backpropagation (module docstring: equations, cost, source).

    Args:
        mode: ``"lowrank"`` transforms the leading directions of the input, ``"full"`` learns the whole matrix (only for
            narrow layers), ``"precondition"`` leaves the layer as it is and transforms its gradient.
        rank: k, leading directions; more than d counts as d. Not in full mode.
        every: T, steps between updates.
        kappa: κ of full mode: 0 decorrelates alone, 0.5 whitens, 1 brings variances to 1 alone.
        lr: of R in full mode, relative to 1/λ_max, in (0, 1]; None is 0.5.
        variant: the rule of full mode, ``"published"`` or ``"normalized"``.
        damping: c in mean eigenvalues, 0 or more. Not in full mode.
        power: p of precondition mode, 0.5 or 1; None is 1.
        rows: sampled rows (patches) for each update.
        until: stop updating R after this share of the training, in (0, 1]; below 1 it needs `total_steps`.
        total_steps: length of the training in optimizer steps, for `until`.

    Raises:
        OptionError: a value out of its range, or an option that has no effect in this mode.

    Example:
        >>> session = rg.attach(model, rg.Decorrelate(rank=32))
    """

    name: ClassVar[str] = "decorrelate"

    mode: Literal["lowrank", "full", "precondition"] = "lowrank"
    rank: int = 32
    every: int = 32
    kappa: float = 0.5
    lr: float | None = None
    variant: Literal["published", "normalized"] = "published"
    damping: float = 0.1
    power: float | None = None
    rows: int = 2048
    until: float = 1.0
    total_steps: int | None = None

    def __post_init__(self) -> None:
        self._check(
            "mode", self.mode in ("lowrank", "full", "precondition"), "'lowrank', 'full' or 'precondition'"
        )
        self._check("rank", self.rank >= 1, "1 or more")
        self._check("every", self.every >= 1, "1 or more")
        self._check("rows", self.rows >= 2, "2 or more")
        self._check("kappa", 0 <= self.kappa <= 1, "between 0 and 1")
        self._check("lr", self.lr is None or 0 < self.lr <= 1, "above 0 and at most 1")
        self._check("variant", self.variant in ("published", "normalized"), "'published' or 'normalized'")
        self._check(
            "damping", math.isfinite(self.damping) and self.damping >= 0, "a finite number, 0 or more"
        )
        self._check("power", self.power in (None, 0.5, 1), "0.5 or 1")
        self._check("until", 0 < self.until <= 1, "a share of the training, above 0 and at most 1")
        self._check("total_steps", self.total_steps is None or self.total_steps >= 1, "1 or more")
        if (self.until < 1) != (self.total_steps is not None):
            raise OptionError(
                f"Decorrelate: until={self.until} with total_steps={self.total_steps}: a share of the training needs its "
                "length, and the length is needed for nothing else. Give both, or neither."
            )
        self._refuse_idle_options()

    def _check(self, option: str, fine: bool, wanted: str) -> None:
        if not fine:
            raise OptionError(f"Decorrelate: {option}={getattr(self, option)!r} must be {wanted}.")

    def _refuse_idle_options(self) -> None:
        for field in dataclasses.fields(self):
            home = _ONLY_IN.get(field.name)
            idle = home not in (None, self.mode) or (
                self.mode == "full" and field.name in ("rank", "damping")
            )
            if idle and getattr(self, field.name) != field.default:
                raise OptionError(
                    f"Decorrelate: {field.name}={getattr(self, field.name)!r} has no effect in mode={self.mode!r}. "
                    "Leave it out, or choose another mode."
                )

    @property
    def last_step(self) -> int | None:
        """The step from which R stays as it is; None when it never does."""
        return None if self.total_steps is None else math.ceil(self.until * self.total_steps)

    def rule(self, site: Site) -> Rule | str:
        """Every linear or convolutional layer that owns a trained weight alone."""
        layer = site.layer
        if not isinstance(layer, _KNOWN):
            return f"the layout of the weight of a {type(layer).__name__} is not known"
        # TODO(site.tied)
        if getattr(site, "tied", False):
            return "its weight is shared with another layer, whose input has another R"
        if nn.utils.parametrize.is_parametrized(layer):
            return "parametrised: its weight is computed anew in every forward pass and cannot be corrected"
        if not layer.weight.requires_grad:
            return "weight frozen: nothing is learnt from its input"
        kinds = {"lowrank": _LowRankRule, "full": _FullRule, "precondition": _PreconditionRule}
        return kinds[self.mode](site.name, self)


class _DecorrelateRule(Rule):
    """What the three modes share: when to act, and what to measure."""

    def __init__(self, name: str, method: Decorrelate) -> None:
        super().__init__(name)
        self._method = method
        self._next = 0
        self._overhead = 0.0
        self._owed = 0.0
        rank = 0 if method.mode == "full" else method.rank
        self.needs_statistics = StatisticsSpec(method.rows, method.every, rank, method.last_step)

    def prepare(self, layer: nn.Module) -> None:
        assert isinstance(layer, _KNOWN)
        self._layer = layer
        self._transposed = isinstance(layer, _TRANSPOSED)
        self._groups = 1 if isinstance(layer, nn.Linear) else layer.groups

    def _matrix(self, weight: Tensor) -> Tensor:
        """W as (groups, o, d)."""
        return weight_matrix(weight, self._groups, self._transposed)

    def _weight(self, matrix: Tensor) -> Tensor:
        return weight_from_matrix(matrix, self._layer.weight.shape, self._transposed)

    def _call_flops(self, weight: Tensor) -> float:
        raise NotImplementedError

    def observe(self, call: Call, delta: Delta) -> None:
        """Count: what slot 1 cost in this call, and what was learnt since the last one."""
        flops = self._call_flops(call.weight) + self._owed
        self._owed = 0.0
        self._overhead += flops
        call.counters.overhead += flops

    def local(self, step: Step) -> None:
        """Every T steps: a new R from the statistics of the input."""
        last = self._method.last_step
        if step.refreshed and step.index >= self._next and (last is None or step.index < last):
            self._next = step.index + self._method.every
            self._update()

    def _update(self) -> None:
        raise NotImplementedError

    def _leading(self, mean: Tensor | None) -> tuple[Tensor, Tensor]:
        """U and g of equations (2) and (3); of E[xxᵀ] when the `mean` is not taken away, of Cov when it is None."""
        found = self.statistics
        assert found.basis is not None and found.eigenvalues is not None and found.variance is not None
        k, d = min(self._method.rank, found.basis.shape[1]), found.basis.shape[1]
        basis, eigenvalues, variance = found.basis[..., :k], found.eigenvalues[:, :k], found.variance
        if mean is not None:
            rest = decorrelate.rest_variance(eigenvalues, variance, d)
            basis, eigenvalues = decorrelate.second_moment(mean, basis, eigenvalues, rest)
            variance = variance + mean.square().mean(-1)
        return basis, decorrelate.gains(eigenvalues, self._method.damping * variance)

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next, "overhead": self._overhead, "owed": self._owed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = int(state["next"])
        self._overhead, self._owed = float(state["overhead"]), float(state["owed"])

    def metrics(self) -> dict[str, float]:
        """Work so far (FLOPs), without the statistics'."""
        return {"overhead": self._overhead}


class _ReparameterRule(_DecorrelateRule):
    """Equation (1): A in place of W, and the corrections that keep the layer's function."""

    def prepare(self, layer: nn.Module) -> None:
        super().prepare(layer)
        weight = self._matrix(self._layer.weight.detach())
        wide = weight.dtype if weight.dtype == torch.float64 else torch.float32
        bias = self._layer.bias
        # A bias that is not trained cannot take up the mean; nor can one that is not there.
        self._centred = bias is not None and bias.requires_grad
        if self._centred:
            layer.register_buffer("decorrelation_mean", weight.new_zeros(weight[:, 0].shape, dtype=wide))
        self._register(layer, weight.to(wide))

    def _register(self, layer: nn.Module, weight: Tensor) -> None:
        raise NotImplementedError

    def _transform(self, layer: nn.Module, weight: Tensor) -> Tensor:
        """``W R``, (groups, o, d), with the buffers of `layer`."""
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
        channels = self._layer.out_channels
        return shift.reshape(channels, -1).sum(-1) / math.prod(self._layer.stride)

    def input(self, operands: Operands) -> Operands:
        """Equation (1), on the weight: patches are never formed, and the input's statistics stay those of x."""
        weight, shift = self._fused(self._layer, operands.weight)
        bias = operands.bias
        if shift is not None and bias is not None:
            bias = bias - shift.to(bias.dtype)
        return dataclasses.replace(operands, weight=weight, bias=bias)

    @torch.no_grad()
    def _update(self) -> None:
        layer = self._layer
        fused = self._transform(layer, self._matrix(layer.weight))
        if self._centred and layer.bias is not None:
            mean, before = self.statistics.mean, layer.get_buffer("decorrelation_mean")
            assert mean is not None
            layer.bias.add_(self._shift(fused, mean - before).to(layer.bias.dtype))
            before.copy_(mean)
        layer.weight.copy_(self._weight(self._learn(layer, fused)))

    def _learn(self, layer: nn.Module, fused: Tensor) -> Tensor:
        """Change R; return the W' of ``A = W' R'``."""
        raise NotImplementedError

    def fold(self, layer: nn.Module) -> nn.Module:
        """``W ← W R``, ``b ← b − A μ``; the buffers go."""
        with torch.no_grad():
            assert isinstance(layer, _KNOWN)
            weight, shift = self._fused(layer, layer.weight)
            layer.weight.copy_(weight)
            if shift is not None and layer.bias is not None:
                layer.bias.sub_(shift.to(layer.bias.dtype))
        for name in [n for n in layer._buffers if n.startswith("decorrelation_")]:
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
            # R is symmetric to (2) but not to (4): rows of R are what makes a feature of z.
            part = self._features(rows, chosen)
            found["correlation"] = float(decorrelate.correlation(part).mean())
            found["correlation_input"] = float(decorrelate.correlation(rows[..., chosen]).mean())
        return found

    def _features(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """The `chosen` features of z = R x."""
        raise NotImplementedError


class _LowRankRule(_ReparameterRule):
    """Equations (2) and (3)."""

    def _register(self, layer: nn.Module, weight: Tensor) -> None:
        groups, _, d = weight.shape
        k = min(self._method.rank, d)
        layer.register_buffer("decorrelation_basis", weight.new_zeros(groups, d, k))
        layer.register_buffer("decorrelation_gain", weight.new_ones(groups, k))

    def _transform(self, layer: nn.Module, weight: Tensor) -> Tensor:
        basis, gain = layer.get_buffer("decorrelation_basis"), layer.get_buffer("decorrelation_gain")
        return decorrelate.transform(weight.to(basis.dtype), basis, gain)

    def _learn(self, layer: nn.Module, fused: Tensor) -> Tensor:
        basis, gain = self._leading(None if self._centred else self.statistics.mean)
        layer.get_buffer("decorrelation_basis").copy_(basis)
        layer.get_buffer("decorrelation_gain").copy_(gain)
        self._owed += 8.0 * fused.numel() * gain.shape[-1]
        return decorrelate.untransform(fused, basis, gain)

    def _call_flops(self, weight: Tensor) -> float:
        return 8.0 * weight.numel() * self._layer.get_buffer("decorrelation_gain").shape[-1]

    def _features(self, rows: Tensor, chosen: Tensor) -> Tensor:
        basis, gain = (
            self._layer.get_buffer("decorrelation_basis"),
            self._layer.get_buffer("decorrelation_gain"),
        )
        return rows[..., chosen] + (rows @ basis) * (gain - 1).unsqueeze(-2) @ basis[:, chosen].mT


class _FullRule(_ReparameterRule):
    """Equations (4) and (5)."""

    def _register(self, layer: nn.Module, weight: Tensor) -> None:
        groups, _, d = weight.shape
        eye = torch.eye(d, dtype=weight.dtype, device=weight.device)
        layer.register_buffer("decorrelation_matrix", eye.repeat(groups, 1, 1))

    def _transform(self, layer: nn.Module, weight: Tensor) -> Tensor:
        matrix = layer.get_buffer("decorrelation_matrix")
        return weight.to(matrix.dtype) @ matrix

    def _learn(self, layer: nn.Module, fused: Tensor) -> Tensor:
        method, found = self._method, self.statistics
        matrix = layer.get_buffer("decorrelation_matrix")
        assert found.rows is not None and found.mean is not None and found.variance is not None
        rows = found.rows - found.mean.unsqueeze(1) if self._centred else found.rows
        z = rows @ matrix.mT
        floor = _VARIANCE_FLOOR * found.variance.unsqueeze(-1) * matrix.square().sum(-1)
        # Ranks see different rows: what R learns from is their mean.
        G = across_ranks(decorrelate.direction(z, method.kappa, method.variant, floor))
        largest = across_ranks(decorrelate.largest_eigenvalue(z)) + floor.amax(-1)
        step = (_LR if method.lr is None else method.lr) / largest.clamp_min(1.0)
        change = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device) - step[:, None, None] * G
        before = self._matrix(layer.weight.detach()).to(matrix.dtype)
        matrix.copy_(change @ matrix)
        g, n, d = rows.shape
        self._owed += g * (4.0 * n * d**2 + 3.0 * d**3) + 2.0 * fused.numel() * d
        # R R'⁻¹ = (I − εG)⁻¹, so W' needs no inverse of R itself.
        return torch.linalg.solve(change, before, left=False)

    def _call_flops(self, weight: Tensor) -> float:
        return 4.0 * weight.numel() * self._layer.get_buffer("decorrelation_matrix").shape[-1]

    def _features(self, rows: Tensor, chosen: Tensor) -> Tensor:
        return rows @ self._layer.get_buffer("decorrelation_matrix")[:, chosen].mT


class _PreconditionRule(_DecorrelateRule):
    """Slot 7: the gradient alone."""

    def __init__(self, name: str, method: Decorrelate) -> None:
        super().__init__(name, method)
        self._basis: Tensor | None = None
        self._gain: Tensor | None = None

    def grad(self, step: Step) -> None:
        """``dW ← dW (I + U diag(g^(2p) − 1) Uᵀ)``."""
        gradient = self._layer.weight.grad
        if gradient is None or self._basis is None or self._gain is None:
            return
        matrix = self._matrix(gradient).to(self._basis.dtype)
        power = 1.0 if self._method.power is None else self._method.power
        changed = decorrelate.transform(matrix, self._basis, self._gain ** (2 * power))
        gradient.copy_(self._weight(changed))
        self._owed += 4.0 * gradient.numel() * self._gain.shape[-1]

    def _update(self) -> None:
        assert self.statistics.mean is not None
        self._basis, self._gain = self._leading(self.statistics.mean)

    def _call_flops(self, weight: Tensor) -> float:
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "basis": self._basis, "gain": self._gain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._basis, self._gain = state["basis"], state["gain"]

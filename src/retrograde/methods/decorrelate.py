r"""Decorrelated backpropagation: every layer learns from an input whose features no longer move together.

Beside its weight W a layer holds a decorrelating matrix R and a mean μ, learnt from its input alone:

    y = W R (x − μ) + b = A x + (b − A μ),  A = W R      (1)   R₀ = I, μ₀ = 0; dW = dA Rᵀ by autograd

**Low rank** (default): U and λ are the k leading eigenpairs of the input's covariance, refreshed every T steps,

    R = I + U diag(g − 1) Uᵀ                             (2)
    g = sqrt((λ_k + c) / (λ + c)),  c = damping · tr/d   (3)   λ_k: the least of the k; tr/d: the mean eigenvalue

**Full**: R (d × d) follows the published rule on decorrelated rows z, S = ZᵀZ/n, C its off-diagonal, V = mean z² − 1,

    R ← (I − εG) R,  G = (1−κ) C + κ V                   (4)   "normalized": G = (1−κ)/(d−1) C + 2κ V
    ε = lr / max(1, λ_max(S)), lr ≤ 0.5                  (5)   "normalized": divided by 2κ if that is above 1

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

R multiplies the rows x or the weight W of a linear layer, whichever are fewer: the two differ in rounding alone.
Convolutions transform W: patches are never formed.

Cost for each call of n rows, W (o × d): 4·d·k operations (full: 2·d²) for each of 2·o rows of W and of its gradient, or
of n rows of x and as many of its gradient if that is asked for, which then also keeps the n·d values of R x;
every T steps about 16·n·d·k for the statistics of n rows and 8·o·d·k for W (full: 4·n·d² + 3·d³ + 2·o·d²).

Suggested settings: rank 32 every 32 steps with Adam at 1e-3. It helps most where inputs are correlated and nothing
normalises them: multilayer perceptrons, networks without BatchNorm.

Reference:
    Dalm, Offergeld, Ahmad, van Gerven. *Efficient Deep Learning with Decorrelated Backpropagation.* arXiv 2405.02385.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from retrograde.engine.slots import Method, Rule, Site
from retrograde.errors import OptionError
from retrograde.methods.decorrelate_rules import KNOWN, FullRule, LowRankRule, PreconditionRule, Settings

_LR = 0.5
_POWER = 1.0
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
        lr: of R in full mode, relative to 1/λ_max, in (0, 0.5]; None is 0.5.
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
        self._check("lr", self.lr is None or 0 < self.lr <= 0.5, "above 0 and at most 0.5")
        self._check("variant", self.variant in ("published", "normalized"), "'published' or 'normalized'")
        self._check(
            "damping", math.isfinite(self.damping) and self.damping >= 0, "a finite number, 0 or more"
        )
        self._check("power", self.power in (None, 0.5, 1), "0.5 or 1")
        self._check("until", 0 < self.until <= 1, "a share of the training, above 0 and at most 1")
        self._check("total_steps", self.total_steps is None or self.total_steps >= 1, "1 or more")
        if (self.until < 1) != (self.total_steps is not None):
            raise OptionError(
                f"Decorrelate: until={self.until} with total_steps={self.total_steps}: a share of the training needs "
                "its length, and the length is needed for nothing else. Give both, or neither."
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

    def make_rule(self, site: Site) -> Rule | str:
        """Every linear or convolutional layer that owns a trained weight alone."""
        layer = site.layer
        if not isinstance(layer, KNOWN):
            return f"the layout of the weight of a {type(layer).__name__} is not known"
        if site.tied:
            return "its weight is shared with another layer, whose input has another R"
        if nn.utils.parametrize.is_parametrized(layer):
            return "parametrised: its weight is computed anew in every forward pass and cannot be corrected"
        if not layer.weight.requires_grad:
            return "weight frozen: nothing is learnt from its input"
        kinds = {"lowrank": LowRankRule, "full": FullRule, "precondition": PreconditionRule}
        return kinds[self.mode](site.name, self._settings())

    def _settings(self) -> Settings:
        until = None if self.total_steps is None else math.ceil(self.until * self.total_steps)
        lr = _LR if self.lr is None else self.lr
        power = _POWER if self.power is None else self.power
        return Settings(
            rank=self.rank,
            every=self.every,
            kappa=self.kappa,
            lr=lr,
            variant=self.variant,
            damping=self.damping,
            power=power,
            rows=self.rows,
            until=until,
        )

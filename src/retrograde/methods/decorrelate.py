r"""Decorrelated backpropagation: every layer learns from an input whose features no longer move together.

A layer y = A x + b is trained in other coordinates, in which its input is decorrelated:

    z = R (x − μ),  y = W z + b',   A = W R,  b' = b + A μ       (1)   R₀ = I, μ₀ = 0

R and μ are learnt from the input alone. **Low rank** (default): U and λ are the k leading eigenpairs of the input's
covariance, refreshed every T steps,

    R = γ R₀,  R₀ = I + U diag(g − 1) Uᵀ                 (2)   γ² = trΣ / tr(R₀ΣR₀), at most 9
    g = sqrt((λ_k + c) / (λ + c)),  c = damping · tr/d   (3)   λ_k: the least of the k; tr/d: the mean eigenvalue

γ gives z the energy of x − μ, Σ being what R is learnt from. Without it a step of the same size changes the layer's
output less than in plain training, and a learning rate that suits that is too small.

**Full**: R (d × d) follows the published rule on decorrelated rows z, S = ZᵀZ/n, C its off-diagonal, V = mean z² − 1,

    R ← (I − εG) R,  G = (1−κ) C + κ V                   (4)   "normalized": G = (1−κ)/(d−1) C + 2κ V
    ε = lr / max(1, λ_max(S)), lr ≤ 0.5                  (5)   "normalized": divided by 2κ if that is above 1

The layer holds A and b at all times: coordinates change around the optimizer's step alone. It is given the gradient of
W, and the step s that it makes counts as one of W:

    dW = (dA − db μᵀ) Rᵀ                                 (6)   before the step
    A ← ω A + s R,  s = P − ω A                          (7)   after it; P: what it left, ω: the share that weight
                                                               decay left of A
    b ← b − ΔA μ,   ΔA: what (7) changed                 (8)

So forward pass, ``state_dict``, copies, averages and compiled code see an ordinary layer; a new R or μ changes no
function, and a step that raises leaves an ordinary layer behind.

**Precondition**: before each step ``dW ← dW (Σ + cI)^(−p)``, Σ = E[xxᵀ] in the low-rank form, scaled so that directions
outside U keep their gradient, times γ^(2p): γ^(2p) dW (I + U diag(g^(2p) − 1) Uᵀ). With p = 1 plain SGD then moves A
as (7) does.

Convolutions: R acts on patches, of C_in/groups · kernel values, each group with its own R, one for all positions. At
zero-padded borders the padding counts as an input of 0, not of μ. Transposed convolutions: R acts on the channels of a
pixel, and a pixel's mean reaches an output through kernel/stride places on average, which is what ``ΔA μ`` sums.
A layer without a trained bias keeps μ = 0, and Σ = Cov + mean·meanᵀ takes the covariance's place.

Deviations from the paper: the low-rank form, γ and centring are not in it; uncentred, inputs far from zero diverge.
In (4) R changes every T steps, not in each, with a step that λ_max bounds, and the variance of each feature has
c = 0.001·tr/d (seen through R) added, without which the row of a silent feature grows for ever. The optimizer's moments
are left as they are when R changes. Decoupled weight decay (`AdamW`, `Muon`) is exactly decay of A; decay inside the
gradient (SGD's) is multiplied by R like the rest of the step. LBFGS is refused: its line search needs the loss's own
gradient. (6) takes dA and db to be the loss's, or scaled alike (`clip_grad_norm_`). Clipped entry by entry
(`clip_grad_value_`) or each by its own norm, or masked one without the other, more is left of db than of dA, and where
|μ| is large the gradient is turned round: use `mode="precondition"` with these.

Cost for each step, weight (o × d): 8·o·d·k operations and a copy of the weight, counted as 2·o·d·k more (full: 4·o·d²;
precondition: 4·o·d·k), nothing for each row, so a layer's share of its own 6·n·o·d for n rows is 10k/6n. k is the
largest that keeps it under `max_overhead`, 4 to 32; in small batches 4 are more than that. Every T steps, and less and
less often where R settles, 4·n·d·k for the statistics of n rows (full: 4·n·d² + 2·d³). Memory: the weights once more
during a step.

Suggested settings: the defaults with Adam at 1e-3. It helps most where inputs are correlated and nothing normalises
them: multilayer perceptrons, networks without BatchNorm.

Reference:
    Dalm, Offergeld, Ahmad, van Gerven. *Efficient Deep Learning with Decorrelated Backpropagation.* arXiv 2405.02385.
"""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

from retrograde.engine.slots import Method, Rule, Site
from retrograde.errors import OptionError, check_option, check_steps
from retrograde.methods.decorrelate_rules import FullRule, LowRankRule, PreconditionRule, Settings

_LR = 0.5
_MAX_OVERHEAD = 0.15
_LONGEST = 16
_POWER = 1.0
_ONLY_IN = {"kappa": "full", "variant": "full", "lr": "full", "power": "precondition"}


@dataclass(frozen=True)
class Decorrelate(Method):
    """Decorrelated backpropagation; `retrograde methods decorrelate` prints its equations, cost and source.

    Args:
        mode: ``"lowrank"`` transforms the leading directions of the input, ``"full"`` learns the whole matrix (only for
            narrow layers), ``"precondition"`` transforms gradients alone.
        rank: k, leading directions; more than d counts as d. None takes, in each layer, as many as `max_overhead`
            allows, 4 to 32. Not in full mode.
        max_overhead: share of a layer's own work, by operations, that the method may add; without `rank`.
        every: T, steps between updates of R.
        longest: steps between them once they find nothing new; None is 16 T. Not in full mode.
        kappa: κ of full mode: 0 decorrelates alone, 0.5 whitens, 1 brings variances to 1 alone.
        lr: of R in full mode, relative to 1/λ_max, in (0, 0.5]; None is 0.5.
        variant: the rule of full mode, ``"published"`` or ``"normalized"``.
        damping: c in mean eigenvalues, 0 or more. Not in full mode.
        power: p of precondition mode, 0.5 or 1; None is 1.
        rows: sampled rows (patches) for each update.
        until: stop updating R after so many steps, or this share of the run; None never stops.

    Raises:
        OptionError: a value out of its range, or an option that has no effect in this mode.

    Examples:
        >>> session = rg.attach(model, rg.Decorrelate())
    """

    name: ClassVar[str] = "decorrelate"
    adjustable: ClassVar[Collection[str]] = ("damping", "kappa", "lr", "power")
    shares: ClassVar[Collection[str]] = ("until",)

    mode: Literal["lowrank", "full", "precondition"] = "lowrank"
    rank: int | None = None
    max_overhead: float = _MAX_OVERHEAD
    every: int = 32
    longest: int | None = None
    kappa: float = 0.5
    lr: float | None = None
    variant: Literal["published", "normalized"] = "published"
    damping: float = 0.1
    power: float | None = None
    rows: int = 1024
    until: int | float | None = None

    def __post_init__(self) -> None:
        check_option(
            self,
            "mode",
            self.mode in ("lowrank", "full", "precondition"),
            "'lowrank', 'full' or 'precondition'",
        )
        check_option(self, "rank", self.rank is None or self.rank >= 1, "1 or more")
        share = math.isfinite(self.max_overhead) and self.max_overhead > 0
        check_option(self, "max_overhead", share, "a finite number above 0")
        check_option(self, "every", self.every >= 1, "1 or more")
        slow = self.longest is None or self.longest >= self.every
        check_option(self, "longest", slow, f"{self.every} or more, as `every` is")
        check_option(self, "rows", self.rows >= 2, "2 or more")
        check_option(self, "kappa", 0 <= self.kappa <= 1, "between 0 and 1")
        check_option(self, "lr", self.lr is None or 0 < self.lr <= 0.5, "above 0 and at most 0.5")
        check_option(
            self, "variant", self.variant in ("published", "normalized"), "'published' or 'normalized'"
        )
        check_option(
            self, "damping", math.isfinite(self.damping) and self.damping >= 0, "a finite number, 0 or more"
        )
        check_option(self, "power", self.power in (None, 0.5, 1), "0.5 or 1")
        if self.until is not None:
            check_steps(self, "until")
            check_option(self, "until", self.until > 0, "1 step or more: R would never be learnt")
        self._refuse_idle_options()

    def _refuse_idle_options(self) -> None:
        for field in dataclasses.fields(self):
            home = _ONLY_IN.get(field.name)
            idle = home not in (None, self.mode) or (
                self.mode == "full" and field.name in ("rank", "damping", "max_overhead", "longest")
            )
            if idle and getattr(self, field.name) != field.default:
                raise OptionError(
                    f"Decorrelate: {field.name}={getattr(self, field.name)!r} has no effect in mode={self.mode!r}. "
                    "Leave it out, or choose another mode."
                )
        if self.rank is not None and self.max_overhead != _MAX_OVERHEAD:
            raise OptionError(
                f"Decorrelate: max_overhead={self.max_overhead!r} has no effect beside rank={self.rank}, which says "
                "what is spent. Leave one of them out."
            )

    def make_rule(self, site: Site) -> Rule | str:
        """Every linear or convolutional layer that owns a trained weight alone."""
        if site.weight is None:
            return "its weight is computed in every forward pass, so no optimizer step belongs to it"
        if site.tied:
            return "its weight is shared with another layer, whose input needs an R of its own"
        if not site.weight.requires_grad:
            return "weight frozen: nothing is learnt from its input"
        kinds = {"lowrank": LowRankRule, "full": FullRule, "precondition": PreconditionRule}
        return kinds[self.mode](site.name, self.settings())

    def settings(self) -> Settings:
        """The options with their defaults filled in."""
        lr = _LR if self.lr is None else self.lr
        power = _POWER if self.power is None else self.power
        return Settings(
            rank=self.rank,
            max_overhead=self.max_overhead,
            every=self.every,
            longest=_LONGEST * self.every if self.longest is None else self.longest,
            kappa=self.kappa,
            lr=lr,
            variant=self.variant,
            damping=self.damping,
            power=power,
            rows=self.rows,
            until=None if self.until is None else int(self.until),
        )

r"""DeepFocus: each block's backward pass is skipped, run in low precision or run in full, by how large its error is.

A block is a residual branch, or, where there is none, a single linear or convolutional layer (a *chain*). Its error is
the gradient δ at its output, seen before any of its backward work:

    e = ‖δ‖_F / √numel,   m = EMA(e, 0.98),   r = e/m                       (1)
    r < α → SKIP,   α ≤ r < β → LOW,   r ≥ β → FULL                         (2)
    α ← α·exp(h (q_skip − 1[r < α]))                                        (3)
    β ← β·exp(h ((1 − q_full) − 1[r < β])),   α ≤ 0.95 β                    (4)
    probe: run anyway with probability p = clip(r/α, p_min, p_max)          (5)
    unbiased: a probed block's gradient is multiplied by 1/p                (6)

SKIP at a branch drops its whole backward pass; in a chain dx and db are computed and dW is not. LOW rounds both
operands of dx and of dW, stochastically, to int8 (step = peak/127) or to bfloat16, and accumulates in the layer's own
precision or in int32. Large int8 products of linear layers run on whichever kernel is fastest; those of convolutions
and of bfloat16 are emulated: counted at the precision's discount, they take no less time. A probed block
runs in LOW, as r < β. Parameters whose every call in a step was skipped get no gradient at all, so neither momentum nor
weight decay moves them.

With ``unbiased=True`` the expected gradient is exactly the dense one (SKIP, probe and LOW are unbiased given δ, and δ
enters linearly), unless gradients are clipped afterwards. Without it the skipped part is missing: a regulariser.

Choices of this implementation: r is measured against the m of the steps before, and α, β and m move once after every
step, by the mean over the step's calls (gradient accumulation). With q_skip = 0 nothing is skipped and with q_full = 1
everything is full, exactly. A non-finite δ runs in full, and counts (`fallbacks`). Under data parallelism e² is
averaged over the ranks, and rank 0's probe counts for all. The first and the last block are never skipped: they run in
LOW instead. ``p_max`` (not in the description) bounds the probe: r/α is mostly near 1, so that with ``p_max=1`` far
fewer calls are really skipped than q_skip says. ``controller="random"`` puts a uniform random number in place of r
(with α = q_skip, β = 1 − q_full): the control experiment for whether the error tells anything.

Cost for each entry of a block's δ: 2 operations, and one small number for the host at each call (on a GPU, a
synchronisation). LOW, for each entry of δ, W and x: about 28 operations. Compiled with ``fullgraph``, a skipped branch
saves the products of its attached layers; norms, activations and attention products still run, on zeros.

Suggested settings: the defaults; ``warmup`` about 5 % of the steps; ``p_max=0.05`` where speed matters most;
``unbiased=True`` with ``p_min`` of 0.2 and more, else rare large gradients.

Reference: an independent design from the published idea of DeepFocus-BP (C. Fernandes: skip, low and full precision by
error magnitude, stochastic probing, adaptive α and β). Related: Wang et al., *Efficient backpropagation with
variance-controlled adaptive sampling* (VCAS), ICLR 2024, arXiv 2402.17227; Huang et al., *Deep networks with stochastic
depth*, ECCV 2016.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from retrograde.engine import ranks
from retrograde.engine.branches import find_branches
from retrograde.engine.slots import Block, BlockCall, BlockRule, Call, Grant, Method, Rule, Site, Tier
from retrograde.errors import OptionError, check_option, check_steps
from retrograde.kernels import dispatch
from retrograde.kernels.delta import Delta
from retrograde.kernels.int8 import Quantised
from retrograde.maths import deepfocus as maths
from retrograde.maths.philox import mix_key, numbers

_FLOPS_PER_ENTRY = 2
"""Overhead of the error: one square, one sum."""

_ROUNDING_FLOPS = 28
"""Overhead of LOW for each rounded entry: peak, scaling, rounding and noise, as for dithering."""

_CEILING = 0.95
_START = (0.95, 1.05)
_DELTA, _WEIGHT, _SAVED = range(3)


@dataclass(frozen=True)
class DeepFocus(Method):
    """Routing of blocks to SKIP, LOW or FULL by their error.

    `retrograde methods deepfocus` prints its equations, cost and source.

    Args:
        q_skip: share of calls that should fall below α.
        q_full: share of calls that should reach β.
        p_min: smallest probability that a block to be skipped runs anyway, in (0, 1].
        h: step of the threshold tracking.
        warmup: steps with everything FULL while the thresholds settle, or their share of the run; 0.05 suits most.
        unbiased: scale probed gradients by 1/p.
        low: what LOW rounds to; None runs LOW in full precision.
        blocks: glob patterns that name the residual branches; None finds them (see `retrograde.engine.branches`).
        momentum: of the running mean m.
        controller: ``"quantile"`` routes by error, ``"random"`` at random, at the same rates.
        p_max: largest probability of a probe.

    Raises:
        OptionError: a value out of its range.

    Examples:
        >>> session = rg.attach(model, rg.DeepFocus(q_skip=0.6, unbiased=True))
    """

    name: ClassVar[str] = "deepfocus"
    adjustable: ClassVar[Collection[str]] = ("q_skip", "q_full", "p_min", "p_max", "h", "low", "unbiased")
    shares: ClassVar[Collection[str]] = ("warmup",)
    short_run: ClassVar[Mapping[str, Any]] = {"warmup": 40}
    forecast_note: ClassVar[str] = (
        "deepfocus: only those calls of a block count as skipped that `p_max` leaves no probe; training decides on "
        "others. What lies between the layers of a skipped block is not counted as saved."
    )

    q_skip: float = 0.5
    q_full: float = 0.2
    p_min: float = 0.05
    h: float = 0.03
    warmup: int | float = 100
    unbiased: bool = False
    low: Literal["int8", "bfloat16"] | None = "int8"
    blocks: tuple[str, ...] | None = None
    momentum: float = 0.98
    controller: Literal["quantile", "random"] = "quantile"
    p_max: float = 1.0

    def __post_init__(self) -> None:
        for name in ("q_skip", "q_full"):
            check_option(self, name, 0 <= getattr(self, name) <= 1, "a share, 0 to 1")
        if self.q_skip + self.q_full > 1:
            raise OptionError(
                f"DeepFocus: q_skip={self.q_skip} and q_full={self.q_full} are shares of the same calls and must not "
                "add up to more than 1."
            )
        if not 0 < self.p_min <= self.p_max <= 1:
            raise OptionError(
                f"DeepFocus: p_min={self.p_min} and p_max={self.p_max} must be probabilities, 0 < p_min ≤ p_max ≤ 1: "
                "without a probe a skipped block would never run again."
            )
        check_option(self, "h", math.isfinite(self.h) and self.h >= 0, "a finite number, 0 or more")
        check_steps(self, "warmup")
        check_option(self, "momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        check_option(self, "low", self.low in ("int8", "bfloat16", None), "'int8', 'bfloat16' or None")
        check_option(self, "controller", self.controller in ("quantile", "random"), "'quantile' or 'random'")
        if isinstance(self.blocks, str):
            object.__setattr__(self, "blocks", (self.blocks,))
        elif self.blocks is not None:
            object.__setattr__(self, "blocks", tuple(self.blocks))

    def branches(self, model: nn.Module) -> Sequence[Block]:
        """The residual branches, found or named."""
        return find_branches(model, self.blocks)

    def block_rules(self, blocks: Sequence[Block]) -> Sequence[BlockRule]:
        """One router for each block; the first and the last are never skipped."""
        ends = (0, len(blocks) - 1)
        return [_Router(self, may_skip=position not in ends) for position in range(len(blocks))]

    def make_rule(self, site: Site) -> Rule:
        """Every linear-like layer can run in LOW."""
        return _LowPrecision(site.name, self)


class _Router(BlockRule):
    """Equations (1) to (6) for one block."""

    def __init__(self, method: DeepFocus, *, may_skip: bool) -> None:
        self._method = method
        self._may_skip = may_skip
        if method.controller == "random":
            self._alpha, self._beta = method.q_skip, 1 - method.q_full
        else:
            self._alpha = _START[0] if method.q_skip else 0.0
            self._beta = _START[1] if method.q_full < 1 else 0.0
        self._mean: float | None = None
        self._ratio = 0.0
        self._probes = 0
        # Of this step: calls, sum of e, calls with r < α, calls with r < β.
        self._calls, self._errors, self._below_alpha, self._below_beta = 0, 0.0, 0, 0

    def adjust(self, method: Method) -> None:
        assert isinstance(method, DeepFocus)
        if method.controller == "random":
            self._alpha, self._beta = method.q_skip, 1 - method.q_full
        self._method = method

    def gate(self, call: BlockCall) -> Grant:
        method = self._method
        if not call.delta.numel():
            return Grant(Tier.FULL)
        call.counters.overhead += _FLOPS_PER_ENTRY * call.delta.numel()
        error, ratio, u = self._measure(call)
        if not math.isfinite(error):
            call.counters.fallbacks += 1
            return Grant(Tier.FULL)
        if method.controller == "quantile":
            ratio = error / self._mean if self._mean else math.inf
        self._ratio = ratio
        self._calls += 1
        self._errors += error
        self._below_alpha += ratio < self._alpha
        # With q_full = 0 nothing is full, however large.
        low = ratio < self._beta or method.q_full == 0
        self._below_beta += ratio < self._beta
        if call.step < method.warmup or self._mean is None:
            return Grant(Tier.FULL)
        if ratio >= self._alpha or not (self._may_skip and call.may_skip):
            return Grant(Tier.LOW if low else Tier.FULL)
        p = maths.probe_probability(ratio, self._alpha, method.p_min, method.p_max)
        if u >= p:
            return Grant(Tier.SKIP)
        self._probes += 1
        return Grant(Tier.LOW if low else Tier.FULL, 1 / p if method.unbiased else 1.0)

    def _measure(self, call: BlockCall) -> tuple[float, float, float]:
        """e, and two uniform numbers; the same on all ranks."""
        square, drawn = maths.mean_square(call.delta), numbers(call.key, 2)
        if ranks.count() > 1:
            # The mean over ranks of (e², n·u on rank 0 and 0 elsewhere): seeds may differ, decisions may not.
            noise = square.new_tensor(drawn) * (ranks.count() if ranks.rank() == 0 else 0)
            square, *drawn = ranks.mean(torch.cat([square.reshape(1), noise])).tolist()
        error = float(square)
        return math.sqrt(error) if error >= 0 else math.nan, drawn[0], drawn[1]

    def local(self) -> None:
        """Equations (3) and (4), then m."""
        if not self._calls:
            return
        method, calls = self._method, self._calls
        if method.controller == "quantile" and self._mean is not None:
            if method.q_full < 1:
                share = self._below_beta / calls
                self._beta = maths.track(self._beta, 1 - method.q_full, share, method.h)
            if method.q_skip:
                self._alpha = maths.track(self._alpha, method.q_skip, self._below_alpha / calls, method.h)
                self._alpha = min(self._alpha, _CEILING * self._beta)
        error = self._errors / calls
        before = error if self._mean is None else self._mean
        self._mean = method.momentum * before + (1 - method.momentum) * error
        self._calls, self._errors, self._below_alpha, self._below_beta = 0, 0.0, 0, 0

    def shares(self) -> Mapping[Tier, float]:
        """By the quantiles. Of the calls below α routing at random skips a known share, by error at least 1 − p_max."""
        method = self._method
        skipped = method.q_skip * (1 - method.p_max)
        if method.controller == "random":
            skipped = maths.skip_share(method.q_skip, method.p_min, method.p_max)
        skipped = skipped if self._may_skip else 0.0
        full = method.q_full
        return {Tier.SKIP: skipped, Tier.LOW: max(0.0, 1 - full - skipped), Tier.FULL: full}

    def metrics(self) -> dict[str, float]:
        """Thresholds, running mean of e, last r, and probes so far."""
        return {
            "alpha": self._alpha,
            "beta": self._beta,
            "error": self._mean or 0.0,
            "ratio": self._ratio if math.isfinite(self._ratio) else 0.0,
            "probes": self._probes,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "alpha": self._alpha,
            "beta": self._beta,
            "mean": self._mean,
            "ratio": self._ratio,
            "probes": self._probes,
            "step": [self._calls, self._errors, self._below_alpha, self._below_beta],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._alpha, self._beta, self._ratio = (float(state[name]) for name in ("alpha", "beta", "ratio"))
        self._mean = None if state["mean"] is None else float(state["mean"])
        self._probes = int(state["probes"])
        self._calls, self._errors, self._below_alpha, self._below_beta = state["step"]


class _LowPrecision(Rule):
    """What LOW means at one layer: δ and the other operands of both products rounded without bias.

    Where another method has made levels of δ, they stay: one quantiser is enough.
    """

    precedence = 1

    def __init__(self, name: str, method: DeepFocus) -> None:
        super().__init__(name)
        self._low = method.low

    def adjust(self, method: Method) -> None:
        assert isinstance(method, DeepFocus)
        self._low = method.low

    def delta(self, call: Call, delta: Delta) -> Delta:
        if call.tier is not Tier.LOW or self._low is None or not delta.values.numel():
            return delta
        rounded = delta
        if not delta.quantised:
            rounded = self._rounded(call, delta, _DELTA)
            if rounded is delta:
                return delta
        if call.needs.input and call.low_weight is None:
            call.low_weight = self._operand(call, call.map.factor(call.weight), _WEIGHT)
        if call.needs.weight and call.low_input is None:
            call.low_input = self._operand(call, call.saved[0], _SAVED)
        call.rounded = self._low
        return rounded

    def _operand(self, call: Call, x: torch.Tensor, which: int) -> torch.Tensor | Quantised:
        """An operand as it was rounded: in 8 bits where kernels can take it so, which only those of the CPU do."""
        rounded = self._rounded(call, Delta(x), which)
        if not call.map.plain_rows or rounded.step is None:
            return rounded.dense(x.dtype)
        levels = rounded.values.reshape(-1, x.shape[-1])
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale = torch.full((x.shape[-1],), rounded.step, dtype=wide, device=x.device)
        return Quantised(levels, scale, x.dtype)

    def _rounded(self, call: Call, exact: Delta, which: int) -> Delta:
        """What is all zeros, or not finite, comes back as it is: on a GPU as a copy, since the host does not know."""
        key, values = mix_key(call.key, which), exact.values
        if not values.numel():
            return exact
        call.spend(_ROUNDING_FLOPS * values.numel())
        if self._low == "bfloat16":
            return Delta(maths.round_to_bfloat16(values, key))
        return dispatch.dithered(exact, 0.0, 8, key, small=False, constant=True).delta

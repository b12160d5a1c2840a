r"""VCAS: unbiased sampling of examples in the backward pass, as few as leave the gradient's variance nearly alone.

At every linear or convolutional layer l with a batch of B examples (δ_i: all of example i's part of δ):

    δ̃_i = (m_i/p_i) δ_i,  m_i ~ Bernoulli(p_i),  p_i = min(1, c‖δ_i‖),  Σ p_i = ρ_l B       (1)   travels further down
    dW = Σ_r (n_r/q_r) δ̃_r x_rᵀ,  n_r ~ Bernoulli(q_r),  q_r = min(1, c'‖δ̃_r‖‖x_r‖),
         Σ q_r = ν_l · (rows of δ̃ that are not zero)                                        (2)   linear layers only

Every F steps, with `every` = F and g_i example i's part of dW, one step measures and adapts:

    V_s = B/(B−1) (Σ_i ‖g_i‖² − ‖Σ_i g_i‖²/B)                                               (3)   SGD's own variance
    V_act = Σ_i (1 − p_i)/p_i ‖g_i‖²                                                        (4)   what (1) adds
    V_w = Σ_r (1 − q_r)/q_r ‖δ_r‖²‖x_r‖²                                                    (5)   what (2) adds
    s ← s − α  if Σ_l V_act < τ Σ_l V_s, else s + α,  in [0, 1]                             (6)   one s for the model
    ρ_l = max_{j ≤ l} min{n/B: the n largest ‖δ_i‖ of layer j have s of their sum}          (7)
    ν_l ← ν_l β  if V_w < τ V_s of the layer, else ν_l/β,  at most 1                         (8)

With ρ = ν = 1 nothing is sampled: that is the start.

Deviations from the paper: it measures by M = 2 exact passes and M² sampled ones beside the training steps, which a
layer cannot ask for. Here the measuring step itself trains without sampling, and (3) to (5) are computed from its exact
δ: V_s within the batch; V_act as if the layers behind sampled with the same p_i (true where the ‖δ_i‖ of the layers are
proportional); V_w without what (1) adds to it. The paper samples activation gradients between blocks, (1) at each
attached layer. db sums the δ that arrived. Ranks decide for themselves.

Cost: norms, 2 operations for each entry of δ and, where (2) samples, of δ̃ and x; in measuring steps one more dW.

Reference:
    Wang, Chen, Zhu. *Efficient backpropagation with variance-controlled adaptive sampling.* ICLR 2024,
    arXiv 2402.17227.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from retrograde.engine.maps.base import Map
from retrograde.engine.slots import Call, Conductor, Method, Rule, Site
from retrograde.kernels.delta import Delta
from retrograde.kernels.dispatch import Products
from retrograde.kernels.work import Work
from retrograde.lab.peers.base import Peer
from retrograde.lab.peers.constant_dither import count_examples
from retrograde.maths.philox import mix_key, uniform

_WEIGHT_NOISE = 1
_SMALLEST_RATIO = 0.01
"""Of ν: below it nothing is left to save."""


@dataclass(frozen=True)
class Vcas(Peer, Method):
    """VCAS (module docstring: equations, deviations, source).

    Args:
        tau: τ, extra variance that is allowed for (1), and again for (2), as a share of SGD's own.
        every: F, steps between measurements.
        alpha: α, step of s.
        beta: β, factor on ν.
    """

    name: ClassVar[str] = "vcas"

    tau: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.025
    every: PositiveInt = 100
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.01
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.95

    def make_rule(self, site: Site) -> Rule:
        """Every linear-like layer."""
        return (_LinearRule if site.map.plain_rows else VcasRule)(site.name, self)

    def conductor(self, model: nn.Module, rules: Mapping[str, Rule]) -> Conductor:
        """Equations (6) and (7)."""
        return _Controller(self, [rule for rule in rules.values() if isinstance(rule, VcasRule)])


def keep_probabilities(norms: Tensor, total: float) -> Tensor:
    """``p = min(1, c · norm)`` with the c for which Σp = `total`.

    Args:
        norms: (n,), 0 or more.
        total: expected number to keep; where no more than so many are above 0, all of these are kept.

    Returns:
        (n,) float64; 0 where the norm is.
    """
    norms = norms.double()
    if int((norms > 0).sum()) <= total:
        return (norms > 0).double()
    ordered = norms.sort(descending=True).values
    # With the m largest kept for certain, the others share what is left: c_m; the least m with c_m · next ≤ 1 is it.
    rest = ordered.flip(0).cumsum(0).flip(0)
    certain = torch.arange(len(norms), dtype=norms.dtype, device=norms.device)
    c = (total - certain) / rest
    first = (c * ordered <= 1).nonzero()[0]
    return (c[first] * norms).clamp_max(1.0)


def sparsity(norms: Tensor, s: float) -> float:
    """Equation (7) for one layer: the least share of the examples that has `s` of the sum of norms, (n,) → (0, 1]."""
    ordered = norms.double().sort(descending=True).values.cumsum(0)
    if s >= 1 or float(ordered[-1]) == 0:
        return 1.0
    return min(1.0, (int((ordered < s * ordered[-1]).sum()) + 1) / len(norms))


class VcasRule(Rule):
    """Equation (1), and in measuring steps (3) and (4).

    Attributes:
        measuring: whether this step is exact and measured.
        keep: ρ_l.
        norms: ‖δ_i‖ of the last measured call; None before it, and once it was used.
        own: V_s of the step so far.
        added: V_act of the step so far.
    """

    def __init__(self, name: str, method: Vcas) -> None:
        super().__init__(name)
        self._method = method
        self.measuring = True
        self.keep = 1.0
        self.norms: Tensor | None = None
        self.own = self.added = 0.0

    def delta(self, call: Call, delta: Delta) -> Delta:
        """Equation (1)."""
        examples = count_examples(call)
        if delta.step is not None or examples < 2 or not (self.measuring or self.keep < 1):
            return delta
        norms = torch.linalg.vector_norm(delta.values.flatten(1).float(), dim=1)
        call.spend(2.0 * delta.values.numel())
        if not bool(torch.isfinite(norms).all()):
            call.counters.fallbacks += 1
            return delta
        if self.measuring:
            if call.needs.weight:
                self._measure(call, norms)
            return delta
        p = keep_probabilities(norms, self.keep * examples)
        kept = uniform(call.key, p.shape, p.device) < p
        factor = torch.where(kept, 1 / p, 0.0).to(delta.values.dtype)
        sampled = Delta(delta.values * factor.view(-1, *[1] * (delta.values.dim() - 1)))
        # The share of zeros differs from call to call: no count can stand for the next.
        sampled.count()
        return sampled

    def _measure(self, call: Call, norms: Tensor) -> None:
        """Equations (3) and (4)."""
        squares, whole = _example_gradients(call, norms)
        p = keep_probabilities(norms, self.keep * len(norms))
        alive = p > 0
        self.own += _sgd_variance(squares, whole)
        self.added += float(((1 / p[alive] - 1) * squares[alive]).sum())
        self.norms = norms

    def clear(self) -> None:
        """Begin a new measurement."""
        self.norms, self.own, self.added = None, 0.0, 0.0

    def metrics(self) -> dict[str, float]:
        """ρ."""
        return {"keep": self.keep}

    def state_dict(self) -> dict[str, Any]:
        """The same."""
        return self.metrics()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.keep = float(state["keep"])


class _LinearRule(VcasRule):
    """Equations (2), (5) and (8) too."""

    def __init__(self, name: str, method: Vcas) -> None:
        super().__init__(name, method)
        self._rows_kept = 1.0
        self._weight_added = 0.0

    def _measure(self, call: Call, norms: Tensor) -> None:
        super()._measure(call, norms)
        leverage = _leverage(call.delta, call.saved[0])
        q = keep_probabilities(leverage, self._rows_kept * int((leverage > 0).sum()))
        alive = q > 0
        self._weight_added += float(((1 / q[alive] - 1) * leverage[alive].square()).sum())

    def clear(self) -> None:
        """Equation (8)."""
        if self.norms is not None:
            less = self._weight_added < self._method.tau * self.own
            changed = self._rows_kept * self._method.beta if less else self._rows_kept / self._method.beta
            self._rows_kept = min(max(changed, _SMALLEST_RATIO), 1.0)
        self._weight_added = 0.0
        super().clear()

    def save(self, x: Tensor, weight: Tensor, map: Map) -> tuple[Tensor, ...]:
        """x itself."""
        return (x,)

    def product(self, call: Call, delta: Delta) -> Work:
        """Equation (2), as a product of the rows that are kept."""
        x = call.saved[0]
        if self.measuring or self._rows_kept >= 1 or delta.step is not None or call.delta.dim() == 1:
            return call.map.weight_grad(call.products, call.operand, call.weight)
        call.spend(2.0 * (delta.values.numel() + x.numel()))
        leverage = _leverage(delta.values, x)
        if not bool(torch.isfinite(leverage).all()):
            return call.map.weight_grad(call.products, call.operand, call.weight)
        q = keep_probabilities(leverage, self._rows_kept * int((leverage > 0).sum()))
        chosen = (uniform(mix_key(call.key, _WEIGHT_NOISE), q.shape, q.device) < q).nonzero().flatten()
        rows = _rows(delta.values)[chosen] / q[chosen].unsqueeze(1).to(delta.values.dtype)
        return call.map.weight_grad(Products(Delta(rows), wanted=1), _rows(x)[chosen], call.weight)

    def metrics(self) -> dict[str, float]:
        """ρ and ν."""
        return {**super().metrics(), "keep_rows": self._rows_kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        super().load_state_dict(state)
        self._rows_kept = float(state["keep_rows"])


class _Controller(Conductor):
    """Equations (6) and (7) for the whole model; rules come in the model's order."""

    def __init__(self, method: Vcas, rules: list[VcasRule]) -> None:
        self._method, self._rules = method, rules
        self._share = 1.0
        self._steps = 0

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Adapt where this step has measured, and say whether the next one does."""
        if self._steps % self._method.every == 0:
            self._adapt()
        self._steps += 1
        self._announce()

    def _adapt(self) -> None:
        measured = [rule for rule in self._rules if rule.norms is not None]
        if measured:
            less = sum(r.added for r in measured) < self._method.tau * sum(r.own for r in measured)
            changed = self._share - self._method.alpha if less else self._share + self._method.alpha
            self._share = min(max(changed, 0.0), 1.0)
        keep = 0.0
        for rule in measured:
            assert rule.norms is not None
            keep = max(keep, sparsity(rule.norms, self._share))
            rule.keep = keep
            rule.clear()

    def _announce(self) -> None:
        for rule in self._rules:
            rule.measuring = self._steps % self._method.every == 0

    def metrics(self) -> dict[str, Any]:
        """s."""
        return {"s": self._share}

    def state_dict(self) -> dict[str, Any]:
        return {"s": self._share, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._share, self._steps = float(state["s"]), int(state["steps"])
        self._announce()


def _example_gradients(call: Call, norms: Tensor) -> tuple[Tensor, float]:
    """‖g_i‖² of each example, (B,), and ‖Σ g_i‖²; one dW more, which is counted."""
    delta, x = call.delta, call.saved[0]
    call.spend(call.map.flops(call.input_shape, call.weight.shape, delta.shape))
    if delta.dim() == 2:
        squares = norms.double().square() * x.double().square().sum(1)
        return squares, float((delta.mT.float() @ x.float()).double().square().sum())
    total = torch.zeros_like(call.weight, dtype=torch.float64)
    squares = norms.new_zeros(len(norms), dtype=torch.float64)
    for i in range(len(norms)):
        products = Products(Delta(delta[i : i + 1]), wanted=1)
        found = call.map.weight_grad(products, x[i : i + 1], call.weight).value.double()
        squares[i] = found.square().sum()
        total += found
    return squares, float(total.square().sum())


def _sgd_variance(squares: Tensor, whole: float) -> float:
    """Equation (3)."""
    b = len(squares)
    return max(b / (b - 1) * (float(squares.sum()) - whole / b), 0.0)


def _leverage(delta: Tensor, x: Tensor) -> Tensor:
    """``‖δ_r‖ ‖x_r‖`` of each row."""
    return torch.linalg.vector_norm(_rows(delta).float(), dim=1) * torch.linalg.vector_norm(
        _rows(x).float(), dim=1
    )


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
